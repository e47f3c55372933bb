"""Copy: backups from one store to another.

Between stores that share the id key (`store init --like`) and the geometry, the subtrees are sent
that differ from the newest copy's, and of these the chunks that the target lacks (`same-key`). With
another id key it is each piece that differs from the newest copy's, under its new id (`new-key`);
into a store that is cut otherwise (chunk size, page width) the image, as a backup of it
(`new-cut`).

A copy is a backup of its own in the target, with its own id, and says what it is a copy of
(`copied_from`), which makes a second run find that it is there already. Lists of deltas stay as
they are. The commit point is the manifest; index objects come out every `_BATCH_BYTES`, so that
what a killed copy has sent is not sent again:

| killed | in the target | recovery |
| --- | --- | --- |
| while a batch is written | its packs | removed |
| after its index object | its packs and index object | stay: the next run finds the chunks |
| after the manifest | a finished copy | kept, and entered in the catalog |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.manifests import read_folds, read_manifest
from offload.engine.repository import Repository
from offload.engine.writing import settle_dead
from offload.errors import (
    IntegrityError,
    NotFoundError,
    OffloadError,
    UsageError,
)
from offload.format import layout
from offload.format.manifest import Manifest
from offload.ids import match_prefix
from offload.instance import Instance
from offload.model import Backup
from offload.progress import NoProgress, Progress
from offload.services import stores
from offload.services.context import Context
from offload.services.copy_plan import Copied, CopyRequest, origin_of, origins_in
from offload.services.copying import Copying


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What a copy run did, in the order in which it was done."""

    source: str
    target: str
    copies: tuple[Copied, ...]
    stored_bytes: int


def copy(ctx: Context, request: CopyRequest, progress: Progress | None = None) -> CopyReport:
    """Copy backups, the oldest first. What is there already is said so, and not sent.

    A backup that cannot be read in the source is reported (`failed`), and the others go on.
    Raises NotFoundError (`unknown-backup`), UsageError (`same-store`).
    """
    ctx.instance.config.store(request.source)
    ctx.instance.config.store(request.target)
    with (
        stores.opened(ctx, request.source, exclusive=False) as source,
        stores.opened(ctx, request.target, exclusive=False) as target,
    ):
        if source.parameters.store_id == target.parameters.store_id:
            raise UsageError(
                f"{request.source} and {request.target} are one store",
                code="same-store",
                hint="name another one with --to",
            )
        run = _Run(ctx, request, source, target, progress or NoProgress())
        done = tuple(run.copies())
    return CopyReport(
        source=request.source,
        target=request.target,
        copies=done,
        stored_bytes=sum(entry.stored_bytes for entry in done),
    )


class _Run:
    """The chosen backups, one after the other."""

    def __init__(
        self, ctx: Context, request: CopyRequest, source: Repository, target: Repository,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.ctx = ctx
        self.request = request
        self.source = source
        self.target = target
        self.progress = progress
        self.unreadable: list[Copied] = []
        self.backups = {str(m.backup.id): m for m in self._manifests()}
        there = dict(origins_in(target))
        self.there = {  # id in the source → id in the target
            ident: there[key]
            for ident, manifest in self.backups.items()
            if (key := origin_of(manifest, source)) in there
        }

    def copies(self) -> Iterator[Copied]:
        """Copy what is not there yet."""
        for backup in self._chosen():
            known = self.there.get(backup.id)
            if known is not None and self._enter(known):
                yield Copied(backup=backup.id, copy=known, group=backup.group, how="already-there")
                continue
            try:
                done = self._one(backup.id)
            except (IntegrityError, NotFoundError) as error:
                if error.code == "unknown-backup" and not self.request.ids:
                    yield Copied(backup=backup.id, copy="", group=backup.group, how="gone")
                    continue
                if error.code == "write-check":
                    raise
                yield _failed(backup.id, backup.group, error)
                continue
            self.there[backup.id] = done.copy
            yield done
        yield from self.unreadable

    def _enter(self, ident: str) -> bool:
        """Enter a copy that this catalog may not know: made by another host, or before a crash.

        False if it has been deleted since.
        """
        try:
            known = read_manifest(self.target, ident, self.request.target).backup
        except NotFoundError:
            return False
        self.ctx.catalog.add_backup(known)
        return True

    def _one(self, ident: str) -> Copied:
        with self.ctx.journal.operation("copy", f"{ident} to {self.request.target}") as op:
            copying = Copying(
                self.ctx, op, self.request, self.source, self.target,
                there=self.there, progress=self.progress,
            )  # fmt: skip
            return copying.run(ident)

    def _manifests(self) -> Iterator[Manifest]:
        """All of the source."""
        folds = read_folds(self.source)
        for name in self.source.store.list(layout.MANIFESTS):
            ident = name.removeprefix(layout.MANIFESTS)
            try:
                yield read_manifest(self.source, ident, self.request.source, folds)
            except IntegrityError as error:
                self.unreadable.append(_failed(ident, "", error))

    def _chosen(self) -> list[Backup]:
        """The oldest first."""
        request = self.request
        bad = [entry.backup for entry in self.unreadable]
        wanted = {
            match_prefix("backup", one.removeprefix("backup:"), [*self.backups, *bad])
            for one in request.ids
        }
        if wanted:
            self.unreadable = [entry for entry in self.unreadable if entry.backup in wanted]
        chosen = sorted(
            (
                manifest.backup
                for ident, manifest in self.backups.items()
                if (not wanted or ident in wanted)
                and request.group in (None, manifest.backup.group)
            ),
            key=lambda b: (b.created_at, b.id),
        )
        return chosen if request.last is None else chosen[-request.last :]


def _failed(ident: str, group: str, error: OffloadError) -> Copied:
    return Copied(backup=ident, copy="", group=group, how="failed", error=error.message)


def undo_copy(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Enter a copy whose manifest is out and counts, take one back that does not; the pin goes
    last."""
    store = compose.open_store(args["store"])
    try:
        ident = args["backup"]
        with closing(Repository.open(store, instance.cache_dir)) as repository:
            if settle_dead(repository, ident):
                catalog.add_backup(read_manifest(repository, ident, args["name"]).backup)
            stores.remove_unfinished(repository, ident)
    finally:
        store.close()
