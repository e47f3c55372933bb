"""Writes in a production VM what it is told to over TCP. It stands alone: Debian's own Python runs
it in the guest.

An order is a line `KIND NUMBER`; the answer `NUMBER DIGEST` follows once all of it is durable.
DIGEST is the SHA-256 of what was written.

| kind | what is written |
| --- | --- |
| pair | a burst of numbers, each to its place on the first disk, then to that on the second |
| file | a new small file, on the disks in turn |
| row | a row of an SQLite database on the first disk |
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import socketserver
import sqlite3
import sys
from pathlib import Path

PAIR_BYTES = 4096
BURST = 16  # numbers that one order of a pair writes
ROWS = "rows.db"
_FOLDER_FILES = 256  # in one folder
_LARGEST_BYTES = 12_000


def pair_path(disk: Path) -> Path:
    """Where the number of a pair is, on a disk."""
    return disk / "sequence"


def pair_of(number: int) -> bytes:
    """The place of a number, whole: a torn write shows."""
    return number.to_bytes(8, "little") * (PAIR_BYTES // 8)


def file_path(disk: Path, number: int) -> Path:
    """Where a small file is."""
    return disk / "files" / f"{number // _FOLDER_FILES:04}" / f"{number:07}"


def content_of(number: int) -> bytes:
    """What a small file holds: some bytes to some blocks."""
    pick = random.Random(number)  # noqa: S311 - known content, no secret
    return pick.randbytes(pick.randrange(1, _LARGEST_BYTES))


class Disks:
    """The mount points of the two disks, prepared for the orders."""

    def __init__(self, first: Path, second: Path) -> None:
        self.both = (first, second)
        for disk in self.both:
            (disk / "files").mkdir(exist_ok=True)
            # the place is there from the beginning: from now on only its content changes
            write_durably(pair_path(disk), pair_of(0))
        with sqlite3.connect(first / ROWS) as rows:
            rows.execute("PRAGMA journal_mode = WAL")
            rows.execute("CREATE TABLE IF NOT EXISTS row (number INTEGER PRIMARY KEY, digest TEXT)")
        rows.close()
        os.sync()

    def write_pair(self, number: int) -> str:
        """Each number on both, the first disk first; durable at the end.

        O_DIRECT: a write has reached the disk when it returns, so the next one begins after it
        there too, and many follow each other while a snapshot is made.
        """
        fds = [os.open(pair_path(disk), os.O_WRONLY | os.O_DIRECT) for disk in self.both]
        try:
            with mmap.mmap(-1, PAIR_BYTES) as block:  # in pages of its own, as O_DIRECT wants it
                for small in range((number - 1) * BURST + 1, number * BURST + 1):
                    block[:] = pair_of(small)
                    for fd in fds:
                        os.pwrite(fd, block, 0)
            for fd in fds:
                os.fsync(fd)
        finally:
            for fd in fds:
                os.close(fd)
        return hashlib.sha256(pair_of(number * BURST)).hexdigest()

    def write_file(self, number: int) -> str:
        """A new file, and its name."""
        path = file_path(self.both[number % 2], number)
        if not path.parent.exists():
            path.parent.mkdir()
            sync_folder(path.parent.parent)
        data = content_of(number)
        write_durably(path, data)
        return hashlib.sha256(data).hexdigest()

    def rows(self) -> sqlite3.Connection:
        """The database; each statement is a durable transaction."""
        database = sqlite3.connect(self.both[0] / ROWS, isolation_level=None)
        database.execute("PRAGMA synchronous = FULL")
        return database


def write_row(rows: sqlite3.Connection, number: int) -> str:
    """One row."""
    digest = hashlib.sha256(content_of(number)).hexdigest()
    rows.execute("INSERT INTO row VALUES (?, ?)", (number, digest))
    return digest


def write_durably(path: Path, data: bytes) -> None:
    """A file, with its name in the folder."""
    with path.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """fsync of a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Orders(socketserver.StreamRequestHandler):
    """One client: its orders one after another."""

    server: _Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Until it hangs up."""
        rows = self.server.disks.rows()
        try:
            for line in self.rfile:
                kind, _, number = line.decode().partition(" ")
                digest = self._carry_out(kind, int(number), rows)
                self.wfile.write(f"{int(number)} {digest}\n".encode())
        finally:
            rows.close()

    def _carry_out(self, kind: str, number: int, rows: sqlite3.Connection) -> str:
        if kind == "pair":
            return self.server.disks.write_pair(number)
        if kind == "file":
            return self.server.disks.write_file(number)
        return write_row(rows, number)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], disks: Disks) -> None:
        self.disks = disks
        super().__init__(address, _Orders)


def main(address: str, port: str, first: str, second: str) -> None:
    """Serve for ever."""
    with _Server((address, int(port)), Disks(Path(first), Path(second))) as server:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
