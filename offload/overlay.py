"""Overlays: what is written to a view, in a qcow2 file of its own that outlives the server.

What is guaranteed. A write that was acknowledged is on disk (fdatasync), and so is the table that
says where: it survives `kill -9` of every server of the view, a reboot and a power cut, whether the
client flushed or not. Writes that are in flight together share their fdatasyncs. What was not
acknowledged may be there, be missing, or be there in part, sector by sector.

What is not: that a disk which lies about its cache keeps its promises; that what is discarded
(trim, unmap) is given back before `unmount`.

Why not cheaper. qcow2 keeps its tables in the daemon's memory until a flush: killed, it loses every
cluster that was new since. Tables that are written at once but not synced would survive the
daemon; after a power cut, though, a table may have reached the disk before the data that it names,
and in a cluster that was written in part that is data of the origin. So it is one fdatasync a write
at queue depth 1 (1.3 where most clusters are new), which is two to three times slower than
write-back where an fdatasync takes 0.1 ms.

The limit is of the file: nothing of it lies past `limit_bytes`, and a write that would have to
fails with ENOSPC. Reads, and writes to clusters that are there, go on.

The file names no backing file in its header: what it lies upon is given to the server by us, so
that nobody who writes into an image can make a server open another file. Clusters of 64 KiB have
subclusters of 2 KiB: a write of whole ones need not read the origin.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from offload import run
from offload.errors import BusyError, CleanupError, UnavailableError, UsageError
from offload.filesystem import fsync_folder
from offload.quantity import show_size
from offload.target import Overlay

CLUSTER_BYTES = 64 << 10
_FORMAT = f"cluster_size={CLUSTER_BYTES},extended_l2=on"
# Beside the empty tables of its image, before a write of one cluster is sure to fit.
LIMIT_MIN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How full an overlay is: up to where in its file clusters are taken, and the limit of that."""

    used_bytes: int
    limit_bytes: int

    @property
    def share(self) -> float:
        """1.0 is full."""
        return self.used_bytes / self.limit_bytes


def create(overlay: Overlay, size_bytes: int) -> None:
    """Make an empty overlay (0600) for an image of `size_bytes`, its entry in the folder durable.

    Raises BusyError (`overlay-exists`), UsageError (`overlay-limit-small`), UnavailableError
    (`program-missing`, `program-failed`, `overlay-unusable`).
    """
    program = run.require_program("qemu-img", "qemu-utils")
    path = overlay.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise BusyError(f"there is an overlay {path} already", code="overlay-exists") from None
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        run.run([program, "create", "-q", "-f", "qcow2", "-o", _FORMAT, str(path), str(size_bytes)])
        _set_limit(overlay)
    except BaseException:
        remove(path)
        raise


def remove(path: Path) -> None:
    """Remove an overlay and what was written to it. Idempotent."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CleanupError(f"cannot remove {path}: {error.strerror}", code="cleanup") from error


def usage(overlay: Overlay) -> Usage | None:
    """How full it is; None where it is gone."""
    try:
        fd = os.open(overlay.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        used = _end_of_data(fd)
    finally:
        os.close(fd)
    return Usage(used_bytes=min(used, overlay.limit_bytes), limit_bytes=overlay.limit_bytes)


def _set_limit(overlay: Overlay) -> None:
    """The file is as long as it may become, and sparse: see `qemu_storage.overlay_node`."""
    needed = overlay.path.stat().st_size + LIMIT_MIN_BYTES
    if overlay.limit_bytes < needed:
        raise UsageError(
            f"an overlay of {show_size(overlay.limit_bytes)} is too small for this image",
            code="overlay-limit-small",
            hint=f"it takes {show_size(needed)} at the very least, and what is to be written",
        )
    try:
        fd = os.open(overlay.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, overlay.limit_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_folder(overlay.path.parent)
    except OSError as error:
        raise _unusable(overlay.path, error) from error


def _end_of_data(fd: int) -> int:
    """The end of the last cluster that holds anything.

    qcow2 takes clusters from the start of the file on, but fills them in part: the blocks of the
    file would say less than what counts for the limit.
    """
    status = os.fstat(fd)
    low, high = 0, status.st_size
    if _seek(fd, 0, os.SEEK_HOLE) >= high > status.st_blocks * 512:
        return status.st_blocks * 512  # a file system that does not tell its holes
    while low < high:  # whether there is data behind a place only ever changes to "no"
        middle = (low + high) // 2
        if _seek(fd, middle, os.SEEK_DATA) < status.st_size:
            low = middle + 1
        else:
            high = middle
    return -(-low // CLUSTER_BYTES) * CLUSTER_BYTES


def _seek(fd: int, at: int, how: int) -> int:
    """lseek; the end of the file where there is nothing more of the kind."""
    try:
        return os.lseek(fd, at, how)
    except OSError as error:
        if error.errno not in {errno.ENXIO, errno.EINVAL}:  # EINVAL: it knows no holes
            raise
        return os.fstat(fd).st_size


def _unusable(path: Path, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"cannot make the overlay {path}: {error.strerror}",
        code="overlay-unusable",
        hint="see [overlays] folder and limit in the configuration",
    )
