"""Real files for the production volumes, taken from the machine."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

MIB = 1 << 20
BLOCK_BYTES = 4096
_LARGEST_BYTES = 24 * MIB  # of one file, so that there are many


def find_files(tops: Sequence[str], goal_bytes: int) -> list[Path]:
    """Regular files below the first folders that there are, until `goal_bytes` are reached."""
    found: list[Path] = []
    total = 0
    for path in _walk(tops):
        size = path.stat().st_size
        if 0 < size <= _LARGEST_BYTES:
            found.append(path)
            total += size
            if total >= goal_bytes:
                break
    return found


def copy_files(files: Sequence[Path], to: Path) -> int:
    """Copy them with their paths; returns the bytes."""
    total = 0
    for path in files:
        target = to / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        total += target.stat().st_size
    return total


def overwrite_blocks(path: Path, blocks: int, seed: int, start: int = 0, end: int = 0) -> int:
    """Overwrite random 4 KiB blocks of a file (within `[start, end)`); returns the bytes."""
    dice = random.Random(seed)
    size = path.stat().st_size
    first, last = start // BLOCK_BYTES, (min(end, size) if end else size) // BLOCK_BYTES
    chosen = dice.sample(range(first, last), min(blocks, last - first))
    fd = os.open(path, os.O_WRONLY)
    try:
        for block in chosen:
            os.pwrite(fd, dice.randbytes(BLOCK_BYTES), block * BLOCK_BYTES)
        os.fsync(fd)
    finally:
        os.close(fd)
    return len(chosen) * BLOCK_BYTES


def _walk(tops: Sequence[str]) -> Iterator[Path]:
    for top in tops:
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                    yield path
