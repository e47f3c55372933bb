"""The kernel's NBD client on real servers."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload import attachment, device_use, kernel_nbd, qemu_nbd, run
from offload.blockdev import device_read_only, device_sector_size, device_size
from offload.errors import BusyError, NotFoundError, UnavailableError, UsageError
from offload.genetlink import Family, u32, u64

MIB = 1 << 20
NAME = "offload-test-"


@dataclass
class Server:
    """A running nbdkit."""

    process: subprocess.Popen[bytes]
    socket: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)


Serve = Callable[..., Server]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofk-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def image(folder: Path) -> Path:
    path = folder / "image.raw"
    path.write_bytes(os.urandom(4 * MIB))
    return path


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """Starts nbdkits: plugin and parameters, on a unix socket or, with `port`, on TCP too."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*plugin: object, options: Sequence[str] = ()) -> Server:
        socket = folder / f"s{len(running)}"
        pid_file = folder / f"p{len(running)}"
        where = [] if "--port" in options else ["--unix", str(socket)]
        argv = ["nbdkit", "--foreground", "--pidfile", str(pid_file), *where, *options]
        process = run.spawn([*argv, *(str(part) for part in plugin)], stdout=None, stderr=None)
        running.append(process)
        wait_for(pid_file.exists)
        return Server(process, socket)

    yield start
    for device in ours():
        kernel_nbd.detach(device)
    for process in running:
        run.terminate(process)


def ours() -> list[str]:
    return [
        f"/dev/{folder.name}"
        for folder in Path("/sys/block").glob("nbd*")
        if (kernel_nbd.identifier_of(folder.name) or "").startswith(NAME)
    ]


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until, "it did not come true within 30 s"
        time.sleep(0.005)


@contextmanager
def opened(device: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(device, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def unconnected(index: int) -> Iterator[None]:
    """A device that is there and serves nothing: the kernel makes it with an export that nobody is
    to remove it with."""
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(Family("nbd")) as family:
        family.ask(
            1,  # NBD_CMD_CONNECT: index, size, sockets
            [(1, u32(index)), (2, u64(MIB)), (7, [(1, [(1, u32(theirs.fileno()))])])],
        )
        family.ask(2, [(1, u32(index))])  # NBD_CMD_DISCONNECT
    assert Path(f"/sys/block/nbd{index}").exists()
    try:
        yield
    finally:
        wait_for(lambda: settled(index))


def settled(index: int) -> bool:
    """Have it removed with an export that takes it along, once nobody has it open."""
    if not Path(f"/sys/block/nbd{index}").exists():
        return True
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(Family("nbd")) as family, suppress(OSError):
        family.ask(
            1,  # and client flags: NBD_CFLAG_DESTROY_ON_DISCONNECT
            [(1, u32(index)), (2, u64(MIB)), (6, u64(1)), (7, [(1, [(1, u32(theirs.fileno()))])])],
        )
        family.ask(2, [(1, u32(index))])
    return False


def attach(server: Server, name: str = "one", *, read_only: bool = True, timeout_s: int = 2) -> str:
    return kernel_nbd.attach(
        server.socket,
        identifier=NAME + name,
        sector_size=512,
        read_only=read_only,
        timeout_s=timeout_s,
        connections=2,
    )


def test_attach_shows_the_export_read_only(serve: Serve, image: Path) -> None:
    device = attach(serve("file", image))
    with opened(device) as fd:
        assert device_size(fd) == 4 * MIB
        assert device_sector_size(fd) == 512
        assert device_read_only(fd)
    assert Path(device).read_bytes() == image.read_bytes()
    with opened(device, os.O_RDWR) as fd, pytest.raises(PermissionError):
        os.pwrite(fd, b"x" * 512, 0)


def test_attach_over_tcp_shows_the_export(serve: Serve, image: Path) -> None:
    serve("file", image, options=["--ipaddr", "127.0.0.1", "--port", "10931"])
    device = kernel_nbd.attach(
        ("127.0.0.1", 10931), identifier=NAME + "tcp", sector_size=None, read_only=True
    )
    assert Path(device).read_bytes() == image.read_bytes()


def test_attach_sectors_of_4096_bytes(serve: Serve, image: Path) -> None:
    server = serve("file", image)
    device = kernel_nbd.attach(
        server.socket, identifier=NAME + "4k", sector_size=4096, read_only=True
    )
    with opened(device) as fd:
        assert device_sector_size(fd) == 4096
    assert Path(device).read_bytes() == image.read_bytes()


def test_attach_without_a_sector_size_takes_the_servers(serve: Serve, image: Path) -> None:
    server = serve(
        "file", image, "blocksize-minimum=4096", options=["--filter=blocksize-policy"]
    )  # fmt: skip
    device = kernel_nbd.attach(
        server.socket, identifier=NAME + "min", sector_size=None, read_only=True
    )
    with opened(device) as fd:
        assert device_sector_size(fd) == 4096


@pytest.mark.parametrize(
    ("size", "policy"),
    [(4 * MIB + 100, "blocksize-minimum=1"), (4 * MIB, "blocksize-minimum=4096")],
)
def test_attach_what_is_no_whole_sectors_is_refused(
    serve: Serve, image: Path, size: int, policy: str
) -> None:
    os.truncate(image, size)
    server = serve("file", image, policy, options=["--filter=blocksize-policy"])
    with pytest.raises(UsageError) as error:
        attach(server)
    assert error.value.code == "bad-sector-size"
    assert ours() == []


def test_attach_writable_writes_reach_the_server_with_the_flush(serve: Serve, image: Path) -> None:
    log = image.parent / "log"
    server = serve("file", image, f"logfile={log}", options=["--filter=log"])
    device = attach(server, read_only=False)
    with opened(device, os.O_RDWR) as fd:
        assert not device_read_only(fd)
        os.pwrite(fd, b"x" * 4096, MIB)
        os.fsync(fd)
        words = log.read_text()
    assert "Write" in words
    assert words.index("Flush") > words.index("Write")
    assert image.read_bytes()[MIB : MIB + 4096] == b"x" * 4096


def test_attach_two_devices_have_numbers_of_their_own(serve: Serve, image: Path) -> None:
    server = serve("file", image)
    one, two = attach(server, "one"), attach(server, "two")
    assert one != two
    assert {int(path.removeprefix("/dev/nbd")) for path in (one, two)} <= set(kernel_nbd.INDEXES)
    assert kernel_nbd.find(NAME + "one") == one
    assert kernel_nbd.find(NAME + "two") == two
    assert kernel_nbd.find(NAME + "three") is None
    kernel_nbd.detach(one)
    assert kernel_nbd.find(NAME + "one") is None
    assert Path(two).read_bytes() == image.read_bytes()


def test_attach_device_that_somebody_looks_at_is_waited_for(
    serve: Serve, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As udev does, from the moment that it is made: left behind, nobody would remove it."""
    monkeypatch.setattr(kernel_nbd, "INDEXES", range(1500, 1510))
    with unconnected(1500):
        looking = os.open("/dev/nbd1500", os.O_RDONLY | os.O_CLOEXEC)
        closing_it = threading.Timer(0.5, os.close, [looking])
        closing_it.start()
        device = attach(serve("file", image))
        closing_it.join()
        assert device == "/dev/nbd1500"
        assert Path(device).read_bytes() == image.read_bytes()
        kernel_nbd.detach(device)
        wait_for(lambda: not Path("/sys/block/nbd1500").exists())


def test_attach_device_that_somebody_keeps_open_is_passed_over(
    serve: Serve, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_nbd, "INDEXES", range(1500, 1510))
    monkeypatch.setattr(kernel_nbd, "_LOOKED_AT_S", 0.1)
    with unconnected(1500), opened("/dev/nbd1500"):
        device = attach(serve("file", image))
        assert device == "/dev/nbd1501"
        kernel_nbd.detach(device)


def test_attach_all_devices_taken_says_so(
    serve: Serve, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_nbd, "INDEXES", range(1500, 1502))
    server = serve("file", image)
    assert {attach(server, name) for name in ("one", "two")} == {"/dev/nbd1500", "/dev/nbd1501"}
    with pytest.raises(BusyError) as error:
        attach(server, "three")
    assert error.value.code == "no-device"


def test_attach_nobody_there_names_the_address(folder: Path) -> None:
    with pytest.raises(UnavailableError) as error:
        kernel_nbd.attach(
            folder / "nowhere", identifier=NAME + "x", sector_size=512, read_only=True
        )
    assert error.value.code == "server-gone"
    assert str(folder / "nowhere") in error.value.message


def test_attach_unknown_export_is_not_found(folder: Path, image: Path) -> None:
    socket = folder / "qemu.sock"
    argv = ["qemu-nbd", "-r", "-f", "raw", "-x", "known", "-e", "0", "-t", "-k"]
    process = run.spawn([*argv, str(socket), str(image)], stdout=None, stderr=None)
    try:
        wait_for(lambda: qemu_nbd.greets(socket))
        with pytest.raises(NotFoundError) as error:
            kernel_nbd.attach(
                socket, identifier=NAME + "x", sector_size=512, read_only=True, export="unknown"
            )
        assert error.value.code == "export-missing"
        device = kernel_nbd.attach(
            socket, identifier=NAME + "x", sector_size=512, read_only=True, export="known"
        )
        assert Path(device).read_bytes() == image.read_bytes()
        kernel_nbd.detach(device)
    finally:
        run.terminate(process)


def test_attach_partitions_are_devices(serve: Serve, image: Path) -> None:
    """As of any disk: the kernel reads the table when the device is opened."""
    table = "label: gpt\nstart=1MiB, size=1MiB\nstart=2MiB, size=1MiB\n"
    run.run(["sfdisk", "--quiet", str(image)], stdin=table.encode())
    device = attach(serve("file", image))
    with opened(device):
        wait_for(Path(f"{device}p2").exists)
    assert Path(f"{device}p1").read_bytes() == image.read_bytes()[MIB : 2 * MIB]


def test_server_killed_reads_fail_and_detach_works(serve: Serve, image: Path) -> None:
    """With nobody to serve it again, a request waits for its two seconds, the next not at all."""
    server = serve("file", image)
    device = attach(server, timeout_s=2)
    server.kill()
    assert not attachment.answers(device)
    began = time.monotonic()
    assert not attachment.answers(device)
    assert time.monotonic() - began < 2
    kernel_nbd.detach(device)
    wait_for(lambda: not Path(device).exists())


def test_reconnect_serves_those_who_have_it_open(serve: Serve, image: Path) -> None:
    server = serve("file", image)
    device = attach(server)
    with opened(device) as fd:
        server.kill()
        assert not attachment.answers(device)
        again = serve("file", image)
        taken = kernel_nbd.reconnect(device, again.socket, identifier=NAME + "one", connections=2)
        assert taken == 2
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 4096, 0) == image.read_bytes()[:4096]
    assert kernel_nbd.find(NAME + "one") == device


def test_reconnect_in_time_no_request_fails(serve: Serve, image: Path) -> None:
    """A read that begins while the server is away waits for its return."""
    server = serve("file", image)
    device = attach(server, timeout_s=60)
    server.kill()
    again = serve("file", image)
    reader = run.spawn(["dd", f"if={device}", "iflag=direct", "bs=64k", "count=1", "status=none"])
    wait_for(lambda: waits(reader.pid))
    taken = kernel_nbd.reconnect(device, again.socket, identifier=NAME + "one", connections=2)
    assert taken == 2
    out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert out == image.read_bytes()[:65536]


def waits(pid: int) -> bool:
    """Whether a process sleeps in a request that cannot be interrupted."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"


def test_reconnect_living_connections_stay(serve: Serve, image: Path) -> None:
    server = serve("file", image)
    device = attach(server)
    assert kernel_nbd.reconnect(device, server.socket, identifier=NAME + "one") == 0
    assert attachment.answers(device)


def test_reconnect_with_anothers_identifier_is_refused(serve: Serve, image: Path) -> None:
    server = serve("file", image)
    device = attach(server)
    with pytest.raises(UnavailableError) as error:
        kernel_nbd.reconnect(device, server.socket, identifier=NAME + "two")
    assert error.value.code == "no-device"


def test_detach_again_and_of_nothing_is_no_error(serve: Serve, image: Path) -> None:
    device = attach(serve("file", image))
    for _ in range(2):
        kernel_nbd.detach(device)
    assert kernel_nbd.find(NAME + "one") is None
    assert not (Path("/sys/block") / Path(device).name).exists()


def test_detach_while_open_gives_errors_and_goes_with_the_last_close(
    serve: Serve, image: Path
) -> None:
    device = attach(serve("file", image))
    with opened(device) as fd:
        kernel_nbd.detach(device)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            gone = os.pread(fd, 4096, 2 * MIB) == b""  # the kernel has made it a device of 0 bytes
        except OSError as error:
            gone = error.errno == errno.EIO
        assert gone
    wait_for(lambda: not (Path("/sys/block") / Path(device).name).exists())


def test_users_are_named(serve: Serve, folder: Path) -> None:
    image = folder / "ext4.raw"
    with image.open("wb") as out:
        out.truncate(8 * MIB)
    run.run(["mkfs.ext4", "-q", "-F", str(image)])
    device = attach(serve("file", image))
    assert device_use.users(device) == []
    point = folder / "mnt"
    point.mkdir()
    run.run(["mount", "-o", "ro,noload", device, str(point)])
    try:
        assert device_use.users(device) == [f"mounted at {point}"]
    finally:
        run.run(["umount", str(point)])
    with opened(device) as fd:
        reader = run.spawn(["sleep", "600"], stdin=fd)
    try:
        assert device_use.users(device) == [f"open in process {reader.pid} (sleep)"]
    finally:
        run.terminate(reader)
    run.run(["modprobe", "--all", "dm-mod", "loop"])
    table = f"0 2048 linear {device} 0"
    run.run(["dmsetup", "create", "--readonly", "--noudevsync", "oft", "--table", table])
    try:
        assert device_use.users(device) == ["part of oft"]
    finally:
        run.run(["dmsetup", "remove", "--noudevsync", "oft"])
    loop = run.run(["losetup", "--find", "--show", "--read-only", device]).stdout.strip()
    try:
        assert device_use.users(device) == [f"under {Path(loop).name}"]
    finally:
        run.run(["losetup", "--detach", loop])


def test_family_unknown_is_not_found() -> None:
    with pytest.raises(FileNotFoundError):
        Family("offload-none")
    with closing(Family("nlctrl")) as family, pytest.raises(OSError, match="not supported"):
        family.ask(200, [])
