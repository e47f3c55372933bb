"""Snapshots of image files by FICLONE, on XFS and btrfs.

A clone of one file is one instant: the file system holds its writers while it clones (about 9 µs an
extent). Several files are one instant when their writers are held from outside, or, as root, when
they lie in one btrfs subvolume: that is snapshot as a whole and the files are cloned out of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from offload import fiemap
from offload.errors import (
    BusyError,
    ConfigError,
    IntegrityError,
    OffloadError,
    UnavailableError,
)
from offload.extents import Ranges
from offload.filesystem import copy_nocow_flag, fsync_folder, mount_of, space_of
from offload.model import Instant, RawSource, Snapshot, Volume
from offload.snapshot import Plan, VolumeState
from offload.snapshots import btrfs_subvolume, naming
from offload.snapshots.volume_file import (
    look_at,
    open_snapshot,
    open_volume,
    record_snapshot,
    settle_files,
)

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_CLONE_RANGE = struct.Struct("=qQQQ")  # src_fd, src_offset, src_length, dest_offset
_LARGEST_BLOCK = 64 << 10  # bytes; no file system of Linux has larger ones on all machines
_SUFFIX = ".raw"
_EXTENT_S = 9e-6  # measured: 100,000 extents cloned in 0.9 s
_CLONE_S = 0.002  # a clone of a file of few extents
_SUBVOLUME_S = 0.2  # a subvolume snapshot commits a transaction of the file system
_NEEDED_BYTES = 64 << 10  # inode and B-tree blocks
_EXTENT_BYTES = 64  # of B-tree records for each extent shared
_EXACT_MAPS = ("xfs", "btrfs")  # whose FIEMAP names one block for good


class ReflinkProvider:
    """FICLONE of volume files into `<snapshot_dir>/<instance>/<timemark>/<volume>.raw`."""

    name = "reflink"

    def __init__(self, instance: str) -> None:
        self._instance = instance

    def inspect(self, volume: Volume) -> VolumeState:
        """Look at a volume; also whether its file system can clone into the snapshot folder.

        Raises NotFoundError (`volume-missing`), UnavailableError (`not-a-file`, `no-reflink`),
        ConfigError (`snapshot-dir-elsewhere`), PrivilegeError.
        """
        with open_volume(volume) as fd:
            _check_cloneable(volume, fd)
            state = look_at(volume, fd)
            try:
                pool = mount_of(fd).point
                pool_size, pool_free = space_of(fd)
            except OSError as error:
                raise naming.pool_error(error, volume.path, "look at") from error
            return VolumeState(
                size_bytes=state.size_bytes,
                sector_size=state.sector_size,
                identity=state.identity,
                allocated_bytes=state.allocated_bytes,
                extents=state.extents,
                estimate_s=state.extents * _EXTENT_S + _CLONE_S,
                pool=pool,
                pool_size_bytes=pool_size,
                pool_free_bytes=pool_free,
                needed_bytes=_NEEDED_BYTES + state.extents * _EXTENT_BYTES,
            )

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """One instant for a single volume, or for several in one btrfs subvolume (as root)."""
        estimate_s = sum(self.inspect(volume).estimate_s for volume in volumes)
        together = len(volumes) > 1 and _common_subvolume(volumes) is not None
        return Plan(
            timemark=timemark,
            volumes=tuple(volumes),
            refs=tuple(naming.ref_of(v, self._instance, timemark, _SUFFIX) for v in volumes),
            instant_alone=Instant.ONE if len(volumes) == 1 or together else Instant.NONE,
            estimate_s=estimate_s + (_SUBVOLUME_S if together else 0.0),
        )

    def prepare(self, plan: Plan) -> None:
        """Make the folders; flush the volumes, so that the clone finds little to write."""
        for volume, path in self._places(plan):
            naming.ensure_folder(path)
            with open_volume(volume) as fd:
                try:
                    os.fsync(fd)
                except OSError as error:
                    raise naming.pool_error(error, volume.path, "flush") from error

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """Clone all volumes of the plan, or none."""
        places = self._places(plan)
        with ExitStack() as stack:
            together = len(places) > 1 and plan.instant_alone is Instant.ONE
            frozen = stack.enter_context(_subvolume_snapshot(places)) if together else None
            made: list[Path] = []
            try:
                return tuple(self._clone(volume, path, frozen, made) for volume, path in places)
            except BaseException as failure:
                for path in reversed(made):
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        failure.add_note(f"{path} is left: {error.strerror}")
                raise

    def _clone(
        self, volume: Volume, path: Path, frozen: _Frozen | None, made: list[Path]
    ) -> Snapshot:
        with open_volume(volume) as fd, ExitStack() as stack:
            source = fd if frozen is None else stack.enter_context(frozen.open(volume, fd))
            target = _create(path)
            made.append(path)
            stack.callback(os.close, target)
            try:
                copy_nocow_flag(source, target)
                fcntl.ioctl(target, _FICLONE, source)
            except OSError as error:
                raise _clone_error(error, volume, path) from error
            return record_snapshot(volume, fd, self.name, path)

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """Set the clones read-only and make them durable."""
        settle_files([naming.own_path(s.ref, self._instance, _SUFFIX) for s in snapshots])

    def delete(self, ref: dict[str, str]) -> None:
        """Delete one clone, and what a broken snapshot left beside it. Idempotent.

        Raises PolicyError (`foreign-snapshot`) for a path that is not of our scheme.
        """
        path = naming.own_path(ref, self._instance, _SUFFIX)
        try:
            if path.parent.is_dir():
                path.unlink(missing_ok=True)
                if (path.parent / naming.SUBVOLUME).is_dir():
                    btrfs_subvolume.ensure_destroyed(path.parent, naming.SUBVOLUME)
                fsync_folder(path.parent)
        except FileNotFoundError:
            pass  # another process was faster
        except OSError as error:
            raise naming.pool_error(error, path, "delete") from error
        naming.remove_empty_folders(path)

    def exists(self, ref: dict[str, str]) -> bool:
        """Whether the clone is there."""
        return naming.own_path(ref, self._instance, _SUFFIX).is_file()

    def source(self, snapshot: Snapshot) -> RawSource:
        """The clone is a plain file."""
        return RawSource(
            path=Path(snapshot.ref["path"]),
            size_bytes=snapshot.size_bytes,
            sector_size=snapshot.sector_size,
        )

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        """What the two clones no longer share, by FIEMAP.

        None for another or a resized volume, and on file systems whose maps are not exact. Raises
        NotFoundError (`snapshot-missing`), IntegrityError (`snapshot-altered`).
        """
        if older.identity != newer.identity or older.size_bytes != newer.size_bytes:
            return None
        old_path, new_path = Path(older.ref["path"]), Path(newer.ref["path"])
        with open_snapshot(old_path) as old_fd, open_snapshot(new_path) as new_fd:
            _check_size(older, old_fd)
            _check_size(newer, new_fd)
            try:
                if mount_of(new_fd).kind not in _EXACT_MAPS:
                    return None
                return fiemap.changed_ranges(old_fd, new_fd, newer.size_bytes)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    return None
                raise naming.pool_error(error, new_path, "map") from error

    def leftovers(self, volumes: Sequence[Volume]) -> list[dict[str, str]]:
        """Refs of all clones of this instance near these volumes, and of empty folders."""
        return naming.find_refs(volumes, self._instance, _SUFFIX)

    def _places(self, plan: Plan) -> list[tuple[Volume, Path]]:
        paths = (naming.own_path(ref, self._instance, _SUFFIX) for ref in plan.refs)
        return list(zip(plan.volumes, paths, strict=True))


class _Frozen:
    """A read-only snapshot of the subvolume that holds several volumes."""

    def __init__(self, root: Path, place: Path) -> None:
        self._root = root
        self._place = place

    @contextmanager
    def open(self, volume: Volume, live_fd: int) -> Iterator[int]:
        """The volume's file inside the snapshot; it must be the same file as the live one."""
        path = self._place / volume.path.resolve().relative_to(self._root)
        with open_snapshot(path) as fd:
            if os.fstat(fd).st_ino != os.fstat(live_fd).st_ino:
                raise UnavailableError(
                    f"volume {volume.name}: {volume.path} was replaced during the snapshot",
                    code="volume-replaced",
                    hint="try again",
                )
            yield fd


@contextmanager
def _subvolume_snapshot(places: Sequence[tuple[Volume, Path]]) -> Iterator[_Frozen]:
    root = _common_subvolume([volume for volume, _ in places])
    folder = places[0][1].parent
    if root is None:
        raise UnavailableError(
            "the volumes are no longer in one btrfs subvolume",
            code="volume-replaced",
            hint="try again",
        )
    try:
        btrfs_subvolume.create_readonly(root, folder, naming.SUBVOLUME)
    except OSError as error:
        raise naming.pool_error(error, folder / naming.SUBVOLUME, "make") from error
    try:
        yield _Frozen(root, folder / naming.SUBVOLUME)
    except BaseException as failure:
        try:
            btrfs_subvolume.ensure_destroyed(folder, naming.SUBVOLUME)
        except OSError as error:
            failure.add_note(f"{folder / naming.SUBVOLUME} is left: {error.strerror}")
        raise
    try:
        btrfs_subvolume.ensure_destroyed(folder, naming.SUBVOLUME)
    except OSError as error:
        raise naming.pool_error(error, folder / naming.SUBVOLUME, "delete") from error


def _common_subvolume(volumes: Sequence[Volume]) -> Path | None:
    """The btrfs subvolume that holds all these volumes and that we may snapshot, or None."""
    if os.geteuid() != 0:
        return None  # making it would work for its owner, deleting it needs root
    roots = set()
    for volume in volumes:
        with open_volume(volume) as fd:
            try:
                on_btrfs = mount_of(fd).kind == "btrfs"
                roots.add(btrfs_subvolume.subvolume_root(volume.path) if on_btrfs else None)
            except OSError as error:
                raise naming.pool_error(error, volume.path, "look at") from error
    return roots.pop() if len(roots) == 1 else None


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise BusyError(
            f"the snapshot {path} exists already",
            code="snapshot-exists",
            hint="take a new TimeMark; this file was not touched",
        ) from error
    except OSError as error:
        raise naming.pool_error(error, path, "make") from error


def _check_cloneable(volume: Volume, fd: int) -> None:
    """Try to clone nothing: a range behind the volume's end into a file without a name.

    The kernel looks at both file systems first (EXDEV, EOPNOTSUPP) and at the range last (EINVAL):
    so EINVAL is the good answer, and nothing becomes shared.
    """
    folder = naming.existing_part(naming.root_of(volume))
    try:
        target = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in {errno.EOPNOTSUPP, errno.EISDIR}:
            raise _clone_error(error, volume, folder) from error
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return  # a full pool must still be looked at, so that room can be made
        raise naming.pool_error(error, folder, "write to") from error
    behind = -(-os.fstat(fd).st_size // _LARGEST_BLOCK) * _LARGEST_BLOCK
    try:
        fcntl.ioctl(target, _FICLONERANGE, _CLONE_RANGE.pack(fd, behind, 0, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise _clone_error(error, volume, folder) from error
    finally:
        os.close(target)


def _clone_error(error: OSError, volume: Volume, path: Path) -> OffloadError:
    if error.errno == errno.EXDEV:
        return ConfigError(
            f"volume {volume.name}: {path} is on another file system than {volume.path}",
            code="snapshot-dir-elsewhere",
            hint=f"set snapshot_dir of [volumes.{volume.name}] to a folder on the volume's own",
        )
    if error.errno in {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EISDIR, errno.ENOSYS}:
        return UnavailableError(
            f"volume {volume.name}: the file system of {volume.path} cannot clone files",
            code="no-reflink",
            hint='use XFS (reflink=1) or btrfs, or set provider = "copy" (slow, not atomic)',
        )
    if error.errno == errno.ETXTBSY:
        return BusyError(
            f"volume {volume.name}: {volume.path} is in use as swap",
            code="in-use",
            hint=f"swapoff {volume.path}, or take the volume out of its group",
        )
    return naming.pool_error(error, path, "clone to")


def _check_size(snapshot: Snapshot, fd: int) -> None:
    found = os.fstat(fd).st_size
    if found != snapshot.size_bytes:
        raise IntegrityError(
            f"the snapshot {snapshot.ref['path']} has {found} bytes, not {snapshot.size_bytes}",
            code="snapshot-altered",
            hint="something outside of offload wrote to it; delete its TimeMark",
        )
