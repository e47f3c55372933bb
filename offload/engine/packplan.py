"""What becomes of each pack: kept, copied into a new one, or dropped."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from offload.engine.liveset import LiveSet
from offload.engine.packwriter import PackWriter
from offload.engine.repository import Repository
from offload.errors import IntegrityError
from offload.format.pack import FILE_HEADER, MAX_HEAD

_REPACK_BELOW = 0.7  # a pack with less than this share of live bytes is copied


@dataclass(slots=True)
class PackPlan:
    """Pack names, with the bytes that their going frees. `keep` stay; `live_bytes` is their use."""

    keep: list[str] = field(default_factory=list)
    rewrite: dict[str, int] = field(default_factory=dict)
    drop: dict[str, int] = field(default_factory=dict)
    live_bytes: int = 0

    @property
    def frees(self) -> dict[str, int]:
        """All that go, with the bytes that this frees."""
        return {**self.rewrite, **self.drop}


def plan_packs(
    repository: Repository,
    live: LiveSet,
    packs: Mapping[str, int],
    *,
    untouched: Set[str] = frozenset(),
) -> PackPlan:
    """Plan for `packs` (with their sizes), after `live.choose`. Only the place that was chosen for
    a chunk counts as used; packs in `untouched` stay whatever is in them."""
    head = MAX_HEAD if repository.keys.encrypted else len(FILE_HEADER)
    used = live.used()
    plan = PackPlan()
    for name, size in sorted(packs.items()):
        mine = used.get(name)
        if name in untouched:
            plan.keep.append(name)
            plan.live_bytes += size
        elif mine is None:
            plan.drop[name] = size
        elif (needed := mine.pack_bytes(head)) < size * _REPACK_BELOW:
            plan.rewrite[name] = size - needed
            plan.live_bytes += needed
        else:
            plan.keep.append(name)
            plan.live_bytes += needed
    return plan


def copy_live(
    repository: Repository, writer: PackWriter, live: LiveSet, packs: Set[str]
) -> dict[str, str]:
    """Copy what is in use of these packs, each chunk checked on the way.

    Returns the packs of which not all could be read, and why: they must stay.
    """
    failed: dict[str, str] = {}
    for pack, entry in live.entries(packs):
        if pack in failed:
            continue
        try:
            stored = repository.store.get_range(pack, entry.payload_offset, entry.stored_length)
            payload = repository.payload(entry, stored, pack)
            repository.decompress(entry, payload, pack)
        except IntegrityError as error:
            failed[pack] = error.message
            continue
        writer.append(entry.id, entry.kind, entry.encoding, entry.raw_length, payload)
    return failed
