"""What a backup is now: its manifest, with the roots that folds have put in the place of its own.

Everybody who reads an image's root takes it from here, never from the catalog: a prune may have
folded its deltas, and swept what only the old root needs. A root may change between two calls; its
content never does. So whoever wants to rely on a root pins it and then asks again: it is safe once
the answer is the one that was pinned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from offload.engine.repository import Repository
from offload.engine.retention_lock import ask
from offload.errors import IntegrityError, NotFoundError
from offload.format import layout
from offload.format.fold import Fold, decode_fold
from offload.format.manifest import Manifest, decode_manifest
from offload.model import Backup
from offload.objectlock import Locking
from offload.store import Store

log = logging.getLogger(__name__)

_ATTEMPTS = 5  # a fold goes only when a newer one is out: the listing is asked again


class FoldedRoot(NamedTuple):
    """A root, and the sequence of the fold that gave it."""

    sequence: int
    root: str


class Folds:
    """All folds of a store that exist, as one look-up."""

    def __init__(self, objects: Mapping[str, Fold]) -> None:
        self.objects = objects  # by object name
        self._roots: dict[tuple[str, str], FoldedRoot] = {}
        for fold in objects.values():
            for backup, volumes in fold.backups.items():
                for volume, root in volumes.items():
                    mine = FoldedRoot(fold.sequence, root)
                    known = self._roots.get((backup, volume), mine)
                    self._roots[backup, volume] = max(known, mine)

    @property
    def next_sequence(self) -> int:
        """What the next fold is numbered."""
        return max((fold.sequence for fold in self.objects.values()), default=0) + 1

    def root(self, backup: str, volume: str) -> str | None:
        """The root in the place of the manifest's, or None."""
        found = self._roots.get((backup, volume))
        return None if found is None else found.root

    def applied(self, backup: Backup) -> Backup:
        """The backup with the roots that are read now."""
        images = tuple(
            replace(image, root=self.root(backup.id, image.volume) or image.root)
            for image in backup.images
        )
        return backup if images == backup.images else replace(backup, images=images)


def read_folds(repository: Repository) -> Folds:
    """The folds of a store; one whose prune was given up (`voids/`) does not exist.

    IntegrityError (`bad-seal`, `bad-fold`), UnavailableError (`fold-newer`): no root is sure then.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return Folds(_without_locked(repository, dict(_existing(repository))))
        except NotFoundError:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def void_folds(store: Store) -> list[str]:
    """Folds of prunes that were given up, by name. They must go before their `voids/` do."""
    voids = set(store.list(layout.VOIDS))
    return [
        name
        for name in store.list(layout.FOLDS)
        if layout.VOIDS + name.removeprefix(layout.FOLDS) in voids
    ]


def _existing(repository: Repository) -> Iterator[tuple[str, Fold]]:
    names = list(repository.store.list(layout.FOLDS))
    void = set(void_folds(repository.store)) if names else set()
    for name in names:
        if name not in void:
            try:
                raw = repository.store.get(name)
                yield name, repository.with_keys(partial(decode_fold, name, raw))
            except IntegrityError as error:
                if not isinstance(repository.store, Locking):
                    raise
                # A root and its fold have the same content: without it reading may miss chunks,
                # and prune stops, but nothing wrong is read. So rubbish does not end all restores.
                log.warning("%s; it does not count", error.message)


def _without_locked(repository: Repository, objects: dict[str, Fold]) -> dict[str, Fold]:
    """A backup under object lock is read as it was written: nothing that its own roots need can
    have been folded away, so that a fold of it is somebody else's."""
    store = repository.store
    if not objects or not isinstance(store, Locking):
        return objects
    names = {layout.manifest_name(b) for fold in objects.values() for b in fold.backups}
    locked = ask(store, store.originals(names).values()).keys()
    return {
        name: replace(
            fold,
            backups={
                b: r for b, r in fold.backups.items() if layout.manifest_name(b) not in locked
            },
        )
        for name, fold in objects.items()
    }


def read_manifest(
    repository: Repository, backup: str, store: str = "", folds: Folds | None = None
) -> Manifest:
    """One backup as it is read now; `store` is the name under which the store is configured here,
    `folds` those that `read_folds` gave, where many manifests are read.

    NotFoundError (`unknown-backup`), IntegrityError, UnavailableError (`manifest-newer`).
    """
    name = layout.manifest_name(backup)
    try:
        raw = repository.store.get(name)
    except NotFoundError as error:
        raise NotFoundError(
            f"the store {repository.store.url} has no backup '{backup}'",
            code="unknown-backup",
            hint="see what it has with: offload backup list",
        ) from error
    manifest = repository.with_keys(lambda keys: decode_manifest(name, raw, keys, store))
    known = read_folds(repository) if folds is None else folds
    return replace(manifest, backup=known.applied(manifest.backup))


def resolved(repository: Repository, backup: Backup) -> Backup:
    """A backup of the catalog or of a manifest, with the roots that are read now."""
    return read_folds(repository).applied(backup)
