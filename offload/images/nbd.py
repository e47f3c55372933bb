"""An Image behind any NBD server, read through libnbd over a few connections."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from offload.errors import IntegrityError, UnavailableError
from offload.model import Extent, ExtentKind

_ALLOCATION = "base:allocation"
_HOLE, _ZERO = 1, 2  # NBD_STATE_HOLE, NBD_STATE_ZERO: NBD protocol, base:allocation context
_READ_MAX = 32 << 20  # NBD protocol: what every server accepts without being asked
_STATUS_MAX = 2 << 30  # block status replies of libnbd before 1.18 carry 32-bit lengths
_SILENCE_MS = 60_000  # a server that moves no byte for so long is taken for dead


class NbdImage:
    """Reads an export; immutable as long as the server keeps it so.

    Each call takes a connection of its own out of a pool that grows to `connections` (an NBD
    handle is used by one thread at a time). `size_bytes` limits the image to the size on record:
    a smaller export is an IntegrityError (`size-mismatch`). Errors: UnavailableError
    (`nbd-unavailable`) when the server cannot be reached, fails or falls silent.
    """

    def __init__(
        self,
        uri: str,
        *,
        size_bytes: int | None = None,
        block_size: int = 512,
        connections: int = 4,
    ) -> None:
        self.uri = uri
        self.block_size = block_size
        self._room = threading.BoundedSemaphore(connections)
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._closed = False
        handle = self._connect()
        self._idle.append(handle)
        served: int = handle.get_size()
        self._served = served
        self._has_extents = handle.can_meta_context(_ALLOCATION)
        self._align = max(1, handle.get_block_size(0))  # LIBNBD_SIZE_MINIMUM
        most: int = handle.get_block_size(2)  # LIBNBD_SIZE_MAXIMUM; 0: the server does not say
        self._read_max = min(most or _READ_MAX, _READ_MAX)
        self.size_bytes: int = served if size_bytes is None else size_bytes
        if served < self.size_bytes:
            self.close()
            raise IntegrityError(
                f"{uri} serves {served} bytes, {size_bytes} are on record", code="size-mismatch"
            )

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Allocation as the server tells it; all data where it does not tell."""
        self._check_range(offset, length)
        pending: Extent | None = None
        for found in self._walk(offset, length):
            if pending is None or pending.kind is not found.kind:
                if pending is not None:
                    yield pending
                pending = found
            else:
                pending = Extent(pending.offset, pending.length + found.length, found.kind)
        if pending is not None:
            yield pending

    def _walk(self, offset: int, length: int) -> Iterator[Extent]:
        if not self._has_extents:
            if length:
                yield Extent(offset, length, ExtentKind.DATA)
            return
        at, end = offset, offset + length
        while at < end:
            start = at // self._align * self._align
            want = min(-(-(end - start) // self._align) * self._align, _STATUS_MAX)
            want = min(want, self._served - start)
            for size, flags in self._ask_status(start, want):
                stop = min(start + size, end)
                if stop > at:
                    yield Extent(at, stop - at, _kind(flags))
                    at = stop
                start += size

    def _ask_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        entries: list[tuple[int, int]] = []

        def collect(name: str, _offset: int, flat: list[int], _error: object) -> int:
            if name == _ALLOCATION:
                entries.extend(zip(flat[::2], flat[1::2], strict=True))
            return 0

        with self._connection() as handle:
            cookie = handle.aio_block_status(length, offset, collect)
            _finish(handle, cookie)
        if not entries or entries[0][0] == 0:
            raise UnavailableError(
                f"{self.uri} gave an empty block status at {offset}", code="nbd-unavailable"
            )
        return entries

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` without a copy, in requests of at most 32 MiB."""
        view = buffer.cast("B")
        self._check_range(offset, len(view))
        lead, tail = offset % self._align, (offset + len(view)) % self._align
        if lead or tail:
            start = offset - lead
            stop = -(-(offset + len(view)) // self._align) * self._align
            whole = bytearray(stop - start)
            self._read(start, memoryview(whole))
            view[:] = memoryview(whole)[lead : lead + len(view)]
        else:
            self._read(offset, view)

    def _read(self, offset: int, view: memoryview) -> None:
        import nbd

        cuts = [*range(0, len(view), self._read_max), len(view)]
        with self._connection() as handle:
            for start, stop in pairwise(cuts):
                part = nbd.Buffer.from_buffer(view[start:stop])
                _finish(handle, handle.aio_pread(part, offset + start))

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Say goodbye to the server. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for handle in idle:
            _hang_up(handle)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(
                f"{length} bytes at {offset} are outside an image of {self.size_bytes}"
            )

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """A handle for one call; one that failed is dropped: its state is unknown, and it may
        still point into the caller's buffer."""
        import nbd

        with self._room:
            with self._lock:
                if self._closed:
                    raise ValueError(f"the image {self.uri} is closed")
                handle = self._idle.pop() if self._idle else None
            if handle is None:
                handle = self._connect()
            healthy = False
            try:
                yield handle
                healthy = True
            except nbd.Error as error:
                raise _translate(self.uri, error) from error
            finally:
                with self._lock:
                    keep = healthy and not self._closed
                    if keep:
                        self._idle.append(handle)
                if not keep:
                    _hang_up(handle)

    def _connect(self) -> Any:
        import nbd

        handle = nbd.NBD()
        try:
            handle.add_meta_context(_ALLOCATION)
            handle.connect_uri(self.uri)
        except nbd.Error as error:
            raise _translate(self.uri, error) from error
        return handle


def _kind(flags: int) -> ExtentKind:
    if not flags & _ZERO:
        return ExtentKind.DATA  # a hole that does not promise zeros may read as anything
    return ExtentKind.HOLE if flags & _HOLE else ExtentKind.ZERO


def _finish(handle: Any, cookie: int) -> None:
    """Drive one handle until its command is answered (the GIL is free while it waits)."""
    while not handle.aio_command_completed(cookie):
        if handle.poll(_SILENCE_MS) == 0:
            raise UnavailableError(
                f"the NBD server did not answer for {_SILENCE_MS // 1000} s", code="nbd-unavailable"
            )


def _hang_up(handle: Any) -> None:
    import nbd

    with contextlib.suppress(nbd.Error):
        handle.shutdown(nbd.SHUTDOWN_ABANDON_PENDING)


def _translate(uri: str, error: Any) -> UnavailableError:
    return UnavailableError(
        f"{uri}: {error.string}",
        code="nbd-unavailable",
        hint="is its server still running?",
    )
