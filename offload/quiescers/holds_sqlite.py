"""The write lock of a SQLite database, held by the guardian. Loads the standard library only.

A process of its own because the lock is a POSIX record lock: it would be lost as soon as anything
else in the same process closed the file (sqlite.org/howtocorrupt.html, 2.2).
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from offload.errors import UnavailableError

_AGAIN = 3  # times that a writer may slip in between checkpoint and lock


class SqliteHold:
    """`path` names the database itself, no symlink; `timeout_s` is for the lock."""

    def __init__(self, *, path: str, timeout_s: float) -> None:
        """Opens it, and checkpoints what can be without waiting for anybody."""
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
            ((self._journal,),) = self._connection.execute("PRAGMA journal_mode").fetchall()
            with contextlib.suppress(sqlite3.OperationalError):  # busy: the next one will do
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            raise UnavailableError(f"{path}: {error}", code="freeze-failed") from error

    def freeze(self) -> None:
        """Empty the WAL, then lock. Raises UnavailableError (`freeze-late`, `freeze-failed`)."""
        until = time.monotonic() + self._timeout_s
        try:
            for _ in range(_AGAIN):
                self._checkpoint(until)
                self._patience(until)
                # RESERVED, or the WAL's write lock: no commit is under way, and none can begin
                self._connection.execute("BEGIN IMMEDIATE")
                if self._wal_bytes() == 0 or time.monotonic() >= until:
                    break
                self._connection.execute("ROLLBACK")
            else:
                self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self.thaw()
            raise self._translated(error) from error
        self.said = self._described()

    def _checkpoint(self, until: float) -> None:
        if self._journal == "wal":
            self._patience(until, share=0.5)  # a reader that stays must not cost us the lock
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _patience(self, until: float, share: float = 1.0) -> None:
        left_ms = max(1, round((until - time.monotonic()) * 1000 * share))
        self._connection.execute(f"PRAGMA busy_timeout = {left_ms}")

    def _wal_bytes(self) -> int:
        try:
            return self._wal.stat().st_size
        except FileNotFoundError:
            return 0

    def _translated(self, error: sqlite3.Error) -> UnavailableError:
        busy = getattr(error, "sqlite_errorcode", 0) & 0xFF in {
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
        }
        if busy:
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
