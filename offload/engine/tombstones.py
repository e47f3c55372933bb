"""Tombstones: packs that a prune will delete, said before it does.

A sealed object `tombstones/PRUNE`: {packs: [names]}. A pack in one is dead for good: writers take
what it holds for absent, and what turns out to be needed is copied out of it. The object goes last,
when all its packs are gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from offload.engine.repository import Repository
from offload.errors import IntegrityError, NotFoundError
from offload.format import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """What one prune will delete. `put_at` is by the store's clock."""

    prune: str
    host: str
    packs: frozenset[str]
    put_at: datetime


def put_tombstone(repository: Repository, prune: str, packs: Iterable[str]) -> None:
    """Say that these packs will go."""
    value = {
        "format": "offload-tombstone",
        "version": 1,
        "host": os.uname().nodename,
        "at": datetime.now(UTC).isoformat(),
        "packs": sorted(packs),
    }
    repository.put_sealed(layout.tombstone_name(prune), value)


def read_tombstones(
    repository: Repository, known: Mapping[str, Tombstone] | None = None
) -> dict[str, Tombstone]:
    """All that there are, by prune; what is `known` is not read again: they never change.

    IntegrityError for one that cannot be read.
    """
    found = {}
    for info in repository.store.infos(layout.TOMBSTONES):
        prune = info.name.removeprefix(layout.TOMBSTONES)
        if known and prune in known:
            found[prune] = known[prune]
            continue
        try:
            value = repository.get_sealed(info.name)
        except NotFoundError:
            continue  # done with while it was listed
        packs = value.get("packs")
        if not isinstance(packs, list):
            raise IntegrityError(f"{info.name} is no tombstone", code="bad-tombstone")
        found[prune] = Tombstone(
            prune=prune,
            host=str(value.get("host", "")),
            packs=frozenset(packs),
            put_at=info.modified,
        )
    return found


def packs_of(tombstones: Iterable[Tombstone]) -> frozenset[str]:
    """All packs that any of them names."""
    return frozenset[str]().union(*(t.packs for t in tombstones))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """A store as a writer may rely on it: packs that are there and stay, with their sizes."""

    packs: Mapping[str, int]  # all that are there, in bytes
    tombstones: Mapping[str, Tombstone]
    vanished: frozenset[str]  # packs that an index object names and that are not there

    @property
    def dead(self) -> frozenset[str]:
        """Packs that will go."""
        return packs_of(self.tombstones.values())

    @property
    def reliable(self) -> frozenset[str]:
        """Packs that may be built on."""
        return frozenset(self.packs.keys() - self.dead)


def look(repository: Repository, known: Mapping[str, Tombstone] | None = None) -> Sight:
    """Look at a store, in the one order that is safe: tombstones, index objects, packs.

    A tombstone that has gone before it was looked for has taken its packs with it, so that the
    listing of packs shows none of them; one that comes later finds the pin of whoever looks.
    """
    tombstones = read_tombstones(repository, known)
    repository.refresh()
    named = frozenset(repository.index.packs())  # before the packs: a later one is not in the list
    packs = {info.name: info.size_bytes for info in repository.store.infos(layout.PACKS)}
    sight = Sight(packs=packs, tombstones=tombstones, vanished=named - packs.keys())
    repository.index.avoid = sight.dead
    return sight
