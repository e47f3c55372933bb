"""Read-only snapshots of a whole btrfs subvolume, by ioctl: no program starts during a freeze.

Such a snapshot is one transaction: of two writes of which the second was issued after the first was
durable (O_DIRECT, or followed by a flush), it never shows the second without the first, whichever
files they went to. Both ioctls need root in general.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

# linux/btrfs.h: _IOW(0x94, 23, struct btrfs_ioctl_vol_args_v2): fd, transid, flags, unused[4], name
_SNAP_CREATE_V2 = 0x50009417
_ARGS_V2 = struct.Struct("=qQQ32x4040s")
_SUBVOL_RDONLY = 1 << 1
# linux/btrfs.h: _IOW(0x94, 15, struct btrfs_ioctl_vol_args): fd, name
_SNAP_DESTROY = 0x5000940F
_ARGS = struct.Struct("=q4088s")
_ROOT_INODE = 256  # linux/btrfs_tree.h: BTRFS_FIRST_FREE_OBJECTID, the top folder of a subvolume


def subvolume_root(path: Path) -> Path | None:
    """The top folder of the subvolume that holds a file, or None where this mount doesn't reach it.

    Raises OSError. To be asked for files on btrfs only.
    """
    real = path.resolve()
    device = real.stat().st_dev  # on btrfs one a subvolume
    for folder in real.parents:
        status = folder.stat()
        if status.st_dev != device:
            return None
        if status.st_ino == _ROOT_INODE:
            return folder
    return None


def create_readonly(root: Path, folder: Path, name: str) -> None:
    """Snapshot the subvolume at `root` as `folder/name`. Raises OSError."""
    source = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _in_folder(folder, _SNAP_CREATE_V2, _ARGS_V2.pack(source, 0, _SUBVOL_RDONLY, name.encode()))
    finally:
        os.close(source)


def ensure_destroyed(folder: Path, name: str) -> None:
    """Delete the subvolume `folder/name`; the kernel frees its space later. Idempotent.

    Raises OSError.
    """
    try:
        _in_folder(folder, _SNAP_DESTROY, _ARGS.pack(0, name.encode()))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _in_folder(folder: Path, request: int, arguments: bytes) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, bytearray(arguments))
    finally:
        os.close(fd)
