"""Runs in a guest, with Debian's own Python alone: small synced writes, and how long each took.

`guest_writes.py FILE` overwrites random blocks of 4 KiB of FILE, each with fdatasync, for ever; a
line a write, in microseconds.
"""

from __future__ import annotations

import os
import random
import sys
import time

_BLOCK = 4096
_LINES = 5  # at once: a line for each write would cost as much as the write


def main(path: str) -> None:
    """Until it is killed."""
    pick = random.Random(1)
    fd = os.open(path, os.O_RDWR)
    blocks = os.fstat(fd).st_size // _BLOCK
    lines: list[str] = []
    while True:
        data, offset = pick.randbytes(_BLOCK), pick.randrange(blocks) * _BLOCK
        began = time.perf_counter_ns()
        os.pwrite(fd, data, offset)
        os.fdatasync(fd)
        lines.append(f"{(time.perf_counter_ns() - began) // 1000}\n")
        if len(lines) == _LINES:
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
            lines.clear()


if __name__ == "__main__":
    main(sys.argv[1])
