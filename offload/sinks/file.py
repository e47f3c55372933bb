"""A plain file: a new one that gets its name at the end, or one that is written in place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from offload.filesystem import fsync_folder
from offload.sink import UNIT, pread_all, pwrite_all, write_error


class _OpenFile:
    """What both kinds do with their descriptor."""

    path: Path
    _fd: int

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        pwrite_all(self._fd, str(self.path), offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Write zeros where there is data; the rest is a hole already."""
        _write_zeros(self._fd, str(self.path), self.data(offset, length))

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """What is there now."""
        pread_all(self._fd, str(self.path), offset, buffer)

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """What is no hole."""
        return _data(self._fd, offset, offset + length)

    def sync(self) -> None:
        """fdatasync."""
        _sync(self._fd, str(self.path))

    def close(self) -> None:
        """Close; what was not finished stays as it is, a new file under its temporary name.
        Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NewFileSink(_OpenFile):
    """A sparse file under a temporary name, renamed when it is whole.

    `resume`: the temporary file is there and is gone on with.
    """

    fresh = True

    def __init__(self, path: Path, temp: Path, size_bytes: int, *, resume: bool) -> None:
        self.path = path
        self.temp = temp
        how = 0 if resume else os.O_CREAT | os.O_TRUNC
        try:
            self._fd = os.open(temp, os.O_RDWR | how | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(self._fd, size_bytes)
                if not resume:
                    fsync_folder(temp.parent)  # a record of what is in it must find it
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise write_error(str(path), error) from error

    def finish(self) -> None:
        """fsync, rename over the name, fsync the folder."""
        try:
            os.fsync(self._fd)
            self.temp.rename(self.path)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise write_error(str(self.path), error) from error


class InPlaceFileSink(_OpenFile):
    """A file that is there and keeps its name: until the end it holds a mixture."""

    fresh = False

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self._size = size_bytes
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(self._fd).st_size < size_bytes:
                    os.ftruncate(self._fd, size_bytes)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise write_error(str(path), error) from error

    def finish(self) -> None:
        """Cut off what is longer than the image; fsync."""
        try:
            os.ftruncate(self._fd, self._size)
            os.fsync(self._fd)
        except OSError as error:
            raise write_error(str(self.path), error) from error


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """From SEEK_DATA and SEEK_HOLE; all of it on a file system that knows no holes."""
    at = start
    while at < end:
        try:
            found = os.lseek(fd, at, os.SEEK_DATA)
            stop = os.lseek(fd, found, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            yield at, end
            return
        if found >= end:
            return
        yield found, min(stop, end)
        at = stop


def _write_zeros(fd: int, name: str, ranges: Iterator[tuple[int, int]]) -> None:
    for start, end in ranges:
        for at in range(start, end, UNIT):
            pwrite_all(fd, name, at, memoryview(bytes(min(UNIT, end - at))))


def _sync(fd: int, name: str) -> None:
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise write_error(name, error) from error
