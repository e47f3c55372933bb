"""A writer in a store that others write to, read from and prune: what it may build on, and whether
what it has written stands.

Its steps, in this order (docs/design/store-protocol.md): pin; look at tombstones, index objects and
packs; pin the parent, then see that it is still there; write packs, index object and manifest; see
that no prune has given it up, and that the packs it built on are there. Its pin goes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from offload.engine.deletions import take_away
from offload.engine.fences import look_for_fences, was_given_up
from offload.engine.manifests import read_manifest
from offload.engine.pins import HeldPin, PinKind, given_up, images_of
from offload.engine.repository import Repository
from offload.engine.tombstones import look
from offload.errors import NotFoundError, UnavailableError
from offload.format import layout
from offload.journal import step
from offload.model import Backup
from offload.objectlock import Locking
from offload.store import Store

REFERENCES_LOST = "references-lost"


def is_firm(store: Store) -> bool:
    """Whether a manifest cannot be taken back: under object lock. All that it needs was locked
    before it, so that no prune can have destroyed any of it until the lock has ended."""
    return isinstance(store, Locking)


class Writing:
    """One writer at work. Made by `writing`."""

    def __init__(self, repository: Repository, pin: HeldPin) -> None:
        self.repository = repository
        self.pin = pin
        self._parents: dict[str, Backup | None] = {}

    def parent(self, backup: str, store: str) -> Backup | None:
        """A backup to build on, pinned; None where it is gone, or was given up while it was made.

        One that has a fence is not trusted either: its prune may be about to make it void.
        """
        if backup not in self._parents:
            self._parents[backup] = self._pinned(backup, store)
        return self._parents[backup]

    def _pinned(self, backup: str, store: str) -> Backup | None:
        try:
            found = read_manifest(self.repository, backup, store).backup
            while True:
                self.pin.pin(images_of(found))
                again = read_manifest(self.repository, backup, store).backup
                if images_of(again) == images_of(found):
                    break
                found = again  # folded meanwhile
        except NotFoundError:
            return None
        step("writer.parent.pinned")
        return None if look_for_fences(self.repository.store, backup) else found

    def confirm(self, own_packs: Iterable[str]) -> None:
        """After the manifest: it stands, or it is taken back, unless it is locked, or somebody has
        placed a legal hold on it.

        UnavailableError: `given-up`; `references-lost`, if a pack is gone that this built on.
        """
        store = self.repository.store
        wanted = self.repository.index.relied.union(own_packs)
        lost = wanted - set(store.list(layout.PACKS)) if wanted else set()
        firm = is_firm(store)
        late = was_given_up(store, self.pin.id)
        if not lost and not late:
            return
        if not firm:
            take_away(self.repository, self.pin.id, self.pin.id)
            step("writer.taken.back")
        if late:
            raise given_up(self.pin.id)
        raise UnavailableError(
            f"{len(lost)} packs that backup {self.pin.id} builds on went while it was made: "
            f"{min(lost)}",
            code=REFERENCES_LOST,
            hint="run it again; if this comes back: offload verify --all",
        )


def settle_dead(repository: Repository, ident: str) -> bool:
    """For recovery: whether what a dead writer finished counts. When it had been given up, it is
    taken back, as far as it can be."""
    store = repository.store
    if not store.exists(layout.manifest_name(ident)):
        return False
    if not was_given_up(store, ident):
        return True
    return not is_firm(store) and not take_away(repository, ident, ident)


@contextmanager
def writing(repository: Repository, ident: str) -> Iterator[Writing]:
    """Begin to write as `ident`. After an exception the pin stays, for whoever takes back what was
    written to remove it last."""
    with HeldPin(repository, PinKind.WRITER, ident=ident) as pin:
        step("writer.pinned")
        sight = look(repository)
        repository.index.rely_on(sight.reliable)
        pin.seen(sorted(sight.tombstones))
        step("writer.looked")
        yield Writing(repository, pin)
