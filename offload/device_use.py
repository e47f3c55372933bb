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


def users(device: str) -> list[str]:
    """Who uses a disk or one of its partitions, in words; nobody where it does not exist."""
    folder = _SYS_BLOCK / Path(device).name
    parts = [folder, *_partitions(folder)]
    numbers = {number for part in parts if (number := _number(part)) is not None}
    if not numbers:
        return []
    found = [*_mounts(numbers), *_swap(numbers)]
    for part in parts:
        found += _holders(part)
    found += [*_loops(numbers), *_processes(numbers)]
    if not found and _claimed(device):
        found.append("claimed by the kernel (an iSCSI target, perhaps)")
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


def _processes(numbers: set[Device]) -> Iterator[str]:
    """Those that this user may look into."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(_opened(fd) in numbers for fd in (process / "fd").iterdir()):
                name = (process / "comm").read_text().strip()
                yield f"open in process {process.name} ({name})"


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
