"""The part of verify that walks trees: what damage hits, and the chunks of single backups."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from offload.engine.damage import DamageMap, Hit
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.engine.work import run_workers
from offload.errors import IntegrityError, NotFoundError, OffloadError
from offload.format.pack import RECORD
from offload.model import Backup, ImageRecord
from offload.progress import Progress
from offload.services.verify_packs import Notes, Tally

_CHUNK_DAMAGED = "damaged data"
_CHUNK_MISSING = "missing data"
_PAGE = "a damaged or missing tree page"


class Trees:
    """The trees of one store's backups."""

    def __init__(
        self, repository: Repository, store: str, tally: Tally, notes: Notes, progress: Progress
    ) -> None:
        self.repository = repository
        self.store = store
        self.tally = tally
        self.notes = notes
        self.progress = progress
        self._choose = random.SystemRandom()

    def map_damage(self, backups: Sequence[Backup]) -> None:
        """Say which ranges of which backups the damaged and missing chunks hit."""
        for ident, what in list(self.tally.bad.items()):
            if self._readable(ident):
                self.tally.problem(self.store, f"{what}; readers use another copy")
                del self.tally.bad[ident]
        unused = dict(self.tally.bad)
        damage = DamageMap(self.repository, self.tally.bad)
        for backup in backups:
            for image in backup.images:
                for hit in damage.image(image):
                    unused.pop(hit.ident, None)
                    self._hit(backup, image, hit)
        for what in sorted(set(unused.values())):
            self.tally.problem(self.store, f"{what}; no backup needs it")
        self.tally.bad.clear()  # the next store has other ids

    def _readable(self, ident: bytes) -> bool:
        """Whether readers get the chunk all the same: it can be stored twice."""
        try:
            self.repository.read(ident)
        except OffloadError:
            return False
        return True

    def _hit(self, backup: Backup, image: ImageRecord, hit: Hit) -> None:
        gone = hit.missing or hit.ident in self.tally.missing
        what = _PAGE if hit.is_page else _CHUNK_MISSING if gone else _CHUNK_DAMAGED
        self._range(backup, image, (hit.start, hit.end), what)

    def _range(self, backup: Backup, image: ImageRecord, where: tuple[int, int], what: str) -> None:
        self.tally.problem(self.store, what, backup=backup.id, volume=image.volume, where=where)

    def packs_of(self, backups: Sequence[Backup]) -> set[str]:
        """The packs that the chunks of these backups are read from."""
        packs: set[str] = set()
        for backup in backups:
            for image in backup.images:
                tree = self._tree(image)
                for page in self._pages(tree):
                    leaves = tree.leaf_page(page)
                    ids = {i for leaf in leaves if leaf for i in (leaf.base, *leaf.deltas)}
                    packs |= {p.pack for p in self.repository.index.find_many(list(ids)).values()}
        return packs

    def read(self, backup: Backup, sample: float | None) -> None:
        """Read the chunks (or a sample) of one backup's trees."""
        for image in backup.images:
            task = f"{backup.id}/{image.volume}"
            self.progress.start(task, image.size_bytes)
            tree = self._tree(image)

            def job(page: int, _tool: None, *, tree: TreeReader = tree, task: str = task,
                    image: ImageRecord = image) -> None:  # fmt: skip
                self._page(backup, image, tree, page, sample)
                self.progress.advance(task, tree.shape.page_bytes)

            @contextmanager
            def nothing() -> Iterator[None]:
                yield None

            run_workers(self._pages(tree, backup, image), nothing, job)
            self.progress.finish(task)

    def _tree(self, image: ImageRecord) -> TreeReader:
        shape = self.repository.shape(image.size_bytes)
        return TreeReader(self.repository, bytes.fromhex(image.root), shape)

    def _pages(
        self, tree: TreeReader, backup: Backup | None = None, image: ImageRecord | None = None
    ) -> Iterator[int]:
        """Leaf pages that can be read; one that cannot is a range of `backup` that is lost."""
        stack = [(tree.shape.levels - 1, 0)]
        while stack:
            level, page = stack.pop()
            try:
                if tree.page_id(level, page) is None:
                    continue
                if level == 0:
                    tree.leaf_page(page)
                    yield page
                    continue
                children = tree.inner_page(level, page)
            except (IntegrityError, NotFoundError):
                if backup is not None and image is not None:
                    span = tree.shape.page_bytes * tree.shape.page_entries**level
                    end = min((page + 1) * span, image.size_bytes)
                    self._range(backup, image, (page * span, end), _PAGE)
                continue
            first = page * tree.shape.page_entries
            stack += [
                (level - 1, first + i) for i in range(len(children) - 1, -1, -1) if children[i]
            ]

    def _page(
        self, backup: Backup, image: ImageRecord, tree: TreeReader, page: int,
        sample: float | None,
    ) -> None:  # fmt: skip
        for index, leaf in enumerate(tree.leaf_page(page)):
            if leaf is None or (sample is not None and self._choose.random() >= sample):
                continue
            slot = page * tree.shape.page_entries + index
            for ident in (leaf.base, *leaf.deltas):
                what = self._chunk(ident)
                if what:
                    self._range(backup, image, tree.shape.slot_range(slot), what)

    def _chunk(self, ident: bytes, *, again: bool = False) -> str:
        """Read one chunk from its first place, header and all; what is wrong with it."""
        location = self.repository.index.find(ident)
        if location is None:
            return _CHUNK_MISSING
        entry = location.entry
        try:
            raw = memoryview(
                self.repository.store.get_range(
                    location.pack, entry.offset, RECORD.size + entry.stored_length
                )
            )
            if raw[: RECORD.size] != self.repository.record_header(entry, location.pack):
                self.tally.problem(
                    self.store,
                    f"{location.pack}: the record header at {entry.offset} is damaged; its chunk "
                    "is found through the footer",
                )
            self.repository.decode(entry, raw[RECORD.size :], location.pack)
        except (IntegrityError, NotFoundError) as error:
            gone = isinstance(error, NotFoundError)
            if gone and not again:
                self.repository.refresh()
                if location.pack not in self.repository.index.packs():
                    return self._chunk(ident, again=True)  # moved by a prune
            self.notes.bad_chunk(location, error.message, gone=gone)
            return self._unless_elsewhere(ident, error.message, gone=gone)
        with self.tally.lock:
            self.tally.checked_bytes += len(raw)
            self.tally.chunks += 1
        return ""

    def _unless_elsewhere(self, ident: bytes, why: str, *, gone: bool) -> str:
        if self._readable(ident):
            self.tally.problem(self.store, f"{why}; readers use another copy")
            return ""
        return _CHUNK_MISSING if gone else _CHUNK_DAMAGED
