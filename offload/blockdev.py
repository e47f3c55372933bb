"""What Linux says about block devices and disk images: size, sector size, a lasting identity."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from offload.filesystem import file_identity

_BLKSSZGET = 0x1268  # linux/fs.h: _IO(0x12, 104), logical sector size in bytes, an int
_BLKROSET = 0x125D  # linux/fs.h: _IO(0x12, 93), an int
_BLKROGET = 0x125E  # linux/fs.h: _IO(0x12, 94), an int
_BLKGETSIZE64 = 0x80081272  # linux/fs.h: _IOR(0x12, 114, size_t), size in bytes, a u64
_GPT_SIGNATURE = b"EFI PART"  # UEFI 2.10, 5.3.2: at the start of the second logical sector
_SECTOR_SIZES = (512, 4096)
_SYS_BLOCK = Path("/sys/dev/block")
_BY_ID = Path("/dev/disk/by-id")


def device_size(fd: int) -> int:
    """The size of an open block device in bytes. Raises OSError."""
    answer = bytearray(8)
    fcntl.ioctl(fd, _BLKGETSIZE64, answer)
    return int.from_bytes(answer, "little")


def device_sector_size(fd: int) -> int:
    """The logical sector size of an open block device in bytes. Raises OSError."""
    answer = bytearray(4)
    fcntl.ioctl(fd, _BLKSSZGET, answer)
    return int.from_bytes(answer, "little")


def device_read_only(fd: int) -> bool:
    """Whether the kernel refuses writes to an open block device. Raises OSError."""
    answer = bytearray(4)
    fcntl.ioctl(fd, _BLKROGET, answer)
    return int.from_bytes(answer, "little") != 0


def make_device_read_only(fd: int) -> None:
    """Have the kernel refuse writes to an open block device. Raises OSError."""
    fcntl.ioctl(fd, _BLKROSET, (1).to_bytes(4, "little"))


def image_sector_size(fd: int) -> int:
    """The sector size that the partition table of a disk image was made for: 512 or 4096.

    A GPT tells it by its place; any other image is taken for one of 512-byte sectors.
    """
    for size in _SECTOR_SIZES:
        if os.pread(fd, len(_GPT_SIGNATURE), size) == _GPT_SIGNATURE:
            return size
    return _SECTOR_SIZES[0]


def device_identity(fd: int) -> str:
    """A name of an open block device that lasts over reboots where the device has one.

    In this order: the device-mapper UUID, WWID or serial of the device, what backs a loop device,
    udev's by-id name, else device number and size. A partition adds its place to its disk's name.
    """
    status = os.fstat(fd)
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    folder = _SYS_BLOCK / f"{major}:{minor}"
    if (folder / "partition").exists():
        start = _text(folder / "start") or "0"
        parent = folder.resolve().parent
        number = _text(parent / "dev") or f"{major}:{minor}"
        return f"{_disk_identity(parent, number, device_size(fd))}:part@{start}"
    return _disk_identity(folder, f"{major}:{minor}", device_size(fd))


def _disk_identity(folder: Path, number: str, size_bytes: int) -> str:
    for place in ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial"):
        found = _text(folder / place)
        if found:
            return f"{place.rpartition('/')[2]}:{' '.join(found.split())}"
    backing = _text(folder / "loop/backing_file")
    if backing:
        with contextlib.suppress(OSError):
            offset = _text(folder / "loop/offset") or "0"
            return f"loop:{_backing_identity(backing)}@{offset}"
    by_id = _by_id(number)
    return f"by-id:{by_id}" if by_id else f"number:{number}:{size_bytes}"


def _backing_identity(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return file_identity(fd)
    finally:
        os.close(fd)


def _by_id(number: str) -> str | None:
    """The first of udev's lasting names of a whole device, or None where udev gives none."""
    if not _BY_ID.is_dir():
        return None
    for link in sorted(_BY_ID.iterdir()):
        with contextlib.suppress(OSError):
            status = link.stat()
            found = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            if stat.S_ISBLK(status.st_mode) and found == number:
                return link.name
    return None


def _text(path: Path) -> str | None:
    """One attribute of sysfs, or None: absent, unreadable, empty."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip() or None
    return None
