"""Where each chunk of a store lies: a cache in a local SQLite file, made from the index objects.

It can be thrown away at any time. `refresh` compares it with the names of the index objects: names
are never reused, so a name that is known has a content that is known. When a name has vanished (a
prune) the cache is made anew.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.errors import UnavailableError
from offload.filelock import alone
from offload.format.pack import Entry

_SCHEMA = """
CREATE TABLE IF NOT EXISTS source(name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pack(number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS chunk(
  id BLOB PRIMARY KEY, pack INTEGER NOT NULL, offset INTEGER NOT NULL, stored INTEGER NOT NULL,
  raw INTEGER NOT NULL, kind INTEGER NOT NULL, encoding INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS chunk_pack ON chunk(pack, offset);
"""
_SQL_MANY = 500  # variables in one statement; SQLite allows more, old ones 999


# One statement: between two, another process may have made the cache anew.
_SELECT = (
    "SELECT c.id, p.name, c.offset, c.stored, c.raw, c.kind, c.encoding "
    "FROM chunk c JOIN pack p ON p.number = c.pack"
)


@dataclass(frozen=True, slots=True)
class Location:
    """A chunk and where it is."""

    pack: str
    entry: Entry


class ChunkIndex:
    """Lookups are safe from any thread; one writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Alone, because the change to WAL ignores the busy timeout, and because a damaged cache
            # must not be taken away from under a process that has just made it again.
            with alone(path.with_name(f"{path.name}.lock")):
                self._db = self._open()
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(
                f"cannot use the local chunk index {path}: {error}",
                hint="it is a cache: remove it, or make its folder writable",
            ) from error

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise
            for tail in ("", "-wal", "-shm"):  # a damaged cache is made again
                self.path.with_name(self.path.name + tail).unlink(missing_ok=True)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        self.path.chmod(0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")  # a cache: a crash of the machine may cost it
        db.executescript(_SCHEMA)
        return db

    def refresh(
        self,
        names: Callable[[], Iterable[str]],
        load: Callable[[str], dict[str, list[Entry]]],
    ) -> None:
        """Bring the cache to exactly the index objects of `names()`; `load` reads one.

        Several processes may share the cache. `names` is asked again once this one has the cache
        for itself: an older answer would take what another has just added for vanished.
        """
        with self._use():
            if self._sources() == set(names()):
                return
            with self._transaction():
                known, wanted = self._sources(), set(names())
                if known - wanted:
                    for table in ("source", "pack", "chunk"):
                        self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - constants
                    known = set()
                for name in sorted(wanted - known):
                    self._insert(load(name))
                    self._db.execute("INSERT INTO source VALUES (?)", (name,))

    def _sources(self) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT name FROM source")}

    def add(self, name: str, packs: dict[str, list[Entry]]) -> None:
        """Take over an index object that this process has just written."""
        with self._use(), self._transaction():
            self._insert(packs)
            self._db.execute("INSERT OR IGNORE INTO source VALUES (?)", (name,))

    def _insert(self, packs: dict[str, list[Entry]]) -> None:
        for pack, entries in packs.items():
            self._db.execute("INSERT OR IGNORE INTO pack(name) VALUES (?)", (pack,))
            (number,) = self._db.execute(
                "SELECT number FROM pack WHERE name = ?", (pack,)
            ).fetchone()
            self._db.executemany(
                "INSERT OR REPLACE INTO chunk VALUES (?,?,?,?,?,?,?)",
                (
                    (e.id, number, e.offset, e.stored_length, e.raw_length, e.kind, e.encoding)
                    for e in entries
                ),
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # the first error is the one to tell
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        """The database for one thread, its errors translated."""
        with self._mutex:
            try:
                yield
            except sqlite3.Error as error:
                raise UnavailableError(
                    f"cannot use the local chunk index {self.path}: {error}",
                    code="cache-unusable",
                    hint=f"it is a cache: remove {self.path}* and try again",
                ) from error

    def find(self, ident: bytes) -> Location | None:
        """Where a chunk is, or None."""
        with self._use():
            row = self._db.execute(f"{_SELECT} WHERE c.id = ?", (ident,)).fetchone()
        return None if row is None else _location(row)

    def find_many(self, ids: Sequence[bytes]) -> dict[bytes, Location]:
        """Locations of all that are known."""
        found: dict[bytes, Location] = {}
        with self._use():
            for at in range(0, len(ids), _SQL_MANY):
                part = ids[at : at + _SQL_MANY]
                marks = ",".join("?" * len(part))
                for row in self._db.execute(f"{_SELECT} WHERE c.id IN ({marks})", part):
                    found[row[0]] = _location(row)
        return found

    def entries(self, pack: str) -> list[Entry]:
        """The chunks that are read from this pack, in its order."""
        query = f"{_SELECT} WHERE p.name = ? ORDER BY c.offset"
        with self._use():
            rows = self._db.execute(query, (pack,)).fetchall()
        return [_location(row).entry for row in rows]

    def packs(self) -> list[str]:
        """All packs that the index knows."""
        with self._use():
            return [row[0] for row in self._db.execute("SELECT name FROM pack ORDER BY name")]

    def empty(self) -> bool:
        """Whether it knows no chunk at all."""
        with self._use():
            return self._db.execute("SELECT 1 FROM chunk LIMIT 1").fetchone() is None

    def totals(self) -> tuple[int, int, int]:
        """Chunks, their stored bytes and their raw bytes."""
        with self._use():
            row = self._db.execute("SELECT count(*), sum(stored), sum(raw) FROM chunk").fetchone()
        return row[0], row[1] or 0, row[2] or 0

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def _location(row: tuple[bytes, str, int, int, int, int, int]) -> Location:
    ident, pack, offset, stored, raw, kind, encoding = row
    return Location(pack, Entry(ident, kind, encoding, raw, stored, offset))
