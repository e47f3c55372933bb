"""What is to be copied, what became of it, and what it is a copy of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from offload.engine.manifests import read_folds, read_manifest
from offload.engine.repository import Repository
from offload.errors import (
    IntegrityError,
    NotFoundError,
)
from offload.format import layout
from offload.format.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRequest:
    """Which backups, from where, to where: by `ids` (or prefixes), or all, or those of a group;
    `last`: only so many, the newest."""

    source: str
    target: str
    ids: tuple[str, ...] = ()
    group: str | None = None
    last: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What became of one backup. `how`: same-key, new-key, new-cut, already-there, failed, gone
    (deleted while others were copied)."""

    backup: str
    copy: str
    group: str
    how: str
    read_bytes: int = 0
    stored_bytes: int = 0
    error: str = ""


def origin_of(manifest: Manifest, repository: Repository) -> tuple[str, str]:
    """The ids of the store and the backup that this is, or is a copy of."""
    origin = manifest.copied_from
    if origin is None:
        return repository.parameters.store_id, manifest.backup.id
    return origin["store"], origin["backup"]


def origins_in(target: Repository) -> Iterator[tuple[tuple[str, str], str]]:
    """What a store holds, by what it is a copy of; its own backups too. What is damaged or was just
    deleted is nothing to rely on."""
    folds = read_folds(target)
    for name in target.store.list(layout.MANIFESTS):
        ident = name.removeprefix(layout.MANIFESTS)
        with suppress(NotFoundError, IntegrityError):
            yield origin_of(read_manifest(target, ident, folds=folds), target), ident
