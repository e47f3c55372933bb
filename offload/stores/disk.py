"""A store in a folder of a file system.

An object is written under a temporary name in `tmp/`, fsynced, linked to its own name (which fails
if that exists: nothing is ever overwritten) and the folder is fsynced. What a crash leaves is a
file in `tmp/`, which `recover` or `prune` removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from offload import mountinfo
from offload.errors import (
    BusyError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    UnavailableError,
)
from offload.filesystem import fsync_folder
from offload.ids import new_id
from offload.store import Buffer, ObjectInfo
from offload.storespec import StoreSpec

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*(/[a-z0-9][a-z0-9.-]*)*")
_IOV_MAX = 1024  # limits.h, Linux
_OPEN_FILES = 64
TMP = "tmp"
# where flock is seen by all that can see the folder, and goes only with its process
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay")
_LOCK = "lock"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class _Descriptor:
    """An open file, closed when the last of those who read it has let go."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class DiskStore:
    """Objects as files below one folder. See `offload.store.Store` for the contract."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.url = spec.url
        self.root = Path(spec.url)
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._mutex = threading.Lock()

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """Write under a new name; see the contract."""
        if retain_until is not None:
            raise ValueError("a folder cannot lock objects")
        path = self._path(name)
        temp = self.root / TMP / f"{name.replace('/', '_')}.{new_id()}"
        try:
            _ensure_folder(temp.parent, self.root)
            _ensure_folder(path.parent, self.root)
            written = self._write(temp, parts)
            _publish(temp, path)
            fsync_folder(path.parent)
        except OSError as error:
            raise self._explain(error, name, writing=True) from error
        finally:
            with contextlib.suppress(OSError):
                temp.unlink()
        return written

    def _write(self, temp: Path, parts: Sequence[Buffer]) -> int:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            written = 0
            for at in range(0, len(parts), _IOV_MAX):
                written += _writev_all(fd, list(parts[at : at + _IOV_MAX]))
            os.fsync(fd)
            return written
        finally:
            os.close(fd)

    def get(self, name: str) -> bytes:
        """The whole object."""
        return self.get_range(name, 0, self.size(name))

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; see the contract."""
        try:
            file = self._descriptor(name)
            data = os.pread(file.fd, length, offset)
            while len(data) < length:
                more = os.pread(file.fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise self._explain(error, name) from error
        if len(data) != length:
            raise self._short(name, length - len(data))
        return data

    def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from `offset`; see `offload.store.Filling`."""
        done = 0
        try:
            file = self._descriptor(name)
            while done < len(buffer):
                count = os.preadv(file.fd, [buffer[done:]], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise self._explain(error, name) from error
        if done != len(buffer):
            raise self._short(name, len(buffer) - done)

    def _short(self, name: str, missing: int) -> IntegrityError:
        return IntegrityError(
            f"object {name} of {self.url} ends {missing} bytes too early", code="object-short"
        )

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        try:
            return os.stat(self._path(name)).st_size
        except OSError as error:
            raise self._explain(error, name) from error

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        return self._path(name).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        """Names below a folder, in name order. A folder that cannot be read is an error: prune
        would take the objects in it for gone."""
        return (name for name, _ in self._found(prefix))

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """The same, with size and time of change; an object that goes meanwhile is left out."""
        for name, entry in self._found(prefix):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._explain(error, name) from error
            yield ObjectInfo(
                name=name,
                size_bytes=status.st_size,
                modified=datetime.fromtimestamp(status.st_mtime_ns / 1e9, UTC),
            )

    def _found(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        if not prefix.endswith("/"):
            raise ValueError(f"'{prefix}' is no object name with its slash")
        try:
            yield from self._walk(str(self._path(prefix[:-1])), prefix)
        except OSError as error:
            raise self._explain(error, prefix) from error

    def _walk(self, folder: str, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Plain strings: a store has thousands of packs, and each backup lists them."""
        try:
            with os.scandir(folder) as found:
                entries = {e.name + ("/" if e.is_dir() else ""): e for e in found}
        except FileNotFoundError:
            if not self.root.is_dir():
                raise
            return
        for name in sorted(entries):
            if name.endswith("/"):
                yield from self._walk(entries[name].path, prefix + name)
            else:
                yield prefix + name, entries[name]

    def now(self) -> datetime:
        """The clock of the file system: that of the server, where it is a network's."""
        probe = self.root / TMP / f"clock.{new_id()}"
        try:
            _ensure_folder(probe.parent, self.root)
            probe.touch()
            return datetime.fromtimestamp(probe.stat().st_mtime_ns / 1e9, UTC)
        except OSError as error:
            raise self._explain(error, "") from error
        finally:
            probe.unlink(missing_ok=True)

    def exclusion_is_sound(self) -> bool:
        """Whether the folder lies on a file system of this machine alone, and is not said to be
        shared all the same (through a server on this machine, say)."""
        if self.spec.options.get("shared") == "yes":
            return False
        return mountinfo.mount_holding(self.root, mountinfo.mounts()).kind in _LOCAL

    def delete(self, name: str) -> None:
        """Remove an object. Idempotent."""
        path = self._path(name)
        with self._mutex:
            self._open.pop(name, None)
        try:
            path.unlink()
            fsync_folder(path.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._explain(error, name) from error

    @contextmanager
    def lock(self, *, exclusive: bool, wait_s: float = 0.0) -> Iterator[None]:
        """flock on `lock`; goes with the process. Who may only read holds it shared if he can."""
        try:
            fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            fd = -1 if exclusive or error.errno not in _READ_ONLY else self._open_read_only()
            if fd < 0:
                raise self._explain(error, _LOCK) from error
        try:
            _flock(fd, exclusive=exclusive, wait_s=wait_s, url=self.url)
            yield
        finally:
            os.close(fd)

    def _open_read_only(self) -> int:
        """The lock file, or where there is none that can be read, the folder: never -1."""
        try:
            return os.open(self.root / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def sweep(self, part: str, *, min_age_s: float = 0.0) -> int:
        """Remove temporary files whose name holds `part`, at least that old; returns how many."""
        removed = 0
        folder = self.root / TMP
        for path in folder.glob("*") if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if part in path.name and time.time() - path.stat().st_mtime >= min_age_s:
                    path.unlink()
                    removed += 1
        return removed

    def space_bytes(self) -> tuple[int, int] | None:
        """Space left on the file system for this user, and its size."""
        try:
            space = os.statvfs(self.root)
        except OSError as error:
            raise self._explain(error, "") from error
        return space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize

    def close(self) -> None:
        """Close the cached descriptors. Idempotent."""
        with self._mutex:
            self._open.clear()

    def _descriptor(self, name: str) -> _Descriptor:
        """An open file, from a small cache."""
        with self._mutex:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
                return file
            file = self._open[name] = _Descriptor(self._path(name))
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.partition("/")[0] in (TMP, _LOCK):
            raise ValueError(f"'{name}' is no object name")
        return self.root / name

    def _explain(self, error: OSError, name: str, *, writing: bool = False) -> OffloadError:
        if error.errno == errno.EEXIST:
            return BusyError(f"object {name} exists already in {self.url}", code="object-exists")
        if error.errno == errno.ENOENT:
            if not self.root.is_dir():
                return UnavailableError(
                    f"the store folder {self.url} is not there",
                    code="store-unavailable",
                    hint="mount it, or make the store with: offload store init",
                )
            return NotFoundError(f"no object {name} in {self.url}", code="no-object")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UnavailableError(
                f"no space left in the store {self.url}",
                code="no-space",
                hint="make room, or run: offload prune",
            )
        if writing and error.errno in _READ_ONLY:
            return UnavailableError(
                f"the store {self.url} cannot be written to at {name or 'its folder'}: "
                f"{error.strerror}",
                code="store-read-only",
                hint="mount it writable, or run this as the user that it belongs to",
            )
        return UnavailableError(
            f"the store {self.url} fails at {name or 'its folder'}: {error.strerror}",
            code="store-unavailable",
        )


def _ensure_folder(folder: Path, root: Path) -> None:
    """Make a folder below the root, and its entry and those of its parents durable."""
    if folder == root or folder.is_dir():
        return
    _ensure_folder(folder.parent, root)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def _writev_all(fd: int, parts: list[Buffer]) -> int:
    total = 0
    while parts:
        count = os.writev(fd, parts)
        total += count
        while parts and count >= len(parts[0]):
            count -= len(parts.pop(0))
        if count:
            parts[0] = memoryview(parts[0])[count:]
    return total


def _publish(temp: Path, path: Path) -> None:
    """Give a finished file its name, never over another one."""
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        if path.exists():  # a file system without hard links; names are unique all the same
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
        temp.rename(path)


def _flock(fd: int, *, exclusive: bool, wait_s: float, url: str) -> None:
    until = time.monotonic() + wait_s
    how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    while True:
        try:
            fcntl.flock(fd, how)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise BusyError(
                    f"the store {url} is in use by "
                    + ("other backups, restores or mounted views" if exclusive else "a prune"),
                    code="store-busy",
                    hint="try again when they have ended; see: offload views",
                ) from None
            time.sleep(0.05)
