"""From LUNs to the logical volume of a VMFS: a partition, the header of VMware's volume manager,
and its table of physical extents.

Layout of a device, from the start of its partition: 1 MiB on, `DEVICE` (little endian, packed);
behind it 1024 sectors for descriptions of volumes and the names of devices; then pairs of a bitmap
and a table of 8192 entries of 128 bytes, one entry a physical extent.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from offload.errors import IntegrityError, UnavailableError
from offload.image import Image

_HEADER = 0x100000  # bytes from the start of the partition
_MAGIC = 0xC001D00D
_SECTOR = 512
_VOLUMES = 1024 * _SECTOR  # descriptions of volumes, names of devices
_ENTRIES = 8192  # of one table
_ENTRY_BYTES = 128
_BITMAP_5 = 1024
_MAPS_MAX = 64  # tables that are looked at: twice what a VMFS can have
_GPT_TYPE = UUID("aa31e02a-400f-11db-9590-000c2911d1b8")
_MBR_TYPE = 0xFB

# magic, major, minor; disk id; block size, size, volumes, physical extents
_DEVICE = struct.Struct("<III 78s IQII")
_DEVICE_MORE = {"maps": 0xBE, "next": 0xC2, "alignment": 0xCA}
# size; generation, state, name; id of the volume and of its snapshot; creation; index, number of
# extents, first, last; modification; devices
_VOLUME = struct.Struct("<Q 12x 64s 16s I 8x II QQ 8x I")
_EXTENT = struct.Struct("<B II QQQ")  # used; id, volume; physical, logical offset, length


@dataclass(frozen=True, slots=True)
class Run:
    """`length` bytes of the logical volume from `logical`: on a device, from `physical` (of the
    image, not of the partition)."""

    logical: int
    physical: int
    length: int
    device: int


@dataclass(frozen=True, slots=True)
class _Device:
    start: int  # of the partition
    volume: bytes  # id of the logical volume
    index: int
    first: int  # physical extent
    devices: int
    size: int  # of the logical volume
    runs: tuple[tuple[int, int, int], ...]  # logical, physical, length


class LogicalVolume:
    """The bytes of a VMFS, on one LUN or several, given in any order. Thread safe."""

    def __init__(self, luns: Sequence[Image]) -> None:
        """Raises IntegrityError (`not-vmfs`, `bad-vmfs`), UnavailableError (`vmfs-spans`: LUNs are
        missing)."""
        self._luns = luns
        found = sorted(
            ((_device(lun), at) for at, lun in enumerate(luns)), key=lambda pair: pair[0].first
        )
        head = found[0][0]
        if any(device.volume != head.volume for device, _ in found) or head.first != 0:
            raise UnavailableError(
                "the LUNs are not all of one VMFS, or its first is missing", code="vmfs-spans"
            )
        if head.devices > len(found):
            raise UnavailableError(
                f"the VMFS spans {head.devices} LUNs, and {len(found)} is here",
                code="vmfs-spans",
                hint="its VMs can be mounted as placeholders on an ESXi host",
            )
        self.size_bytes = head.size
        self._runs = _merged(found)
        self._starts = [run.logical for run in self._runs]
        end = self._runs[-1].logical + self._runs[-1].length if self._runs else 0
        if end < self.size_bytes:
            raise IntegrityError("the VMFS has no storage behind its end", code="bad-vmfs")

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Where these bytes lie. Raises IntegrityError (`bad-vmfs`) outside of the volume."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise IntegrityError(
                f"the VMFS points outside of itself: {length} bytes at {offset}", code="bad-vmfs"
            )
        at = bisect_right(self._starts, offset) - 1
        while length > 0:
            run = self._runs[at]
            into = offset - run.logical
            count = min(length, run.length - into)
            yield Run(offset, run.physical + into, count, run.device)
            offset, length, at = offset + count, length - count, at + 1

    def pread(self, offset: int, length: int) -> bytes:
        """These bytes. Raises IntegrityError (`bad-vmfs`), and what the LUNs raise."""
        return b"".join(
            self._luns[run.device].pread(run.physical, run.length)
            for run in self.runs(offset, length)
        )

    def lun(self, run: Run) -> Image:
        """The LUN that a run lies on."""
        return self._luns[run.device]


def _device(lun: Image) -> _Device:
    start = _partition(lun)
    head = _read(lun, start + _HEADER, 0xD6)
    _, major, _, _, _, _, volumes, extents = _DEVICE.unpack_from(head)
    if volumes != 1:
        raise IntegrityError(f"the LUN has {volumes} logical volumes, not one", code="bad-vmfs")
    new = major >= 6
    alignment = _u32(head, _DEVICE_MORE["alignment"]) if new else _SECTOR
    if not _SECTOR <= alignment <= 1 << 20:
        raise IntegrityError(f"a metadata alignment of {alignment} bytes", code="bad-vmfs")
    known = _VOLUME.unpack(_read(lun, start + _HEADER + alignment, _VOLUME.size))
    size, _, ident, snap, index, _, first, _, devices = known
    bitmap = max(alignment, _BITMAP_5) if new else _BITMAP_5
    runs: list[tuple[int, int, int]] = []
    for at in _tables(lun, start, head, alignment, bitmap):
        count = min(extents, _ENTRIES)
        runs += _extents(_read(lun, at, count * _ENTRY_BYTES), index, start, lun.size_bytes)
        extents -= count
        if extents <= 0:
            break
    return _Device(
        start, ident + snap.to_bytes(4, "little"), index, first, devices, size, tuple(runs)
    )


def _tables(lun: Image, start: int, head: bytes, alignment: int, bitmap: int) -> Iterator[int]:
    """Where tables of physical extents begin."""
    maps = _u32(head, _DEVICE_MORE["maps"]) or 1
    at, after = start + _HEADER, _u64(head, _DEVICE_MORE["next"])
    left = _MAPS_MAX
    while True:
        for number in range(min(maps, left)):
            yield at + alignment + _VOLUMES + number * (bitmap + _ENTRIES * _ENTRY_BYTES) + bitmap
        left -= maps
        if not after or left <= 0:
            return
        at = start + after
        more = _read(lun, at, 24)
        if _u32(more, 0) != _MAGIC:
            raise IntegrityError("a table of physical extents has no magic", code="bad-vmfs")
        maps, after = _u32(more, 4) or 1, _u64(more, 16)


def _extents(table: bytes, volume: int, start: int, size: int) -> Iterator[tuple[int, int, int]]:
    for at in range(0, len(table), _ENTRY_BYTES):
        used, _, of, physical, logical, length = _EXTENT.unpack_from(table, at)
        if not used or of != volume:
            continue
        if length == 0 or start + physical + length > size:
            # the last one may reach past the end of a LUN that is no multiple of it
            length = size - start - physical
            if length <= 0:
                raise IntegrityError("a physical extent outside of the LUN", code="bad-vmfs")
        yield logical, start + physical, length


def _merged(found: Sequence[tuple[_Device, int]]) -> list[Run]:
    made: list[Run] = []
    every = sorted(
        (logical, physical, length, at)
        for device, at in found
        for logical, physical, length in device.runs
    )
    for logical, physical, length, at in every:
        last = made[-1] if made else None
        end = last.logical + last.length if last is not None else 0
        if logical != end:
            raise IntegrityError(
                f"physical extents of the VMFS: one at {logical}, where {end} is next",
                code="bad-vmfs",
            )
        if last is not None and last.device == at and last.physical + last.length == physical:
            made[-1] = Run(last.logical, last.physical, last.length + length, at)
        else:
            made.append(Run(logical, physical, length, at))
    return made


def _partition(lun: Image) -> int:
    """Where the partition of the VMFS begins; 0 where the LUN has none.

    Raises IntegrityError (`not-vmfs`).
    """
    for start in _candidates(lun):
        if start + _HEADER + 4 <= lun.size_bytes:
            (magic,) = struct.unpack("<I", lun.pread(start + _HEADER, 4))
            if magic == _MAGIC:
                return start
    raise IntegrityError(
        "there is no VMFS on it", code="not-vmfs", hint="VMDKs are found on volumes with a VMFS"
    )


def _candidates(lun: Image) -> Iterator[int]:
    yield 0
    for sector in dict.fromkeys((lun.block_size, 512, 4096)):
        head = lun.pread(sector, 92) if lun.size_bytes >= sector + 92 else b""
        if head[:8] == b"EFI PART":  # UEFI 2.10, 5.3.2
            table, count, size = struct.unpack_from("<QII", head, 72)
            if 128 <= size <= 4096 and table * sector + count * size <= lun.size_bytes:
                entries = lun.pread(table * sector, min(count, 128) * size)
                for at in range(0, len(entries), size):
                    if entries[at : at + 16] == _GPT_TYPE.bytes_le:
                        yield struct.unpack_from("<Q", entries, at + 32)[0] * sector
        mbr = lun.pread(446, 66) if lun.size_bytes >= _SECTOR else b""
        if mbr[64:] == b"\x55\xaa":
            for at in range(0, 64, 16):
                if mbr[at + 4] == _MBR_TYPE:
                    yield struct.unpack_from("<I", mbr, at + 8)[0] * sector


def _read(lun: Image, offset: int, length: int) -> bytes:
    if offset < 0 or offset + length > lun.size_bytes:
        raise IntegrityError("the VMFS's description leads outside of the LUN", code="bad-vmfs")
    return lun.pread(offset, length)


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
