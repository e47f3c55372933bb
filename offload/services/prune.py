"""Prune: forget backups by rules, and free what no backup needs.

It takes the store for itself alone (an exclusive lock). Order and commit points:

| step | what a crash after it leaves |
| --- | --- |
| 1 manifests of the forgotten backups are deleted | their space: the next prune frees it |
| 2 live chunks of half-empty packs are copied to new packs | packs no index names: removed |
| 3 one new index object for everything live is written | old index objects say the same |
| 4 the old index objects are deleted | the new one alone: correct |
| 5 packs that the new index does not name are deleted | some of them: the next prune |

At no step does an index object name a pack that is gone. An unreadable manifest or page aborts
before anything is deleted.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

from offload import compose
from offload.catalog.store import Catalog
from offload.configs.stores import KeepConfig
from offload.engine.packwriter import PackWriter
from offload.engine.repository import Repository
from offload.engine.tree import walk_pages
from offload.errors import IntegrityError, OffloadError
from offload.format import layout
from offload.format.pack import Entry, pack_bytes
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import step
from offload.model import Backup
from offload.progress import NoProgress, Progress
from offload.retention import KeepRules, Verdict, judge
from offload.services import backups as finished
from offload.services import stores
from offload.services.context import Context

_REPACK_BELOW = 0.7  # a pack with less than this share of live bytes is copied


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What was (with `dry_run`: would be) forgotten and freed. Sizes in bytes."""

    store: str
    verdicts: tuple[Verdict, ...]
    dry_run: bool
    packs_deleted: int
    packs_rewritten: int
    freed_bytes: int
    live_bytes: int


@dataclass(slots=True)
class _PackPlan:
    """What becomes of the packs."""

    keep: list[str]
    rewrite: list[str]
    drop: list[str]
    live_bytes: int
    freed_bytes: int


def rules_of(config: KeepConfig | None) -> KeepRules:
    """The configured rules of a store; none keeps everything."""
    if config is None:
        return KeepRules()
    return KeepRules(
        last=config.last,
        hourly=config.hourly,
        daily=config.daily,
        weekly=config.weekly,
        monthly=config.monthly,
        yearly=config.yearly,
        within_s=config.within,
    )


def prune(
    ctx: Context,
    store: str,
    *,
    rules: KeepRules | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PruneReport:
    """Apply keep rules (the store's own unless given) and free space.

    Raises BusyError (`store-busy`) while anything else uses the store, IntegrityError if a manifest
    or a page cannot be read: then nothing is deleted.
    """
    shown = progress or NoProgress()
    with stores.opened(ctx, store, exclusive=not dry_run) as repository:
        backups = _all_backups(ctx, repository, store)
        chosen = rules or rules_of(ctx.instance.config.store(store).keep)
        verdicts = judge(backups, chosen, datetime.now(UTC))
        kept = [v.backup for v in verdicts if v.kept]
        gone = [v.backup for v in verdicts if not v.kept]
        for backup in gone:
            finished.refuse_shown(ctx, backup.id)
        with closing(_LiveSet()) as live:
            _mark(repository, kept, live, shown)
            plan = _plan(repository, live)
            if not dry_run:
                _apply(ctx, repository, gone, plan, live)
    return PruneReport(
        store=store,
        verdicts=tuple(verdicts),
        dry_run=dry_run,
        packs_deleted=len(plan.drop),
        packs_rewritten=len(plan.rewrite),
        freed_bytes=plan.freed_bytes,
        live_bytes=plan.live_bytes,
    )


def _all_backups(ctx: Context, repository: Repository, store: str) -> list[Backup]:
    backups = []
    for name, found in stores.manifests(repository, store):
        if isinstance(found, OffloadError):
            raise IntegrityError(
                f"prune stopped, nothing was deleted: {name} cannot be read: {found.message}",
                code="prune-unsafe",
                hint="see: offload verify --all",
            )
        backups.append(found.backup)
    lost = {b.id for b in ctx.catalog.backups(store=store)} - {b.id for b in backups}
    if lost:
        raise IntegrityError(
            f"prune stopped, nothing was deleted: the store {store} lacks the manifests of "
            f"{', '.join(sorted(lost))}, which the catalog knows",
            code="prune-unsafe",
            hint="bring them back; if they were deleted elsewhere: "
            f"offload store check {store} --rebuild-catalog",
        )
    return sorted(backups, key=lambda b: (b.created_at, b.id))


class _LiveSet:
    """Ids of chunks in use, in a temporary SQLite file: memory stays bounded."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # a temporary file, gone when closed
        self._db.execute("CREATE TABLE live(id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, ids: Sequence[bytes]) -> None:
        """Mark ids as in use."""
        self._db.executemany("INSERT OR IGNORE INTO live VALUES (?)", ((i,) for i in ids))

    def __contains__(self, ident: bytes) -> bool:
        found = self._db.execute("SELECT 1 FROM live WHERE id = ?", (ident,)).fetchone()
        return found is not None

    def close(self) -> None:
        """Drop it."""
        self._db.close()


def _mark(
    repository: Repository, kept: Sequence[Backup], live: _LiveSet, progress: Progress
) -> None:
    """Everything reachable from the kept backups, each shared subtree once."""
    seen: dict[tuple[int, int], set[bytes]] = defaultdict(set)
    present = set(repository.store.list(layout.PACKS))
    progress.start("marking", None)
    for backup in kept:
        for image in backup.images:
            shape = repository.shape(image.size_bytes)
            visited = seen[shape.levels, shape.slots]
            for _, _, page, leaves in walk_pages(
                repository, bytes.fromhex(image.root), shape, visited
            ):
                ids = [page]
                for leaf in leaves:
                    if leaf is not None:
                        ids += (leaf.base, *leaf.deltas)
                _require(repository, ids, backup, present)
                live.add(ids)
    progress.finish("marking")


def _require(
    repository: Repository, ids: Sequence[bytes], backup: Backup, present: Set[str]
) -> None:
    wanted = list(dict.fromkeys(ids))
    known = repository.index.find_many(wanted).values()
    missing = len(wanted) - sum(1 for found in known if found.pack in present)
    if missing:
        raise IntegrityError(
            f"prune stopped, nothing was deleted: backup {backup.id} lacks {missing} chunks",
            code="prune-unsafe",
            hint="see which ranges it hits: offload verify --all",
        )


def _plan(repository: Repository, live: _LiveSet) -> _PackPlan:
    """Which packs stay, are rewritten, or go. Only the copy that the index names counts as used."""
    plan = _PackPlan([], [], [], 0, 0)
    for name in repository.store.list(layout.PACKS):
        size = repository.store.size(name)
        entries = _live_in(repository, name, live)
        # what a pack of just these would take: a small pack is all frame, and must not be
        # rewritten for that, again and again
        used = pack_bytes(entries)
        if not entries:
            plan.drop.append(name)
            plan.freed_bytes += size
            continue
        plan.live_bytes += used
        if used < size * _REPACK_BELOW:
            plan.rewrite.append(name)
            plan.freed_bytes += size - used
        else:
            plan.keep.append(name)
    return plan


def _live_in(repository: Repository, pack: str, live: _LiveSet) -> list[Entry]:
    """Chunks of a pack that are in use and that the index reads from this pack.

    Never by what the pack says of itself: with a damaged footer that may be too little.
    """
    return [entry for entry in repository.index.entries(pack) if entry.id in live]


def _apply(
    ctx: Context,
    repository: Repository,
    gone: Sequence[Backup],
    plan: _PackPlan,
    live: _LiveSet,
) -> None:
    writer_id = new_id()
    args = {"store": repository.store.spec.text(), "backup": writer_id}
    with ctx.journal.operation("prune", repository.store.url) as op:
        op.intend("packs", "abort-prune", args)
        for number, backup in enumerate(gone, 1):
            finished.erase(ctx, op, backup, number)
        if plan.drop or plan.rewrite:
            _free(repository, writer_id, plan, live)
        stores.sweep_temporary(repository.store, "")
        op.done("packs")


def _free(repository: Repository, writer_id: str, plan: _PackPlan, live: _LiveSet) -> None:
    old_indexes = list(repository.store.list(layout.INDEXES))
    packs = dict(_kept_entries(repository, plan.keep, live))
    packs.update(_rewrite(repository, writer_id, plan.rewrite, live))
    step("prune.packs.copied")
    name = layout.index_name(writer_id)
    repository.put_index(name, packs)
    step("prune.index.written")
    for old in old_indexes:
        repository.store.delete(old)
    step("prune.indexes.deleted")
    for pack in (*plan.drop, *plan.rewrite):
        repository.store.delete(pack)
        step("prune.pack.deleted")
    repository.refresh()


def _kept_entries(
    repository: Repository, keep: Sequence[str], live: _LiveSet
) -> Iterator[tuple[str, list[Entry]]]:
    """What of the packs that stay is in use: the rest must not be found any more, since a later
    prune may drop it."""
    for pack in keep:
        yield pack, _live_in(repository, pack, live)


def _rewrite(
    repository: Repository, writer_id: str, packs: Sequence[str], live: _LiveSet
) -> dict[str, list[Entry]]:
    """Copy live chunks as they are compressed; the writer checks each, and encrypts it anew."""
    with PackWriter(repository, writer_id) as writer:
        for pack in packs:
            for entry in _live_in(repository, pack, live):
                stored = repository.store.get_range(pack, entry.payload_offset, entry.stored_length)
                payload = repository.payload(entry, stored, pack)
                writer.append(entry.id, entry.kind, entry.encoding, entry.raw_length, payload)
        return writer.flush()


def undo_prune(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """After a crash: nothing has to be taken back once the new index object is out (its packs are
    in use); before, the copies are removed. Either way the next prune frees the rest."""
    store = compose.open_store(args["store"])
    try:
        ident = args["backup"]
        if not store.exists(layout.index_name(ident)):
            stores.remove_packs(store, ident)
        stores.sweep_temporary(store, ident)
    finally:
        store.close()
