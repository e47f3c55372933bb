"""Read-only loop devices: a file, or a device that somebody else holds, as a device of its own.

By ioctl, not by losetup, for what losetup does not give: the device bears our name (as
`lo_file_name`, udev's ID_LOOP_BACKING_FILENAME), and it goes by itself with its last user, so that
no crash leaves one behind.

Numbers and structures: linux/loop.h of Linux 6.1.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.errors import UnavailableError

NAME_MAX = 63  # bytes; LO_NAME_SIZE with the zero behind it

_CONTROL = Path("/dev/loop-control")
_SYS_BLOCK = Path("/sys/block")
_GET_FREE = 0x4C82  # LOOP_CTL_GET_FREE
_CONFIGURE = 0x4C0A  # LOOP_CONFIGURE
_GET_STATUS64 = 0x4C05  # LOOP_GET_STATUS64
_READ_ONLY, _AUTOCLEAR = 1, 4  # LO_FLAGS_…
# struct loop_info64: five times u64, four times u32, file name, crypt name, key, two times u64
_INFO = "=5Q4I64s64s32s2Q"
_CONFIG = f"=II{struct.calcsize(_INFO)}s8Q"  # struct loop_config: fd, block size, info, reserved
_TRIES = 50  # of a free device that another process may take before us


@contextmanager
def opened(path: Path, name: str, sector_size: int) -> Iterator[str]:
    """A loop device on `path`, read-only; its path. Whoever opens it keeps it after this block.

    UnavailableError (`no-device`) where the kernel refuses.
    """
    config = _config(name, sector_size)
    try:
        backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            number, device = _configured(backing, config)
        finally:
            os.close(backing)
    except OSError as error:
        raise UnavailableError(
            f"the kernel makes no loop device of {path}: {error.strerror}", code="no-device"
        ) from error
    try:
        yield f"/dev/loop{number}"
    finally:
        os.close(device)


def name_of(device: str) -> str | None:
    """The name that a loop device (`loop3`) was made under; None: free, gone, not to be opened."""
    if not (_SYS_BLOCK / device / "loop").is_dir():
        return None
    with contextlib.suppress(OSError):
        fd = os.open(f"/dev/{device}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = fcntl.ioctl(fd, _GET_STATUS64, bytes(struct.calcsize(_INFO)))
        finally:
            os.close(fd)
        raw: bytes = struct.unpack(_INFO, info)[9]
        return raw.rstrip(b"\0").decode("utf-8", "replace")
    return None


def _config(name: str, sector_size: int) -> list[object]:
    """All of a struct loop_config but the descriptor."""
    flags = _READ_ONLY | _AUTOCLEAR
    info = struct.pack(_INFO, *[0] * 5, 0, 0, 0, flags, name.encode(), b"", b"", 0, 0)
    return [sector_size, info, *[0] * 8]


def _configured(backing: int, config: list[object]) -> tuple[int, int]:
    """The number of a device that is ours, and an open descriptor of it. Raises OSError."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control, _GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, struct.pack(_CONFIG, backing, *config))
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return number, device
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    finally:
        os.close(control)
