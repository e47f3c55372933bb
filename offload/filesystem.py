"""What Linux says about the file system under a path: its mount, its space, a lasting identity."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

# xfs/xfs_fs.h: _IOR('X', 100, struct xfs_fsop_geom_v1) of 112 bytes, the UUID at byte 64
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864
_XFS_GEOMETRY_BYTES = 112
_XFS_UUID = slice(64, 80)
_FS_IOC_GETVERSION = 0x80087601  # linux/fs.h: _IOR('v', 1, long), an inode's generation
_FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h: _IOR('f', 1, long); the kernel moves an int
_FS_IOC_SETFLAGS = 0x40086602  # linux/fs.h: _IOW('f', 2, long)
_FS_NOCOW_FL = 0x00800000  # linux/fs.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of mountinfo."""

    point: str
    kind: str  # xfs, btrfs …


def mount_of(fd: int) -> Mount:
    """The mount through which a file was opened.

    In a chroot the mount of its root is in no line: then the device number names it, and its kind
    is empty. Raises OSError where /proc does not tell.
    """
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    wanted = re.search(r"^mnt_id:\s*(\d+)", info, re.MULTILINE)
    # not by device number: on btrfs st_dev is of the subvolume and stands in no line
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if wanted and fields[0] == wanted.group(1):
            kind = fields[fields.index("-") + 1]
            return Mount(point=_unescape(fields[4]), kind=kind)
    device = os.fstat(fd).st_dev
    return Mount(point=f"/dev/block/{os.major(device)}:{os.minor(device)}", kind="")


def space_of(fd: int) -> tuple[int, int]:
    """Size of the file system, and the bytes that are free for everyone.

    Not what only root may still write (f_bfree): production hosts seldom run as root, and on btrfs
    that figure also counts space that files cannot have.
    """
    status = os.statvfs(fd)
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def file_system_id(fd: int) -> str:
    """An id of the file system that outlives remounts.

    XFS derives statfs's f_fsid from the device number, so its UUID is asked for; others derive
    f_fsid from theirs (btrfs: from the UUID and the subvolume).
    """
    answer = bytearray(_XFS_GEOMETRY_BYTES)
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _XFS_IOC_FSGEOMETRY_V1, answer)
        return str(uuid.UUID(bytes=bytes(answer[_XFS_UUID])))
    return f"{os.statvfs(fd).f_fsid:x}"


def file_identity(fd: int) -> str:
    """`<file system>:<inode>:<generation>`: a file made again under its old name has another.

    The generation is empty on file systems that do not give it.
    """
    generation = ""
    answer = bytearray(8)
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _FS_IOC_GETVERSION, answer)
        generation = f"{int.from_bytes(answer[:4], 'little'):x}"
    return f"{file_system_id(fd)}:{os.fstat(fd).st_ino}:{generation}"


def copy_nocow_flag(source_fd: int, fresh_fd: int) -> None:
    """Give an empty new file the source's no-copy-on-write flag (`chattr +C`).

    btrfs refuses to clone between files that differ in it. Nothing happens where file systems know
    no such flag. Raises OSError if it is set and cannot be copied.
    """
    flags = bytearray(8)
    with contextlib.suppress(OSError):
        fcntl.ioctl(source_fd, _FS_IOC_GETFLAGS, flags)
    if not int.from_bytes(flags[:4], "little") & _FS_NOCOW_FL:
        return
    own = bytearray(8)
    fcntl.ioctl(fresh_fd, _FS_IOC_GETFLAGS, own)
    wanted = int.from_bytes(own[:4], "little") | _FS_NOCOW_FL
    fcntl.ioctl(fresh_fd, _FS_IOC_SETFLAGS, struct.pack("=Q", wanted))


def fsync_folder(folder: Path) -> None:
    """Make the entries of a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unescape(field: str) -> str:
    r"""Undo mountinfo's octal escapes: \040 is a blank (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), field)
