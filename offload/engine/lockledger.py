"""What is known here of locks: a cache in a local SQLite file, one a store.

Until when each object is locked, as far as this host has set or asked; which packs the pages of
trees need; and for roots of backups a set of packs that is no smaller than what they need. It can
be thrown away at any time: then the store is asked, object by object.
"""

from __future__ import annotations

import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from offload.errors import UnavailableError

_LAYOUT = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS lock(name TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pack(number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS page(id BLOB PRIMARY KEY, packs BLOB NOT NULL, made REAL NOT NULL);
CREATE TABLE IF NOT EXISTS root(id BLOB PRIMARY KEY, packs BLOB NOT NULL, made REAL NOT NULL);
CREATE TABLE IF NOT EXISTS damage(digest BLOB NOT NULL);
"""
_TABLES = ("lock", "pack", "page", "root", "damage")
_KEPT_S = 180 * 86400.0  # of pages and roots; later they are walked again

_PAST_S = 30 * 86400.0

Numbers = frozenset[int]


class LockLedger:
    """Safe from any thread; several processes may share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._translated():
            self._db = self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        self.path.chmod(0o600)
        db.execute("PRAGMA synchronous=OFF")
        if db.execute("PRAGMA user_version").fetchone() != (_LAYOUT,):
            for table in _TABLES:
                db.execute(f"DROP TABLE IF EXISTS {table}")
            db.execute(f"PRAGMA user_version={_LAYOUT}")
        db.executescript(_SCHEMA)
        return db

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UnavailableError(
                f"cannot use the local record of locks {self.path}: {error}",
                code="cache-unusable",
                hint=f"it is a cache: remove {self.path}* and try again",
            ) from error

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, self._translated():
            yield self._db

    # -- locks -----------------------------------------------------------------------------------

    def note(self, locks: Mapping[str, datetime]) -> None:
        """Until when objects are locked. An earlier date than is known changes nothing."""
        with self._use() as db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "INSERT INTO lock VALUES (?,?) "
                "ON CONFLICT(name) DO UPDATE SET until = max(until, excluded.until)",
                ((name, until.timestamp()) for name, until in locks.items()),
            )
            past = datetime.now(UTC).timestamp() - _PAST_S  # what has ended says nothing
            db.execute("DELETE FROM lock WHERE until < ?", (past,))
            db.execute("COMMIT")

    def locks(self, names: Iterable[str]) -> dict[str, datetime]:
        """Until when these are locked, of those that are known."""
        wanted = set(names)
        with self._use() as db:
            rows = db.execute("SELECT name, until FROM lock").fetchall()
        return {n: datetime.fromtimestamp(until, UTC) for n, until in rows if n in wanted}

    def forget(self) -> None:
        """Drop all of it: it was found to be wrong."""
        self.forget_trees()
        with self._use() as db:
            db.execute("DELETE FROM lock")

    def forget_trees(self) -> None:
        """Drop what trees need: chunks have moved."""
        with self._use() as db:
            db.execute("DELETE FROM page")
            db.execute("DELETE FROM root")

    def trees_under(self, damage: bytes) -> None:
        """Drop what trees need if it was noted under another damage of the store than this."""
        with self._use() as db:
            known = db.execute("SELECT digest FROM damage").fetchall()
        if known == [(damage,)]:
            return
        self.forget_trees()
        with self._use() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM damage")
            db.execute("INSERT INTO damage VALUES (?)", (damage,))
            db.execute("COMMIT")

    # -- packs of trees --------------------------------------------------------------------------

    def numbers(self, packs: Iterable[str]) -> Numbers:
        """Short names of packs."""
        found = set()
        with self._use() as db:
            for pack in packs:
                db.execute("INSERT OR IGNORE INTO pack(name) VALUES (?)", (pack,))
                found.add(
                    db.execute("SELECT number FROM pack WHERE name = ?", (pack,)).fetchone()[0]
                )
        return frozenset(found)

    def names(self, numbers: Numbers) -> set[str]:
        """The inverse."""
        with self._use() as db:
            rows = db.execute("SELECT number, name FROM pack").fetchall()
        return {name for number, name in rows if number in numbers}

    def page(self, ident: bytes) -> Numbers | None:
        """The packs that a page and all below it need."""
        return self._get("page", ident)

    def set_pages(self, pages: Mapping[bytes, Numbers]) -> None:
        """Keep what pages need."""
        self._set("page", pages)

    def root(self, ident: bytes) -> Numbers | None:
        """Packs among which are all that the tree under a root needs."""
        return self._get("root", ident)

    def set_roots(self, roots: Mapping[bytes, Numbers]) -> None:
        """Keep what roots need at most."""
        self._set("root", roots)

    def _get(self, table: str, ident: bytes) -> Numbers | None:
        query = f"SELECT packs FROM {table} WHERE id = ?"  # noqa: S608 - our own names
        with self._use() as db:
            row = db.execute(query, (ident,)).fetchone()
        return None if row is None else frozenset(n for (n,) in struct.iter_unpack("<I", row[0]))

    def _set(self, table: str, entries: Mapping[bytes, Numbers]) -> None:
        made = datetime.now(UTC).timestamp()
        rows = (
            (ident, struct.pack(f"<{len(packs)}I", *sorted(packs)), made)
            for ident, packs in entries.items()
        )
        with self._use() as db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?,?,?)", rows)  # noqa: S608
            db.execute(f"DELETE FROM {table} WHERE made < ?", (made - _KEPT_S,))  # noqa: S608
            db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._db.close()
