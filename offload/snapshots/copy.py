"""The fallback: a plain sparse copy of image files, for file systems that cannot clone.

Slow, and never one instant, not even of a single file: writers go on while it is copied unless they
are held from outside for all that time. Plans say so (`Instant.NONE`), and estimate it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from offload.errors import BusyError, UnavailableError
from offload.extents import Ranges
from offload.filesystem import fsync_folder, mount_of, space_of
from offload.model import Instant, RawSource, Snapshot, Volume
from offload.snapshot import Plan, VolumeState
from offload.snapshots import naming
from offload.snapshots.volume_file import (
    look_at,
    open_volume,
    record_snapshot,
    settle_files,
)

_SUFFIX = ".copy"
_PART = ".part"
_BYTES_PER_S = 300e6  # a conservative rate of one disk that reads and writes
_COPY_S = 0.01
_STEP_BYTES = 8 << 20  # of one copy_file_range
_NEEDED_BYTES = 64 << 10  # inode and block map, beside the data


class CopyProvider:
    """Copies of volume files as `<snapshot_dir>/<instance>/<timemark>/<volume>.copy`.

    A copy has its name only when it is whole; before that it ends in `.part`.
    """

    name = "copy"

    def __init__(self, instance: str) -> None:
        self._instance = instance

    def inspect(self, volume: Volume) -> VolumeState:
        """Look at a volume; the pool is where the copy will lie.

        Raises NotFoundError (`volume-missing`), UnavailableError (`not-a-file`), PrivilegeError.
        """
        with open_volume(volume) as fd:
            state = look_at(volume, fd)
        pool, pool_size, pool_free = _pool_of(volume)
        copied = min(state.allocated_bytes, state.size_bytes)
        return VolumeState(
            size_bytes=state.size_bytes,
            sector_size=state.sector_size,
            identity=state.identity,
            allocated_bytes=state.allocated_bytes,
            extents=state.extents,
            estimate_s=copied / _BYTES_PER_S + _COPY_S,
            pool=pool,
            pool_size_bytes=pool_size,
            pool_free_bytes=pool_free,
            needed_bytes=state.allocated_bytes + _NEEDED_BYTES,
        )

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """Never one instant by itself."""
        return Plan(
            timemark=timemark,
            volumes=tuple(volumes),
            refs=tuple(naming.ref_of(v, self._instance, timemark, _SUFFIX) for v in volumes),
            instant_alone=Instant.NONE,
            estimate_s=sum(self.inspect(volume).estimate_s for volume in volumes),
        )

    def prepare(self, plan: Plan) -> None:
        """Make the folders."""
        for _, path in self._places(plan):
            naming.ensure_folder(path)

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """Copy all volumes of the plan, or none."""
        made: list[Path] = []
        try:
            return tuple(self._copy(volume, path, made) for volume, path in self._places(plan))
        except BaseException as failure:
            for path in reversed(made):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    failure.add_note(f"{path} is left: {error.strerror}")
            raise

    def _copy(self, volume: Volume, path: Path, made: list[Path]) -> Snapshot:
        if path.exists():
            raise _exists(path)
        part = path.with_name(path.name + _PART)
        with open_volume(volume) as source, ExitStack() as stack:
            target = _create(part)
            made.append(part)
            stack.callback(os.close, target)
            try:
                _copy_sparse(source, target, os.fstat(source).st_size)
                part.rename(path)
            except _ShrunkError as error:
                raise UnavailableError(
                    f"volume {volume.name}: {volume.path} shrank while it was copied",
                    code="volume-replaced",
                    hint="try again",
                ) from error
            except OSError as error:
                raise naming.pool_error(error, path, "copy to") from error
            made[-1] = path
            return record_snapshot(volume, source, self.name, path)

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """Set the copies read-only and make them durable."""
        settle_files([naming.own_path(s.ref, self._instance, _SUFFIX) for s in snapshots])

    def delete(self, ref: dict[str, str]) -> None:
        """Delete one copy, whole or half made. Idempotent.

        Raises PolicyError (`foreign-snapshot`) for a path that is not of our scheme.
        """
        path = naming.own_path(ref, self._instance, _SUFFIX)
        try:
            if path.parent.is_dir():
                path.with_name(path.name + _PART).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                fsync_folder(path.parent)
        except FileNotFoundError:
            pass  # another process was faster
        except OSError as error:
            raise naming.pool_error(error, path, "delete") from error
        naming.remove_empty_folders(path)

    def exists(self, ref: dict[str, str]) -> bool:
        """Whether the copy is there, whole."""
        return naming.own_path(ref, self._instance, _SUFFIX).is_file()

    def source(self, snapshot: Snapshot) -> RawSource:
        """The copy is a plain file."""
        return RawSource(
            path=Path(snapshot.ref["path"]),
            size_bytes=snapshot.size_bytes,
            sector_size=snapshot.sector_size,
        )

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:  # noqa: ARG002
        """Unknown: two copies share nothing."""
        return None

    def leftovers(self, volumes: Sequence[Volume]) -> list[dict[str, str]]:
        """Refs of all copies of this instance near these volumes, whole or half made."""
        return naming.find_refs(volumes, self._instance, _SUFFIX)

    def _places(self, plan: Plan) -> list[tuple[Volume, Path]]:
        paths = (naming.own_path(ref, self._instance, _SUFFIX) for ref in plan.refs)
        return list(zip(plan.volumes, paths, strict=True))


class _ShrunkError(Exception):
    """The source ended early."""


def _pool_of(volume: Volume) -> tuple[str, int, int]:
    """Mount point, size and free bytes of where the copy will lie."""
    folder = naming.existing_part(naming.root_of(volume))
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return (mount_of(fd).point, *space_of(fd))
        finally:
            os.close(fd)
    except OSError as error:
        raise naming.pool_error(error, folder, "look at") from error


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise naming.pool_error(error, path, "make") from error


def _exists(path: Path) -> BusyError:
    return BusyError(
        f"the copy {path} exists already",
        code="snapshot-exists",
        hint="take a new TimeMark; this file was not touched",
    )


def _copy_sparse(source: int, target: int, size_bytes: int) -> None:
    """Copy the data of `[0, size_bytes)`; holes stay holes."""
    os.ftruncate(target, size_bytes)
    at = 0
    while at < size_bytes:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if os.fstat(source).st_size < size_bytes:
                raise _ShrunkError from error
            return  # a hole to the end
        end = min(os.lseek(source, at, os.SEEK_HOLE), size_bytes)
        while at < end:
            at += _copy_some(source, target, at, min(end - at, _STEP_BYTES))


def _copy_some(source: int, target: int, at: int, length: int) -> int:
    """Copy up to `length` bytes at one place; returns how many."""
    try:
        count = os.copy_file_range(source, target, length, at, at)
    except OSError as error:
        # between two file systems, or of a kind that has no such call
        if error.errno not in {errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
            raise
        block = os.pread(source, length, at)
        count = os.pwrite(target, block, at) if block else 0
    if count == 0:
        raise _ShrunkError
    return count
