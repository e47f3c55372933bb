"""Where a view can be migrated to: a new file, a block device, an NBD export.

A file has a temporary name until the switch, when it gets its own as a second one: what is there by
then is not overwritten.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from offload import device_use
from offload.blockdev import device_size
from offload.errors import BusyError, NotFoundError, OffloadError, PolicyError, UnavailableError
from offload.filesystem import fsync_folder

if TYPE_CHECKING:
    import nbd

PART = ".offload-part"  # how the temporary name of a file ends


class Home(Protocol):
    """A target of a migration. Errors: UnavailableError (`target-unavailable`)."""

    place: str  # where it will be found
    opened: str  # what the daemon opens meanwhile

    def prepare(self) -> None:
        """Make what is not there. After its intent."""
        ...

    def flush(self) -> None:
        """What was written by the daemon is durable."""
        ...

    def publish(self) -> None:
        """Let it be found under its place, durably. BusyError (`target-exists`)."""
        ...

    def close(self) -> None:
        """Let go of it. Idempotent."""
        ...


def open_home(place: str, size_bytes: int, tag: str) -> Home:
    """What `place` names, checked; nothing is changed. `tag` is part of temporary names.

    Raises BusyError (`target-exists`, `device-in-use`), NotFoundError (`no-folder`), PolicyError
    (`target-too-small`, `target-read-only`, `target-unflushable`), UnavailableError
    (`nbd-unavailable`, `target-unavailable`).
    """
    if "://" in place:
        return _NbdHome(place, size_bytes)
    path = Path(place).absolute()
    try:
        if stat.S_ISBLK(path.stat().st_mode):
            return _DeviceHome(path, size_bytes)
    except FileNotFoundError:
        return _FileHome(path, size_bytes, tag)
    except OSError as error:
        raise _unwritable(str(path), error) from error
    raise _exists(path)


def temporary(path: Path, tag: str) -> Path:
    """The name of a file until the switch."""
    return path.with_name(f".{path.name}.{tag}{PART}")


def discard(place: str, opened: str) -> None:
    """Remove a file that a migration made and that does not count. Idempotent; never another."""
    temp, path = Path(opened), Path(place)
    if not opened.endswith(PART):
        return
    if temp.exists() and path.exists() and temp.samefile(path):
        path.unlink()
    temp.unlink(missing_ok=True)


def keep(opened: str) -> None:
    """Remove the temporary name of a file that counts. Idempotent."""
    if opened.endswith(PART):
        Path(opened).unlink(missing_ok=True)


class _FileHome:
    def __init__(self, path: Path, size: int, tag: str) -> None:
        if not path.parent.is_dir():
            raise NotFoundError(f"the folder {path.parent} does not exist", code="no-folder")
        self._path, self._size, self._temp = path, size, temporary(path, tag)
        self.place, self.opened = str(path), str(self._temp)
        self._fd = -1

    def prepare(self) -> None:
        """A sparse file of our own."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._temp, flags, 0o600)
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def flush(self) -> None:
        """fsync: it is of the file, whoever wrote to it."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def publish(self) -> None:
        """A second name, which link(2) gives only where there is none."""
        try:
            os.link(self._temp, self._path)
            fsync_folder(self._path.parent)
        except FileExistsError:
            raise _exists(self._path) from None
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _DeviceHome:
    def __init__(self, path: Path, size: int) -> None:
        self.place = self.opened = str(path)
        try:
            # O_EXCL on a block device: the kernel refuses one that is mounted or claimed
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _in_use(path, "mounted, or claimed by the kernel") from error
            raise _unwritable(self.place, error) from error
        try:
            self._check(path, size)
        except BaseException:
            self.close()
            raise

    def _check(self, path: Path, size: int) -> None:
        users = device_use.users(os.path.realpath(path))
        have = device_size(self._fd)
        # Held exclusively by this process only while it is looked at: a daemon opens it next.
        os.close(self._fd)
        self._fd = -1
        others = [user for user in users if not user.startswith("claimed")]
        if others:
            raise _in_use(path, others[0])
        if have < size:
            raise PolicyError(
                f"{path} has {have} bytes, the view {size}",
                code="target-too-small",
                hint="choose a device that is at least as large",
            )

    def prepare(self) -> None:
        """For flushing."""
        try:
            self._fd = os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def flush(self) -> None:
        """fsync: it is of the device, whoever wrote to it."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _unwritable(self.place, error) from error

    def publish(self) -> None:
        """It has its name."""

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _NbdHome:
    """Flushed through a connection of our own: the daemon cannot be told to, so the server has to
    say that a flush counts for all connections (multi-conn)."""

    def __init__(self, uri: str, size: int) -> None:
        import nbd

        self.place = self.opened = uri
        self._handle: nbd.NBD = nbd.NBD()
        try:
            self._handle.connect_uri(uri)
            self._check(size)
        except nbd.Error as error:
            self.close()
            raise _nbd_error(uri, error) from error
        except OffloadError:
            self.close()
            raise

    def _check(self, size: int) -> None:
        have = self._handle.get_size()
        if self._handle.is_read_only():
            raise PolicyError(f"{self.place} is read-only", code="target-read-only")
        if have < size:
            raise PolicyError(
                f"{self.place} has {have} bytes, the view {size}", code="target-too-small"
            )
        if not (self._handle.can_flush() and self._handle.can_multi_conn()):
            raise PolicyError(
                f"{self.place} cannot be flushed from a second connection (NBD multi-conn)",
                code="target-unflushable",
                hint="serve it with: nbdkit file, or qemu-nbd --shared=8",
            )

    def prepare(self) -> None:
        """It is there."""

    def flush(self) -> None:
        """NBD_CMD_FLUSH."""
        import nbd

        try:
            self._handle.flush()
        except nbd.Error as error:
            raise _nbd_error(self.place, error) from error

    def publish(self) -> None:
        """It has its name."""

    def close(self) -> None:
        """Disconnect."""
        import nbd

        try:
            self._handle.shutdown()
        except nbd.Error:
            return  # the server has gone, or never answered


def _exists(path: Path) -> BusyError:
    return BusyError(
        f"{path} exists already",
        code="target-exists",
        hint="choose another name: a migration makes a file of its own",
    )


def _in_use(path: Path, who: str) -> BusyError:
    return BusyError(
        f"{path} is in use: {who}", code="device-in-use", hint=f"see: lsblk {path}; free it first"
    )


def _unwritable(place: str, error: OSError) -> UnavailableError:
    code = "no-space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "target-unavailable"
    return UnavailableError(f"cannot write {place}: {error.strerror}", code=code)


def _nbd_error(uri: str, error: nbd.Error) -> UnavailableError:
    return UnavailableError(f"{uri}: {error.string}", code="nbd-unavailable")
