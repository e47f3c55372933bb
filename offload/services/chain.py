"""The chain of manifests: whether a store shows all that it once had.

Each manifest names, by its hash, the newest one that its writer saw. Whoever notes the head
somewhere else finds out later whether the store has lost it: a head is in the chain if its manifest
is there, or one that names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from offload.catalog.store import Catalog
from offload.engine.deletions import deleted_of
from offload.engine.repository import Repository
from offload.errors import NotFoundError, OffloadError, UsageError
from offload.format import layout
from offload.format.manifest import decode_manifest, manifest_hash

_LEAST = 16  # digits of a head that is typed


@dataclass(frozen=True, slots=True)
class Chain:
    """What the manifests of a store say of each other. `head` is None in an empty store."""

    head: str | None
    known: frozenset[str]  # hashes of manifests, and those that they name
    backups: frozenset[str]

    def holds(self, expected: str) -> bool:
        """Whether a noted head, or its beginning, is in the chain."""
        return any(digest.startswith(expected) for digest in self.known)


def read_chain(repository: Repository) -> Chain:
    """The chain as the store shows it; damaged manifests are left out."""
    head: tuple[datetime, str] | None = None
    known: set[str] = set()
    backups: set[str] = set()
    for name in repository.store.list(layout.MANIFESTS):
        backups.add(name.removeprefix(layout.MANIFESTS))
        try:
            raw = repository.store.get(name)
            manifest = decode_manifest(name, raw, repository.keys, "")
        except (NotFoundError, OffloadError):
            continue
        mine = (manifest.backup.finished_at, manifest_hash(raw))
        head = mine if head is None else max(head, mine)
        known |= {mine[1], *([manifest.previous] if manifest.previous else [])}
    return Chain(head[1] if head else None, frozenset(known), frozenset(backups))


def check_expected(text: str | None) -> str | None:
    """A head as it was typed. UsageError (`bad-head`)."""
    if text is not None and not re.fullmatch(f"[0-9a-f]{{{_LEAST},64}}", text):
        raise UsageError(
            f"'{text}' is no head of a chain",
            code="bad-head",
            hint=f"give the hash that store check prints, or at least {_LEAST} digits of it",
        )
    return text


def missing(
    chain: Chain, repository: Repository, catalog: Catalog, store: str, *, expected: str | None
) -> list[str]:
    """What the store should show and does not, as sentences."""
    found = []
    if expected is not None and not chain.holds(expected):
        found.append(
            f"the chain of manifests lacks the head {expected}: the newest backups are hidden or "
            "were deleted"
        )
    unseen = {b.id for b in catalog.backups(store=store)} - chain.backups
    gone = sorted(unseen - deleted_of(repository, unseen))
    return found + [
        f"backup {backup} is known to the catalog, and its manifest is missing" for backup in gone
    ]
