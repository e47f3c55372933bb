"""Real file systems in loop-mounted files, for tests of what keeps data on production storage.

Needs root, loop devices and the mkfs program of the kind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offload.run import ProgramError, require_program, run

_PATIENCE_S = 60.0  # for programs that a test has just ended to let go of the mount
mounts_of_ours: set[str] = set()  # who makes a mount namespace leaves those of others out
_MAKE = {
    "xfs": (("mkfs.xfs", "-q", "-f"), "xfsprogs"),  # with reflinks, unless told otherwise
    "btrfs": (("mkfs.btrfs", "-q", "-f"), "btrfs-progs"),
    "ext4": (("mkfs.ext4", "-q", "-F"), "e2fsprogs"),
}


@contextmanager
def loop_pool(
    folder: Path,
    kind: str,
    *,
    size_bytes: int = 1 << 30,
    mkfs_options: Sequence[str] = (),
    mount_options: str = "",
) -> Iterator[Path]:
    """A fresh file system of `kind` (xfs, btrfs, ext4) in a sparse file; yields its mount point.

    XFS needs 300 MiB at least. At the end it is unmounted, its loop device freed, the file removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image, point = folder / f"{kind}.img", folder / kind
    point.mkdir()
    with image.open("xb") as out:
        os.ftruncate(out.fileno(), size_bytes)
    argv, package = _MAKE[kind]
    try:
        run([require_program(argv[0], package), *argv[1:], *mkfs_options, str(image)])
        with mounted(image, point, mount_options):
            yield point
    finally:
        image.unlink(missing_ok=True)
        point.rmdir()


@contextmanager
def mounted(image: Path, point: Path, options: str = "") -> Iterator[Path]:
    """A file system in a file, mounted through a loop device that goes with the mount."""
    both = f"loop,{options}" if options else "loop"
    run(["mount", "-o", both, str(image), str(point)])
    mounts_of_ours.add(str(point))
    try:
        yield point
    finally:
        mounts_of_ours.discard(str(point))
        unmount(point)


@contextmanager
def loop_device(image: Path, *, sector_size: int = 512, read_only: bool = False) -> Iterator[Path]:
    """A loop device over a file; yields the device."""
    options = ["--sector-size", str(sector_size), *(["--read-only"] if read_only else [])]
    device = run(["losetup", "--find", "--show", *options, str(image)]).stdout.strip()
    try:
        yield Path(device)
    finally:
        run(["losetup", "--detach", device])


@contextmanager
def partitions(device: Path) -> Iterator[None]:
    """The partitions of a loop device as devices (`loop0p1` …): not every kernel looks for them."""
    run(["partx", "--add", str(device)])
    try:
        yield
    finally:
        _delete_partitions(device)


def _delete_partitions(device: Path) -> None:
    """A file system that was just unmounted holds its partition for a moment longer."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        if run(["partx", "--delete", str(device)], check=False).status == 0:
            return
        if not list(Path("/sys/block", device.name).glob(f"{device.name}p*")):
            return
        time.sleep(0.1)
    run(["partx", "--delete", str(device)])


def unmount(point: Path) -> None:
    """Unmount; wait a little for those who still use it, then take it out of the tree anyway.

    Raises ProgramError (naming the first refusal) if it was in use to the end: a test left
    something behind.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            run(["umount", str(point)])
        except ProgramError:
            if not os.path.ismount(point):
                return
            if time.monotonic() > until:
                run(["umount", "--lazy", str(point)], check=False)
                raise
            time.sleep(0.05)
        else:
            return
