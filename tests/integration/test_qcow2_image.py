"""NbdImage, Qcow2Image and qemu_nbd against the real qemu-nbd."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import compose, qemu_nbd, run
from offload.errors import BusyError, IntegrityError, NotFoundError, UnavailableError
from offload.image import Image
from offload.images.nbd import NbdImage
from offload.images.qcow2 import Qcow2Image
from offload.model import Extent, ExtentKind, NbdSource, Qcow2Source

MIB = 1 << 20
SIZE = 96 * MIB


def write(path: Path, offset: int, length: int, byte: int) -> None:
    run.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P {byte} {offset} {length}", str(path)])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A qcow2 of 96 MiB: ones at 1 MiB (3 MiB long), a sevens block at 80 MiB, zeros at 90 MiB."""
    path = tmp_path / "disk.qcow2"
    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)])
    write(path, MIB, 3 * MIB, 1)
    write(path, 80 * MIB, MIB, 7)
    run.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -z {90 * MIB} {MIB}", str(path)])
    return path


def source(path: Path, snapshot: str | None = None) -> Qcow2Source:
    return Qcow2Source(path=path, size_bytes=SIZE, snapshot=snapshot)


@pytest.fixture
def image(disk: Path) -> Iterator[Qcow2Image]:
    made = Qcow2Image(source(disk))
    yield made
    made.close()


def raw_of(path: Path, to: Path) -> bytes:
    run.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(to)])
    return to.read_bytes()


def test_qcow2_image_read_anywhere_gives_the_bytes_of_qemu_img(
    image: Qcow2Image, disk: Path, tmp_path: Path
) -> None:
    truth = raw_of(disk, tmp_path / "raw")
    assert isinstance(image, Image)
    assert image.size_bytes == SIZE
    rng = random.Random(4)
    for _ in range(40):
        offset = rng.randrange(SIZE)
        length = min(rng.randrange(1, 2 * MIB), SIZE - offset)
        assert image.pread(offset, length) == truth[offset : offset + length]
    assert image.pread(0, SIZE) == truth  # more than one request of 32 MiB


def test_qcow2_image_extents_cover_exactly_and_name_all_data(
    image: Qcow2Image, disk: Path, tmp_path: Path
) -> None:
    truth = raw_of(disk, tmp_path / "raw")
    for offset, length in ((0, SIZE), (MIB + 777, 5 * MIB), (SIZE - 1, 1)):
        at = offset
        for extent in image.extents(offset, length):
            assert extent.offset == at
            assert extent.length > 0
            at = extent.end
            if extent.kind is not ExtentKind.DATA:
                assert not any(truth[extent.offset : extent.end])
        assert at == offset + length
    assert Extent(MIB, 3 * MIB, ExtentKind.DATA) in list(image.extents(0, SIZE))


def test_qcow2_image_read_in_several_threads_at_once_is_right(
    image: Qcow2Image, disk: Path, tmp_path: Path
) -> None:
    truth = raw_of(disk, tmp_path / "raw")
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            offset = rng.randrange(SIZE - MIB)
            if image.pread(offset, MIB) != truth[offset : offset + MIB]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1)])
def test_qcow2_image_read_outside_is_a_value_error(
    image: Qcow2Image, offset: int, length: int
) -> None:
    with pytest.raises(ValueError, match="outside"):
        image.pread(offset, length)


def test_qcow2_image_of_an_internal_snapshot_shows_the_old_bytes(disk: Path) -> None:
    run.run(["qemu-img", "snapshot", "-c", "before", str(disk)])
    write(disk, MIB, MIB, 9)
    old, new = Qcow2Image(source(disk, "before")), None
    try:
        assert old.pread(MIB, MIB) == b"\1" * MIB
        new = Qcow2Image(source(disk))  # readers share the image
        assert new.pread(MIB, MIB) == b"\x09" * MIB
    finally:
        old.close()
        if new is not None:
            new.close()


def test_qcow2_image_after_a_resize_shows_the_size_of_the_record(disk: Path) -> None:
    run.run(["qemu-img", "resize", "-q", str(disk), str(2 * SIZE)])
    with_old_size = Qcow2Image(source(disk))
    try:
        assert with_old_size.size_bytes == SIZE
        assert sum(e.length for e in with_old_size.extents(0, SIZE)) == SIZE
    finally:
        with_old_size.close()


def test_qcow2_image_smaller_than_its_record_is_an_integrity_error_and_leaves_no_server(
    disk: Path,
) -> None:
    before = servers()
    with pytest.raises(IntegrityError) as caught:
        Qcow2Image(Qcow2Source(path=disk, size_bytes=SIZE + 512))
    assert caught.value.code == "size-mismatch"
    assert servers() == before


def servers() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argv[0].endswith(b"qemu-nbd"):
                found.add(int(entry.name))
    return found


def test_qcow2_image_closed_leaves_no_server(disk: Path) -> None:
    before = servers()
    opened = Qcow2Image(source(disk))
    assert servers() != before
    opened.close()
    opened.close()
    assert servers() == before


def test_qcow2_image_of_a_missing_snapshot_says_so(disk: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        Qcow2Image(source(disk, "never"))
    assert caught.value.code == "snapshot-missing"


def test_qcow2_image_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        Qcow2Image(source(tmp_path / "none.qcow2"))
    assert caught.value.code == "volume-missing"


def test_qcow2_image_in_use_by_a_writer_is_busy(disk: Path, tmp_path: Path) -> None:
    writer_socket = tmp_path / "w.sock"
    writer = run.spawn(
        ["qemu-nbd", "--format=qcow2", "--persistent", f"--socket={writer_socket}", str(disk)]
    )
    try:
        while not qemu_nbd.greets(writer_socket):
            assert writer.poll() is None
        with pytest.raises(BusyError) as caught:
            Qcow2Image(source(disk))
        assert caught.value.code == "volume-in-use"
    finally:
        run.terminate(writer)


def test_server_start_serves_many_clients_until_it_is_stopped(disk: Path, tmp_path: Path) -> None:
    sock, pid = tmp_path / "s.sock", tmp_path / "s.pid"
    ref = qemu_nbd.start(
        source(disk), socket_path=sock, pid_file=pid, log_path=tmp_path / "log", export_name="a b"
    )
    try:
        assert pid.read_text().strip() == str(ref.pid)
        assert qemu_nbd.find(sock) == [ref]
        for _ in range(2):  # persistent: it stays when its last client goes
            views = [
                compose.open_image(
                    NbdSource(uri=qemu_nbd.uri(sock, "a b"), size_bytes=SIZE, sector_size=4096)
                )
                for _ in range(5)
            ]
            assert {v.pread(80 * MIB, 4) for v in views} == {b"\7\7\7\7"}
            assert views[0].block_size == 4096
            for view in views:
                view.close()
    finally:
        qemu_nbd.stop(sock, pid)
    assert not ref.alive()
    assert not sock.exists()
    assert not pid.exists()
    qemu_nbd.stop(sock, pid)


def test_server_that_dies_makes_reads_unavailable(disk: Path, tmp_path: Path) -> None:
    sock, pid = tmp_path / "s.sock", tmp_path / "s.pid"
    ref = qemu_nbd.start(source(disk), socket_path=sock, pid_file=pid, log_path=tmp_path / "log")
    view = NbdImage(qemu_nbd.uri(sock))
    ref.end()
    with pytest.raises(UnavailableError) as caught:
        view.pread(0, 4096)
    assert caught.value.code == "nbd-unavailable"
    view.close()
    qemu_nbd.stop(sock, pid)


def test_nbd_image_of_a_server_that_is_no_nbd_server_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        threading.Thread(target=lambda: server.accept()[0].sendall(os.urandom(64))).start()
        with pytest.raises(UnavailableError):
            NbdImage(qemu_nbd.uri(path))
