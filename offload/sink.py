"""Where a restored image goes: a file, a block device, an NBD server, an image of another format.

Drivers are in `offload/sinks/`. A sink that is `fresh` has nothing in it but holes and what an
interrupted run of the same restore wrote there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Protocol

from offload.errors import UnavailableError

UNIT = 4 << 20  # bytes written at once
PART = ".offload-part"  # how the temporary name of a file ends


class Sink(Protocol):
    """Bytes that are written in any order. All methods but `finish` and `close` are safe from any
    thread; a range is never written by two threads at once.

    Errors: UnavailableError (`no-space`, `target-unavailable`, `nbd-unavailable`).
    """

    fresh: bool  # what was never written reads as zeros

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""
        ...

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """What is there now."""
        ...

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Where in a range something else than zeros may be: `(start, end)`, in order."""
        ...

    def sync(self) -> None:
        """Make durable what was written before the call."""
        ...

    def finish(self) -> None:
        """Make everything durable and final."""
        ...

    def close(self) -> None:
        """Release. Idempotent."""
        ...


def pwrite_all(fd: int, name: str, offset: int, data: memoryview) -> None:
    """Write all of `data`; `name` is for the error."""
    try:
        while data:
            count = os.pwrite(fd, data, offset)
            offset += count
            data = data[count:]
    except OSError as error:
        raise write_error(name, error) from error


def pread_all(fd: int, name: str, offset: int, buffer: memoryview) -> None:
    """Fill `buffer`; zeros behind the end of a file."""
    at = 0
    try:
        while at < len(buffer):
            count = os.preadv(fd, [buffer[at:]], offset + at)
            if count == 0:
                buffer[at:] = bytes(len(buffer) - at)
                return
            at += count
    except OSError as error:
        raise UnavailableError(
            f"cannot read {name}: {error.strerror}", code="target-unavailable"
        ) from error


def write_error(name: str, error: OSError) -> UnavailableError:
    """What the system said to a write, an open or a rename."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UnavailableError(
        f"cannot write {name}: {error.strerror}",
        code="no-space" if full else "target-unavailable",
        hint="make room there, or choose another place" if full else "",
    )
