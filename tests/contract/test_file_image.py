"""Images of plain files and block devices."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import IntegrityError, NotFoundError, PrivilegeError, UnavailableError
from offload.image import Image
from offload.images.file import FileImage
from offload.model import ExtentKind, RawSource
from offload.testing.pools import loop_device

_BLOCK = 4096


def _sparse(path: Path, size: int, blocks: dict[int, bytes]) -> RawSource:
    with path.open("wb") as out:
        for at, data in blocks.items():
            out.seek(at)
            out.write(data)
        out.truncate(size)
        out.flush()
        os.fsync(out.fileno())
    return RawSource(path=path, size_bytes=size)


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def image(tmp_path: Path) -> Iterator[FileImage]:
    """Data in the blocks 0 and 16, 1 MiB and 100 bytes long."""
    blocks = {0: b"a" * _BLOCK, 16 * _BLOCK: b"b" * _BLOCK}
    with FileImage(_sparse(tmp_path / "i.raw", (1 << 20) + 100, blocks)) as made:
        yield made


def test_file_image_is_an_image(image: FileImage) -> None:
    assert isinstance(image, Image)
    assert image.size_bytes == (1 << 20) + 100
    assert image.block_size == 512


def test_extents_whole_file_tell_data_from_holes(image: FileImage) -> None:
    found = [(e.offset, e.length, e.kind) for e in image.extents(0, image.size_bytes)]
    assert found == [
        (0, _BLOCK, ExtentKind.DATA),
        (_BLOCK, 15 * _BLOCK, ExtentKind.HOLE),
        (16 * _BLOCK, _BLOCK, ExtentKind.DATA),
        (17 * _BLOCK, (1 << 20) + 100 - 17 * _BLOCK, ExtentKind.HOLE),
    ]


def test_extents_unaligned_range_is_covered_exactly(image: FileImage) -> None:
    found = [(e.offset, e.length, e.kind) for e in image.extents(100, 16 * _BLOCK)]
    assert found == [
        (100, _BLOCK - 100, ExtentKind.DATA),
        (_BLOCK, 15 * _BLOCK, ExtentKind.HOLE),
        (16 * _BLOCK, 100, ExtentKind.DATA),
    ]
    assert list(image.extents(5, 0)) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_extents_of_any_range_cover_it_and_holes_read_zero(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    size = data.draw(st.integers(1, 40 * _BLOCK))
    starts = data.draw(st.sets(st.integers(0, max(size - 10, 0)), max_size=5))
    path = tmp_path_factory.mktemp("any") / "i.raw"
    with FileImage(_sparse(path, size, dict.fromkeys(starts, b"x"))) as image:
        offset = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - offset))
        found = list(image.extents(offset, length))
        assert sum(e.length for e in found) == length
        assert all(e.length > 0 for e in found)
        assert all(a.end == b.offset for a, b in pairwise(found))
        assert not found or found[0].offset == offset
        for extent in found:
            if extent.kind is ExtentKind.HOLE:
                assert not any(image.pread(extent.offset, extent.length))


def test_extents_many_ranges_in_one_stretch_of_data_ask_once_where_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel walks all of the stretch for each answer."""
    source = _sparse(tmp_path / "i.raw", 1 << 20, {0: b"d" * (64 * _BLOCK), 1 << 19: b"e"})
    asked: list[int] = []
    real = os.lseek

    def _counted(fd: int, at: int, how: int) -> int:
        asked.append(at)
        return real(fd, at, how)

    monkeypatch.setattr(os, "lseek", _counted)
    with FileImage(source) as image:
        for block in range(64):
            (extent,) = image.extents(block * _BLOCK, 100)
            assert extent.kind is ExtentKind.DATA
        assert len(asked) == 2
        found = [(e.offset, e.kind) for e in image.extents(60 * _BLOCK, (1 << 20) - 60 * _BLOCK)]
    assert [kind for _, kind in found] == [
        ExtentKind.DATA, ExtentKind.HOLE, ExtentKind.DATA, ExtentKind.HOLE,
    ]  # fmt: skip
    assert found[1][0] == 64 * _BLOCK


def test_pread_end_of_a_file_of_no_whole_sectors(image: FileImage) -> None:
    assert image.pread(image.size_bytes - 7, 7) == bytes(7)
    assert image.pread(16 * _BLOCK - 1, 3) == b"\0bb"
    assert image.pread(image.size_bytes, 0) == b""


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, (1 << 20) + 101), (1 << 60, 1)])
def test_read_outside_is_a_value_error(image: FileImage, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        image.pread(offset, length)
    with pytest.raises(ValueError, match="outside"):
        list(image.extents(offset, length))


def test_readinto_buffer_of_wider_items_is_filled_whole(image: FileImage) -> None:
    buffer = memoryview(bytearray(16)).cast("Q")
    image.readinto(0, buffer)
    assert buffer.tobytes() == b"a" * 16


def test_readinto_short_reads_go_on_until_the_buffer_is_full(
    image: FileImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may return less than asked for; 2 GiB is the most that it does."""
    real = os.preadv

    def _few(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", _few)
    assert image.pread(_BLOCK - 1500, 3000) == b"a" * 1500 + bytes(1500)


def test_read_file_truncated_while_open_is_an_integrity_error(tmp_path: Path) -> None:
    source = _sparse(tmp_path / "i.raw", 1 << 20, {0: b"x"})
    with FileImage(source) as image:
        os.truncate(source.path, 1 << 19)
        with pytest.raises(IntegrityError) as read:
            image.pread((1 << 19) - 10, 20)
        with pytest.raises(IntegrityError) as mapped:
            list(image.extents(0, 1 << 20))
    assert read.value.code == mapped.value.code == "image-short"


def test_open_file_longer_than_the_image_shows_the_image_only(tmp_path: Path) -> None:
    source = _sparse(tmp_path / "i.raw", 1 << 20, {0: b"x", 600_000: b"y"})
    shorter = RawSource(path=source.path, size_bytes=600_001, sector_size=4096)
    with FileImage(shorter) as image:
        assert image.block_size == 4096
        assert image.pread(600_000, 1) == b"y"
        assert list(image.extents(0, 600_001))[-1].end == 600_001


def test_open_errors_close_what_was_opened(tmp_path: Path) -> None:
    source = _sparse(tmp_path / "i.raw", 1 << 20, {})
    before = _open_descriptors()
    with pytest.raises(IntegrityError):
        FileImage(RawSource(path=source.path, size_bytes=(1 << 20) + 1))
    with pytest.raises(NotFoundError):
        FileImage(RawSource(path=tmp_path / "gone", size_bytes=1))
    with pytest.raises(UnavailableError):
        FileImage(RawSource(path=tmp_path, size_bytes=1))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnavailableError):
        FileImage(RawSource(path=tmp_path / "fifo", size_bytes=1))
    assert _open_descriptors() == before


def test_open_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def _denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", _denied)
    with pytest.raises(PrivilegeError) as denied:
        FileImage(RawSource(path=tmp_path / "i.raw", size_bytes=1))
    assert denied.value.code == "image-permission"


def test_close_twice_is_like_once(image: FileImage) -> None:
    image.close()
    image.close()


def test_reads_and_extents_from_several_threads_do_not_disturb_each_other(
    tmp_path: Path,
) -> None:
    blocks = {at * 2 * _BLOCK: bytes([at + 1]) * _BLOCK for at in range(64)}
    source = _sparse(tmp_path / "i.raw", 128 * _BLOCK, blocks)
    failed: list[BaseException] = []
    with FileImage(source) as image:
        expected = list(image.extents(0, source.size_bytes))

        def _work(number: int) -> None:
            try:
                for _ in range(30):
                    assert list(image.extents(0, source.size_bytes)) == expected
                    at = number * 2 * _BLOCK
                    assert image.pread(at, _BLOCK) == blocks[at]
            except BaseException as error:  # noqa: BLE001 - shown by the test itself
                failed.append(error)

        threads = [threading.Thread(target=_work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


@pytest.mark.needs_root
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_block_device_is_all_data(tmp_path: Path, sector_size: int) -> None:
    file = _sparse(tmp_path / "i.raw", 1 << 20, {_BLOCK: b"block"})
    with loop_device(file.path, sector_size=sector_size) as device:
        source = RawSource(path=device, size_bytes=1 << 20, sector_size=sector_size)
        with FileImage(source) as image:
            (extent,) = image.extents(3, (1 << 20) - 3)
            assert (extent.offset, extent.end, extent.kind) == (3, 1 << 20, ExtentKind.DATA)
            assert image.pread(_BLOCK, 5) == b"block"
        with pytest.raises(IntegrityError):
            FileImage(RawSource(path=device, size_bytes=2 << 20))
