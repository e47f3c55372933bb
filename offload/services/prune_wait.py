"""Whom a prune waits for, and whom it gives up."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from offload import compose
from offload.engine.fences import give_up
from offload.engine.mark import Roots, find_roots
from offload.engine.pins import Pin, PinKind, drop_pin, read_pins
from offload.engine.repository import Repository
from offload.engine.tombstones import Tombstone
from offload.errors import BusyError
from offload.format import layout
from offload.services import stores
from offload.services.context import Context
from offload.store import Exclusive

log = logging.getLogger(__name__)

_ALONE_WAIT_S = 0.5  # for a command that only looks; who stays longer is not waited for
_STALE_S = 86400.0  # a temporary file of a put that nobody can be at any more

OWN = ""  # the tombstone that a rehearsal would put


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Packs that go with a later prune. `holders` must end first (or be late); `until`: no sooner.

    `frees_bytes` is what that will free.
    """

    prune: str
    packs: int
    frees_bytes: int
    holders: tuple[str, ...]
    until: datetime | None

    def sized(self, packs: Mapping[str, int], of: Set[str], frees: Mapping[str, int]) -> Waiting:
        """With the sizes of the packs `of` it: what is copied already frees less."""
        there = of & packs.keys()
        size = sum(frees.get(p, packs[p]) for p in there)
        return replace(self, packs=len(there), frees_bytes=size)


def bury_the_dead(ctx: Context, name: str, *, dry_run: bool) -> bool:
    """Take a store for itself alone for a moment: whoever has a pin there now is dead.

    Returns whether that was possible: only where the store can be held alone, and nobody uses it.
    """
    store = compose.open_store(stores.spec_of(ctx, name))
    try:
        if not (isinstance(store, Exclusive) and store.exclusion_is_sound()):
            stores.sweep_temporary(store, "", min_age_s=_STALE_S)
            return False
        stores.require_initialised(store, name)
        with store.lock(exclusive=True, wait_s=_ALONE_WAIT_S):
            if not dry_run:
                for pin in list(store.list(layout.PINS)):
                    store.delete(pin)
                stores.sweep_temporary(store, "")
            return True
    except BusyError:
        return False
    finally:
        store.close()


def give_way(repository: Repository, own: str, now: datetime) -> None:
    """Raise BusyError (`prune-running`) if another prune was there first."""
    prunes = [p for p in read_pins(repository) if p.kind is PinKind.PRUNE]
    mine = next((p for p in prunes if p.id == own), None)
    for other in prunes:
        if other.id == own or other.expired(now):
            continue
        if mine is None or (other.started_at, other.id) < (mine.started_at, mine.id):
            raise BusyError(
                f"another prune is at work in the store {repository.store.url}: {other.holder()}",
                code="prune-running",
                hint="it frees the same; should it be dead, its pin expires at "
                f"{other.until.astimezone():%H:%M}",
            )


def settle(repository: Repository, store: str, roots: Roots, own: str, now: datetime) -> Roots:
    """Give up everybody whose pin has expired: what they finished counts, nothing else will."""
    for ident in roots.buried:  # by a prune that ended before their pin went
        drop_pin(repository.store, ident)
    late = {p.id: p for p in roots.pins if p.id != own and p.expired(now)}
    for pin in late.values():
        void = give_up(repository, pin.id, own)
        log.warning("%s %s", pin.holder(), "was given up" if void else "has finished")
        drop_pin(repository.store, pin.id)
    return find_roots(repository, store) if late else roots


def due_tombstones(
    tombstones: Mapping[str, Tombstone],
    pins: Iterable[Pin],
    now: datetime,
    grace_s: float,
) -> tuple[frozenset[str], list[Waiting]]:
    """Which tombstones may be swept, and what the others wait for.

    A writer that has not seen a tombstone may be building on its packs. Readers need not be waited
    for: what they read is marked.
    """
    due, waiting = set(), []
    writers = {p.id: p for p in pins if p.kind is not PinKind.READER}
    for prune, tombstone in sorted(tombstones.items()):
        holders = [
            pin.holder()
            for pin in writers.values()
            if pin.tombstones is None or prune not in pin.tombstones
        ]
        until = tombstone.put_at + timedelta(seconds=grace_s)
        early = grace_s > 0 and now < until
        if not holders and not early:
            due.add(prune)
            continue
        waiting.append(
            Waiting(
                prune=prune,
                packs=len(tombstone.packs),
                frees_bytes=0,
                holders=tuple(holders),
                until=until if early else None,
            )
        )
    return frozenset(due), waiting
