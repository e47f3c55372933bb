"""What targets read from: sockets and files, over every kind of source, with an overlay or not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import overlay, procs, qemu_storage, run
from offload.errors import (
    BusyError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    UnavailableError,
)
from offload.model import Exposure, NbdSource, Qcow2Source, RawSource, Source
from offload.target import ExportRequest
from offload.testing.pools import loop_device
from offload.testing.target import writable
from targets import backing
from targets.backing import Backing
from targets.command import unix_uri

MIB = 1 << 20
SIZE = 4 * MIB
ODD_NAME = "an image, with=\"odd\" 'name'.raw"
Opener = Callable[[ExportRequest], Backing]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofk-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def raw(folder: Path) -> Path:
    path = folder / ODD_NAME
    with path.open("xb") as out:
        out.truncate(SIZE)
        out.seek(MIB)
        out.write(os.urandom(MIB))
    return path


@pytest.fixture
def request_(folder: Path, raw: Path) -> ExportRequest:
    run_dir = folder / "views" / "v1"
    run_dir.mkdir(parents=True)
    return ExportRequest(
        view_id="v1",
        name="one",
        source=RawSource(path=raw, size_bytes=SIZE),
        run_dir=run_dir,
        exposure=Exposure(),
    )


@pytest.fixture(autouse=True)
def nothing_left(folder: Path) -> Iterator[None]:
    """Whatever a test does, no process and no mount of its folder may be left."""
    yield
    left = _processes(folder)
    for ref in left:
        ref.end()
    mounted = [m for m in Path("/proc/self/mountinfo").read_text().split() if str(folder) in m]
    for run_dir in (folder / "views").glob("*"):
        backing.close(run_dir, {})
    assert left == []
    assert mounted == []


def _processes(folder: Path) -> list[procs.ProcessRef]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            argv = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        ref = procs.ref_of(int(entry.name))
        if bytes(folder) in argv and int(entry.name) != os.getpid() and ref is not None:
            found.append(ref)
    return found


@pytest.fixture
def opened(request_: ExportRequest) -> Iterator[Callable[[Opener, ExportRequest], Backing]]:
    made: list[tuple[Path, Backing]] = []

    def run_it(opener: Opener, request: ExportRequest) -> Backing:
        found = opener(request)
        made.append((request.run_dir, found))
        return found

    yield run_it
    for run_dir, found in made:
        backing.close(run_dir, found.record)


def sources(folder: Path, raw: Path) -> dict[str, Source]:
    """The same bytes in each of the kinds that need no store."""
    inside, kept = folder / "inside.qcow2", folder / "kept.qcow2"
    for path in (inside, kept):
        run.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(path)])
    run.run(["qemu-img", "snapshot", "-c", "then", str(kept)])
    run.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 2M", str(kept)])
    return {
        "raw": RawSource(path=raw, size_bytes=SIZE),
        "qcow2": Qcow2Source(path=inside, size_bytes=SIZE),
        "qcow2-snapshot": Qcow2Source(path=kept, size_bytes=SIZE, snapshot="then"),
    }


def digests(folder: Path) -> dict[str, str]:
    """Of all images that are origins."""
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "v1.qcow2")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


class _Nbd:
    def __init__(self, path: Path) -> None:
        self.handle: Any = nbd.NBD()
        self.handle.set_strict_mode(0)  # the server must refuse, not the library
        self.handle.connect_uri(unix_uri(path))

    def read(self, count: int, offset: int = 0) -> bytes:
        return bytes(self.handle.pread(count, offset))

    def write(self, data: bytes, offset: int) -> None:
        self.handle.pwrite(data, offset)

    def close(self) -> None:
        self.handle.shutdown()


class _File:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def read(self, count: int, offset: int = 0) -> bytes:
        return os.pread(self._fd, count, offset)

    def write(self, data: bytes, offset: int) -> None:
        assert os.pwrite(self._fd, data, offset) == len(data)

    def close(self) -> None:
        os.close(self._fd)


@dataclass(frozen=True)
class Way:
    open: Opener
    client: Callable[[Path], Any]


WAYS = {"socket": Way(backing.open_socket, _Nbd), "file": Way(backing.open_file, _File)}
KINDS = ["raw", "qcow2", "qcow2-snapshot", "nbd"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_backing_over_each_source_reads_takes_writes_and_leaves_the_origin(
    opened: Any, request_: ExportRequest, raw: Path, kind: str, way: str
) -> None:
    folder = raw.parent
    opener, client_of = WAYS[way].open, WAYS[way].client
    made = sources(folder, raw)
    if kind == "nbd":
        behind = replace(request_, source=made["qcow2"], run_dir=folder / "views" / "behind")
        behind.run_dir.mkdir()
        served = opened(backing.open_socket, behind)
        made["nbd"] = NbdSource(uri=unix_uri(served.path), size_bytes=SIZE)
    request, content = replace(request_, source=made[kind]), raw.read_bytes()
    before = digests(folder)
    found = opened(opener, request)
    assert backing.alive(request.run_dir, found.record)
    assert all(key.startswith("backing_") for key in found.record)
    if (
        found.path != raw
    ):  # its own server refuses writes; the origin's file is the target's to open
        with closing(client_of(found.path)) as client:
            assert client.read(SIZE) == content
            with pytest.raises((nbd.Error, PermissionError)):
                client.write(b"x" * 512, 0)
    backing.close(request.run_dir, found.record)

    request = writable(request)
    found = opened(opener, request)
    with closing(client_of(found.path)) as client:
        assert client.read(SIZE) == content
        client.write(b"x" * 1000, MIB + 100)
        wanted = content[: MIB + 100] + b"x" * 1000 + content[MIB + 1100 :]
        assert client.read(SIZE) == wanted
    backing.close(request.run_dir, found.record)
    assert not backing.alive(request.run_dir, found.record)
    assert list(request.run_dir.iterdir()) == []
    again = opened(opener, request)
    with closing(client_of(again.path)) as client:
        assert client.read(SIZE) == wanted
    backing.close(request.run_dir, {})
    backing.close(request.run_dir, {})
    assert digests(folder) == before


def test_open_file_of_a_raw_read_only_view_is_the_origin_itself(
    request_: ExportRequest, raw: Path, folder: Path
) -> None:
    found = backing.open_file(request_)
    assert (found.path, found.record) == (raw, {})
    assert _processes(folder) == []
    assert backing.alive(request_.run_dir, found.record)


@pytest.mark.needs_root
@pytest.mark.parametrize("way", WAYS)
def test_backing_of_a_block_device_reads_and_takes_writes(
    opened: Any, request_: ExportRequest, raw: Path, way: str
) -> None:
    opener, client_of = WAYS[way].open, WAYS[way].client
    content = raw.read_bytes()
    with loop_device(raw) as device:
        request = replace(request_, source=RawSource(path=device, size_bytes=SIZE))
        found = opened(opener, writable(request))
        with closing(client_of(found.path)) as client:
            client.write(b"x" * 512, 0)
            assert client.read(SIZE) == b"x" * 512 + content[512:]
        backing.close(request.run_dir, found.record)
        plain = opened(opener, request)
        assert (plain.path == device) == (way == "file")
        backing.close(request.run_dir, plain.record)
        assert device.read_bytes() == content


def test_backing_of_another_view_is_left_alone(
    opened: Any, request_: ExportRequest, folder: Path, raw: Path
) -> None:
    other = replace(request_, view_id="v", run_dir=folder / "views" / "v")
    other.run_dir.mkdir()
    found = opened(backing.open_file, writable(request_))
    opened(backing.open_file, writable(other))
    backing.close(other.run_dir, {})
    assert backing.alive(request_.run_dir, found.record)
    assert found.path.read_bytes() == raw.read_bytes()


# -- servers that die -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("victim", ["backing_", "backing_base_"])
def test_alive_one_process_killed_is_dead_and_close_removes_the_rest(
    opened: Any, request_: ExportRequest, raw: Path, way: str, victim: str
) -> None:
    folder = raw.parent
    request = writable(replace(request_, source=sources(folder, raw)["qcow2"]))
    found = opened(WAYS[way].open, request)
    _kill(found, victim)
    assert not backing.alive(request.run_dir, found.record)
    backing.close(request.run_dir, found.record)
    assert list(request.run_dir.iterdir()) == []
    assert _processes(folder) == []


def test_alive_file_unmounted_by_somebody_is_dead(opened: Any, request_: ExportRequest) -> None:
    found = opened(backing.open_file, writable(request_))
    run.run(["umount", str(found.path)])
    assert not backing.alive(request_.run_dir, found.record)


@pytest.mark.parametrize("killed", [False, True])
def test_close_while_somebody_has_the_file_open_does_not_wait_for_him(
    opened: Any, request_: ExportRequest, killed: bool
) -> None:
    found = opened(backing.open_file, writable(request_))
    fd = os.open(found.path, os.O_RDWR)
    try:
        if killed:
            _kill(found, "backing_")
        began = time.monotonic()
        backing.close(request_.run_dir, found.record)
        assert time.monotonic() - began < 5
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.pread(fd, 512, 0)
        assert list(request_.run_dir.iterdir()) == []
    finally:
        with suppress(OSError):  # the file is gone; the descriptor closes all the same
            os.close(fd)


@pytest.mark.parametrize("way", WAYS)
def test_close_daemon_that_hangs_is_ended_all_the_same(
    opened: Any, request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(qemu_storage, "_GRACE_S", 0.2)
    found = opened(WAYS[way].open, writable(request_))
    os.kill(int(found.record["backing_pid"]), signal.SIGSTOP)
    assert backing.alive(request_.run_dir, found.record)  # and does not wait for it
    backing.close(request_.run_dir, found.record)
    assert list(request_.run_dir.iterdir()) == []


def test_close_record_of_others_looks_for_nothing(opened: Any, request_: ExportRequest) -> None:
    """A record without our keys: this view never had what we start."""
    found = opened(backing.open_socket, writable(request_))
    backing.close(request_.run_dir, {"pid": "1"})
    assert backing.alive(request_.run_dir, found.record)


# -- what fails -------------------------------------------------------------------------------


def _overlay(request: ExportRequest) -> Path:
    assert request.overlay is not None
    return request.overlay.path


def _gone(request: ExportRequest) -> ExportRequest:
    path = request.run_dir / "gone.raw"
    return replace(request, source=RawSource(path=path, size_bytes=SIZE))


def _short(request: ExportRequest) -> ExportRequest:
    assert isinstance(request.source, RawSource)
    os.truncate(request.source.path, SIZE - 512)
    return request


def _short_qcow2(request: ExportRequest) -> ExportRequest:
    path = request.run_dir.parents[1] / "short.qcow2"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"])
    return replace(request, source=Qcow2Source(path=path, size_bytes=SIZE))


def _overlay_gone(request: ExportRequest) -> ExportRequest:
    _overlay(request).unlink()
    return request


def _overlay_is_a_folder(request: ExportRequest) -> ExportRequest:
    _overlay(request).unlink()
    _overlay(request).mkdir()
    return request


def _overlay_of_another_size(request: ExportRequest) -> ExportRequest:
    assert request.overlay is not None
    _overlay(request).unlink()
    overlay.create(request.overlay, 2 * SIZE)
    return request


def _overlay_no_qcow2(request: ExportRequest) -> ExportRequest:
    with _overlay(request).open("r+b") as file:
        file.write(b"\0" * 512)
    return request


def _overlay_cut_short(request: ExportRequest) -> ExportRequest:
    os.truncate(_overlay(request), 1 * MIB)
    return request


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (_gone, (NotFoundError, "source-missing")),
        (_short, (IntegrityError, "size-mismatch")),
        (_short_qcow2, (IntegrityError, "size-mismatch")),
        (_overlay_gone, (NotFoundError, "overlay-missing")),
        (_overlay_is_a_folder, (NotFoundError, "overlay-missing")),
        (_overlay_of_another_size, (IntegrityError, "size-mismatch")),
        (_overlay_no_qcow2, (UnavailableError, "server-failed")),
        (_overlay_cut_short, (UnavailableError, "server-failed")),
    ],
)
def test_open_bad_image_is_one_clear_error_and_leaves_nothing(
    request_: ExportRequest,
    folder: Path,
    way: str,
    spoil: Any,
    error: tuple[type[OffloadError], str],
) -> None:
    request = spoil(writable(request_))
    family, code = error
    with pytest.raises(family) as caught:
        WAYS[way].open(request)
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    assert list(request.run_dir.iterdir()) == []
    assert _processes(folder) == []


def test_open_overlay_that_another_daemon_has_is_refused(
    opened: Any, request_: ExportRequest, folder: Path
) -> None:
    request = writable(request_)
    opened(backing.open_socket, request)
    other = replace(request, run_dir=folder / "views" / "other")
    other.run_dir.mkdir()
    with pytest.raises(BusyError) as caught:
        backing.open_socket(other)
    assert caught.value.code == "overlay-in-use"
    assert "\n" not in caught.value.message


def test_open_overlay_whose_header_names_a_backing_file_is_refused(
    request_: ExportRequest, folder: Path
) -> None:
    """As somebody would write it who wants to read another file through his view."""
    other = folder / "other.raw"
    other.write_bytes(b"other" * 100_000)
    request = writable(request_)
    argv = ["qemu-img", "rebase", "-u", "-b", str(other), "-F", "raw"]
    run.run([*argv, "-f", "qcow2", str(_overlay(request))])
    with pytest.raises(UnavailableError) as caught:
        backing.open_socket(request)
    assert caught.value.code == "server-failed"


def test_open_without_the_daemon_names_its_package(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    request = writable(request_)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(run, "_DEFAULT_PATH", str(folder))
    with pytest.raises(UnavailableError) as caught:
        backing.open_file(request)
    assert caught.value.code == "program-missing"
    assert "apt-get install qemu-system-common" in caught.value.hint


def test_open_file_without_fuse_says_so(
    request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(qemu_storage, "_FUSE", folder / "no-fuse")
    with pytest.raises(UnavailableError) as caught:
        backing.open_file(writable(request_))
    assert caught.value.code == "fuse-unavailable"
    assert "modprobe fuse" in caught.value.hint


def test_daemon_command_line_holds_json_and_no_secret_of_the_overlay(
    opened: Any, request_: ExportRequest
) -> None:
    found = opened(backing.open_socket, writable(request_))
    argv = Path(f"/proc/{found.record['backing_pid']}/cmdline").read_bytes().split(b"\0")
    node = json.loads(argv[argv.index(b"--blockdev") + 1])
    assert node["backing"]["read-only"] is True
    assert node["file"]["driver"] == "raw"
    assert "force-share" not in json.dumps(node)


def test_overlay_file_is_private(request_: ExportRequest) -> None:
    assert _overlay(writable(request_)).stat().st_mode & 0o777 == 0o600


def _kill(found: Backing, prefix: str) -> None:
    ref = procs.ProcessRef(
        pid=int(found.record[f"{prefix}pid"]),
        start=found.record[f"{prefix}start"],
        boot=found.record[f"{prefix}boot"],
    )
    os.kill(ref.pid, signal.SIGKILL)
    _wait(lambda: not ref.alive())


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
