"""The write lock of a SQLite database, held by the guardian. Loads the standard library only.

A process of its own because the lock is a POSIX record lock: it would be lost as soon as anything
else in the same process closed the file (sqlite.org/howtocorrupt.html, 2.2).
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from offload.errors import UnavailableError

_OPEN_S = 5.0  # the parent waits 10 s
_READERS_S = 0.2  # a checkpoint that waits for readers lets no writer go on
_AGAIN = 3  # times that a writer may slip in between checkpoint and lock
# SQLite's own busy handler looks ten times a second: a writer that commits without a pause is seen
# idle by it one time in a hundred.
_LOOK_S = 0.0003


class SqliteHold:
    """`path` names the database itself, no symlink; `timeout_s` is for the lock."""

    def __init__(self, *, path: str, timeout_s: float) -> None:
        """Opens it, and checkpoints what nobody is reading."""
        self.name = path
        self.ours = True
        self.said = ""
        self._timeout_s = timeout_s
        self._wal = Path(f"{path}-wal")
        try:
            self._connection = sqlite3.connect(
                f"{Path(path).as_uri()}?mode=rw",
                uri=True,
                timeout=0,
                isolation_level=None,
                check_same_thread=False,  # the guardian freezes in a thread
            )
            until = time.monotonic() + min(timeout_s, _OPEN_S)
            ((self._journal,),) = self._execute("PRAGMA journal_mode", until)
            self._execute("PRAGMA wal_checkpoint(PASSIVE)", until)
        except sqlite3.Error as error:
            raise UnavailableError(f"{path}: {error}", code="freeze-failed") from error

    def freeze(self) -> None:
        """Empty the WAL, then lock. Raises UnavailableError (`freeze-late`, `freeze-failed`)."""
        until = time.monotonic() + self._timeout_s
        try:
            for _ in range(_AGAIN):
                emptied = self._checkpoint(until)
                # RESERVED, or the WAL's write lock: no commit is under way, and none can begin
                self._execute("BEGIN IMMEDIATE", until)
                if not emptied or self._wal_bytes() == 0:
                    break
                self._connection.execute("ROLLBACK")
            else:
                self._execute("BEGIN IMMEDIATE", until)
        except sqlite3.Error as error:
            self.thaw()
            raise self._translated(error) from error
        self.said = self._described()

    def _checkpoint(self, until: float) -> bool:
        """Whether there was a WAL, and it was emptied."""
        if self._journal != "wal":
            return False
        until = min(until, time.monotonic() + _READERS_S)
        while True:
            ((busy, _, _),) = self._execute("PRAGMA wal_checkpoint(TRUNCATE)", until)
            if not busy or time.monotonic() >= until:
                return not busy
            time.sleep(_LOOK_S)

    def _execute(self, statement: str, until: float) -> list[tuple[Any, ...]]:
        """Tried until nobody else holds a lock on it, or it is late."""
        while True:
            try:
                return self._connection.execute(statement).fetchall()
            except sqlite3.OperationalError as error:
                if not _busy(error) or time.monotonic() >= until:
                    raise
            time.sleep(_LOOK_S)

    def _wal_bytes(self) -> int:
        try:
            return self._wal.stat().st_size
        except FileNotFoundError:
            return 0

    def _translated(self, error: sqlite3.Error) -> UnavailableError:
        if _busy(error):
            return UnavailableError(
                f"{self.name}: a writer did not let go of it in {self._timeout_s:g} s",
                code="freeze-late",
            )
        return UnavailableError(f"{self.name}: {error}", code="freeze-failed")

    def _described(self) -> str:
        if self._journal != "wal":
            return f"write lock held, journal_mode={self._journal}"
        left = self._wal_bytes()
        if left:
            return f"write lock held; a reader kept {left} bytes of WAL, which the image has too"
        return "write lock held, WAL empty"

    def intact(self) -> bool:
        """Whether the transaction lasts; the parent asks the kernel for the lock itself."""
        return self._connection.in_transaction

    def thaw(self) -> bool:
        """Let go, and close: the last one to close a database removes its WAL."""
        try:
            held = self._connection.in_transaction
            if held:
                self._connection.execute("ROLLBACK")
            self._connection.close()
        except sqlite3.ProgrammingError:  # closed already
            return False
        except sqlite3.Error:  # the lock goes with the process, at the latest
            return False
        return held


def _busy(error: sqlite3.Error) -> bool:
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest is the extended code
    return primary in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
