"""Whether a QEMU has an image open for writing, by the locks that every QEMU takes on it.

QEMU block/file-posix.c: a QEMU that holds a permission locks the byte 100 + permission, shared, by
open file description; BLK_PERM_WRITE is bit 1 (include/block/block-common.h).
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from offload.errors import UnavailableError

_F_OFD_GETLK = 36  # linux/fcntl.h
_WRITE_BYTE = 101  # RAW_LOCK_PERM_BASE + 1
_FLOCK = "hhqqi4x"  # struct flock, linux/fcntl.h: type, whence, start, len, pid


def open_for_writing(image: Path) -> bool:
    """Whether some QEMU may write to this file or device now. UnavailableError if it is unknown.

    Not seen: a QEMU with `file.locking=off`, one on another host where the storage does not pass
    locks on, and programs that are no QEMU.
    """
    ask = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _WRITE_BYTE, 1, 0)
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            answer = fcntl.fcntl(fd, _F_OFD_GETLK, ask)
        finally:
            os.close(fd)
    except OSError as error:
        raise UnavailableError(
            f"cannot tell who has {image} open: {error.strerror}", code="lock-unknown"
        ) from error
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK
