"""Which chunks are in use, and from which pack each is to be read from now on.

Both are in a temporary SQLite file, joined with the tables of the local chunk index: memory stays
bounded, however large the store is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

from offload.engine.chunkindex import ChunkIndex
from offload.errors import UnavailableError
from offload.format.pack import ENTRY, RECORD, TRAILER, Entry

_RECENT = 200_000  # ids in memory: 20 MB
_SCHEMA = """
CREATE TABLE live(id BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE usable(number INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE place(id BLOB PRIMARY KEY, pack TEXT, offset INTEGER, stored INTEGER) WITHOUT ROWID;
CREATE INDEX place_pack ON place(pack, offset);
CREATE TABLE bad(pack TEXT, offset INTEGER, PRIMARY KEY(pack, offset)) WITHOUT ROWID;
"""
# Of several places the one in the first pack by name: whoever counts comes to the same answer.
_PLACES = """
INSERT INTO place SELECT c.id, min(u.name), c.offset, c.stored
FROM live l JOIN cache.chunk c ON c.id = l.id JOIN cache.pack p ON p.number = c.pack
JOIN usable u ON u.name = p.name
WHERE NOT EXISTS(SELECT 1 FROM place WHERE place.id = l.id)
AND EXISTS(SELECT 1 FROM bad WHERE bad.pack = u.name AND bad.offset = c.offset) = ?
GROUP BY c.id
"""


@dataclass(frozen=True, slots=True)
class Used:
    """What of one pack is in use."""

    chunks: int
    stored_bytes: int  # of the payloads

    def pack_bytes(self, head_length: int) -> int:
        """The size of a pack that holds just this: a small pack is all frame, and must not be
        rewritten for that again and again."""
        frame = self.chunks * (RECORD.size + ENTRY.size) + TRAILER.size
        return head_length + frame + self.stored_bytes


class LiveSet:
    """Made of the index as it is when `choose` is called. One thread."""

    def __init__(self, index: ChunkIndex) -> None:
        self._recent: set[bytes] = set()  # one backup says mostly what the one before it did
        self._db = sqlite3.connect("", isolation_level=None)  # a temporary file, gone when closed
        try:
            self._db.execute("ATTACH ? AS cache", (str(index.path),))
            self._db.executescript("PRAGMA main.journal_mode=OFF; PRAGMA main.synchronous=OFF;")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN")
        except sqlite3.Error as error:
            self._db.close()
            raise UnavailableError(
                f"cannot make a temporary database of what is in use: {error}",
                hint="make room for temporary files (TMPDIR)",
            ) from error

    def add(self, ids: Sequence[bytes]) -> None:
        """Mark ids as in use."""
        new = set(ids) - self._recent
        self._db.executemany("INSERT OR IGNORE INTO live VALUES (?)", ((i,) for i in new))
        self._recent |= new
        if len(self._recent) > _RECENT:
            self._recent.clear()

    def __contains__(self, ident: bytes) -> bool:
        found = self._db.execute("SELECT 1 FROM live WHERE id = ?", (ident,)).fetchone()
        return found is not None

    def choose(
        self,
        usable: Set[str],
        last: Set[str] = frozenset(),
        bad: Set[tuple[str, int]] = frozenset(),
    ) -> int:
        """Choose a place for every chunk in use: in a pack of `usable`, else in one of `last`; one
        of the `bad` (packs and offsets that cannot be read) only where there is no other.

        Returns how many have none.
        """
        # the index is read as it is now: a transaction would see it as it was at its begin
        self._db.execute("COMMIT")
        self._db.execute("DELETE FROM place")
        self._db.execute("DELETE FROM bad")
        self._db.executemany("INSERT INTO bad VALUES (?, ?)", bad)
        for is_bad, packs in ((0, usable), (0, last), (1, usable), (1, last)):
            if is_bad and not bad:
                break
            self._db.execute("DELETE FROM usable")
            self._db.executemany("INSERT INTO usable(name) VALUES (?)", ((p,) for p in packs))
            self._db.execute(_PLACES, (is_bad,))
        query = "SELECT (SELECT count(*) FROM live) - (SELECT count(*) FROM place)"
        missing: int = self._db.execute(query).fetchone()[0]
        self._db.execute("BEGIN")
        return missing

    def unreadable(self) -> set[str]:
        """Packs with a chunk in use that is bad there, and is nowhere else."""
        query = (
            "SELECT DISTINCT place.pack FROM place JOIN bad "
            "ON bad.pack = place.pack AND bad.offset = place.offset"
        )
        return {pack for (pack,) in self._db.execute(query)}

    def used(self) -> dict[str, Used]:
        """What of each pack is in use, for the packs of which anything is."""
        query = "SELECT pack, count(*), sum(stored) FROM place GROUP BY pack"
        return {pack: Used(count, stored) for pack, count, stored in self._db.execute(query)}

    def entries(self, packs: Iterable[str]) -> Iterator[tuple[str, Entry]]:
        """The chunks in use of these packs, pack by pack, in their order."""
        query = (
            "SELECT c.id, c.kind, c.encoding, c.raw, c.stored, c.offset FROM place "
            "JOIN cache.pack p ON p.name = place.pack "
            "JOIN cache.chunk c ON c.id = place.id AND c.pack = p.number "
            "AND c.offset = place.offset WHERE place.pack = ? ORDER BY place.offset"
        )
        for pack in sorted(packs):
            for row in self._db.execute(query, (pack,)).fetchall():
                yield pack, Entry(*row)

    def close(self) -> None:
        """Drop it."""
        self._db.close()
