"""Object lock of what a backup needs, before its manifest says that the backup exists.

A backup needs the packs that it wrote, those that its trees inherit, the index objects that name
them, and the store's parameters and keys. All must be locked at least as long as the backup itself;
those whose dates are too early get new ones, a generation ahead.

To know the packs of a tree without reading it every night, a set is kept for each root that is no
smaller than what it needs: that of its parent, what the run wrote, and what it found in the store.
When one of these has to be extended, which is once a generation, the tree itself is asked, and
pages that are known are not read again. Where something is damaged, and whenever it is mended, all
that is known of trees is forgotten once.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from offload.engine.chunkindex import Location
from offload.engine.lockledger import LockLedger, Numbers
from offload.engine.repository import Repository
from offload.errors import IntegrityError
from offload.format import layout
from offload.format.tree import Shape, decode_inner_page, decode_leaf_page
from offload.objectlock import Locking
from offload.store import Version

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

_REQUESTS = 8  # at once
_LOOKED_AT = 4  # objects of which the store is asked each time, whatever is known here


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A tree that a run has made. `parent`: the root it was built over."""

    root: bytes
    size_bytes: int
    parent: bytes | None


def ledger_path(repository: Repository) -> Path:
    """Where what is known of a store's locks lies."""
    return repository.index.path.with_name(f"{repository.parameters.store_id}.locks.db")


def lock_references(
    repository: Repository, images: Sequence[Built], own: Iterable[str]
) -> datetime | None:
    """Lock all that these trees need; returns until when the manifest is to be locked.

    `own` are the packs that the run has written. None on a store without locks. IntegrityError
    (`pack-missing`), PolicyError (`lock-too-long`, `clock-differs`), UnavailableError: then the
    backup must not be published.
    """
    store = repository.store
    if not isinstance(store, Locking):
        return None
    with closing(LockLedger(ledger_path(repository))) as ledger:
        ledger.note(store.placed())
        return _Lock(repository, store, ledger).lock(images, set(own) | repository.index.relied)


def lock_mended(repository: Repository) -> None:
    """What is read instead of damaged records is locked at least as long as any backup is that was
    made until now: so that each still needs nothing that can be destroyed before it."""
    store = repository.store
    if isinstance(store, Locking):
        with closing(LockLedger(ledger_path(repository))) as ledger:
            ledger.note(store.placed())
            _Lock(repository, store, ledger).lock_instead()


def _instead(repository: Repository) -> dict[bytes, Location]:
    """Chunks of which some record is noted as damaged, and their best places now."""
    index = repository.index
    bad = {
        entry.id
        for note in repository.quarantine.notes
        for entry in index.entries(note.pack)
        if note.gone or entry.offset in note.offsets
    }
    return index.find_many(sorted(bad))


def locked_packs(repository: Repository, packs: Iterable[str]) -> dict[str, datetime]:
    """Those of the packs that are locked now, and until when. Nothing on a store without locks."""
    store = repository.store
    if not isinstance(store, Locking):
        return {}
    wanted = set(packs)
    with closing(LockLedger(ledger_path(repository))) as ledger:
        ledger.note(store.placed())
        now = store.clock()
        found = {pack: until for pack, until in ledger.locks(wanted).items() if until > now}
        asked = ask(store, store.originals(wanted - found.keys()).values())
        ledger.note(asked)
    return {**found, **asked}


def ask(store: Locking, versions: Iterable[Version]) -> dict[str, datetime]:
    """Until when versions are locked, of those that are, by their names."""
    wanted = list(versions)
    with _crew("locks") as crew:
        dates = list(crew.map(store.locked_until, wanted))
    return {v.name: until for v, until in zip(wanted, dates, strict=True) if until is not None}


def _crew(name: str) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # not for servers of stores without locks

    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix=name)


class _Lock:
    """One run's locking."""

    def __init__(self, repository: Repository, store: Locking, ledger: LockLedger) -> None:
        self.repository = repository
        self.store = store
        self.ledger = ledger
        now = store.clock()
        self.until = store.rules.backup_until(now)
        self.ahead = store.rules.object_until(now)

    def lock(self, images: Sequence[Built], own: set[str]) -> datetime:
        self.ledger.trees_under(self._damage())
        packs = self._at_most(images, own)
        if (
            packs is None
            or self._early(packs | set(self.repository.index.objects_of(packs)))
            or self._misled(packs)
        ):
            packs = self._exactly(images)
            self._misled(packs)
        self._extend(self._objects(packs))
        numbers = self.ledger.numbers(packs)
        self.ledger.set_roots({image.root: numbers for image in images})
        return self.until

    # -- what is needed --------------------------------------------------------------------------

    def _damage(self) -> bytes:
        """A digest of what is noted as damaged, and of where it is read from instead: by a repair,
        on whatever host, a tree comes to need a pack that it did not need before."""
        told = sorted((ident, place.pack) for ident, place in _instead(self.repository).items())
        return blake3(repr(told).encode()).digest()

    def lock_instead(self) -> None:
        """Lock what is read instead of what is noted as damaged."""
        packs = {place.pack for place in _instead(self.repository).values()}
        self._extend(packs | set(self.repository.index.objects_of(packs)))

    def _at_most(self, images: Sequence[Built], own: set[str]) -> set[str] | None:
        """Packs among which are all that the trees need; None where that is not known."""
        numbers: Numbers = frozenset()
        for image in images:
            if image.parent is not None:
                known = self.ledger.root(image.parent)
                if known is None:
                    return None
                numbers |= known
        return own | self.ledger.names(numbers)

    def _exactly(self, images: Sequence[Built]) -> set[str]:
        walk = _Walk(self.repository, self.ledger)
        numbers: Numbers = frozenset()
        for image in images:
            numbers |= walk.packs(image.root, self.repository.shape(image.size_bytes))
        packs = self.ledger.names(numbers)
        if packs <= set(self.repository.index.packs()):
            return packs
        self.ledger.forget_trees()  # chunks have moved to other packs since
        return self._exactly(images)

    def _small(self) -> set[str]:
        return {layout.STORE_OBJECT, *self.repository.store.list(layout.KEYS)}

    def _objects(self, packs: set[str]) -> set[str]:
        return packs | set(self.repository.index.objects_of(packs)) | self._small()

    # -- locking ---------------------------------------------------------------------------------

    def _early(self, names: set[str]) -> set[str]:
        known = self.ledger.locks(names)
        return {n for n in names if n not in known or known[n] < self.until}

    def _misled(self, packs: set[str]) -> bool:
        """Ask the store about a few packs that are locked as far as is known here. If one is not,
        nothing is known any more."""
        good = sorted(packs - self._early(packs))
        sample = random.sample(good, min(_LOOKED_AT, len(good)))
        locked = ask(self.store, self.store.originals(sample).values())
        if all(name in locked and locked[name] >= self.until for name in sample):
            return False
        log.warning("objects are not locked as they were; all of them are looked at")
        self.ledger.forget()
        return True

    def _extend(self, names: set[str]) -> None:
        early = self._early(names)
        found = self.store.originals(early)
        missing = sorted(early - found.keys())
        if missing:
            raise IntegrityError(
                f"the backup cannot be locked: {missing[0]} is missing from the store "
                f"{self.repository.store.url}"
                + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
                code="pack-missing",
                hint="see which backups it hits: offload verify --all",
            )
        for version in found.values():
            if not version.latest:
                log.warning("%s was replaced or hidden; its original is locked", version.name)
        with _crew("locks") as crew:
            list(crew.map(self._one, found.values()))

    def _one(self, version: Version) -> None:
        until = self.store.locked_until(version)
        if until is None or until < self.until:
            self.store.extend(version, self.ahead)
            until = self.ahead
        self.ledger.note({version.name: until})


class _Walk:
    """The packs of trees, page by page; pages that the ledger knows are not read."""

    def __init__(self, repository: Repository, ledger: LockLedger) -> None:
        self.repository = repository
        self.ledger = ledger

    def packs(self, root: bytes, shape: Shape) -> Numbers:
        """Of the whole tree."""
        return self._below(shape, shape.levels - 1, [(0, root)])

    def _below(self, shape: Shape, level: int, pages: Sequence[tuple[int, bytes]]) -> Numbers:
        """Of pages of one level, with all below them."""
        known = {ident: self.ledger.page(ident) for _, ident in pages}
        fresh = [(page, ident) for page, ident in pages if known[ident] is None]
        with _crew("pages") as crew:
            raws = list(crew.map(self.repository.read_page, [ident for _, ident in fresh]))
        made: dict[bytes, Numbers] = {}
        for (page, ident), raw in zip(fresh, raws, strict=True):
            count = shape.entries(level, page)
            if level == 0:
                leaves = decode_leaf_page(raw, count)
                ids = {i for leaf in leaves if leaf for i in (leaf.base, *leaf.deltas)}
                numbers = self._places({ident, *ids})
            else:
                first = page * shape.page_entries
                children = [
                    (first + index, child)
                    for index, child in enumerate(decode_inner_page(raw, level, count))
                    if child is not None
                ]
                numbers = self._places({ident}) | self._below(shape, level - 1, children)
            made[ident] = numbers
        self.ledger.set_pages(made)
        return frozenset().union(*made.values(), *(n for n in known.values() if n is not None))

    def _places(self, ids: set[bytes]) -> Numbers:
        found = self.repository.index.find_many(list(ids))
        packs = {place.pack for place in found.values()}
        packs |= {self.repository.locate(ident).pack for ident in ids - found.keys()}
        return self.ledger.numbers(packs)
