"""Which volumes' writers a list of frozen mounts really holds: looked up, not believed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload import mountinfo
from offload.mountinfo import Backing, Device, FileId, MountPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """`held`: every file system on them that can be written to is among the frozen mounts.
    `loose`: volume → mount points on it that would go on writing. `opaque`: mounts of which no
    known volume can be found below."""

    held: tuple[str, ...]
    loose: Mapping[str, tuple[Path, ...]]
    opaque: tuple[Path, ...]


def cover(frozen: Sequence[MountPoint], paths: Mapping[str, Path]) -> Coverage:
    """Compare the frozen mounts with all that is mounted on this machine from each volume.

    `paths`: volume → its file or device. Seen are mounts of every mount namespace, through
    partitions, loop devices, device-mapper and md. Not seen is a program that writes to the block
    device itself, without a file system.
    """
    everywhere = [*mountinfo.mounts_everywhere(), *frozen]
    backings: dict[Device, Backing] = {}
    for mount in everywhere:
        if mount.device not in backings:
            backings[mount.device] = mountinfo.backing_of(mountinfo.devices_of(mount))
    frozen_devices = {mount.device for mount in frozen}
    held: list[str] = []
    loose: dict[str, tuple[Path, ...]] = {}
    found: set[Device] = set()
    for volume, path in paths.items():
        on_it = [m for m in everywhere if _lies_on(backings[m.device], path)]
        found |= {m.device for m in on_it}
        writing = {m.point for m in on_it if not m.read_only and m.device not in frozen_devices}
        if writing:
            loose[volume] = tuple(sorted(writing))
        elif any(m.device in frozen_devices for m in on_it):
            held.append(volume)
    opaque = tuple(m.point for m in frozen if m.device not in found)
    return Coverage(held=tuple(held), loose=loose, opaque=opaque)


def carrying(frozen: Sequence[MountPoint], paths: Mapping[str, Path]) -> tuple[str, ...]:
    """Volumes on whose own device, not on a partition or a layer above it, one of the frozen file
    systems lies."""
    devices = frozenset(device for mount in frozen for device in mountinfo.devices_of(mount))
    return tuple(volume for volume, path in paths.items() if _number_of(path) in devices)


def _number_of(path: Path) -> Device | None:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            return os.major(status.st_rdev), os.minor(status.st_rdev)
    return None


def _lies_on(backing: Backing, path: Path) -> bool:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            return (os.major(status.st_rdev), os.minor(status.st_rdev)) in backing.devices
        return FileId(status.st_dev, status.st_ino) in backing.files
    return False
