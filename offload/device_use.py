"""Who uses a block device of this machine: mounts, swap, devices on top of it, open files.

Sources: proc(5), the kernel's Documentation/ABI for /sys/block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from offload import mountinfo
from offload.mountinfo import Device

_SYS_BLOCK = Path("/sys/block")
_CLASS_BLOCK = Path("/sys/class/block")  # partitions too


def users(device: str, *, readers: bool = True) -> list[str]:
    """Who uses a disk or one of its partitions, in words; nobody where it does not exist.

    Without `readers`, processes that only read it are left out: those that look what a disk holds
    do so at any time.
    """
    folder = _CLASS_BLOCK / Path(device).name
    parts = [folder, *_partitions(folder)]
    numbers = {number for part in parts if (number := _number(part)) is not None}
    if not numbers:
        return []
    found = [*_mounts(numbers), *_swap(numbers)]
    for part in parts:
        found += _holders(part)
    found += [*_loops(numbers), *_processes(numbers, readers=readers)]
    if not found and _claimed(device):
        found.append("claimed by the kernel (an iSCSI target, perhaps)")
    return found


def loops_of(path: Path) -> list[str]:
    """The loop devices over a file."""
    found = []
    for backing in sorted(_SYS_BLOCK.glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            if path.samefile(backing.read_text().strip()):
                found.append(f"/dev/{backing.parents[1].name}")
    return found


def _partitions(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/partition")]


def _number(folder: Path) -> Device | None:
    with contextlib.suppress(OSError):
        major, _, minor = (folder / "dev").read_text().strip().partition(":")
        return int(major), int(minor)
    return None


def _mounts(numbers: set[Device]) -> Iterator[str]:
    for mount in mountinfo.mounts_everywhere():
        if mountinfo.devices_of(mount) & numbers:
            yield f"mounted at {mount.point}"


def _swap(numbers: set[Device]) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/swaps").read_text().splitlines()[1:]:
            if _device_number(line.split()[0]) in numbers:
                yield "swap space"


def _holders(folder: Path) -> Iterator[str]:
    """Devices of device-mapper and md that are made of it."""
    with contextlib.suppress(OSError):
        for holder in sorted((folder / "holders").iterdir()):
            name = ""
            with contextlib.suppress(OSError):
                name = (holder / "dm/name").read_text().strip()
            yield f"part of {name or holder.name}"


def _loops(numbers: set[Device]) -> Iterator[str]:
    for backing in sorted(_SYS_BLOCK.glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            if _device_number(backing.read_text().strip()) in numbers:
                yield f"under {backing.parents[1].name}"


def _processes(numbers: set[Device], *, readers: bool) -> Iterator[str]:
    """Those that this user may look into."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            opened = [fd for fd in (process / "fd").iterdir() if _opened(fd) in numbers]
            if any(readers or _writes(fd) for fd in opened):
                name = (process / "comm").read_text().strip()
                yield f"open in process {process.name} ({name})"


def _writes(fd: Path) -> bool:
    """Whether a descriptor is open for writing: proc(5), /proc/PID/fdinfo, octal flags."""
    for line in (fd.parents[1] / "fdinfo" / fd.name).read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return True


def _opened(fd: Path) -> Device | None:
    """The device behind a descriptor. Only what lies in a /dev is looked at: to ask for a file of
    a dead network file system would take for ever."""
    with contextlib.suppress(OSError):
        if "/dev/" in str(fd.readlink()):
            return _device_number(fd)
    return None


def _device_number(path: str | Path) -> Device | None:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            return os.major(status.st_rdev), os.minor(status.st_rdev)
    return None


def _claimed(device: str) -> bool:
    """Whether the kernel refuses it to an exclusive opener."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
