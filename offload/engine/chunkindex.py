"""Where each chunk of a store lies: a cache in a local SQLite file, made from the index objects.

It can be thrown away at any time. `refresh` brings it to the index objects that there are: names
are never reused, so a name that is known has a content that is known.

A chunk can be at several places: two writers at once may both have stored it, or a prune has copied
it and the old pack is still there. All are kept. Readers go from one to the next (`places`), those
in packs that are to be deleted last; writers ask `has`, which counts only what they may rely on.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from offload.errors import NotFoundError, UnavailableError
from offload.filelock import alone
from offload.format.pack import Entry, PackHead

_LAYOUT = 3  # of the tables; a cache of another layout is made anew
_SCHEMA = """
CREATE TABLE IF NOT EXISTS source(
  number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, sure INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS pack(number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS named(
  pack INTEGER NOT NULL, source INTEGER NOT NULL, PRIMARY KEY(pack, source)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS chunk(
  id BLOB NOT NULL, pack INTEGER NOT NULL, offset INTEGER NOT NULL, stored INTEGER NOT NULL,
  raw INTEGER NOT NULL, kind INTEGER NOT NULL, encoding INTEGER NOT NULL,
  PRIMARY KEY(id, pack, offset)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS head(
  pack TEXT PRIMARY KEY, key_version INTEGER NOT NULL, salt BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS chunk_pack ON chunk(pack, offset);
CREATE INDEX IF NOT EXISTS named_source ON named(source);
"""
_TABLES = ("source", "pack", "named", "chunk", "head")
_SQL_MANY = 500  # variables in one statement; SQLite allows more, old ones 999
_ATTEMPTS = 20  # index objects that a prune merges while they are listed


# One statement: between two, another process may have made the cache anew.
_SELECT = (
    "SELECT c.id, c.kind, c.encoding, c.raw, c.stored, c.offset, p.name "
    "FROM chunk c JOIN pack p ON p.number = c.pack"
)


_Row = tuple[bytes, int, int, int, int, int, str]  # as _SELECT gives them


_RELIABLE = (
    "SELECT p.name, c.offset FROM chunk c JOIN pack p ON p.number = c.pack "
    "WHERE c.id = ? AND EXISTS("
    "SELECT 1 FROM named n JOIN source s ON s.number = n.source "
    "WHERE n.pack = c.pack AND s.sure)"
)


class Location(NamedTuple):
    """A chunk and where it is."""

    pack: str
    entry: Entry


class ChunkIndex:
    """Lookups are safe from any thread; one writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.avoid: Set[str] = frozenset()  # packs that are to be deleted: read last
        self.bad: Callable[[str, int], bool] = _none_is  # (pack, offset): cannot be read there
        self.relied: set[str] = set()  # packs that a writer has found chunks in
        self._reliable: Set[str] | None = None
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
        if db.execute("PRAGMA user_version").fetchone() != (_LAYOUT,):
            for table in _TABLES:
                db.execute(f"DROP TABLE IF EXISTS {table}")
            db.execute(f"PRAGMA user_version={_LAYOUT}")
        db.executescript(_SCHEMA)
        return db

    def refresh(
        self,
        names: Callable[[], Iterable[str]],
        load: Callable[[str], tuple[dict[str, list[Entry]], bool]],
    ) -> None:
        """Bring the cache to exactly the index objects of `names()`.

        `load` reads one: its packs, and whether that is what it says (a damaged one is guessed from
        the packs: good to read by, not to build on). Several processes may share the cache.
        """
        with self._use():
            if self._sources() == set(names()):
                return
            with self._transaction():
                wanted = self._insert_new(names, load)
                for name in self._sources() - wanted:
                    self._forget(name)

    def _insert_new(
        self,
        names: Callable[[], Iterable[str]],
        load: Callable[[str], tuple[dict[str, list[Entry]], bool]],
    ) -> set[str]:
        """Read what is new, until two listings agree: a prune that merges index objects writes the
        new one before it deletes the old, and one listing may show neither."""
        wanted = set(names())
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(NotFoundError):  # merged meanwhile: the next listing says how
                for name in sorted(wanted - self._sources()):
                    packs, sure = load(name)
                    self._insert(name, packs, sure=sure)
            before, wanted = wanted, set(names())
            if before == wanted and wanted <= self._sources():
                return wanted
        raise UnavailableError(
            "the index objects of the store change faster than they can be read",
            hint="a prune is running: try again",
        )

    def _sources(self) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT name FROM source")}

    def add(self, name: str, packs: dict[str, list[Entry]]) -> None:
        """Take over an index object that this process has just written."""
        with self._use(), self._transaction():
            if name not in self._sources():
                self._insert(name, packs, sure=True)
        if self._reliable is not None:
            self._reliable = self._reliable | packs.keys()

    def _insert(self, name: str, packs: dict[str, list[Entry]], *, sure: bool) -> None:
        self._db.execute("INSERT INTO source(name, sure) VALUES (?,?)", (name, sure))
        source = self._number("source", name)
        for pack, entries in packs.items():
            self._db.execute("INSERT OR IGNORE INTO pack(name) VALUES (?)", (pack,))
            number = self._number("pack", pack)
            self._db.execute("INSERT OR IGNORE INTO named VALUES (?,?)", (number, source))
            self._db.executemany(
                "INSERT OR IGNORE INTO chunk VALUES (?,?,?,?,?,?,?)",
                (
                    (e.id, number, e.offset, e.stored_length, e.raw_length, e.kind, e.encoding)
                    for e in entries
                ),
            )

    def _number(self, table: str, name: str) -> int:
        query = f"SELECT number FROM {table} WHERE name = ?"  # noqa: S608 - our own names
        number: int = self._db.execute(query, (name,)).fetchone()[0]
        return number

    def _forget(self, name: str) -> None:
        """An index object has gone, and the packs that no other one names."""
        source = self._number("source", name)
        packs = self._db.execute("SELECT pack FROM named WHERE source = ?", (source,)).fetchall()
        self._db.execute("DELETE FROM named WHERE source = ?", (source,))
        for pack in packs:
            if self._db.execute("SELECT 1 FROM named WHERE pack = ?", pack).fetchone() is None:
                self._db.execute("DELETE FROM chunk WHERE pack = ?", pack)
                self._db.execute("DELETE FROM pack WHERE number = ?", pack)
        self._db.execute("DELETE FROM source WHERE number = ?", (source,))

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
        """The best place of a chunk, or None."""
        return next(iter(self.places(ident)), None)

    def places(self, ident: bytes) -> list[Location]:
        """All places of a chunk, best first."""
        with self._use():
            rows = self._db.execute(f"{_SELECT} WHERE c.id = ?", (ident,)).fetchall()
        return [_location(row) for row in sorted(rows, key=self._rank_of_row)]

    def _rank(self, pack: str, offset: int) -> tuple[bool, bool]:
        """Smaller is better: what is known to be bad comes last."""
        return self.bad(pack, offset), pack in self.avoid

    def _rank_of_row(self, row: _Row) -> tuple[bool, bool]:
        return self._rank(row[6], row[5])

    def find_many(self, ids: Iterable[bytes]) -> dict[bytes, Location]:
        """The best places of all that are known."""
        found: dict[bytes, Location] = {}
        wanted = sorted(ids)  # as they lie in the table
        with self._use():
            for at in range(0, len(wanted), _SQL_MANY):
                part = wanted[at : at + _SQL_MANY]
                marks = ",".join("?" * len(part))
                for row in self._db.execute(f"{_SELECT} WHERE c.id IN ({marks})", part):
                    known = found.get(row[0])
                    if known is None or self._rank_of_row(row) < self._rank(
                        known.pack, known.entry.offset
                    ):
                        found[row[0]] = _location(row)
        return found

    def known(self, ids: Iterable[bytes]) -> set[bytes]:
        """Those of the ids that have a place at all."""
        wanted = list(ids)
        found: set[bytes] = set()
        with self._use():
            for at in range(0, len(wanted), _SQL_MANY):
                part = wanted[at : at + _SQL_MANY]
                marks = ",".join("?" * len(part))
                query = f"SELECT id FROM chunk WHERE id IN ({marks})"  # noqa: S608 - marks only
                found.update(ident for (ident,) in self._db.execute(query, part))
        return found

    def rely_on(self, packs: Set[str]) -> None:
        """A writer's rule: chunks count (`has`) in these packs only, and in its own."""
        self._reliable, self.relied = packs, set()

    def has(self, ident: bytes) -> bool:
        """Whether a writer need not store a chunk; what it builds on is noted in `relied`.

        Not for a place that only a damaged index object was read for: packs that are still being
        written were taken in with it, and they may go. Nor for a place that is noted as bad: what
        is stored anew mends it.
        """
        with self._use():
            rows = self._db.execute(_RELIABLE, (ident,)).fetchall()
            for pack, offset in rows:
                if self.bad(pack, offset):
                    continue
                if self._reliable is None or pack in self._reliable:
                    self.relied.add(pack)
                    return True
        return False

    def entries(self, pack: str) -> list[Entry]:
        """The chunks of this pack, in its order."""
        query = f"{_SELECT} WHERE p.name = ? ORDER BY c.offset"
        with self._use():
            rows = self._db.execute(query, (pack,)).fetchall()
        return [_location(row).entry for row in rows]

    def objects_of(self, packs: Set[str]) -> list[str]:
        """The index objects that name any of these packs."""
        query = (
            "SELECT DISTINCT s.name, p.name FROM source s JOIN named n ON n.source = s.number "
            "JOIN pack p ON p.number = n.pack"
        )
        with self._use():
            found = {source for source, pack in self._db.execute(query) if pack in packs}
        return sorted(found)

    def packs(self) -> list[str]:
        """All packs that the index knows."""
        with self._use():
            return [row[0] for row in self._db.execute("SELECT name FROM pack ORDER BY name")]

    def note_heads(self, heads: Mapping[str, PackHead]) -> None:
        """Keep how packs are encrypted, and forget it of packs that have gone."""
        rows = [(pack, head.key_version, head.salt) for pack, head in heads.items()]
        with self._use(), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO head VALUES (?,?,?)", rows)
            self._db.execute("DELETE FROM head WHERE pack NOT IN (SELECT name FROM pack)")

    def head(self, pack: str) -> PackHead | None:
        """How a pack is encrypted, or None if that is not known here."""
        query = "SELECT key_version, salt FROM head WHERE pack = ?"
        with self._use():
            row = self._db.execute(query, (pack,)).fetchone()
        return None if row is None else PackHead(*row)

    def empty(self) -> bool:
        """Whether it knows no chunk at all."""
        with self._use():
            return self._db.execute("SELECT 1 FROM chunk LIMIT 1").fetchone() is None

    def totals(self) -> tuple[int, int, int]:
        """Chunks, their stored bytes and their raw bytes; what is stored twice counts twice."""
        with self._use():
            row = self._db.execute("SELECT count(*), sum(stored), sum(raw) FROM chunk").fetchone()
        return row[0], row[1] or 0, row[2] or 0

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def _none_is(_pack: str, _offset: int) -> bool:
    return False


def _location(row: _Row) -> Location:
    return Location(row[6], Entry._make(row[:6]))
