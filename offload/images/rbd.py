"""A snapshot of an RBD image, read through librbd in this process.

Not through QEMU's rbd driver: it opens ordinary snapshots only, never those of a group, sees holes
only where the image has an object map, and waits for ever for a cluster that does not answer.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from offload import ceph, rbd_image
from offload.errors import IntegrityError, NotFoundError, UnavailableError
from offload.extents import Ranges, to_extents
from offload.model import Extent, RbdSource

# Of one question for extents: it loads the whole object map, or asks the OSDs for each object. The
# last answer is kept: NBD clients ask for one extent after the other.
_WINDOW_OBJECTS = 1024


class RbdImage:
    """Holds a connection of its own until `close`.

    Raises NotFoundError (`snapshot-missing`, `image-missing`), IntegrityError (`size-mismatch`),
    and what `ceph.connect` raises.
    """

    def __init__(self, source: RbdSource) -> None:
        self.size_bytes = source.size_bytes
        self.block_size = source.sector_size
        self._name = source.name
        with contextlib.ExitStack() as stack:
            login = ceph.Login(conf=source.conf, user=source.user)
            cluster = stack.enter_context(ceph.connect(login, source.cluster, limited=True))
            pool = stack.enter_context(cluster.pool(source.pool, source.namespace))
            self._image: Any = stack.enter_context(rbd_image.opened(pool, image_id=source.image))
            self._set_snapshot(pool, source)
            self._window = _WINDOW_OBJECTS * rbd_image.object_span(self._image)
            self._known: tuple[int, Ranges] = (-1, [])  # start of a window, and what it holds
            # not left to the garbage collector, which would close things in any order: librbd hangs
            self._release = weakref.finalize(self, stack.pop_all().close)

    def _set_snapshot(self, pool: Any, source: RbdSource) -> None:
        number = rbd_image.find_snapshot(
            pool, self._image, name=source.snapshot or "", group=source.group or ""
        )
        if number is None:
            raise NotFoundError(
                f"the image {source.name} has no snapshot {source.snapshot or source.group}",
                code="snapshot-missing",
            )
        with ceph.translated(f"open a snapshot of {source.name}"):
            self._image.set_snap_by_id(number)
            found = self._image.size()
        if found != source.size_bytes:
            raise IntegrityError(
                f"the snapshot of {source.name} has {found} bytes, {source.size_bytes} are on "
                "record",
                code="size-mismatch",
            )

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What was never written, or discarded, is a hole; with an object map (`fast-diff`) whole
        objects of the image are data."""
        self._check_range(offset, length)
        pending: Extent | None = None
        for found in self._walk(offset, offset + length):
            if pending is None or pending.kind is not found.kind:
                if pending is not None:
                    yield pending
                pending = found
            else:
                pending = Extent(pending.offset, pending.length + found.length, found.kind)
        if pending is not None:
            yield pending

    def _walk(self, start: int, end: int) -> Iterator[Extent]:
        while start < end:
            window = start // self._window * self._window
            stop = min(window + self._window, end)
            yield from to_extents(self._data_of(window), start, stop - start)
            start = stop

    def _data_of(self, window: int) -> Ranges:
        known_window, known = self._known
        if known_window == window:
            return known
        stop = min(window + self._window, self.size_bytes)
        found = rbd_image.allocated(self._image, window, stop)
        self._known = (window, found)
        return found

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """librbd's Python gives bytes of its own: one copy."""
        view = buffer.cast("B")
        view[:] = self.pread(offset, len(view))

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        self._check_range(offset, length)
        if not length:
            return b""
        with ceph.translated(f"read the image {self._name}"):
            data: bytes = self._image.read(offset, length)
        if len(data) != length:
            raise UnavailableError(
                f"the image {self._name} gave {len(data)} of {length} bytes at {offset}",
                code="ceph-error",
            )
        return data

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._release()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(
                f"{length} bytes at {offset} are outside an image of {self.size_bytes}"
            )
