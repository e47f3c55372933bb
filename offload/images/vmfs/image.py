"""One disk of a VM as an Image, out of the LUN that its VMFS lies on: nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator

from offload.image import Image
from offload.images.vmfs.filesystem import Node, Vmfs
from offload.images.vmfs.lun import LogicalVolume
from offload.images.vmfs.vmdk import flat_extents
from offload.model import Extent, ExtentKind

_SECTOR = 512  # what a VM sees of a disk in a VMFS


class VmfsImage:
    """The Image over a flat VMDK. It owns `lun`.

    Raises what `LogicalVolume`, `Vmfs` and `flat_extents` raise.
    """

    def __init__(self, lun: Image, path: str) -> None:
        self._lun = lun
        self._volume = LogicalVolume([lun])
        self._vmfs = Vmfs(self._volume)
        disk, extents = flat_extents(self._vmfs, path)
        self._size = disk.size_bytes
        self._parts: list[tuple[int, int, Node]] = []  # from, to, file
        at = 0
        for node, size in extents:
            self._parts.append((at, at + size, node))
            at += size

    @property
    def size_bytes(self) -> int:
        """The size of the disk in bytes."""
        return self._size

    @property
    def block_size(self) -> int:
        """512."""
        return _SECTOR

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Cover exactly the range; blocks that are not allocated, or not written yet, are holes,
        and where they are, what the LUN knows of itself."""
        self._check(offset, length)
        for at, place, count in self._runs(offset, length):
            if place is None:
                yield Extent(at, count, ExtentKind.HOLE)
                continue
            for run in self._volume.runs(place, count):
                shift = at + run.logical - place - run.physical
                for extent in self._lun.extents(run.physical, run.length):
                    yield Extent(extent.offset + shift, extent.length, extent.kind)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset`; a range past the end is a ValueError."""
        view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        self._check(offset, len(view))
        for at, place, count in self._runs(offset, len(view)):
            into = view[at - offset : at - offset + count]
            if place is None:
                into[:] = bytes(count)
                continue
            for run in self._volume.runs(place, count):
                start = run.logical - place
                self._lun.readinto(run.physical, into[start : start + run.length])

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        self._check(offset, length)
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Close the LUN. Idempotent."""
        self._lun.close()

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int | None, int]]:
        """Offset in the disk, place in the volume (None: zeros), bytes."""
        end = offset + length
        for first, last, node in self._parts:
            start, stop = max(offset, first), min(end, last)
            if start < stop:
                for piece in self._vmfs.pieces(node, start - first, stop - start):
                    yield first + piece.offset, piece.place, piece.length

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"{length} bytes at {offset} of a disk of {self._size}")
