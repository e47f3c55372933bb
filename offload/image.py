"""The one idea of the project: whatever can be read at a point in time is an Image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from offload.model import Extent


@runtime_checkable
class Image(Protocol):
    """A fixed number of bytes, readable at any offset; immutable while open.

    Thread safety: `extents`, `pread` and `readinto` may run in several threads at once.
    Buffers: `readinto` fills the caller's buffer and keeps no reference to it.
    Errors: `UnavailableError` when the medium fails, `IntegrityError` when bytes that were read
    are not those that were written; never other data than was asked for.
    """

    @property
    def size_bytes(self) -> int:
        """The size of the image in bytes."""
        ...

    @property
    def block_size(self) -> int:
        """The logical sector size of the volume it shows: 512 or 4096."""
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Cover exactly `[offset, offset + length)`, in order, without gaps or overlaps."""
        ...

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset`; a range past the end is a ValueError."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        ...

    def close(self) -> None:
        """Release what is held. Idempotent."""
        ...
