"""One process at a time, held by the kernel: the lock goes with the process."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.05


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for the lock file `path` (made, 0600) and hold it. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def alone_within(path: Path, timeout_s: float) -> Iterator[None]:
    """The same, but raises TimeoutError where somebody else has held it for so long."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() + _POLL_S > until:
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(_POLL_S)
            else:
                break
        yield
    finally:
        os.close(fd)
