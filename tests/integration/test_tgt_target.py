"""The tgt target on a real tgtd, with real initiators: what the contract suite does not ask."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from offload import iscsi, procs, run
from offload.errors import (
    BusyError,
    ConfigError,
    IntegrityError,
    UnavailableError,
    UsageError,
)
from offload.instance import Instance
from offload.model import Exposure, Qcow2Source, RawSource
from offload.target import Endpoint, ExportRequest
from offload.testing.instances import free_port, make_instance
from offload.testing.libiscsi import Initiator, Login, ScsiError
from offload.testing.target import writable
from targets import tgt_mgmt
from targets.tgt import TgtTarget
from targets.tgt_mgmt import Management, TgtDeniedError, TgtSilentError
from targets.tgt_server import PortalServer

KIB, MIB = 1 << 10, 1 << 20
DATA_PROTECT = 7  # SPC-4, table 48
FRIEND, STRANGER = "iqn.2004-10.com.example:friend", "iqn.2004-10.com.example:stranger"
# their own in each run: whatever else runs on the machine, it cannot know them
SECRET, MUTUAL, OTHER = (f"{text}{os.urandom(6).hex()}" for text in ("a,b=", "mutual ", "other "))
CHAP = Login(user="backup", secret=SECRET)
NOBODY = 65534  # of Debian's base-passwd


@dataclass
class Site:
    """An instance and its target; what it exported is withdrawn at the end."""

    folder: Path
    instance: Instance
    port: int

    def __post_init__(self) -> None:
        self.target = TgtTarget(self.instance)
        self.exported: dict[str, Endpoint] = {}

    @property
    def server(self) -> PortalServer:
        return PortalServer.of(self.instance.servers_dir, "127.0.0.1", self.port)

    def request(self, view_id: str = "v1", *, sector: int = 512) -> ExportRequest:
        path = self.folder / "image.raw"
        return ExportRequest(
            view_id=view_id,
            name=f"name-{view_id}",
            source=RawSource(path=path, size_bytes=path.stat().st_size, sector_size=sector),
            run_dir=self.instance.views_dir / view_id,
            exposure=Exposure(port=self.port),
        )

    def export(self, request: ExportRequest | None = None) -> Endpoint:
        request = request or self.request()
        made = self.target.export(request)
        self.exported[request.view_id] = made
        return made

    def withdraw(self, view_id: str = "v1") -> None:
        made = self.exported.pop(view_id)
        self.target.withdraw(self.instance.views_dir / view_id, made.server)

    def alive(self, view_id: str = "v1") -> bool:
        record = self.exported[view_id].server
        return self.target.alive(self.instance.views_dir / view_id, record)

    def clients(self, view_id: str = "v1") -> list[tuple[str, str]]:
        record = self.exported[view_id].server
        found = self.target.clients(self.instance.views_dir / view_id, record)
        return [(client.name, client.address) for client in found]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofi-", dir="/tmp"))
    yield made
    left = _processes(made)
    for ref in left:
        ref.end(0)
    shutil.rmtree(made, ignore_errors=True)
    assert left == []


@pytest.fixture
def content(folder: Path) -> bytes:
    """What the image of every view holds: 1 MiB."""
    data = os.urandom(MIB)
    (folder / "image.raw").write_bytes(data)
    return data


@pytest.fixture
def make_site(folder: Path, content: bytes) -> Iterator[Callable[..., Site]]:
    """Sites of this test: keys of `[iscsi]`; `inside` is the folder of another instance."""
    made: list[Site] = []

    def make(inside: str = "a", **tables: object) -> Site:
        instance = make_instance(folder / inside, {"iscsi": tables})
        made.append(Site(folder=folder, instance=instance, port=free_port()))
        return made[-1]

    yield make
    for site in made:
        for view_id in list(site.exported):
            site.withdraw(view_id)
        assert list(site.instance.views_dir.glob("*")) == []
        assert [p for p in site.instance.servers_dir.glob("*") if p.is_dir()] == []


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


def _processes(folder: Path) -> list[procs.ProcessRef]:
    """Live processes that were told of anything in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if os.fsencode(folder) + b"/" in (entry / "cmdline").read_bytes():
                    ref = procs.ref_of(int(entry.name))
                    found += [ref] if ref else []
    return found


def _wait(condition: Callable[[], bool], patience_s: float = 10.0) -> None:
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def _kill(endpoint: Endpoint) -> None:
    ref = procs.ProcessRef.from_strings(dict(endpoint.server))
    assert ref is not None
    os.kill(ref.pid, signal.SIGKILL)
    _wait(lambda: not ref.alive())


def _refused(uri: str, login: Login) -> bool:
    try:
        Initiator(uri, login, timeout_s=60).close()
    except ScsiError:
        return True
    return False


def _chap(folder: Path, *, mutual: bool = False, secret: str = SECRET) -> dict[str, object]:
    """The `[iscsi.chap]` table, its secrets in files."""
    table: dict[str, object] = {"user": "backup", "secret_file": str(folder / "secret")}
    texts = {"secret": secret}
    if mutual:
        table |= {"mutual_user": "offload", "mutual_secret_file": str(folder / "mutual")}
        texts["mutual"] = MUTUAL
    for name, text in texts.items():
        (folder / name).write_text(text + "\n")
        (folder / name).chmod(0o600)
    return table


# -- what initiators see ----------------------------------------------------------------------


def test_view_is_a_disk_with_an_identity_of_its_own_that_outlives_servers(site: Site) -> None:
    def seen(uri: str) -> tuple[bytes, bytes, bytes, int]:
        with Initiator(uri) as disk:
            # standard INQUIRY: removable medium, vendor, product, revision
            head = disk.inquiry()
            return head[1:2] + head[8:36], disk.inquiry(0x80), disk.inquiry(0x83), disk.blocks

    one, two = site.export(), site.export(site.request("v2"))
    first, other = seen(one.uri), seen(two.uri)
    assert first[0] == b"\0OFFLOAD TimeView        1   "
    serial = iscsi.identity("v1").serial.encode()
    assert first[1].endswith(serial)
    assert b"OFFLOAD " + serial[:28] in first[2]
    assert {page[:1] for page in (first[1][4:], other[1][4:])}  # both pages have a text
    assert first[1] != other[1]
    designators = [_designators(page) for page in (first[2], other[2])]
    assert designators[0].keys() == designators[1].keys() == {(1, 36), (3, 8), (3, 16)}
    assert all(designators[0][key] != designators[1][key] for key in designators[0])
    naa, local, t10 = iscsi.canonical_names("tgt", "v1")
    assert naa == f"naa.{designators[0][3, 16].hex()}"
    assert local == f"naa.{designators[0][3, 8].hex()}"
    assert t10 == f"t10.{designators[0][1, 36].decode().replace(' ', '_')}"
    site.withdraw("v2")
    site.withdraw("v1")
    again = site.export()  # the other way round, from another server
    assert again.uri == one.uri
    assert seen(again.uri) == first


def _designators(page: bytes) -> dict[tuple[int, int], bytes]:
    """Of VPD page 83h: type and length of each, and what it says (SPC-4, 7.8.6)."""
    found, at = {}, 4
    while at < len(page):
        length = page[at + 3]
        found[page[at + 1] & 15, length] = page[at + 4 : at + 4 + length]
        at += 4 + length
    return found


def test_view_initiator_programs_know_it(site: Site) -> None:
    made = site.export()
    said = run.run(["iscsi-inq", made.uri]).stdout
    assert "Vendor:OFFLOAD" in said
    assert "Product:TimeView" in said
    serial = run.run(["iscsi-inq", "-e", "1", "-c", "128", made.uri]).stdout
    assert iscsi.identity("v1").serial in serial
    names = run.run(["iscsi-inq", "-e", "1", "-c", "131", made.uri]).stdout
    assert "OFFLOAD " + iscsi.identity("v1").serial[:28] in names
    listed = run.run(["iscsi-ls", "-s", f"iscsi://127.0.0.1:{site.port}"]).stdout
    assert f"Target:{made.server['iqn']} Portal:127.0.0.1:{site.port},1" in listed
    assert "Lun:1    Type:DIRECT_ACCESS" in listed


@pytest.mark.parametrize("sector", [512, 4096])
def test_view_has_the_sectors_of_the_volume_and_its_exact_size(site: Site, sector: int) -> None:
    made = site.export(site.request(sector=sector))
    said = run.run(["iscsi-readcapacity16", made.uri]).stdout
    assert f"RETURNED LOGICAL BLOCK ADDRESS:{MIB // sector - 1}" in said
    assert f"LOGICAL BLOCK LENGTH IN BYTES:{sector}" in said
    assert "P_I_EXPONENT:0 LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT:0" in said


def test_view_whole_read_by_qemu_is_the_image(site: Site, folder: Path) -> None:
    made = site.export()
    argv = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(folder / "image.raw"), made.uri]
    assert "Images are identical." in run.run(argv).stdout


def test_view_of_qcow2_is_the_disk_inside(site: Site, folder: Path) -> None:
    inside = folder / "image.qcow2"
    run.run(["qemu-img", "convert", "-O", "qcow2", str(folder / "image.raw"), str(inside)])
    made = site.export(
        replace(site.request(), source=Qcow2Source(path=inside, size_bytes=MIB, sector_size=4096))
    )
    argv = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(folder / "image.raw"), made.uri]
    assert "Images are identical." in run.run(argv).stdout
    with Initiator(made.uri) as disk:
        assert disk.block_size == 4096
        with pytest.raises(ScsiError) as refused:
            disk.pwrite(b"x" * 4096, 0)
        assert refused.value.sense_key == DATA_PROTECT


def test_view_read_only_says_so_and_is_opened_so(site: Site, folder: Path) -> None:
    """Snapshots have the mode 0400; tgtd as root would open them for writing otherwise."""
    (folder / "image.raw").chmod(0o400)
    made = site.export()
    with Initiator(made.uri) as disk:
        assert disk.mode_sense()[2] & 0x80  # SBC-3, 6.4.1: write protected
        with pytest.raises(ScsiError) as refused:
            disk.pwrite(b"x" * 512, 0)
        assert refused.value.sense_key == DATA_PROTECT
    proc = Path(f"/proc/{made.server['pid']}")
    opened = [fd.name for fd in (proc / "fd").iterdir() if fd.readlink().name == "image.raw"]
    flags = [(proc / "fdinfo" / fd).read_text().split("flags:")[1].split()[0] for fd in opened]
    assert [int(text, 8) & os.O_ACCMODE for text in flags] == [os.O_RDONLY]


def test_view_writable_keeps_what_was_flushed_over_kill_and_restart(
    site: Site, content: bytes, folder: Path
) -> None:
    request = writable(site.request())
    made = site.export(request)
    with Initiator(made.uri) as disk:
        assert not disk.mode_sense()[2] & 0x80
        disk.pwrite(b"w" * 4096, 8192)
        disk.flush()
    run.run(["qemu-io", "-f", "raw", "-c", "write -P 0x51 64k 64k", "-c", "flush", made.uri])
    _kill(made)
    os.kill(int(made.server["backing_pid"]), signal.SIGKILL)
    site.withdraw()
    again = site.export(request)
    assert again.uri == made.uri
    wanted = bytearray(content)
    wanted[8192:12288] = b"w" * 4096
    wanted[64 * KIB : 128 * KIB] = b"\x51" * 64 * KIB
    with Initiator(again.uri) as disk:
        assert disk.pread(MIB, 0) == bytes(wanted)
    assert (folder / "image.raw").read_bytes() == content


def test_view_path_with_commas_and_equal_signs_is_served(
    site: Site, folder: Path, content: bytes
) -> None:
    odd = folder / "a,bstype=null,b.raw"
    odd.write_bytes(content)
    made = site.export(replace(site.request(), source=RawSource(path=odd, size_bytes=MIB)))
    with Initiator(made.uri) as disk:
        assert disk.pread(MIB, 0) == content


@pytest.mark.parametrize("size", [MIB - 512, MIB + 512, MIB + 1, 0])
def test_export_file_of_another_size_is_refused(site: Site, folder: Path, size: int) -> None:
    request = site.request()
    os.truncate(folder / "image.raw", size)
    with pytest.raises(IntegrityError) as refused:
        site.export(request)
    assert refused.value.code == "size-mismatch"


@pytest.mark.parametrize(("size", "sector"), [(MIB + 1, 512), (MIB + 512, 4096), (100, 512)])
def test_export_image_with_a_partial_last_sector_is_refused(
    site: Site, folder: Path, size: int, sector: int
) -> None:
    os.truncate(folder / "image.raw", size)
    with pytest.raises(UsageError) as refused:
        site.export(site.request(sector=sector))
    assert refused.value.code == "partial-sector"
    assert "--target nbd" in refused.value.hint


def test_view_with_the_longest_name_is_served(make_site: Callable[..., Site]) -> None:
    site = make_site(iqn_prefix="iqn.2026-11.internal.offload:" + "x" * 140)
    made = site.export(replace(site.request(), name="n" * 63))
    assert len(made.server["iqn"]) == 223  # RFC 7143, 4.2.7.1
    with Initiator(made.uri) as disk:
        assert disk.blocks == MIB // 512
    assert site.alive()


# -- who may log in ---------------------------------------------------------------------------


def test_chap_right_secret_logs_in_and_no_other_does(
    make_site: Callable[..., Site], folder: Path
) -> None:
    site = make_site(chap=_chap(folder))
    uri = site.export().uri
    with Initiator(uri, CHAP) as disk:
        assert len(disk.pread(512, 0)) == 512
    assert _refused(uri, Login())
    assert _refused(uri, Login(user="backup", secret=OTHER))
    assert _refused(uri, Login(user="somebody", secret=SECRET))


def test_chap_mutual_target_proves_itself(make_site: Callable[..., Site], folder: Path) -> None:
    site = make_site(chap=_chap(folder, mutual=True))
    uri = site.export().uri
    with Initiator(uri, replace(CHAP, mutual_user="offload", mutual_secret=MUTUAL)) as disk:
        assert len(disk.pread(512, 0)) == 512
    assert _refused(uri, replace(CHAP, mutual_user="offload", mutual_secret=OTHER))
    with Initiator(uri, CHAP) as disk:  # whether the target must prove itself, the host decides
        assert disk.blocks


def test_chap_longest_secret_and_user_log_in(make_site: Callable[..., Site], folder: Path) -> None:
    secret, user = "s" * 255, "ü" * 100
    site = make_site(chap={**_chap(folder, secret=secret), "user": user})
    with Initiator(site.export().uri, Login(user=user, secret=secret)) as disk:
        assert disk.blocks


def test_chap_secrets_are_nowhere_but_in_their_files(
    make_site: Callable[..., Site], folder: Path
) -> None:
    """Not on any command line while a view is mounted, not in what is left in the folders."""
    secrets = (SECRET.encode(), MUTUAL.encode())
    site = make_site(chap=_chap(folder, mutual=True))
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for entry in Path("/proc").iterdir():
                for name in ("cmdline", "environ") if entry.name.isdigit() else ():
                    with contextlib.suppress(OSError):
                        seen.add((entry / name).read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = site.export(writable(site.request()))
        Initiator(made.uri, CHAP).close()
        site.export(site.request("v2"))
    finally:
        done.set()
        watcher.join()
    assert any(b"tgtd" in text for text in seen)
    assert not [text for text in seen for secret in secrets if secret in text]
    assert not [value for value in made.server.values() if SECRET in value or MUTUAL in value]
    files = [p for p in site.instance.runtime_dir.rglob("*") if p.is_file()]
    assert site.server.folder / "log" in files
    assert not [p for p in files for secret in secrets if secret in p.read_bytes()]


def test_chap_changed_secret_is_refused_while_the_old_one_is_in_use(
    make_site: Callable[..., Site], folder: Path
) -> None:
    site = make_site(chap=_chap(folder))
    old = site.export()
    _chap(folder, secret=OTHER)
    with pytest.raises(BusyError) as refused:
        site.export(site.request("v2"))
    assert refused.value.code == "chap-secret-changed"
    with Initiator(old.uri, CHAP) as disk:  # nothing changed for those that are there
        assert disk.blocks
    site.withdraw()
    new = site.export(site.request("v2"))
    assert _refused(new.uri, CHAP)
    with Initiator(new.uri, Login(user="backup", secret=OTHER)) as disk:
        assert disk.blocks


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"user": "a,b"}, "chap-user-invalid"),
        ({"user": "a\nb"}, "chap-user-invalid"),
        ({"user": "offload"}, "chap-user-twice"),
    ],
)
def test_check_chap_that_tgtd_cannot_take_is_refused(
    make_site: Callable[..., Site], folder: Path, change: dict[str, object], code: str
) -> None:
    site = make_site(chap={**_chap(folder, mutual=True), **change})
    with pytest.raises(ConfigError) as refused:
        site.target.check(Exposure(port=site.port))
    assert refused.value.code == code
    assert refused.value.hint


def test_acl_admits_the_named_initiators_and_nobody_else(make_site: Callable[..., Site]) -> None:
    site = make_site(initiators=[FRIEND])
    uri = site.export().uri
    with Initiator(uri, Login(initiator=FRIEND)) as disk:
        assert len(disk.pread(512, 0)) == 512
        assert site.clients() == [(FRIEND, "127.0.0.1")]
    assert _refused(uri, Login(initiator=STRANGER))
    assert _refused(uri, Login(initiator=FRIEND + "x"))


def test_discovery_shows_a_stranger_nothing(make_site: Callable[..., Site]) -> None:
    site = make_site(initiators=[FRIEND])
    site.export()
    url = f"iscsi://127.0.0.1:{site.port}"
    assert "Target:" in run.run(["iscsi-ls", "-i", FRIEND, url]).stdout
    assert "Target:" not in run.run(["iscsi-ls", "-i", STRANGER, url], check=False).stdout


# -- who is logged in, and gone ---------------------------------------------------------------


def test_clients_two_at_once_are_named_until_they_leave(site: Site) -> None:
    made = site.export()
    with Initiator(made.uri, Login(initiator=FRIEND)) as one:
        other = Initiator(made.uri, Login(initiator=STRANGER))
        assert sorted(site.clients()) == [(FRIEND, "127.0.0.1"), (STRANGER, "127.0.0.1")]
        assert one.pread(512, 0) == other.pread(512, 0)
        other.vanish()  # no logout
        _wait(lambda: site.clients() == [(FRIEND, "127.0.0.1")])
    assert site.clients() == []


_READER = """
import sys
from offload.testing.libiscsi import Initiator, Login
disk = Initiator(sys.argv[1], Login(initiator=sys.argv[2]))
print("in", flush=True)
while True:
    disk.pread(1 << 20, 0)
"""

# Sends READs for 16 MiB and takes no answer: more than both sockets hold.
_TAKES_NOTHING = """
import ctypes, select, sys, time
from offload.testing.libiscsi import Initiator, Login
disk = Initiator(sys.argv[1], Login(initiator=sys.argv[2]))
library, context, number = disk._library, ctypes.c_void_p(disk._context), ctypes.c_int
done = ctypes.CFUNCTYPE(None, ctypes.c_void_p, number, ctypes.c_void_p, ctypes.c_void_p)(print)
for _ in range(64):
    library.iscsi_read16_task(
        context, 1, ctypes.c_uint64(0), 1 << 18, 512, 0, 0, 0, 0, 0, done, None
    )
while library.iscsi_which_events(context) & select.POLLOUT:
    library.iscsi_service(context, select.POLLOUT)
print("in", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def _reader(uri: str, script: str = _READER) -> Iterator[subprocess.Popen[bytes]]:
    """An initiator in a process of its own, which reads without end."""
    process = run.spawn([sys.executable, "-c", script, uri, FRIEND], cwd=Path(__file__).parents[2])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        yield process
    finally:
        run.terminate(process)


def test_initiator_killed_while_it_reads_is_gone_at_once(site: Site) -> None:
    made = site.export()
    with _reader(made.uri) as process:
        assert [name for name, _ in site.clients()] == [FRIEND]
        process.kill()
        _wait(lambda: site.clients() == [])
    with Initiator(made.uri) as disk:
        assert disk.blocks


def test_withdraw_hangs_up_on_those_that_read_and_leaves_the_others(
    site: Site, content: bytes
) -> None:
    made, other = site.export(), site.export(site.request("v2"))
    idle = Initiator(made.uri)
    with _reader(made.uri), Initiator(other.uri) as neighbour:
        began = time.monotonic()
        site.withdraw()
        assert time.monotonic() - began < 5
        assert neighbour.pread(4096, 0) == content[:4096]
        with pytest.raises(ScsiError):
            idle.pread(512, 0)
    assert _refused(made.uri, Login())
    assert site.alive("v2")


@pytest.mark.slow
def test_withdraw_initiator_that_takes_no_data_is_given_up(site: Site) -> None:
    """tgtd can neither send to it nor hear of it, until it owes three signs of life."""
    made = site.export()
    site.export(site.request("v2"))
    with _reader(made.uri, _TAKES_NOTHING):
        _wait(lambda: _unsent(site.port) > MIB)
        site.withdraw()
        assert list(site.server.management.targets()) == [int(site.exported["v2"].server["tid"])]
    assert site.alive("v2")


def _unsent(port: int) -> int:
    """Bytes that a server on this port could not get rid of (proc(5), /proc/net/tcp: tx_queue)."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [line for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "01"]
    return sum(int(line[4].partition(":")[0], 16) for line in ours)


def test_withdraw_what_is_behind_hangs_ends_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that never comes back from below keeps no view mounted."""
    monkeypatch.setattr("targets.tgt._HANGS_S", 0.2)
    monkeypatch.setattr("offload.qemu_storage._GRACE_S", 0.2)
    made = site.export(writable(site.request()))
    other = site.export(site.request("v2"))
    below = int(made.server["backing_pid"])
    disk = Initiator(made.uri)
    os.kill(below, signal.SIGSTOP)
    reading = threading.Thread(target=lambda: _failing(disk))
    reading.start()
    _wait(lambda: _in_flight(int(made.server["pid"])))
    site.withdraw()
    reading.join(60)
    assert not reading.is_alive()
    assert procs.ref_of(below) is None
    with Initiator(other.uri) as neighbour:
        assert neighbour.pread(512, 0)


def _failing(disk: Initiator) -> None:
    with contextlib.suppress(ScsiError):
        disk.pread(512, 512 * KIB)


def _in_flight(pid: int) -> bool:
    """Whether a thread of tgtd waits in pread: 17 on amd64, 67 on arm64."""
    calls = [(t / "syscall").read_text() for t in Path(f"/proc/{pid}/task").iterdir()]
    return any(call.split()[0] in {"17", "67"} for call in calls)


def test_clients_hostile_name_forges_nothing(site: Site) -> None:
    """What an initiator calls itself stands unescaped in tgtd's listings."""
    made = site.export()
    victim = iscsi.identity("v2").serial[:7]
    name = (
        f"x\n    Connection: 0\n        Initiator: y\n        IP Address: 192.0.2.1\n"
        f"Target {int(victim, 16)}: {made.server['iqn']}\n    LUN information:\n"
        "        LUN: 1\n            Online: No\n"
    )
    with Initiator(made.uri, Login(initiator=name)):
        ((shown, address),) = site.clients()
        assert "\n" not in shown
        assert address == "127.0.0.1"
        assert site.alive()
        site.export(site.request("v2"))
        assert site.alive("v2")
        site.withdraw("v2")
        assert site.alive()
        site.withdraw()


# -- servers ----------------------------------------------------------------------------------


def test_server_is_shared_by_a_portal_and_ends_with_its_last_view(site: Site) -> None:
    one, two = site.export(), site.export(site.request("v2"))
    assert one.server["pid"] == two.server["pid"]
    assert len(site.server.find()) == 1
    site.withdraw("v1")
    assert site.alive("v2")
    site.withdraw("v2")
    assert site.server.find() == []
    assert not site.server.folder.exists()


def test_server_has_no_descriptor_session_or_right_that_it_does_not_need(
    site: Site, folder: Path
) -> None:
    with (folder / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        pid = int(site.export().server["pid"])
        held = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [
        name for name in held if name.endswith("/lock") or name.startswith(("/dev/pts", "/dev/tty"))
    ]
    assert os.getsid(pid) != os.getsid(0)
    status = Path(f"/proc/{pid}/status").read_text()
    rights = int(status.split("CapEff:")[1].split()[0], 16)
    # linux/capability.h: DAC_READ_SEARCH, NET_BIND_SERVICE, SYS_RESOURCE
    assert rights & ~(1 << 2 | 1 << 10 | 1 << 24) == 0
    assert site.server.folder.stat().st_mode & 0o777 == 0o700


def test_server_listens_at_its_portal_alone(site: Site) -> None:
    site.export()
    assert site.server.management.portals() == [("127.0.0.1", site.port)]
    with socket.socket() as wire, pytest.raises(ConnectionRefusedError):
        wire.connect(("127.0.0.2", site.port))


def test_server_ipv6_portal_is_served(make_site: Callable[..., Site]) -> None:
    site = make_site(address="0:0:0:0:0:0:0:1")
    made = site.export()
    assert made.uri.startswith(f"iscsi://[::1]:{site.port}/")
    with Initiator(made.uri) as disk:
        assert disk.blocks
        assert [address for _, address in site.clients()] == ["::1"]


def test_two_instances_have_two_servers_and_one_portal_is_one_instances(
    make_site: Callable[..., Site],
) -> None:
    ours, theirs = make_site("a"), make_site("b")
    ours.export()
    theirs.export()
    with pytest.raises(UnavailableError) as refused:
        theirs.target.check(Exposure(port=ours.port))
    assert refused.value.code == "port-taken"
    ours.target.check(Exposure(port=ours.port))
    ours.withdraw()
    assert theirs.alive()


def test_check_port_of_another_server_is_refused(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.port)), pytest.raises(UnavailableError) as refused:
        site.export()
    assert refused.value.code == "port-taken"
    assert str(site.port) in refused.value.message


def test_export_port_lost_after_the_look_leaves_no_server_elsewhere(
    site: Site, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """tgtd would listen on port 3260 of all addresses instead."""
    monkeypatch.setattr("targets.listen.check_tcp", lambda *_: None)
    with socket.create_server(("127.0.0.1", site.port)), pytest.raises(UnavailableError) as refused:
        site.export()
    assert refused.value.code == "port-taken"
    assert _processes(folder) == []


def test_export_server_that_ends_at_once_is_explained_in_its_words(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PortalServer._argv
    monkeypatch.setattr(PortalServer, "_argv", lambda self: [*real(self), "--bogus", "y"])
    with pytest.raises(UnavailableError) as refused:
        site.export()
    assert refused.value.code == "server-failed"
    assert "tgtd --help" in refused.value.message


def test_check_without_tgtd_names_the_package(
    site: Site, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(run, "_DEFAULT_PATH", str(folder))
    with pytest.raises(UnavailableError) as refused:
        site.target.check(Exposure(port=site.port))
    assert refused.value.code == "program-missing"
    assert "apt-get install tgt" in refused.value.hint


@pytest.mark.parametrize(
    ("inside", "code"),
    [("x" * 80, "runtime-path-too-long"), ("a,b", "runtime-path-comma")],
)
def test_check_runtime_folder_that_tgtd_cannot_use_is_refused(
    make_site: Callable[..., Site], inside: str, code: str
) -> None:
    site = make_site(inside)
    with pytest.raises(ConfigError) as refused:
        site.target.check(Exposure(port=site.port))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("exposure", "code"),
    [
        (Exposure(transport="unix"), "bad-transport"),
        (
            Exposure(address="fe80::1%lo", initiators=(FRIEND,), insecure_network=True),
            "bad-address",
        ),
        (Exposure(address="0.0.0.0"), "bad-address"),  # noqa: S104
        (Exposure(address="192.0.2.1", initiators=(FRIEND,)), "not-loopback"),
        (Exposure(initiators=("nobody",)), "bad-iqn"),
    ],
)
def test_check_unfit_exposure_is_refused(
    make_site: Callable[..., Site], folder: Path, exposure: Exposure, code: str
) -> None:
    site = make_site(chap=_chap(folder))
    with pytest.raises(UsageError) as refused:
        site.target.check(exposure)
    assert refused.value.code == code


def test_check_address_of_another_machine_is_refused(
    make_site: Callable[..., Site], folder: Path
) -> None:
    site = make_site(chap=_chap(folder), networks=["192.0.2.0/24"])
    with pytest.raises(UnavailableError) as refused:
        site.target.check(Exposure(address="192.0.2.1", initiators=(FRIEND,)))
    assert refused.value.code == "bad-address"


def test_server_killed_takes_all_views_with_it_and_the_next_serves_them_again(site: Site) -> None:
    first, second = site.export(), site.export(site.request("v2"))
    _kill(first)
    assert not site.alive("v1")
    assert not site.alive("v2")
    assert site.clients("v1") == []
    site.withdraw("v1")
    again = site.export(site.request("v1"))
    assert again.uri == first.uri
    assert not site.alive("v2")  # the new server knows nothing of it
    site.withdraw("v2")
    assert site.export(site.request("v2")).server["pid"] == again.server["pid"]
    with Initiator(second.uri) as disk:
        assert disk.blocks


def test_server_that_does_not_answer_is_reported_and_ended_by_withdraw(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tgt_mgmt, "_ANSWER_S", 0.5)
    made = site.export()
    site.export(site.request("v2"))
    os.kill(int(made.server["pid"]), signal.SIGSTOP)
    began = time.monotonic()
    assert [site.alive(name) for name in ("v1", "v2") * 8] == [False] * 16
    assert time.monotonic() - began < 4  # it is asked once
    with pytest.raises(TgtSilentError) as silent:
        site.clients()
    assert "--force" in silent.value.hint
    with pytest.raises(TgtSilentError):
        site.export(site.request("v3"))
    assert procs.ref_of(int(made.server["pid"])) is not None  # a failing export ends nothing
    site.withdraw("v1")
    assert site.server.find() == []
    site.withdraw("v2")
    site.export(site.request("v2"))
    assert TgtTarget(site.instance).alive(
        site.instance.views_dir / "v2", site.exported["v2"].server
    )


def test_withdraw_without_a_record_finds_the_view_among_servers(site: Site) -> None:
    """Also where even the folder of the view is gone."""
    site.export()
    site.export(site.request("v2"))
    shutil.rmtree(site.instance.views_dir / "v1")
    site.target.withdraw(site.instance.views_dir / "v1", {})
    assert list(site.server.management.targets().values()) == [site.exported["v2"].server["iqn"]]
    site.withdraw("v1")
    assert site.alive("v2")


def test_withdraw_ends_a_server_that_was_left_without_views(site: Site) -> None:
    """Its starter was killed before it had given it one."""
    with site.server.alone():
        site.server.start()
    run_dir = site.instance.views_dir / "v1"
    run_dir.mkdir(parents=True)
    (run_dir / "portal").symlink_to(site.server.folder)
    site.target.withdraw(run_dir, {})
    assert site.server.find() == []
    assert not run_dir.exists()


def test_export_server_whose_folder_is_gone_is_replaced(site: Site) -> None:
    """A runtime folder that was cleaned leaves a server that nobody can reach."""
    lost = site.export()
    shutil.rmtree(site.server.folder)
    site.export(site.request("v2"))
    assert procs.ref_of(int(lost.server["pid"])) is None
    assert not site.alive("v1")
    assert site.alive("v2")


def test_export_log_of_the_server_stays_short(site: Site) -> None:
    site.export()
    log = site.server.folder / "log"
    with log.open("ab") as out:
        out.write(b"x" * (2 * MIB))
    site.export(site.request("v2"))
    assert log.stat().st_size < 4096


def test_administrators_tgtd_is_left_alone(site: Site, folder: Path, content: bytes) -> None:
    """Another portal, its own socket, its own target: as it was, before, during and after."""
    port, socket_path = free_port(), folder / "admin"
    argv = ["tgtd", "-f", "--iscsi", f"portal=127.0.0.1:{port}"]
    admin = run.spawn(argv, env={"TGT_IPC_SOCKET": str(socket_path)})
    try:
        theirs = Management(socket_path.with_name("admin.0"))
        _wait(socket_path.with_name("admin.0").exists)
        theirs.new_target(1, "iqn.2004-10.com.example:theirs")
        theirs.new_unit(1, 1, folder / "image.raw", 512)
        before = theirs._ask("", tgt_mgmt._Mode.TARGET, tgt_mgmt._Op.SHOW, tid=-1)
        site.export()
        site.withdraw()
        site.target.withdraw(site.instance.views_dir / "v1", {})
        assert theirs._ask("", tgt_mgmt._Mode.TARGET, tgt_mgmt._Op.SHOW, tid=-1) == before
        with pytest.raises(UnavailableError):
            site.target.check(Exposure(port=port))
        assert admin.poll() is None
    finally:
        admin.kill()
        run.terminate(admin)


# -- many -------------------------------------------------------------------------------------


def test_64_views_at_once_are_served_listed_and_withdrawn_to_nothing(
    site: Site, content: bytes
) -> None:
    for number in range(64):
        site.export(site.request(f"v{number}"))
    assert len({made.server["pid"] for made in site.exported.values()}) == 1
    assert len({made.uri for made in site.exported.values()}) == 64
    listed = run.run(["iscsi-ls", f"iscsi://127.0.0.1:{site.port}"]).stdout
    assert listed.count("Target:iqn.") == 64
    disks = [Initiator(made.uri) for made in site.exported.values()]
    assert {disk.pread(8192, 4096) for disk in disks} == {content[4096:12288]}
    assert all(site.alive(view_id) for view_id in site.exported)
    for disk in disks:
        disk.close()


_EXPORTS = """
import sys
from pathlib import Path
from offload.config import Config
from offload.instance import Instance
from offload.model import Exposure, RawSource
from offload.target import ExportRequest
from targets.tgt import TgtTarget
folder, name, port, image, number = sys.argv[1:]
root = Path(folder)
config = Config.model_validate({"state_dir": folder + "/state", "runtime_dir": folder + "/run"})
target = TgtTarget(Instance(config=config, config_path=None, state_dir=root / "state",
                            runtime_dir=root / "run", id=name))
for round in range(4):
    request = ExportRequest(
        view_id=f"w{number}", name="x", source=RawSource(path=Path(image), size_bytes=1 << 20),
        run_dir=root / "run" / "views" / f"w{number}", exposure=Exposure(port=int(port)),
    )
    made = target.export(request)
    assert target.alive(request.run_dir, made.server)
    target.withdraw(request.run_dir, made.server)
"""


def test_processes_that_export_and_withdraw_at_once_do_not_disturb_each_other(site: Site) -> None:
    """The server comes and goes under them, with whichever view is the last one."""
    argv = [sys.executable, "-c", _EXPORTS, str(site.folder / "a"), site.instance.id]
    argv += [str(site.port), str(site.folder / "image.raw")]
    racing = [run.spawn([*argv, str(n)], cwd=Path(__file__).parents[2]) for n in range(4)]
    said = [process.communicate(timeout=120)[1].decode() for process in racing]
    assert [process.returncode for process in racing] == [0] * 4, said
    assert site.server.find() == []


# -- without root -----------------------------------------------------------------------------


@pytest.mark.needs_root
def test_everything_works_for_nobody(folder: Path, content: bytes) -> None:
    """On an unprivileged port, from start to end; and root is told whose server it is."""
    shutil.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o755)
    site = Site(folder=folder, instance=make_instance(folder / "n"), port=free_port())
    for path in [folder / "n", *(folder / "n").rglob("*")]:
        shutil.chown(path, NOBODY, NOBODY)

    def work() -> None:
        made = site.export(writable(site.request()))
        with Initiator(made.uri) as disk:
            disk.pwrite(b"w" * 512, 512)
            assert disk.pread(1024, 0) == content[:512] + b"w" * 512
        site.withdraw()
        site.export()

    assert _as_nobody(work)
    with pytest.raises(TgtDeniedError) as denied:
        site.server.management.targets()
    assert f"uid {NOBODY}" in denied.value.message
    run_dir = site.instance.views_dir / "v1"
    assert _as_nobody(lambda: site.target.withdraw(run_dir, {}))
    assert _processes(folder) == []


def _as_nobody(work: Callable[[], None]) -> bool:
    """Whether it went well, in a child without any right."""
    child = os.fork()
    if child == 0:  # never returns into pytest
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
