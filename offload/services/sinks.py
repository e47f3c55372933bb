"""Where a restored image goes: a file, a block device, an NBD server.

A file appears under its name only when it is whole (temporary name, fsync, rename). A device or an
NBD export is written in place: until the end it holds neither the old nor the new content.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from offload import mountinfo
from offload.blockdev import device_size
from offload.errors import BusyError, NotFoundError, PolicyError, UnavailableError, UsageError
from offload.filesystem import fsync_folder
from offload.ids import new_id
from offload.image import Image
from offload.journal import Operation

if TYPE_CHECKING:
    import nbd

UNIT = 4 << 20  # bytes written at once
PART = ".offload-part"  # how the temporary name of a file ends
_BLKZEROOUT = 0x127F  # linux/fs.h: _IO(0x12, 127), two u64: start, length


class Sink(Protocol):
    """Where an image goes. `write` and `zero` are safe from any thread."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""
        ...

    def finish(self) -> None:
        """Make everything durable and final."""
        ...

    def close(self) -> None:
        """Release; without `finish`, a file is removed."""
        ...


@contextmanager
def open_sink(op: Operation, image: Image, to: str, overwrite: bool) -> Iterator[Sink]:
    """The sink that `to` names, closed at the end."""
    made: Sink
    if to.startswith("nbd"):
        made = _NbdSink(to, image.size_bytes)
    elif "://" in to:
        raise UsageError(
            f"cannot restore to '{to}'", code="bad-target", hint="a path, a device or an nbd:// URI"
        )
    elif _is_block_device(to):
        made = _DeviceSink(Path(to), image.size_bytes)
    else:
        made = _FileSink(op, Path(to), image.size_bytes, overwrite)
    try:
        yield made
    finally:
        made.close()


# -- a file ------------------------------------------------------------------------------------


class _FileSink:
    """A sparse file that gets its name at the end."""

    def __init__(self, op: Operation, path: Path, size: int, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not overwrite:
            raise BusyError(
                f"{path} exists already", code="target-exists", hint="to replace it: --overwrite"
            )
        if not path.parent.is_dir():
            raise NotFoundError(f"the folder {path.parent} does not exist", code="no-folder")
        self.temp = path.with_name(f".{path.name}.{new_id()}{PART}")
        op.intend("file", "remove-path", {"path": str(self.temp)})
        try:
            self._fd = os.open(self.temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise _write_error(str(path), error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        _pwrite_all(self._fd, str(self.path), offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: the file is new, and so a hole."""

    def finish(self) -> None:
        """fsync, rename over the name, fsync the folder."""
        try:
            os.fsync(self._fd)
            self.temp.rename(self.path)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise _write_error(str(self.path), error) from error

    def close(self) -> None:
        """Close; what was not finished goes."""
        os.close(self._fd)
        self.temp.unlink(missing_ok=True)


# -- a block device ----------------------------------------------------------------------------


class _DeviceSink:
    """A block device that nobody else uses."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        try:
            # O_EXCL on a block device: the kernel refuses one that is mounted or claimed.
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BusyError(
                    f"{path} is mounted or in use",
                    code="device-in-use",
                    hint=f"see: lsblk {path}; unmount it first",
                ) from error
            raise _write_error(str(path), error) from error
        try:
            self._check(size)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, size: int) -> None:
        users = _users_of_device(self._fd)
        if users:
            raise BusyError(
                f"{self.path} is in use: {users[0]}",
                code="device-in-use",
                hint=f"see: lsblk {self.path}; unmount it first",
            )
        have = device_size(self._fd)
        if have < size:
            raise PolicyError(
                f"{self.path} has {have} bytes, the image needs {size}",
                code="target-too-small",
                hint="choose a device that is at least as large",
            )

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        _pwrite_all(self._fd, str(self.path), offset, data)

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
            _pwrite_all(self._fd, str(self.path), at, part)

    def finish(self) -> None:
        """fsync."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _write_error(str(self.path), error) from error

    def close(self) -> None:
        """Close."""
        os.close(self._fd)


def _is_block_device(to: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(to).st_mode)
    except OSError:
        return False


def _users_of_device(fd: int) -> list[str]:
    """Mounts, swap, holders (md, dm) of a device or of its partitions."""
    number = os.fstat(fd).st_rdev
    sys = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    family = [sys, *(p.parent for p in sys.glob("*/partition"))]
    numbers = {(p / "dev").read_text().strip() for p in family if (p / "dev").exists()}
    users = [
        f"mounted on {mount.point}"
        for mount in mountinfo.mounts()
        if f"{mount.device[0]}:{mount.device[1]}" in numbers
    ]
    names = {f"/dev/{p.name}" for p in family}
    swaps = {line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]}
    users += ["it is swap space" for _ in swaps & names]
    users += [f"held by {h.name}" for p in family for h in (p / "holders").glob("*")]
    return users


# -- an NBD server -----------------------------------------------------------------------------


class _NbdSink:
    """An export of an NBD server, over one connection a thread."""

    def __init__(self, uri: str, size: int) -> None:

        self.uri = uri
        self._idle: list[nbd.NBD] = []
        self._all: list[nbd.NBD] = []
        first = self._connect()
        have = first.get_size()
        if first.is_read_only():
            self.close()
            raise PolicyError(f"{uri} is read-only", code="target-read-only")
        if have < size:
            self.close()
            raise PolicyError(
                f"{uri} has {have} bytes, the image needs {size}", code="target-too-small"
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
                f"cannot connect to {self.uri}: {error.string}", code="nbd-unavailable"
            ) from error
        self._all.append(handle)
        return handle

    @contextmanager
    def _handle(self) -> Iterator[nbd.NBD]:
        import nbd

        handle = self._idle.pop() if self._idle else self._connect()
        try:
            yield handle
        except nbd.Error as error:
            raise UnavailableError(
                f"writing to {self.uri} failed: {error.string}", code="nbd-unavailable"
            ) from error
        self._idle.append(handle)

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes."""
        with self._handle() as handle:
            handle.pwrite(bytearray(data), offset)

    def zero(self, offset: int, length: int) -> None:
        """NBD_CMD_WRITE_ZEROES where the server has it."""
        with self._handle() as handle:
            for at in range(offset, offset + length, UNIT):
                part = min(UNIT, offset + length - at)
                if self._zeroes:
                    handle.zero(part, at)
                else:
                    handle.pwrite(bytearray(part), at)

    def finish(self) -> None:
        """Flush through every connection: not every server has multi-conn."""
        import nbd

        try:
            for handle in self._all:
                if handle.can_flush():
                    handle.flush()
        except nbd.Error as error:
            raise UnavailableError(
                f"flushing {self.uri} failed: {error.string}", code="nbd-unavailable"
            ) from error

    def close(self) -> None:
        """Disconnect."""
        import nbd

        for handle in self._all:
            try:
                handle.shutdown()
            except nbd.Error:
                continue  # the server has gone: there is nothing to tell it
        self._all.clear()


def _pwrite_all(fd: int, name: str, offset: int, data: memoryview) -> None:
    try:
        while data:
            count = os.pwrite(fd, data, offset)
            offset += count
            data = data[count:]
    except OSError as error:
        raise _write_error(name, error) from error


def _write_error(name: str, error: OSError) -> UnavailableError:
    code = "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "target-unavailable"
    return UnavailableError(f"cannot write {name}: {error.strerror}", code=code)
