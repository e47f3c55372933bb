"""The production load: one number goes up, on both volumes, for as long as somebody watches.

Each round commits the number to a SQLite database on the first volume and then writes it to a file
on the second, both made durable. So at any one instant the database is level with the file or one
ahead, never behind and never further. Without root there are no file systems to write to: the
number then goes into a sector of each volume.

Ends when its standard input is closed: a demonstration that is killed leaves no writer.
"""

from __future__ import annotations

import argparse
import os
import select
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECTOR_BYTES = 512
PAUSE_S = 0.010  # shorter rounds are not written down
_BREATH_S = 0.003

Put = Callable[[int], None]


def into_database(path: Path) -> Put:
    """Commits to a database in WAL mode, synchronous to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = sqlite3.connect(path, isolation_level=None)
    link.execute("PRAGMA journal_mode=WAL")
    link.execute("PRAGMA synchronous=FULL")
    link.execute(
        "CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY, placed REAL, goods BLOB)"
    )

    def put(number: int) -> None:
        goods = os.urandom(300)
        link.execute("INSERT INTO orders VALUES (?, ?, ?)", (number, time.time(), goods))

    return put


def into_file(path: Path, offset: int = 0) -> Put:
    """Overwrites one sector of a file or an image."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def put(number: int) -> None:
        os.pwrite(fd, sector_of(number), offset)
        os.fsync(fd)

    return put


def sector_of(number: int) -> bytes:
    """A number as the sector that holds it."""
    return f"{number}\n".encode().ljust(SECTOR_BYTES, b"\0")


def number_in(sector: bytes) -> int:
    """The inverse of `sector_of`."""
    return int(sector.split(b"\n")[0])


def longest_pause(log: Path, began: float, ended: float) -> float | None:
    """Seconds of the longest round that touches a span of the monotonic clock.

    None: no round was longer than `PAUSE_S`.
    """
    found = []
    for line in log.read_text().splitlines():
        at, length = (float(word) for word in line.split())
        if at - length <= ended and at >= began:
            found.append(length)
    return max(found, default=None)


def write_on(first: Put, second: Put, log: Path) -> None:
    """Write until standard input is closed; rounds longer than `PAUSE_S` are written down."""
    number = 0
    with log.open("a", buffering=1) as out:
        last = time.monotonic()
        while not select.select([sys.stdin], [], [], _BREATH_S)[0]:
            number += 1
            first(number)
            second(number)
            now = time.monotonic()
            if now - last > PAUSE_S:
                out.write(f"{now:.6f} {now - last:.6f}\n")
            last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--sector", action="append", nargs=2, default=[], metavar=("IMAGE", "AT"))
    parser.add_argument("--log", type=Path, required=True)
    args = parser.parse_args()
    if args.sector:
        first, second = (into_file(Path(image), int(at)) for image, at in args.sector)
    else:
        first, second = into_database(args.database), into_file(args.file)
    write_on(first, second, args.log)


if __name__ == "__main__":
    main()
