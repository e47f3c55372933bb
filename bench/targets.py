"""Targets beside each other: reading over iSCSI and TCP, 64 LUNs at once, time to a good read."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nbd

from bench.ground import GIB, MIB, Ground
from bench.measure import in_turns, medians, once, ratio
from bench.report import Table, rate
from offload import run
from offload.testing.instances import free_port
from offload.testing.libiscsi import Initiator

_LUNS = 64
_READ_BYTES = 4 * MIB  # a request
_IN_FLIGHT = 4
_IQN = "iqn.2026-11.internal.bench:bare"
_WAYS = {
    "nbd, unix socket": ("--target", "nbd"),
    "nbd, TCP": ("--target", "nbd", "--tcp"),
    "tgt": ("--target", "tgt"),
}


def reading(ground: Ground, rounds: int) -> Table:
    """The whole image through qemu's own initiators: bare servers, then TimeViews."""
    mark = ground.ask("timemark", "create", "mixed")
    # the very file that the view shows: a clone has a page cache of its own
    image = Path(mark["snapshots"][0]["ref"]["path"])
    origin = f"timemark:{mark['id']}/mixed"
    table = Table(
        "A TimeView beside the bare server on the same bytes "
        f"(qemu-img bench, {_READ_BYTES // MIB} MiB reads, {_IN_FLIGHT} in flight, page cache)",
        ("server", "bare", "TimeView", "TimeView ÷ bare", "goal"),
    )
    bare = {"nbd, TCP": _bare_nbdkit, "tgt": _bare_tgtd}
    for name, start in bare.items():
        (view,) = ground.ask("mount", origin, "--name", "bench", *_WAYS[name])
        with start(image, ground.folder) as uri:
            taken = in_turns(
                {"bare": partial(_bench, uri), "view": partial(_bench, view["uri"])}, rounds
            )
        ground.cli("unmount", "bench")
        alone, ours = (rate(2 * GIB, medians(taken[who]).seconds) for who in ("bare", "view"))
        table.add(name, alone, ours, f"{ratio(taken['bare'], taken['view']):.2f}", "≥ 0.95")
    ground.cli("timemark", "delete", mark["id"], "--yes")
    return table


def many(ground: Ground) -> Table:
    """64 views at once, each read from while all the others stand."""
    mark = ground.ask("timemark", "create", "mixed")
    table = Table(
        f"{_LUNS} TimeViews at once, per target",
        ("target", "mount, all", "each", "a MiB of each, all connected", "unmount, all"),
    )
    for name, options in _WAYS.items():
        began = time.perf_counter()
        ground.cli("mount", *[f"timemark:{mark['id']}/mixed"] * _LUNS, *options)
        mounted = time.perf_counter() - began
        views = ground.ask("views")
        if len(views) != _LUNS or not all(view["alive"] for view in views):
            raise RuntimeError(f"{len(views)} views stand, {_LUNS} were wanted")
        began = time.perf_counter()
        _read_all([view["uri"] for view in views], ground.image)
        read = time.perf_counter() - began
        began = time.perf_counter()
        ground.cli("unmount", "--all")
        gone = time.perf_counter() - began
        each = f"{mounted / _LUNS * 1000:.0f} ms"
        table.add(name, f"{mounted:.1f} s", each, f"{read:.1f} s", f"{gone:.1f} s")
    ground.cli("timemark", "delete", mark["id"], "--yes")
    return table


def first_read(ground: Ground, rounds: int) -> Table:
    """From the start of the command to bytes that are the image's."""
    mark = ground.ask("timemark", "create", "mixed")
    origin = f"timemark:{mark['id']}/mixed"
    table = Table("mount --target to the first good read, whole command", ("target", "seconds"))
    with ground.image.open("rb") as file:
        wanted = file.read(4096)
    ways = {
        **_WAYS,
        "nbd, writable": ("--writable",),
        "tgt, writable": (*_WAYS["tgt"], "--writable"),
    }
    for name, options in ways.items():
        times = []
        for _ in range(rounds + 2):
            began = time.perf_counter()
            (view,) = ground.ask("mount", origin, "--name", "first", *options)
            if _read(view["uri"], 4096) != wanted:
                raise RuntimeError(f"{name} shows other bytes")
            times.append(time.perf_counter() - began)
            ground.cli("unmount", "first", "--force")
        table.add(name, f"{statistics.median(times):.3f}")
    ground.cli("timemark", "delete", mark["id"], "--yes")
    table.notes.append(
        "LIO runs in the kernel of the lab guest only, in emulation: a time there says nothing."
    )
    return table


def _bench(uri: str) -> object:
    count = 2 * GIB // _READ_BYTES
    argv = ["qemu-img", "bench", "-f", "raw", "-c", str(count), "-d", str(_IN_FLIGHT)]
    return once([*argv, "-s", str(_READ_BYTES), uri])


def _read(uri: str, count: int) -> bytes:
    if uri.startswith("iscsi"):
        session = Initiator(uri)
        found = session.pread(count, 0)
        session.close()
        return found
    handle = nbd.NBD()
    handle.connect_uri(uri)
    found = bytes(handle.pread(count, 0))
    handle.shutdown()
    return found


def _read_all(uris: list[str], image: Path) -> None:
    """All sessions stand while each is read from."""
    with image.open("rb") as file:
        wanted = file.read(MIB)
    sessions = []
    for uri in uris:
        if uri.startswith("iscsi"):
            sessions.append(Initiator(uri))
        else:
            sessions.append(nbd.NBD())
            sessions[-1].connect_uri(uri)
    for session in sessions:
        if bytes(session.pread(MIB, 0)) != wanted:
            raise RuntimeError("a view shows other bytes")
    for session in sessions:
        session.close() if isinstance(session, Initiator) else session.shutdown()


@contextmanager
def _bare_nbdkit(image: Path, folder: Path) -> Iterator[str]:
    pid, port = folder / "bare.pid", free_port()
    run.run(
        ["nbdkit", "-r", "-i", "127.0.0.1", "-p", str(port), "-P", str(pid), "file", str(image)]
    )
    try:
        yield f"nbd://127.0.0.1:{port}"
    finally:
        run.run(["kill", pid.read_text().strip()])


@contextmanager
def _bare_tgtd(image: Path, folder: Path) -> Iterator[str]:
    port = free_port()
    env = {"TGT_IPC_SOCKET": str(folder / "bare.tgt")}
    argv = ["tgtd", "-f", "--iscsi", f"portal=127.0.0.1:{port}"]
    process = run.spawn(argv, stdout=None, stderr=os.open(os.devnull, os.O_WRONLY), env=env)

    def admin(*words: str, check: bool = True) -> int:
        return run.run(["tgtadm", "--lld", "iscsi", *words], env=env, check=check).status

    try:
        while admin("--op", "show", "--mode", "system", check=False):
            time.sleep(0.02)
        admin("--op", "new", "--mode", "target", "--tid", "1", "-T", _IQN)
        admin("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", str(image))
        admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
        yield f"iscsi://127.0.0.1:{port}/{_IQN}/1"
    finally:
        run.terminate(process, grace_s=1.0)
