"""A block device that nobody else uses."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from offload import device_use
from offload.blockdev import device_read_only, device_size
from offload.errors import BusyError, PolicyError
from offload.sink import UNIT, pread_all, pwrite_all, write_error

_BLKZEROOUT = 0x127F  # linux/fs.h: _IO(0x12, 127), two u64: start, length


class DeviceSink:
    """Written in place: until the end it holds neither the old nor the new content.

    Raises BusyError (`device-in-use`), PolicyError (`target-read-only`, `target-too-small`).
    """

    fresh = False

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        _refuse_read_only(path)
        users = device_use.users(str(path.resolve()), readers=False)
        if users:
            raise _in_use(path, users[0])
        try:
            # O_EXCL on a block device: the kernel refuses one that is mounted or claimed.
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _in_use(path, "claimed by the kernel") from error
            raise write_error(str(path), error) from error
        have = device_size(self._fd)
        if have < size_bytes:
            self.close()
            raise PolicyError(
                f"{path} has {have} bytes, the image needs {size_bytes}",
                code="target-too-small",
                hint="choose a device that is at least as large",
            )

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        pwrite_all(self._fd, str(self.path), offset, data)

    def zero(self, offset: int, length: int) -> None:
        """BLKZEROOUT, which the device may do without writing; else zeros."""
        whole = offset % 512 == 0 and length % 512 == 0
        try:
            if whole:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
                return
        except OSError:
            pass  # not supported by this device: write them
        zeros = memoryview(bytes(min(length, UNIT)))
        for at in range(offset, offset + length, UNIT):
            part = zeros[: min(UNIT, offset + length - at)]
            pwrite_all(self._fd, str(self.path), at, part)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """What is there now."""
        pread_all(self._fd, str(self.path), offset, buffer)

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """All of it: devices do not tell."""
        yield offset, offset + length

    def sync(self) -> None:
        """fsync, which also empties the device's own cache."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise write_error(str(self.path), error) from error

    def finish(self) -> None:
        """fsync."""
        self.sync()

    def close(self) -> None:
        """Close. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _refuse_read_only(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise write_error(str(path), error) from error
    try:
        if device_read_only(fd):
            raise PolicyError(
                f"{path} is read-only",
                code="target-read-only",
                hint=f"if it should not be: blockdev --setrw {path}",
            )
    finally:
        os.close(fd)


def _in_use(path: Path, user: str) -> BusyError:
    return BusyError(
        f"{path} is in use: {user}",
        code="device-in-use",
        hint=f"see: lsblk {path}; unmount it first",
    )
