"""One backup on its way from one store to another; see `offload.services.copy`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from offload import __version__
from offload.engine.chunkindex import Location
from offload.engine.manifests import read_folds, read_manifest
from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.pins import pinned_manifest
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.retention_lock import Built, lock_references
from offload.engine.transfer import Rekeyer, WantedPage, changed_leaf_pages, send, wanted_pages
from offload.engine.tree import TreeBuilder, TreeReader
from offload.engine.work import run_workers
from offload.engine.writeimage import Job, write_image
from offload.engine.writing import Writing, writing
from offload.errors import (
    IntegrityError,
    NotFoundError,
)
from offload.format import layout
from offload.format.manifest import Manifest, encode_manifest
from offload.format.pack import Kind
from offload.ids import new_id
from offload.journal import Operation, step
from offload.model import Backup, BackupId, ImageRecord
from offload.progress import Progress
from offload.quantity import Watermark
from offload.services import backups as finished
from offload.services.backup import newest_manifest
from offload.services.batches import Batches
from offload.services.context import Context
from offload.services.copy_plan import Copied, CopyRequest, origin_of

Advance = Callable[[int], None]

_BATCH_BYTES = 512 << 20  # stored; what a killed copy may have to send again


class Copying:
    """One backup on its way. It writes under the rules of docs/design/store-protocol.md: a pin
    first, then a look at what may be built on; the manifest, then a look whether it still counts.
    """

    def __init__(
        self, ctx: Context, op: Operation, request: CopyRequest, source: Repository,
        target: Repository, *, there: Mapping[str, str], progress: Progress,
    ) -> None:  # fmt: skip
        self.ctx = ctx
        self.op = op
        self.request = request
        self.source = source
        self.target = target
        self.there = there
        self.progress = progress
        self.id = BackupId(new_id())
        free = Watermark.parse(ctx.instance.config.store(request.target).min_free)
        self.batches = Batches(op, target, free)
        self.trees: list[Built] = []
        self.read_bytes = 0
        self._mutex = threading.Lock()

    def run(self, ident: str) -> Copied:
        """Copy it; returns what was done."""
        spec = self.target.store.spec.text()
        self.op.intend(
            "pin", "abort-copy", {"store": spec, "name": self.request.target, "backup": self.id}
        )
        with (
            pinned_manifest(self.source, ident, self.request.source) as (manifest, _),
            writing(self.target, self.id) as held,
        ):
            parent = self._parent(manifest.backup, held)
            images = tuple(self._image(image, parent) for image in manifest.backup.images)
            step("copy.images.written")
            done = self._publish(manifest, images, parent, held)
        self.ctx.catalog.add_backup(done)
        self.op.done("catalog")
        return Copied(
            backup=ident,
            copy=self.id,
            group=done.group,
            how=self.how(),
            read_bytes=self.read_bytes,
            stored_bytes=self.batches.stored_bytes,
        )

    def how(self) -> str:
        """By which way chunks are sent between these two stores."""
        ours, theirs = self.source.parameters, self.target.parameters
        if (ours.chunk_bytes, ours.page_entries) != (theirs.chunk_bytes, theirs.page_entries):
            return "new-cut"
        return "same-key" if self.source.keys.data == self.target.keys.data else "new-key"

    # -- the parent ------------------------------------------------------------------------------

    def _parent(self, backup: Backup, held: Writing) -> _Parent | None:
        """The newest backup up to this one that both stores have, pinned in the target."""
        folds = read_folds(self.source)
        known = []
        for ident in self.there:
            with suppress(NotFoundError, IntegrityError):
                before = read_manifest(self.source, ident, self.request.source, folds).backup
                if before.created_at <= backup.created_at and before.group == backup.group:
                    known.append(before)
        for before in sorted(known, key=lambda b: (b.created_at, b.id), reverse=True):
            with suppress(IntegrityError):
                there = held.parent(self.there[before.id], self.request.target)
                if there is not None:
                    return _Parent(before, there)
        return None

    def _trees(
        self, image: ImageRecord, parent: _Parent | None
    ) -> tuple[TreeReader, TreeReader | None, TreeReader | None]:
        """The image's tree; the parent's in the source, and the same in the target."""
        mine = _tree(self.source, image)
        before = parent.source.image(image.volume) if parent else None
        there = parent.target.image(image.volume) if parent else None
        if before is None or there is None or before.size_bytes != image.size_bytes:
            return mine, None, None
        return mine, _tree(self.source, before), _tree(self.target, there)

    # -- the images ------------------------------------------------------------------------------

    def _image(self, image: ImageRecord, parent: _Parent | None) -> ImageRecord:
        task = f"{image.volume} of {self.id}"
        before = self.batches.stored_bytes
        self.progress.start(task, None)

        def advance(count: int) -> None:
            with self._mutex:
                self.read_bytes += count
            self.progress.advance(task, count)

        mine, old, there = self._trees(image, parent)
        match self.how():
            case "same-key":
                root = self._same_key(mine, there, advance)
            case "new-key":
                root = self._new_key(mine, old, there, advance)
            case _:
                root = self._new_cut(image, parent, there, advance)
        self.progress.finish(task)
        parent_root = there.root if there is not None else None
        self.trees.append(Built(root=root, size_bytes=image.size_bytes, parent=parent_root))
        step(f"copy.image.{image.volume}")
        stored = self.batches.stored_bytes - before
        return replace(image, root=root.hex(), stored_bytes=stored)

    def _same_key(self, mine: TreeReader, there: TreeReader | None, advance: Advance) -> bytes:
        batch = _Batch()
        for page in wanted_pages(mine, there):
            wanted = [
                i for i in page.chunks if i not in batch.places and not self.target.index.has(i)
            ]
            places = self.source.index.find_many(wanted)
            for ident in wanted:
                batch.add(places.get(ident) or self.source.locate(ident))
            batch.pages.append(page)
            if batch.stored_bytes >= _BATCH_BYTES:
                self._send(batch, advance)
                batch = _Batch()
        self._send(batch, advance)
        return mine.root

    def _send(self, batch: _Batch, advance: Advance) -> None:
        if not batch.pages:
            return
        codec = Compressor(self.target.parameters.zstd_level)
        with self.batches.writer() as writer:
            send(self.source, writer, batch.places.values(), advance)
            for page in batch.pages:
                writer.add(Kind.PAGE, page.raw, codec.compress, page.ident)

    def _new_key(
        self, mine: TreeReader, old: TreeReader | None, there: TreeReader | None, advance: Advance
    ) -> bytes:
        rekeyer = Rekeyer(mine, old, there)
        level = self.target.parameters.zstd_level
        pages = list(changed_leaf_pages(mine, old))
        size = max(1, _BATCH_BYTES // mine.shape.page_bytes)
        putter = _PagePutter(level)
        builder = TreeBuilder(mine.shape, there, putter.put)

        @contextmanager
        def codec() -> Iterator[Compressor]:
            yield Compressor(level)

        for at in range(0, len(pages), size):
            with self.batches.writer() as writer:
                putter.writer = writer

                def job(page: int, tool: Compressor, writer: PackWriter = writer) -> None:
                    builder.put_leaf_page(page, rekeyer.leaves(page, writer, tool, advance))

                run_workers(iter(pages[at : at + size]), codec, job)
        with self.batches.writer() as writer:
            putter.writer = writer
            return builder.finish()

    def _new_cut(
        self, image: ImageRecord, parent: _Parent | None, there: TreeReader | None, advance: Advance
    ) -> bytes:
        before = parent.source.image(image.volume) if parent and there else None
        changed = None
        if before is not None:
            changed = finished.diff_images(self.source, image.volume, before, image).ranges
        stored = StoredImage(
            self.source, bytes.fromhex(image.root), image.size_bytes, image.sector_size
        )
        job = Job(
            image=stored,
            shape=self.target.shape(image.size_bytes),
            parent=there,
            changed=changed,
            advance=advance,
        )
        try:
            with self.batches.writer() as writer:
                return write_image(job, writer)[0]
        finally:
            stored.close()

    # -- the end ---------------------------------------------------------------------------------

    def _publish(
        self, manifest: Manifest, images: tuple[ImageRecord, ...], parent: _Parent | None,
        held: Writing,
    ) -> Backup:  # fmt: skip
        first, ident = origin_of(manifest, self.source)
        done = replace(
            manifest.backup,
            id=self.id,
            store=self.request.target,
            finished_at=datetime.now(UTC),
            images=images,
            parent=parent.target.id if parent else None,
            host=os.uname().nodename,
        )
        made = replace(
            manifest,
            backup=done,
            previous=newest_manifest(self.target),
            software=f"offload {__version__}",
            copied_from={"store": first, "backup": ident},
        )
        held.pin.look()
        locked = lock_references(self.target, self.trees, self.batches.packs)
        step("copy.manifest.before")
        name = layout.manifest_name(self.id)
        raw = encode_manifest(made, self.target.keys)
        self.target.store.put(name, [raw], retain_until=locked)
        step("copy.manifest.written")
        held.confirm(self.batches.packs)
        step("copy.manifest.counts")
        return done


def _tree(repository: Repository, image: ImageRecord) -> TreeReader:
    shape = repository.shape(image.size_bytes)
    return TreeReader(repository, bytes.fromhex(image.root), shape)


@dataclass(frozen=True, slots=True)
class _Parent:
    """One backup in both stores."""

    source: Backup
    target: Backup


@dataclass(slots=True)
class _Batch:
    """What is sent under one index object."""

    places: dict[bytes, Location] = field(default_factory=dict)
    pages: list[WantedPage] = field(default_factory=list)
    stored_bytes: int = 0

    def add(self, place: Location) -> None:
        """One more chunk."""
        self.places[place.entry.id] = place
        self.stored_bytes += place.entry.stored_length


class _PagePutter:
    """Stores pages of a tree through the writer of the moment, from any thread."""

    def __init__(self, level: int) -> None:
        self.writer: PackWriter | None = None
        self._codec = Compressor(level)
        self._mutex = threading.Lock()

    def put(self, raw: bytes) -> bytes:
        """Store one; returns its id."""
        if self.writer is None:
            raise ValueError("no writer yet")
        with self._mutex:
            return self.writer.add(Kind.PAGE, raw, self._codec.compress)[0]
