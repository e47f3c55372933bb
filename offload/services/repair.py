"""Repair: chunks that a store has lost are looked for, and stored anew.

What is lost is known from the notes that verify has put (`engine/quarantine.py`), from packs that
are missing, and from a walk over the trees of all backups. It is looked for in this order:

1. in the store itself: places that read well again, packs that no index object names;
2. in every other configured store that opens: by id where the id key is shared, else in a copy of
   the same backup, piece by piece;
3. on production storage: in the TimeMarks that there are, at the same place of the volume.

A candidate counts only if it hashes to the id. Tree pages are made anew from what is below. What is
found goes into new packs with an index object of their own; nothing is deleted, and killed at any
time the store is as it was or better. What is not found is listed, range by range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.damage import DamageMap
from offload.engine.manifests import read_folds, read_manifest
from offload.engine.mend import (
    CopiesElsewhere,
    Finder,
    Need,
    SameStore,
    SourceImages,
    StoreWithSameIds,
    Where,
    find,
    needs_of,
)
from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.pins import drop_pin
from offload.engine.quarantine import note_of
from offload.engine.repository import Repository
from offload.engine.retention_lock import lock_mended
from offload.engine.writing import writing
from offload.errors import IntegrityError, NotFoundError, OffloadError
from offload.format import layout
from offload.format.manifest import Manifest
from offload.holds import hold_timemark
from offload.ids import new_id
from offload.image import Image
from offload.instance import Instance
from offload.origin import parse_origin
from offload.progress import NoProgress, Progress
from offload.quantity import Watermark
from offload.services import points, stores
from offload.services.batches import Batches
from offload.services.context import Context
from offload.services.copy_plan import origin_of, origins_in
from offload.services.verify import Problem, merged
from offload.services.verify_packs import Found

_LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What was mended (with `dry_run`: can be), and what is lost.

    `found_in`: where from, and how many chunks. `unreadable`: backups without a manifest that can
    be read. `unasked`: other stores that could not be opened, and why.
    """

    store: str
    dry_run: bool
    mended_chunks: int
    mended_bytes: int
    found_in: Mapping[str, int]
    lost: tuple[Problem, ...]
    unreadable: tuple[str, ...]
    unasked: tuple[str, ...]


def repair(
    ctx: Context, store: str, *, dry_run: bool = False, progress: Progress | None = None
) -> RepairReport:
    """Mend a store from wherever what it lost still is.

    With `dry_run` nothing is written; what hides behind damaged pages is not counted then.
    """
    with ExitStack() as stack:
        repository = stack.enter_context(stores.opened(ctx, store, exclusive=False))
        run = _Repair(ctx, store, repository, stack, progress or NoProgress())
        if dry_run:
            run.look(None)
        else:
            _mend(ctx, store, repository, run)
        return RepairReport(
            store=store,
            dry_run=dry_run,
            mended_chunks=sum(run.found_in.values()),
            mended_bytes=run.mended_bytes,
            found_in=dict(run.found_in),
            lost=tuple(merged(run.lost)),
            unreadable=tuple(run.unreadable),
            unasked=tuple(run.unasked),
        )


def _mend(ctx: Context, store: str, repository: Repository, run: _Repair) -> None:
    ident = new_id()
    free = Watermark.parse(ctx.instance.config.store(store).min_free)
    with ctx.journal.operation("repair", store) as op:
        spec = repository.store.spec.text()
        op.intend("pin", "drop-pin", {"store": spec, "pin": ident})
        with writing(repository, ident):
            batches = Batches(op, repository, free)
            while run.look(batches.writer):
                pass
            lock_mended(repository)


class _Repair:
    """The state of one run."""

    def __init__(
        self, ctx: Context, store: str, repository: Repository, stack: ExitStack,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.ctx = ctx
        self.store = store
        self.repository = repository
        self.progress = progress
        self.found_in: Counter[str] = Counter()
        self.mended_bytes = 0
        self.lost: list[Found] = []
        self.unreadable: list[str] = []
        self.unasked: list[str] = []
        self._stack = stack
        self._mended: set[bytes] = set()
        self._images: dict[str, list[Image]] = {}
        self.manifests = list(self._manifests())
        self.finders = list(self._finders())
        self._codec = Compressor(repository.parameters.zstd_level)

    def _manifests(self) -> Iterator[Manifest]:
        folds = read_folds(self.repository)
        for name in self.repository.store.list(layout.MANIFESTS):
            ident = name.removeprefix(layout.MANIFESTS)
            try:
                yield read_manifest(self.repository, ident, self.store, folds)
            except IntegrityError as error:
                self.unreadable.append(f"{ident}: {error.message}")
            except NotFoundError:
                continue  # deleted just now

    # -- where to look ---------------------------------------------------------------------------

    def _finders(self) -> Iterator[Finder]:
        yield SameStore(self.repository)
        for name in sorted(self.ctx.instance.config.stores):
            if name == self.store:
                continue
            try:
                opened = stores.opened(self.ctx, name, exclusive=False)
                other = self._stack.enter_context(opened)
                yield self._elsewhere(name, other)
            except OffloadError as error:
                self.unasked.append(f"store {name}: {error.message}")
        backups = [manifest.backup for manifest in self.manifests]
        yield SourceImages(self.repository, self._timemarks, backups)

    def _elsewhere(self, name: str, other: Repository) -> Finder:
        if other.keys.data == self.repository.keys.data:
            return StoreWithSameIds(name, other)
        there = dict(origins_in(other))
        copies = {}
        for manifest in self.manifests:
            ident = there.get(origin_of(manifest, self.repository))
            if ident is not None:
                copies[str(manifest.backup.id)] = read_manifest(other, ident, name).backup
        return CopiesElsewhere(name, other, copies, self.repository)

    def _timemarks(self, volume: str) -> Sequence[Image]:
        """What the TimeMarks show of a volume, the newest first; opened once."""
        if volume not in self._images:
            self._images[volume] = list(self._opened(volume))
        return self._images[volume]

    def _opened(self, volume: str) -> Iterator[Image]:
        for mark in reversed(self.ctx.catalog.timemarks()):
            if mark.snapshot(volume) is None:
                continue
            origin = parse_origin(f"timemark:{mark.id}/{volume}")
            try:
                self._stack.enter_context(hold_timemark(self.ctx.instance, mark.id))
                (point,) = points.of_timemark(self.ctx, origin)
                image = compose.open_image(point.source)
            except OffloadError as error:
                self.unasked.append(f"timemark {mark.id}: {error.message}")
                continue
            self._stack.callback(image.close)
            yield image

    # -- looking and mending ---------------------------------------------------------------------

    def look(self, write: Callable[[], AbstractContextManager[PackWriter]] | None) -> bool:
        """One round: find what is lost, and store what is found. True if another one may find
        more: behind a page that was mended, or over a base."""
        needs = needs_of(self._hits())
        self.lost = [
            Found(
                store=self.store, what=_LOST, backup=where.backup.id, volume=where.image.volume,
                start=where.hit.start, end=where.hit.end,
            )
            for need in needs
            for where in need.wheres
        ]  # fmt: skip
        if not needs:
            return False
        self.progress.start("looking for what is lost", len(needs))
        found = 0
        if write is None:
            found = sum(self._one(need, None) for need in needs)
        else:
            with write() as writer:
                found = sum(self._one(need, writer) for need in needs)
        self.progress.finish("looking for what is lost")
        return found > 0

    def _one(self, need: Need, writer: PackWriter | None) -> bool:
        self.progress.advance("looking for what is lost", 1)
        found = find(need, self.finders, self.repository)
        if found is None or need.ident in self._mended:
            return False  # what was stored and still cannot be read is not stored again and again
        self._mended.add(need.ident)
        name, raw = found
        self.found_in[name] += 1
        self.mended_bytes += len(raw)
        if writer is None:
            self._count_out(need)
            return True
        self._note(need)
        # not `add`: what is damaged without a note is there for it
        encoding, payload = self._codec.compress(raw)
        writer.append(need.ident, need.kind, encoding, len(raw), payload)
        return True

    def _count_out(self, need: Need) -> None:
        """In a dry run: what could be mended is not lost, where nothing else is lost there."""
        mine = {(w.backup.id, w.image.volume, w.hit.start, w.hit.end) for w in need.wheres}
        for entry in list(self.lost):
            key = (entry.backup, entry.volume, entry.start, entry.end)
            if key in mine:
                mine.remove(key)
                self.lost.remove(entry)

    def _note(self, need: Need) -> None:
        """The bad places of a chunk that no note names yet."""
        for place in self.repository.index.places(need.ident):
            at = place.entry.offset
            if self.repository.quarantine.has(place.pack, at):
                continue
            try:
                self.repository.read_place(place)
            except IntegrityError as error:
                gone = error.code == "pack-missing"
                note = note_of(place.pack, [] if gone else [at], gone=gone, why=error.message)
                self.repository.put_sealed(*note)
        self.repository.refresh()

    def _hits(self) -> Iterator[Where]:
        damage = DamageMap(self.repository, self._bad())
        for manifest in self.manifests:
            for image in manifest.backup.images:
                for hit in damage.image(image):
                    yield Where(manifest.backup, image, hit)

    def _bad(self) -> set[bytes]:
        """Chunks that cannot be read from any place, of those that may be so."""
        index = self.repository.index
        suspects: set[bytes] = set()
        for note in self.repository.quarantine.notes:
            suspects |= {
                entry.id
                for entry in index.entries(note.pack)
                if note.gone or entry.offset in note.offsets
            }
        there = set(self.repository.store.list(layout.PACKS))
        for pack in set(index.packs()) - there:
            suspects |= {entry.id for entry in index.entries(pack)}
        return {ident for ident in suspects if not self._readable(ident)}

    def _readable(self, ident: bytes) -> bool:
        try:
            self.repository.read(ident)
        except IntegrityError:
            return False
        return True


def undo_pin(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Let go of the pin of a repair that died. Idempotent."""
    store = compose.open_store(args["store"])
    try:
        drop_pin(store, args["pin"])
    finally:
        store.close()
