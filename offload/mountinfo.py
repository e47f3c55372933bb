"""What is mounted here, on which devices, and in which files and disks those devices lie.

Sources: proc(5) for mountinfo, the kernel's Documentation/ABI for /sys/dev/block and /sys/fs/btrfs.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SYS_BLOCK = Path("/sys/dev/block")
_SYS_BTRFS = Path("/sys/fs/btrfs")

Device = tuple[int, int]  # major, minor


@dataclass(frozen=True, slots=True, kw_only=True)
class MountPoint:
    """One mount. `device` numbers the file system: equal for all mounts of one file system."""

    point: Path
    device: Device
    kind: str  # ext4, xfs, tmpfs …
    source: str
    read_only: bool  # the file system itself, not just this mount of it
    options: tuple[str, ...] = ()  # of the file system: for NFS its server's address, addr=…


@dataclass(frozen=True, slots=True)
class FileId:
    """A file, by the numbers that `stat` gives."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backing:
    """All that a block device lies on, itself included: devices by number, files of loops."""

    devices: frozenset[Device]
    files: frozenset[FileId]
    paths: tuple[Path, ...]  # of `files`


def mounts(process: int | None = None) -> list[MountPoint]:
    """All mounts of a process's mount namespace (default: our own), in the order they were made.

    Raises OSError where the process is gone, or not ours to look at.
    """
    place = "self" if process is None else str(process)
    return _parse(Path(f"/proc/{place}/mountinfo").read_text(errors="surrogateescape"))


def mounts_everywhere() -> list[MountPoint]:
    """Also those of other mount namespaces (containers, services) that this user may look into."""
    found = mounts()
    seen = {_namespace(Path("/proc/self"))}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            namespace = _namespace(process)
            if namespace not in seen:
                text = (process / "mountinfo").read_text(errors="surrogateescape")
                seen.add(namespace)
                found += _parse(text)
    return found


def find_mount(point: Path, table: list[MountPoint]) -> MountPoint | None:
    """The mount at exactly this place (the topmost, where several are), or None."""
    real = Path(os.path.realpath(point))
    return next((m for m in reversed(table) if m.point == real), None)


def mount_holding(path: Path, table: list[MountPoint]) -> MountPoint:
    """The mount in which a path lies; of a path that does not exist, its nearest parent counts."""
    real = Path(os.path.realpath(path))
    while True:
        found = find_mount(real, table)
        if found is not None:
            return found
        if real == real.parent:
            raise LookupError(f"no mount holds {path}")
        real = real.parent


def devices_of(mount: MountPoint) -> frozenset[Device]:
    """The block devices of a file system; empty where it has none that the kernel names."""
    if mount.device[0] != 0:
        return frozenset({mount.device})
    try:
        status = os.stat(mount.source)
    except OSError:
        return frozenset()
    if not stat.S_ISBLK(status.st_mode):
        return frozenset()
    own = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return frozenset({own, *_btrfs_members(own)})


def backing_of(devices: frozenset[Device]) -> Backing:
    """Follow partitions to their disks, device-mapper and md to what they are made of, and loops
    to their files."""
    seen: set[Device] = set()
    files: dict[FileId, Path] = {}
    todo = list(devices)
    while todo:
        device = todo.pop()
        if device in seen:
            continue
        seen.add(device)
        folder = _SYS_BLOCK / f"{device[0]}:{device[1]}"
        todo += _below(folder)
        with contextlib.suppress(OSError):
            path = Path((folder / "loop/backing_file").read_text().rstrip("\n"))
            status = path.stat()
            if stat.S_ISBLK(status.st_mode):
                todo.append((os.major(status.st_rdev), os.minor(status.st_rdev)))
            else:
                files[FileId(status.st_dev, status.st_ino)] = path
    return Backing(
        devices=frozenset(seen), files=frozenset(files), paths=tuple(sorted(files.values()))
    )


def stack_below(mount: MountPoint, table: list[MountPoint]) -> set[Device]:
    """The file systems on which a file system rests, itself included: those that hold the files of
    the loop devices under it. If one of them stands still, so does this one."""
    found: set[Device] = set()
    todo = [mount]
    while todo:
        current = todo.pop()
        if current.device in found:
            continue
        found.add(current.device)
        for path in backing_of(devices_of(current)).paths:
            with contextlib.suppress(LookupError):
                todo.append(mount_holding(path, table))
    return found


def _below(folder: Path) -> Iterator[Device]:
    """The disk of a partition, the members of a dm or md device."""
    with contextlib.suppress(OSError):
        real = folder.resolve(strict=True)
        if (real / "partition").exists():
            yield _number((real.parent / "dev").read_text())
        slaves = real / "slaves"
        if slaves.is_dir():
            for slave in slaves.iterdir():
                yield _number((slave / "dev").read_text())


def _btrfs_members(device: Device) -> set[Device]:
    """All devices of the btrfs that this device is a member of."""
    for folder in _SYS_BTRFS.glob("*/devices"):
        members = set()
        with contextlib.suppress(OSError):
            members = {_number((entry / "dev").read_text()) for entry in folder.iterdir()}
        if device in members:
            return members
    return set()


def _namespace(process: Path) -> int:
    return (process / "ns/mnt").stat().st_ino


def _number(text: str) -> Device:
    major, _, minor = text.strip().partition(":")
    return int(major), int(minor)


def _parse(text: str) -> list[MountPoint]:
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        kind, source, options = fields[fields.index("-") + 1 :][:3]
        found.append(
            MountPoint(
                point=Path(_unescape(fields[4])),
                device=_number(fields[2]),
                kind=kind,
                source=_unescape(source),
                read_only="ro" in options.split(","),
                options=tuple(options.split(",")),
            )
        )
    return found


def _unescape(field: str) -> str:
    r"""Undo the octal escapes: \040 is a blank (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), field)
