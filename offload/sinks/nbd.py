"""An export of an NBD server, over one connection a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload.errors import PolicyError, UnavailableError
from offload.sink import UNIT

if TYPE_CHECKING:
    import nbd


class NbdSink:
    """Written in place. Raises PolicyError (`target-read-only`, `target-too-small`),
    UnavailableError (`nbd-unavailable`)."""

    fresh = False

    def __init__(self, uri: str, size_bytes: int, *, shown: str | None = None) -> None:
        self.uri = uri
        self._shown = shown or uri
        self._mutex = threading.Lock()
        self._idle: list[nbd.NBD] = []
        self._all: list[nbd.NBD] = []
        first = self._connect()
        have = first.get_size()
        if first.is_read_only():
            self.close()
            raise PolicyError(f"{self._shown} is read-only", code="target-read-only")
        if have < size_bytes:
            self.close()
            raise PolicyError(
                f"{self._shown} has {have} bytes, the image needs {size_bytes}",
                code="target-too-small",
                hint="choose an export that is at least as large",
            )
        self._zeroes = bool(first.can_zero())
        self._idle.append(first)

    def _connect(self) -> nbd.NBD:
        import nbd

        handle = nbd.NBD()
        try:
            handle.connect_uri(self.uri)
        except nbd.Error as error:
            raise UnavailableError(
                f"cannot connect to {self._shown}: {error.string}",
                code="nbd-unavailable",
                hint="is its server running, and does it let this machine in?",
            ) from error
        with self._mutex:
            self._all.append(handle)
        return handle

    @contextmanager
    def _handle(self) -> Iterator[nbd.NBD]:
        """A connection for one call; one that failed is not used again."""
        import nbd

        with self._mutex:
            handle = self._idle.pop() if self._idle else None
        if handle is None:
            handle = self._connect()
        try:
            yield handle
        except nbd.Error as error:
            full = error.errno in {"ENOSPC", "EDQUOT"}
            raise UnavailableError(
                f"{self._shown}: {error.string}", code="no-space" if full else "nbd-unavailable"
            ) from error
        with self._mutex:
            self._idle.append(handle)

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes, in requests that every server takes."""
        with self._handle() as handle:
            for at in range(0, len(data), UNIT):
                handle.pwrite(bytes(data[at : at + UNIT]), offset + at)

    def zero(self, offset: int, length: int) -> None:
        """NBD_CMD_WRITE_ZEROES where the server has it."""
        with self._handle() as handle:
            for at in range(offset, offset + length, UNIT):
                part = min(UNIT, offset + length - at)
                if self._zeroes:
                    handle.zero(part, at)
                else:
                    handle.pwrite(bytes(part), at)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """What is there now."""
        with self._handle() as handle:
            for at in range(0, len(buffer), UNIT):
                part = buffer[at : at + UNIT]
                part[:] = handle.pread(len(part), offset + at)

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """All of it."""
        yield offset, offset + length

    def sync(self) -> None:
        """Flush through every connection: not every server has multi-conn. (A handle that another
        thread is using waits its turn: libnbd has a lock in each.)"""
        import nbd

        with self._mutex:
            handles = list(self._all)
        try:
            for handle in handles:
                if handle.can_flush():
                    handle.flush()
        except nbd.Error as error:
            raise UnavailableError(
                f"flushing {self._shown} failed: {error.string}", code="nbd-unavailable"
            ) from error

    def finish(self) -> None:
        """Flush."""
        self.sync()

    def close(self) -> None:
        """Disconnect. Idempotent."""
        import nbd

        for handle in self._all:
            try:
                handle.shutdown()
            except nbd.Error:
                continue  # the server has gone: there is nothing to tell it
        self._all.clear()
        self._idle.clear()
