"""Deleting packs whose time has come: out of the index first, then themselves.

| killed after | there is | the next prune |
| --- | --- | --- |
| a new index object is out | two that say the same of the packs that stay | goes on |
| the old ones are deleted | packs that no index object names, and their tombstone | goes on |
| some packs are deleted | the tombstone, the other packs | goes on |
| the tombstone is deleted | nothing | - |
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set

from offload.engine.repository import Repository
from offload.errors import IntegrityError, NotFoundError
from offload.format import layout
from offload.format.index import decode_index_heads
from offload.format.pack import ENTRY, Entry
from offload.ids import new_id
from offload.journal import step

_SMALL = 1 << 20  # bytes of an index object that is worth merging with others
_MOST = 4 << 20  # bytes of a merged one: each is in memory as a whole
_MANY = 32  # so many small ones are merged though nothing else is to be done

Packs = dict[str, list[Entry]]


def drop_from_index(repository: Repository, dead: Set[str], unsure: Set[str]) -> None:
    """Make index objects without the packs `dead`, and merge small ones.

    `unsure`: writers whose packs must not be taken over from a damaged index object: these may be
    unfinished.
    """
    naming = set(repository.index.objects_of(dead))
    small = [i.name for i in repository.store.infos(layout.INDEXES) if i.size_bytes < _SMALL]
    if not naming and len(small) <= _MANY:
        return
    old = sorted({*naming, *(small if len(small) > 1 else ())})
    batch: Packs = {}
    done: list[str] = []
    for name in old:
        batch.update(_packs_of(repository, name, dead, unsure))
        done.append(name)
        if sum(len(entries) for entries in batch.values()) * ENTRY.size >= _MOST:
            _replace(repository, batch, done)
            batch, done = {}, []
    _replace(repository, batch, done)
    step("prune.indexes.deleted")
    repository.refresh()


def _replace(repository: Repository, packs: Packs, old: list[str]) -> None:
    if packs:
        repository.put_index(layout.index_name(new_id()), packs)
        step("prune.index.written")
    for name in old:
        repository.store.delete(name)


def _packs_of(
    repository: Repository, name: str, dead: Set[str], unsure: Set[str]
) -> Iterator[tuple[str, list[Entry]]]:
    """What an index object says of the packs that stay: all of it, also what nobody uses now. A
    writer may be building on that."""
    try:
        found, heads = decode_index_heads(name, repository.store.get(name), repository.keys)
        for pack, head in heads.items():
            repository.note_head(pack, head)
    except NotFoundError:
        return  # merged by another prune
    except IntegrityError:
        found = {
            pack: repository.pack_entries(pack)
            for pack in repository.store.list(layout.PACKS)
            if pack not in dead and layout.pack_writer(pack) not in unsure
        }
    yield from ((pack, entries) for pack, entries in found.items() if pack not in dead)


def delete_packs(repository: Repository, packs: Collection[str], tombstones: Set[str]) -> None:
    """Delete packs that no index object names any more, and last the tombstones that name them."""
    for pack in sorted(packs):
        repository.store.delete(pack)
        step("prune.pack.deleted")
    for prune in sorted(tombstones):
        repository.store.delete(layout.tombstone_name(prune))
    step("prune.tombstone.deleted")
