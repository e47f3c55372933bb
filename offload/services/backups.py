"""Finished backups: comparing two, deleting them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.deletions import take_away
from offload.engine.pins import pinned_manifest
from offload.engine.readimage import read_leaf
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader, diff_slots
from offload.errors import BusyError, PrivilegeError, UsageError
from offload.extents import Ranges, normalize, total
from offload.format.delta import SECTOR
from offload.format.tree import Leaf
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import Operation
from offload.model import Backup, ImageRecord
from offload.services import legalholds, locks, stores, timemark
from offload.services.context import Context
from offload.services.undo import dump

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeDiff:
    """What differs in one volume, exact to the 512-byte sector."""

    volume: str
    changed_bytes: int
    ranges: Ranges
    note: str = ""


def diff(ctx: Context, a: str, b: str) -> list[VolumeDiff]:
    """Compare two backups of one store, volume by volume; equal subtrees are never read.

    Raises UsageError (`other-store`) for backups in two stores, whose trees cannot be compared.
    """
    left, right = ctx.catalog.backup(_bare(a)), ctx.catalog.backup(_bare(b))
    if left.store != right.store:
        raise UsageError(
            f"backup {left.id} is in store {left.store}, backup {right.id} in {right.store}",
            code="other-store",
            hint="compare backups of one store",
        )
    with (
        stores.opened(ctx, left.store, exclusive=False) as repository,
        pinned_manifest(repository, left.id, left.store) as (one, _),
        pinned_manifest(repository, right.id, right.store) as (two, _),
    ):
        left, right = one.backup, two.backup
        names = dict.fromkeys(i.volume for i in (*left.images, *right.images))
        return [
            diff_images(repository, name, left.image(name), right.image(name)) for name in names
        ]


def _bare(text: str) -> str:
    return text.removeprefix("backup:")


def diff_images(
    repository: Repository, volume: str, a: ImageRecord | None, b: ImageRecord | None
) -> VolumeDiff:
    """Compare one volume of two backups; None where one of them does not have it."""
    only = a or b
    if only is None:
        raise ValueError("neither backup has the volume")
    if a is None or b is None:
        size = only.size_bytes
        note = "only in the " + ("second" if a is None else "first")
        return VolumeDiff(volume=volume, changed_bytes=size, ranges=[(0, size)], note=note)
    if a.size_bytes != b.size_bytes:
        size = max(a.size_bytes, b.size_bytes)
        note = f"resized from {a.size_bytes} to {b.size_bytes} bytes"
        return VolumeDiff(volume=volume, changed_bytes=size, ranges=[(0, size)], note=note)
    shape = repository.shape(a.size_bytes)
    trees = [TreeReader(repository, bytes.fromhex(i.root), shape) for i in (a, b)]
    ranges: Ranges = []
    for slot, x, y in diff_slots(*trees):
        start, stop = shape.slot_range(slot)
        ranges += _sectors(repository, x, y, start, stop - start)
    merged = normalize(ranges)
    return VolumeDiff(volume=volume, changed_bytes=total(merged), ranges=merged)


def _sectors(
    repository: Repository, x: Leaf | None, y: Leaf | None, start: int, length: int
) -> Iterator[tuple[int, int]]:
    """The sectors of a chunk slot in which two entries really differ."""
    import numpy as np  # slow to load, and only a comparison needs it

    sides = []
    for leaf in (x, y):
        content = bytes(length) if leaf is None else bytes(read_leaf(repository, leaf, length))
        padded = content + bytes(-length % SECTOR)
        sides.append(np.frombuffer(padded, dtype=np.uint8).reshape(-1, SECTOR))
    for sector in np.flatnonzero((sides[0] != sides[1]).any(axis=1)):
        at = int(sector) * SECTOR
        yield start + at, start + min(at + SECTOR, length)


def delete(ctx: Context, prefixes: Sequence[str]) -> list[Backup]:
    """Delete backups: their manifests go, `prune` frees the space.

    All are checked first; BusyError if a view shows one (`backup-in-use`), or there is a legal hold
    on one (`backup-held`); PolicyError (`backup-locked`).
    """
    chosen = [ctx.catalog.backup(_bare(p)) for p in dict.fromkeys(prefixes)]
    for known in chosen:
        refuse_shown(ctx, known.id)
    with ExitStack() as stack:
        op = stack.enter_context(ctx.journal.operation("backup-delete", " ".join(prefixes)))
        opened: dict[str, Repository] = {}
        for name in dict.fromkeys(known.store for known in chosen):
            repository = opened[name] = stack.enter_context(
                stores.opened(ctx, name, exclusive=False)
            )
            legalholds.refuse_held(repository, [b for b in chosen if b.store == name])
            locks.refuse_locked(repository, [b for b in chosen if b.store == name])
        for number, known in enumerate(chosen, 1):
            if not erase(ctx, op, opened[known.store], known, number=number):
                raise legalholds.held_error(known.id)  # it was placed meanwhile
    return chosen


def erase(
    ctx: Context, op: Operation, repository: Repository, known: Backup, *, number: int
) -> bool:
    """Delete a backup's manifest, its row, and its TimeMark if that served nothing else.

    The caller holds the store's lock. Recovery finishes what was begun. False, and all is as it
    was, where a legal hold was placed on the backup meanwhile.
    """
    args = {
        "store": stores.spec_of(ctx, known.store).text(),
        "backup": known.id,
        "timemark": known.timemark,
        "deletion": new_id(),
    }
    op.intend(f"erase-{number}", "delete-backup", args)
    done = _delete(ctx.instance, ctx.catalog, repository, args)
    op.done(f"erase-{number}")
    return done


def undo_delete(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Finish the deletion of a backup, unless there is a legal hold on it. One that the store
    denies has not begun: that the backup stays was told to whoever asked."""
    try:
        store = compose.open_store(args["store"])
        with closing(Repository.open(store, instance.cache_dir)) as repository:
            _delete(instance, catalog, repository, args)
    except PrivilegeError as error:
        if error.code != "store-denied":
            raise
        log.warning("backup %s stays: %s", args["backup"], error.message)


def _delete(
    instance: Instance, catalog: Catalog, repository: Repository, args: Mapping[str, str]
) -> bool:
    """False where there is a legal hold on the backup."""
    if not take_away(repository, args["backup"], args["deletion"]):
        return False
    catalog.delete_backup(args["backup"])
    timemark.undo_unused(instance, catalog, {"ids": dump([args["timemark"]])})
    return True


def shown_by(ctx: Context) -> dict[str, str]:
    """Backups that views show, each with the name of such a view."""
    return {
        view.origin.removeprefix("backup:").partition("/")[0]: view.name
        for view in ctx.catalog.views()
        if view.origin.startswith("backup:")
    }


def refuse_shown(ctx: Context, backup: str) -> None:
    """BusyError (`backup-in-use`) if a view shows the backup."""
    view = shown_by(ctx).get(backup)
    if view is not None:
        raise BusyError(
            f"backup {backup} is shown by view {view}",
            code="backup-in-use",
            hint=f"first: offload unmount {view}",
        )
