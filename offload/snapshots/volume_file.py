"""Looking at volumes that are plain files: what the reflink and the copy provider share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload import fiemap
from offload.blockdev import image_sector_size
from offload.errors import NotFoundError, UnavailableError
from offload.filesystem import file_identity, fsync_folder
from offload.model import Snapshot, Volume
from offload.snapshots.naming import pool_error


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """A volume's file as it is now."""

    size_bytes: int
    sector_size: int
    identity: str
    allocated_bytes: int
    extents: int  # 0 where the file system does not tell


@contextmanager
def open_volume(volume: Volume) -> Iterator[int]:
    """The volume's file, open for reading.

    Raises NotFoundError (`volume-missing`), UnavailableError (`not-a-file`, `volume-empty`),
    PrivilegeError.
    """
    fd = _open(volume)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnavailableError(
                f"volume {volume.name}: {volume.path} is not a regular file",
                code="not-a-file",
                hint='for block devices set provider = "device"',
            )
        if status.st_size == 0:
            raise UnavailableError(
                f"volume {volume.name}: {volume.path} is empty",
                code="volume-empty",
                hint="give the file its size first, for example with truncate",
            )
        yield fd
    finally:
        os.close(fd)


def _open(volume: Volume) -> int:
    try:
        # never wait on a FIFO or a device that is not ready
        return os.open(volume.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"volume {volume.name}: {volume.path} is not there",
            code="volume-missing",
            hint="is its file system mounted?",
        ) from error
    except OSError as error:
        raise pool_error(error, volume.path, "read") from error


def look_at(volume: Volume, fd: int) -> FileState:
    """The state of an open volume. Raises UnavailableError where it cannot be read."""
    try:
        status = os.fstat(fd)
        return FileState(
            size_bytes=status.st_size,
            sector_size=volume.sector_size or image_sector_size(fd),
            identity=file_identity(fd),
            allocated_bytes=status.st_blocks * 512,  # stat(2): units of 512 bytes, always
            extents=_extents(fd),
        )
    except OSError as error:
        raise pool_error(error, volume.path, "read") from error


def _extents(fd: int) -> int:
    try:
        return fiemap.count_extents_of(fd)
    except OSError:
        return 0  # no FIEMAP there (tmpfs, network file systems): nothing to say


def record_snapshot(volume: Volume, fd: int, provider: str, path: Path) -> Snapshot:
    """The record of a finished snapshot at `path` of an open volume.

    Cheap: it runs while writers are held. The size is the snapshot's own.
    """
    return Snapshot(
        volume=volume.name,
        provider=provider,
        ref={"path": str(path)},
        size_bytes=path.stat().st_size,
        sector_size=volume.sector_size or image_sector_size(fd),
        identity=file_identity(fd),
    )


@contextmanager
def open_snapshot(path: Path) -> Iterator[int]:
    """A snapshot's file, open for reading.

    Raises NotFoundError (`snapshot-missing`), PrivilegeError, UnavailableError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"the snapshot {path} is not there",
            code="snapshot-missing",
            hint="it was deleted outside of offload; delete its TimeMark",
        ) from error
    except OSError as error:
        raise pool_error(error, path, "read") from error
    try:
        yield fd
    finally:
        os.close(fd)


def settle_files(paths: Sequence[Path]) -> None:
    """Make snapshot files read-only and durable, their folders too.

    Raises UnavailableError, NotFoundError.
    """
    for path in paths:
        with open_snapshot(path) as fd:
            try:
                os.fchmod(fd, 0o400)
                os.fsync(fd)
            except OSError as error:
                raise pool_error(error, path, "write") from error
    for folder in {path.parent for path in paths}:
        try:
            fsync_folder(folder)
        except OSError as error:
            raise pool_error(error, folder, "flush") from error
