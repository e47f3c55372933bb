"""Overlays: what is written to a view, in a qcow2 file of its own that outlives the server.

The file names no backing file in its header: what it lies upon is given to the server by us, so
that nobody who writes into an image can make a server open another file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from offload import run
from offload.errors import BusyError, CleanupError, UnavailableError
from offload.target import Overlay


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How full an overlay is, in bytes of its file system."""

    used_bytes: int
    limit_bytes: int

    @property
    def share(self) -> float:
        """1.0 is full."""
        return self.used_bytes / self.limit_bytes


def create(overlay: Overlay, size_bytes: int) -> None:
    """Make an empty overlay (0600) for an image of `size_bytes`.

    Raises BusyError (`overlay-exists`), UnavailableError (`program-missing`, `program-failed`).
    """
    program = run.require_program("qemu-img", "qemu-utils")
    path = overlay.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise BusyError(f"there is an overlay {path} already", code="overlay-exists") from None
    except OSError as error:
        raise UnavailableError(
            f"cannot make the overlay {path}: {error.strerror}", code="overlay-unusable"
        ) from error
    try:
        run.run([program, "create", "-q", "-f", "qcow2", str(path), str(size_bytes)])
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
        status = overlay.path.stat()
    except OSError:
        return None
    # st_blocks: units of 512 bytes, stat(2)
    return Usage(used_bytes=status.st_blocks * 512, limit_bytes=overlay.limit_bytes)
