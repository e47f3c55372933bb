"""An image in memory, for tests of what reads images."""

from __future__ import annotations

from collections.abc import Iterator

from offload.extents import Ranges, intersect, normalize, to_extents
from offload.model import Extent

_HOLE_UNIT = 4096


class MemoryImage:
    """A bytearray as an Image. Blocks of 4 KiB that are all zeros show as holes, unless `dense`.

    `reads` lists what was read, as `(start, end)`.
    """

    def __init__(self, data: bytes | bytearray, *, dense: bool = False) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []
        self._ranges = normalize(
            (at, min(at + _HOLE_UNIT, len(data)))
            for at in range(0, len(data), _HOLE_UNIT)
            if dense or any(data[at : at + _HOLE_UNIT])
        )

    @property
    def size_bytes(self) -> int:
        """The length of the bytearray."""
        return len(self.data)

    @property
    def block_size(self) -> int:
        """512."""
        return 512

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Blocks with something in them are data."""
        return to_extents(self._ranges, offset, length)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Copy, and note what was read."""
        if offset < 0 or offset + len(buffer) > len(self.data):
            raise ValueError("outside the image")
        self.reads.append((offset, offset + len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def pread(self, offset: int, length: int) -> bytes:
        """Copy, and note what was read."""
        out = bytearray(length)
        self.readinto(offset, memoryview(out))
        return bytes(out)

    def close(self) -> None:
        """Nothing to release."""

    def read_of(self, ranges: Ranges) -> Ranges:
        """Which part of `ranges` was read so far."""
        return intersect(normalize(self.reads), ranges)
