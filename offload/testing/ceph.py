"""A real Ceph cluster of one monitor, one OSD and one manager on loopback, its data in memory.

With authentication: `client.admin`, `client.offload` with the capabilities that the documents ask
for, and `client.lookout`, who may see no data. All files are in one folder; it is up in a few
seconds. Its servers may be stopped for a while (SIGSTOP): an OSD that missed its heartbeats' grace
would, without others, not answer again.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import UnavailableError
from offload.procs import ProcessRef, ref_of
from offload.run import require_program, run, spawn, terminate

POOL = "vms"
USER = "client.offload"
_START_S = 120.0
_CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}
admin socket =
pid file =
log file =
mon data = {folder}/mon
mgr data = {folder}/mgr
osd data = {folder}/osd
mon data avail warn = 0
mon data avail crit = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
paxos propose interval = 0.01
paxos min wait = 0.001
mgr tick period = 1
mgr stats period = 1
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd heartbeat grace = 600
osd class load list = {classes}
osd class default list = {classes}
[client]
rbd discard granularity bytes = 4096
rbd skip partial discard = false
"""
_FORGET_WATCHERS = "[osd]\nosd client watch timeout = 3\n"  # tests of killed readers wait for it
_KEYRING = """\
[mon.]
 key = {mon}
 caps mon = "allow *"
[osd.0]
 key = {osd}
 caps mon = "allow profile osd"
 caps mgr = "allow profile osd"
 caps osd = "allow *"
[mgr.a]
 key = {mgr}
 caps mon = "allow profile mgr"
 caps osd = "allow *"
[client.admin]
 key = {admin}
 caps mon = "allow *"
 caps osd = "allow *"
 caps mgr = "allow *"
[client.lookout]
 key = {lookout}
 caps mon = "allow r"
[client.offload]
 key = {offload}
 caps mon = "profile rbd"
 caps osd = "profile rbd pool=vms"
[client.rgw]
 key = {rgw}
 caps mon = "allow rw"
 caps osd = "allow rwx"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCeph:
    """`conf` leads to the cluster; it has one pool, `vms`."""

    conf: Path
    fsid: str
    mon: ProcessRef
    osd: ProcessRef

    @contextmanager
    def pool(self, pool: str = POOL, namespace: str = "") -> Iterator[Any]:
        """A rados.Ioctx as the administrator."""
        import rados

        handle = rados.Rados(name="client.admin", conffile=str(self.conf))
        handle.connect(timeout=_START_S)
        try:
            context = handle.open_ioctx(pool)
            context.set_namespace(namespace)
            yield context
            context.close()
        finally:
            handle.shutdown()


@contextmanager
def running_ceph(folder: Path, memory_bytes: int = 2 << 30) -> Iterator[RunningCeph]:
    """A cluster for the block. `folder` is made; what is stored takes real memory."""
    with ExitStack() as stack:
        cluster = stack.enter_context(
            running_cluster(
                folder, memory_bytes=memory_bytes, classes="lock rbd", more_conf=_FORGET_WATCHERS
            )
        )
        start_daemon(stack, folder, cluster.conf, "ceph-mgr", "mgr.a")
        _wait_until_usable(cluster.conf)
        yield cluster


@contextmanager
def running_cluster(
    folder: Path, *, memory_bytes: int, classes: str, more_conf: str = ""
) -> Iterator[RunningCeph]:
    """A monitor and an OSD alone, without a pool. `classes` are those that the OSD may load."""
    folder.mkdir(parents=True, mode=0o700)
    fsid, port = str(uuid.uuid4()), free_port()
    names = ("mon", "osd", "mgr", "admin", "lookout", "offload", "rgw")
    keys = {name: _new_key() for name in names}
    conf = folder / "ceph.conf"
    text = _CONF.format(
        fsid=fsid, port=port, folder=folder, memory_bytes=memory_bytes, classes=classes
    )
    conf.write_text(text + more_conf)
    _write_private(folder / "keyring", _KEYRING.format(**keys))
    for name in ("mgr", "osd"):
        (folder / name).mkdir()
    with ExitStack() as stack:
        mon = _start_mon(stack, folder, conf, fsid, port)
        osd = _start_osd(stack, folder, conf, keys["osd"])
        yield RunningCeph(conf=conf, fsid=fsid, mon=mon, osd=osd)


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _new_key() -> str:
    program = require_program("ceph-authtool", "ceph-common")
    return run([program, "--gen-print-key"]).stdout.strip()


def _write_private(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as out:
        out.write(text)


def _start_mon(stack: ExitStack, folder: Path, conf: Path, fsid: str, port: int) -> ProcessRef:
    monmap = str(folder / "monmap")
    address = f"[v2:127.0.0.1:{port}]"
    program = require_program("monmaptool", "ceph-common")
    run([program, "--create", "--fsid", fsid, "--addv", "a", address, monmap])
    mon = require_program("ceph-mon", "ceph-mon")
    keyring = str(folder / "keyring")
    run([mon, "-c", str(conf), "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring])
    return start_daemon(stack, folder, conf, "ceph-mon", "mon.a")


def _start_osd(stack: ExitStack, folder: Path, conf: Path, key: str) -> ProcessRef:
    name = str(uuid.uuid4())
    order = {"prefix": "osd new", "uuid": name}
    _order(conf, order, json.dumps({"cephx_secret": key}).encode())
    osd = require_program("ceph-osd", "ceph-osd")
    run([osd, "-c", str(conf), "-i", "0", "--mkfs", "--osd-uuid", name])
    return start_daemon(stack, folder, conf, "ceph-osd", "osd.0")


def start_daemon(stack: ExitStack, folder: Path, conf: Path, program: str, name: str) -> ProcessRef:
    """In the foreground; ends with the stack, or with the calling thread."""
    log = os.open(folder / f"{program}.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        argv = [require_program("setpriv", "util-linux"), "--pdeathsig", "KILL"]
        argv += [require_program(program, program), "-c", str(conf), "-n", name, "-f"]
        process = spawn(argv, stdout=log, stderr=log)
    finally:
        os.close(log)
    stack.callback(_end, process)
    ref = ref_of(process.pid)
    if ref is None:
        raise UnavailableError(f"{program} ended at once; see {folder / program}.log")
    return ref


def _end(process: subprocess.Popen[bytes]) -> None:
    terminate(process, grace_s=1.0)  # its data is in memory: there is nothing to save


def _order(conf: Path, order: dict[str, Any], data: bytes = b"") -> bytes:
    """A command to the monitors, as the administrator."""
    import rados

    handle = rados.Rados(name="client.admin", conffile=str(conf))
    handle.connect(timeout=_START_S)
    try:
        status, answer, words = handle.mon_command(json.dumps(order), data, timeout=_START_S)
    finally:
        handle.shutdown()
    if status != 0:
        raise UnavailableError(f"the test cluster refused {order['prefix']}: {words}")
    result: bytes = answer
    return result


def _wait_until_usable(conf: Path) -> None:
    """A pool that can be written to, and word of its space from the manager."""
    import rados
    import rbd

    _order(conf, {"prefix": "osd pool create", "pool": POOL, "pg_num": 8})
    handle = rados.Rados(name="client.admin", conffile=str(conf))
    handle.connect(timeout=_START_S)
    try:
        with handle.open_ioctx(POOL) as pool:
            rbd.RBD().pool_init(pool, force=True)
    finally:
        handle.shutdown()
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        answer = json.loads(_order(conf, {"prefix": "df", "format": "json"}))
        if any(p["name"] == POOL and p["stats"]["max_avail"] for p in answer["pools"]):
            return
        time.sleep(0.1)
    raise UnavailableError("the manager of the test cluster says nothing of its pools")
