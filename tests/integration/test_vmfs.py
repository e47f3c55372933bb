"""Disks of VMs straight from a LUN, on VMFS images that ESXi made (tests/data/vmfs/README.md)."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmfs_images import PACKED, unpack

from offload import compose
from offload.errors import IntegrityError, NotFoundError, OffloadError, UnavailableError, UsageError
from offload.images.file import FileImage
from offload.images.vmfs.directory import find, walk
from offload.images.vmfs.filesystem import Vmfs
from offload.images.vmfs.lun import LogicalVolume
from offload.images.vmfs.vmdk import disks, flat_extents
from offload.model import Extent, ExtentKind, RawSource
from offload.sources import lun_of, on_lun, source_from_dict, source_to_dict

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


@pytest.fixture(scope="module")
def luns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as sparse files."""
    folder = tmp_path_factory.mktemp("vmfs")
    for packed in PACKED.glob("*.zst"):
        unpack(packed.stem, folder / packed.stem)
    return folder


def raw(path: Path) -> RawSource:
    return RawSource(path=path, size_bytes=path.stat().st_size)


@pytest.fixture(params=["vmfs5", "vmfs6"])
def lun(request: pytest.FixtureRequest, luns: Path) -> Path:
    return luns / str(request.param)


@pytest.fixture
def vmfs(lun: Path) -> Iterator[Vmfs]:
    with FileImage(raw(lun)) as image:
        yield Vmfs(LogicalVolume([image]))


def test_walk_finds_all_files_and_they_have_what_was_written(vmfs: Vmfs, lun: Path) -> None:
    assert vmfs.geometry.label == lun.name
    assert vmfs.geometry.six == (lun.name == "vmfs6")
    found = {path: vmfs.node(entry.address) for path, entry in walk(vmfs)}
    assert {f"directory/file{n}" for n in range(1, 101)} < set(found)
    assert len([path for path in found if path.startswith("collision/")]) > 10
    for number in range(1, 101):
        content = f"File {number}\n".encode()
        assert vmfs.read(found[f"directory/file{number}"]) == content
    assert vmfs.read(found["small"]) == b"tiny\n"
    assert vmfs.read(found["big"]) == b"Kusjes van SRT<3" * 65536 + b"\n"
    assert vmfs.read(found["symlink"]) == f"/vmfs/volumes/{lun.name}/small".encode()
    bigger = found["bigger"]
    for mib in range(128):
        expected = bytes([mib]) * MIB
        assert vmfs.pread(bigger, mib * MIB, MIB) == expected


def test_read_across_blocks_gives_both_sides(vmfs: Vmfs) -> None:
    assert vmfs.pread(find(vmfs, "bigger"), 7 * MIB - 3, 6) == b"\6\6\6\7\7\7"


def test_disks_are_told_with_their_kinds_and_sizes(vmfs: Vmfs) -> None:
    found = {disk.path: disk for disk in disks(vmfs)}
    assert {path: disk.kind for path, disk in found.items()} == {
        "normal.vmdk": "flat", "large.vmdk": "flat", "rdm.vmdk": "rdm",
    }  # fmt: skip
    assert found["normal.vmdk"].size_bytes == 69 * GIB
    assert found["large.vmdk"].size_bytes == 42 * TIB
    assert found["large.vmdk"].extents == (("large-flat.vmdk", 42 * TIB),)


@pytest.mark.parametrize(
    ("path", "size", "written"),
    [("normal.vmdk", 69 * GIB, 42 * GIB), ("/large.vmdk", 42 * TIB, 117 * GIB)],
)
def test_disk_is_an_image_with_its_holes(lun: Path, path: str, size: int, written: int) -> None:
    source = on_lun(raw(lun), path, size)
    assert source_from_dict(source_to_dict(source)) == source
    assert lun_of(source) == raw(lun)
    image = compose.open_image(source)
    try:
        assert image.size_bytes == size
        assert image.block_size == 512
        kinds = {(e.offset, e.length) for e in image.extents(0, size) if e.kind is ExtentKind.DATA}
        assert sum(length for _, length in kinds) <= MIB
        assert any(offset <= written < offset + length for offset, length in kinds)
        part = list(image.extents(written - 5, 1000))
        assert part[0] == Extent(written - 5, 5, ExtentKind.HOLE)
        assert part[-1].end == written + 995
        assert image.pread(written - 4, 520) == bytes(4) + b"\x42" * 512 + bytes(4)
        assert image.pread(size - 512, 512) == bytes(512)
        with pytest.raises(ValueError, match="of a disk"):
            image.pread(size - 1, 2)
    finally:
        image.close()
        image.close()


@pytest.mark.parametrize(
    ("path", "error", "code"),
    [
        ("rdm.vmdk", UnavailableError, "vmdk-is-rdm"),
        ("normal-flat.vmdk", UsageError, "no-vmdk"),
        ("directory", UsageError, "no-vmdk"),
        ("web/web.vmdk", NotFoundError, "no-such-file"),
    ],
)
def test_what_is_no_flat_disk_is_refused(
    vmfs: Vmfs, path: str, error: type[OffloadError], code: str
) -> None:
    with pytest.raises(error) as caught:
        flat_extents(vmfs, path)
    assert caught.value.code == code
    assert caught.value.hint


def test_vmfs_in_a_partition_is_found(luns: Path, tmp_path: Path) -> None:
    """With a GUID partition table, as ESXi makes it."""
    disk = tmp_path / "disk"
    with (luns / "vmfs6").open("rb") as inner, disk.open("xb") as out:
        size = os.fstat(inner.fileno()).st_size
        at = 0
        while True:
            try:
                at = os.lseek(inner.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(inner.fileno(), at, os.SEEK_HOLE)
            inner.seek(at)
            out.seek(MIB + at)
            out.write(inner.read(min(end - at, 256 << 10)))  # a part is enough for its metadata
            at += min(end - at, 256 << 10)
        out.truncate(MIB + size)
        kind = bytes.fromhex("2ae031aa0f40db119590000c2911d1b8")
        entry = kind + bytes(16) + (2048).to_bytes(8, "little") + bytes(88)
        out.seek(1024)
        out.write(entry)
        out.seek(512)
        head = b"EFI PART".ljust(72, b"\0") + (2).to_bytes(8, "little")
        out.write(head + (128).to_bytes(4, "little") * 2)
    with FileImage(raw(disk)) as image:
        assert find(Vmfs(LogicalVolume([image])), "small").size_bytes == 5


def test_fewer_sub_blocks_a_cluster_are_understood(luns: Path) -> None:
    with FileImage(raw(luns / "vmfs5-no-dense-sbpc")) as image:
        vmfs = Vmfs(LogicalVolume([image]))
        assert not vmfs.geometry.dense
        assert list(walk(vmfs)) == []


def test_vmfs_on_two_luns_needs_both_in_any_order(luns: Path) -> None:
    with (
        FileImage(raw(luns / "vmfs6-span-0")) as one,
        FileImage(raw(luns / "vmfs6-span-1")) as two,
    ):
        assert list(walk(Vmfs(LogicalVolume([two, one])))) == []
        for alone in (one, two):
            with pytest.raises(UnavailableError) as caught:
                LogicalVolume([alone])
            assert caught.value.code == "vmfs-spans"


def test_no_vmfs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(hashlib.sha512(b"x").digest() * (4 * MIB // 64))
    with FileImage(raw(path)) as image, pytest.raises(IntegrityError) as caught:
        LogicalVolume([image])
    assert caught.value.code == "not-vmfs"


def _metadata(path: Path, limit: int) -> list[int]:
    """Where bytes are stored, in the first part of an image."""
    found = []
    with path.open("rb") as file:
        at = MIB
        while at < limit:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            file.seek(at)
            found += [at + i for i, byte in enumerate(file.read(4096)) if byte]
            at += 4096
    return found


def test_damaged_vmfs_gives_an_error_or_what_it_says(lun: Path) -> None:
    """Never a crash, never bytes from outside; each of the damages is bounded work. All of them are
    mended again."""
    places = _metadata(lun, 64 * MIB)
    chance = random.Random(lun.name)
    outcomes = set()
    with lun.open("r+b") as file:
        for _ in range(60):
            hit = [chance.choice(places) for _ in range(3)]
            before = {at: os.pread(file.fileno(), 1, at) for at in hit}
            for at in hit:
                os.pwrite(file.fileno(), bytes([chance.randrange(256)]), at)
            try:
                with FileImage(raw(lun)) as image:
                    vmfs = Vmfs(LogicalVolume([image]))
                    for disk in disks(vmfs):
                        if disk.kind == "flat":
                            _, extents = flat_extents(vmfs, disk.path)
                            vmfs.pread(extents[0][0], 42 * GIB, 4096)
                outcomes.add("read")
            except OffloadError as error:
                outcomes.add(error.code)
            for at, byte in before.items():
                os.pwrite(file.fileno(), byte, at)
    assert {"read", "bad-vmfs"} <= outcomes
