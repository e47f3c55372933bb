"""Memory to read packs into, used again and again.

A buffer of megabytes is given back to the kernel when it is freed, and its pages are made anew for
the next one: that took as long as copying the bytes of a near store into it, twice over.
"""

from __future__ import annotations

import mmap

from offload.store import Filling, Store

_STEP = 1 << 20


class Room:
    """Some memory. One thread at a time; what was read into it is there until the next read."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, length: int) -> memoryview:
        """`length` bytes of it, of any content."""
        if len(self._memory) < length:
            self._memory = memoryview(mmap.mmap(-1, -(-length // _STEP) * _STEP))
        return self._memory[:length]

    def read(self, store: Store, name: str, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes of an object; errors as of `Store.get_range`."""
        if not isinstance(store, Filling):
            return memoryview(store.get_range(name, offset, length))
        part = self.take(length)
        store.get_into(name, offset, part)
        return part
