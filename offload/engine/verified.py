"""When each pack of a store was last read from start to end: a local file, for verifying in parts.

It can be thrown away at any time: then all packs count as never verified.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from offload.errors import UnavailableError
from offload.filelock import alone

_SCHEMA = "CREATE TABLE IF NOT EXISTS pack(name TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID"


class VerifiedPacks:
    """The last full check of each pack that passed it. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with alone(path.with_name(f"{path.name}.lock")):
                self._db = self._open()
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(
                f"cannot use the note of verified packs {path}: {error}",
                code="cache-unusable",
                hint="it is a cache: remove it, or make its folder writable",
            ) from error

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self.path.unlink(missing_ok=True)  # damaged: all packs count as never verified
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30)
        self.path.chmod(0o600)
        db.execute("PRAGMA synchronous=OFF")  # a cache: a crash of the machine may cost it
        db.execute(_SCHEMA)
        return db

    def note(self, packs: Sequence[str], at: datetime) -> None:
        """These packs were read and are whole."""
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO pack VALUES (?, ?)", ((p, at.timestamp()) for p in packs)
            )

    def forget(self, packs: Sequence[str]) -> None:
        """These packs are damaged, or gone."""
        with self._db:
            self._db.executemany("DELETE FROM pack WHERE name = ?", ((p,) for p in packs))

    def times(self) -> dict[str, datetime]:
        """Pack → when it was last whole."""
        rows = self._db.execute("SELECT name, at FROM pack")
        return {name: datetime.fromtimestamp(at, UTC) for name, at in rows}

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def choose_packs(
    sizes: Mapping[str, int],
    verified: Mapping[str, datetime],
    now: datetime,
    *,
    older_than_s: float | None,
    budget_bytes: int | None,
) -> list[str]:
    """The packs to read now: what has gone longest unverified first, in name order at the end.

    Never verified counts as oldest, and so does a time that is yet to come: some clock was wrong.
    At least one pack is chosen where any is due, so that a budget below a pack's size does not
    stop the round for ever.
    """
    never = datetime.min.replace(tzinfo=UTC)
    last = {name: at for name in sizes if (at := verified.get(name, never)) <= now}
    due = [
        name
        for name in sizes
        if older_than_s is None
        or name not in last
        or last[name] <= now - timedelta(seconds=older_than_s)
    ]
    due.sort(key=lambda name: (last.get(name, never), name))
    chosen: list[str] = []
    left = budget_bytes
    for name in due:
        if left is not None and chosen and sizes[name] > left:
            break
        chosen.append(name)
        if left is not None:
            left -= sizes[name]
    return sorted(chosen)
