"""The part of verify that reads packs and index objects, and puts bad packs into quarantine."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from threading import Lock

from offload.engine.chunkindex import Location
from offload.engine.packcheck import PackCheck, check_footer, check_pack
from offload.engine.quarantine import Note, note_of
from offload.engine.repository import Repository
from offload.engine.room import Room
from offload.engine.work import run_workers
from offload.errors import OffloadError
from offload.format import layout
from offload.format.index import decode_index
from offload.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One finding; `end` 0: not a range of an image."""

    store: str
    what: str
    backup: str = ""
    volume: str = ""
    start: int = 0
    end: int = 0


@dataclass(slots=True)
class Tally:
    """Collected by all threads, under the lock."""

    lock: Lock = field(default_factory=Lock)
    checked_bytes: int = 0
    chunks: int = 0
    packs: int = 0
    packs_read: int = 0
    never: bool = False  # a pack that never was read in full
    oldest: datetime | None = None
    bad: dict[bytes, str] = field(default_factory=dict)  # chunk id → what is wrong
    missing: set[bytes] = field(default_factory=set)  # of these: those whose pack is gone
    problems: list[Found] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    lifted: list[str] = field(default_factory=list)

    def problem(
        self, store: str, what: str, *, backup: str = "", volume: str = "",
        where: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        """Note a finding."""
        with self.lock:
            self.problems.append(
                Found(
                    store=store,
                    what=what,
                    backup=backup,
                    volume=volume,
                    start=where[0],
                    end=where[1],
                )
            )


class Notes:
    """What is to be noted in one store of what this run found."""

    def __init__(self, repository: Repository, tally: Tally) -> None:
        self.repository = repository
        self.tally = tally
        self._sound: set[str] = set()
        self._gone: dict[str, str] = {}
        self._bad: dict[str, dict[int, str]] = defaultdict(dict)

    def sound(self) -> set[str]:
        """The packs that were read in full and are whole."""
        return set(self._sound)

    def pack(self, found: PackCheck, *, full: bool) -> None:
        """A pack was looked at. What the store would not give at all is not noted: that says
        nothing of its bytes."""
        with self.tally.lock:
            if full and found.whole:
                self._sound.add(found.name)
            elif found.gone:
                self._gone[found.name] = f"pack {found.name} is missing"
            elif not found.unread:
                for entry, why in found.bad.items():
                    self._bad[found.name][entry.offset] = why

    def bad_chunk(self, place: Location, why: str, *, gone: bool) -> None:
        """A single chunk cannot be read."""
        with self.tally.lock:
            if gone:
                self._gone[place.pack] = why
            else:
                self._bad[place.pack][place.entry.offset] = why

    def finish(self) -> None:
        """Put bad packs into quarantine; lift the notes on those that are whole."""
        known = self.repository.quarantine
        try:
            for name in self._sound & known.packs():
                for note in known.of(name):
                    self.repository.store.delete(note.name)
                self.tally.lifted.append(name)
            self._sweep()
            for name, why in self._gone.items():
                self._put(name, {}, why, gone=True)
            for name, bad in self._bad.items():
                if bad and name not in self._gone:
                    self._put(name, bad, next(iter(bad.values())), gone=False)
        except OffloadError as error:  # e.g. a store that is read-only: the report is what counts
            log.warning("bad packs could not be noted in the store: %s", error.message)
        self.repository.refresh()

    def _sweep(self) -> None:
        """Notes on packs that are gone, and that no index object names: nobody reads there."""
        store, named = self.repository.store, set(self.repository.index.packs())
        for note in self.repository.quarantine.notes:
            if note.pack not in named and not store.exists(note.pack):
                store.delete(note.name)

    def _put(self, pack: str, bad: Mapping[int, str], why: str, *, gone: bool) -> None:
        if _says(self.repository.quarantine.of(pack), set(bad), gone=gone):
            return
        self.repository.put_sealed(*note_of(pack, bad, gone=gone, why=why))
        self.tally.quarantined.append(pack)


class Packs:
    """The packs of one store. `sizes` are those of the listing, in name order."""

    def __init__(
        self, repository: Repository, store: str, tally: Tally, notes: Notes, progress: Progress
    ) -> None:
        self.repository = repository
        self.store = store
        self.tally = tally
        self.notes = notes
        self.progress = progress
        named = set(repository.index.packs())
        self.sizes = {info.name: info.size_bytes for info in repository.store.infos(layout.PACKS)}
        repository.refresh()  # a prune takes packs out of the index before it deletes them
        self._missing = (named & set(repository.index.packs())) - self.sizes.keys()
        tally.packs += len(self.sizes)

    def indexes(self) -> None:
        """Every index object, and that the packs which the index knows are there."""
        objects = self.repository.store
        for name in objects.list(layout.INDEXES):
            try:
                decode_index(name, objects.get(name), self.repository.keys)
            except OffloadError as error:
                self._say(f"{error.message} (it can be made again: the packs hold it too)")
        for name in sorted(self._missing):
            self._gone(name)

    def _gone(self, name: str) -> None:
        self._say(f"pack {name} is missing")
        found = PackCheck(name=name, gone=True)
        found.bad = dict.fromkeys(self.repository.index.entries(name), f"pack {name} is missing")
        self._take(found, full=True)

    def ends(self, names: Sequence[str]) -> None:
        """Look at the ends of these packs."""
        if names:
            self._each(names, "ends of packs", full=False)

    def read(self, names: Sequence[str]) -> None:
        """Read these packs from start to end, in this order."""
        if names:
            self._each(names, f"store {self.store}", full=True)
        self.tally.packs_read += len(names)

    def _each(self, names: Sequence[str], task: str, *, full: bool) -> None:
        self.progress.start(task, sum(self.sizes[name] if full else 1 for name in names))

        def job(name: str, room: Room) -> None:
            if full:
                found = check_pack(self.repository, name, room)
            else:
                found = check_footer(self.repository, name, self.sizes[name])
            self._judge(found, full=full)
            self.progress.advance(task, self.sizes[name] if full else 1)

        run_workers(iter(names), lambda: nullcontext(Room()), job)
        self.progress.finish(task)

    def _judge(self, found: PackCheck, *, full: bool) -> None:
        if found.gone:
            self.repository.refresh()
            if found.name not in self.repository.index.packs():
                return  # pruned, or of a backup that was taken back, while this looked
            self._say(f"pack {found.name} went while it was to be read")
        for note in found.notes:
            self._say(note)
        if found.unread:
            self._say(found.unread)
        self._take(found, full=full)
        with self.tally.lock:
            if full:
                self.tally.checked_bytes += found.size_bytes
                self.tally.chunks += len(found.entries)

    def _take(self, found: PackCheck, *, full: bool) -> None:
        self.notes.pack(found, full=full)
        with self.tally.lock:
            for entry, why in found.bad.items():
                self.tally.bad[entry.id] = why
                if found.gone:
                    self.tally.missing.add(entry.id)

    def _say(self, what: str) -> None:
        self.tally.problem(self.store, what)


def _says(notes: Sequence[Note], bad: set[int], *, gone: bool) -> bool:
    """Whether the notes on a pack say as much already."""
    if any(note.gone for note in notes):
        return True
    return not gone and bad <= {at for note in notes for at in note.offsets}
