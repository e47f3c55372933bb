"""Verify: is every byte of the backups what was written?

`--all` reads every pack once, from start to end (each header, payload and footer), and then walks
the trees to say which backup, volume and byte range a damaged chunk hits. A named backup, or a
sample, reads the chunks of its own trees only.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock

from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.engine.work import run_workers
from offload.errors import IntegrityError, NotFoundError, OffloadError
from offload.extents import normalize
from offload.format import layout
from offload.format.index import decode_index
from offload.format.manifest import decode_manifest
from offload.format.pack import RECORD, Entry, read_footer, record_header, scan_records
from offload.model import Backup, ImageRecord
from offload.progress import NoProgress, Progress
from offload.services import stores
from offload.services.context import Context

_CHUNK_DAMAGED = "damaged data"
_CHUNK_MISSING = "missing data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is not what was written. `length` 0: not a range of an image.

    `backup` and `volume` are empty for damage that hits no backup (repairable or unused objects).
    """

    store: str
    backup: str
    volume: str
    offset: int
    length: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked, in stored bytes, and what was found."""

    problems: tuple[Problem, ...]
    backups: int
    checked_bytes: int
    chunks: int
    sampled: float | None


@dataclass(slots=True)
class _Tally:
    """Collected by all threads, under the lock."""

    lock: Lock = field(default_factory=Lock)
    checked_bytes: int = 0
    chunks: int = 0
    bad: dict[bytes, str] = field(default_factory=dict)  # chunk id → what is wrong
    problems: list[Problem] = field(default_factory=list)


def verify(
    ctx: Context,
    wanted: Sequence[str] = (),
    *,
    all_backups: bool = False,
    sample: float | None = None,
    store: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Verify named backups, or all (of one store, or of every configured one).

    `sample` is the fraction of each backup's chunks that is read, chosen at random each time.
    Damage is reported, never raised; what cannot be opened at all is.
    """
    shown = progress or NoProgress()
    per_store: dict[str, list[Backup]] = defaultdict(list)
    if all_backups:
        for name in [store] if store else sorted(ctx.instance.config.stores):
            per_store[name] = []
    for prefix in wanted:
        known = ctx.catalog.backup(prefix.removeprefix("backup:").partition("/")[0])
        per_store[known.store].append(known)
    tally = _Tally()
    count = 0
    for name, chosen in per_store.items():
        with stores.opened(ctx, name, exclusive=False) as repository:
            run = _Verifier(repository, name, sample, tally, shown)
            backups = run.manifests(None if all_backups else chosen, ctx)
            count += len(backups)
            if all_backups and sample is None:
                run.objects()
                run.map_damage(backups)
            else:
                for backup in backups:
                    run.backup(backup)
        how = "full" if sample is None else f"sample {sample:.0%}"
        _note(ctx, backups, tally.problems, how)
    return VerifyReport(
        problems=tuple(_merge(tally.problems)),
        backups=count,
        checked_bytes=tally.checked_bytes,
        chunks=tally.chunks,
        sampled=sample,
    )


def _note(ctx: Context, backups: Sequence[Backup], problems: Sequence[Problem], how: str) -> None:
    now = datetime.now(UTC)
    for backup in backups:
        hits = sum(1 for p in problems if p.backup == backup.id)
        ctx.catalog.add_backup(backup)
        ctx.catalog.note_verified(backup.id, now, how, hits)


class _Verifier:
    def __init__(
        self,
        repository: Repository,
        store: str,
        sample: float | None,
        tally: _Tally,
        progress: Progress,
    ) -> None:
        self.repository = repository
        self.store = store
        self.sample = sample
        self.tally = tally
        self.progress = progress
        self.choose = random.SystemRandom()
        self.missing: set[bytes] = set()  # of the bad chunks: those whose pack is gone

    def _problem(
        self, what: str, backup: str = "", volume: str = "", offset: int = 0, length: int = 0
    ) -> None:
        with self.tally.lock:
            self.tally.problems.append(
                Problem(
                    store=self.store,
                    backup=backup,
                    volume=volume,
                    offset=offset,
                    length=length,
                    what=what,
                )
            )

    def manifests(self, chosen: Sequence[Backup] | None, ctx: Context) -> list[Backup]:
        """The backups as their manifests say; a missing or damaged manifest is a problem."""
        expected = ctx.catalog.backups(store=self.store) if chosen is None else list(chosen)
        names: dict[str, str] = {layout.manifest_name(b.id): b.id for b in expected}
        if chosen is None:
            for name in self.repository.store.list(layout.MANIFESTS):
                names.setdefault(name, name.removeprefix(layout.MANIFESTS))
        found = []
        for name, ident in names.items():
            try:
                raw = self.repository.store.get(name)
                found.append(decode_manifest(name, raw, self.repository.keys, self.store).backup)
            except OffloadError as error:
                self._problem(f"the manifest: {error.message}", backup=ident)
        return found

    # -- all of a store, each object once --------------------------------------------------------

    def objects(self) -> None:
        """Read every index object and every pack from start to end."""
        objects = self.repository.store
        present = list(objects.list(layout.PACKS))
        for name in objects.list(layout.INDEXES):
            try:
                decode_index(name, objects.get(name), self.repository.keys)
            except OffloadError as error:
                self._problem(f"{error.message} (it can be made again: the packs hold it too)")
        for gone in sorted(set(self.repository.index.packs()) - set(present)):
            self._problem(f"pack {gone} is missing")
            for entry in self.repository.index.entries(gone):
                self.tally.bad[entry.id] = f"pack {gone} is missing"
                self.missing.add(entry.id)
        task = f"store {self.store}"
        self.progress.start(task, sum(self._size(name) for name in present))

        @contextmanager
        def nothing() -> Iterator[None]:
            yield None

        def job(name: str, _tool: None) -> None:
            size = self._pack(name)
            self.progress.advance(task, size)

        run_workers(iter(present), nothing, job)
        self.progress.finish(task)

    def _size(self, name: str) -> int:
        """For the progress shown: a pack of an unfinished backup may go at any time."""
        try:
            return self.repository.store.size(name)
        except NotFoundError:
            return 0

    def _pack(self, name: str) -> int:
        known = self.repository.index.entries(name)
        try:
            raw = memoryview(self.repository.store.get(name))
        except NotFoundError:
            if known:
                self._problem(f"pack {name} went while it was to be read")
            return 0
        except OffloadError as error:
            self._problem(error.message)
            with self.tally.lock:
                self.tally.bad.update((entry.id, error.message) for entry in known)
            return 0
        # What readers look for must be there, whatever the pack says of itself.
        entries = list(dict.fromkeys([*self._own_entries(name, raw), *known]))
        for entry in entries:
            self._record(name, raw, entry)
        with self.tally.lock:
            self.tally.checked_bytes += len(raw)
            self.tally.chunks += len(entries)
        return len(raw)

    def _own_entries(self, name: str, raw: memoryview) -> list[Entry]:
        """What a pack says is in it: by its footer, or by its records where that is damaged."""

        def part(offset: int, length: int) -> bytes:
            return bytes(raw[offset : offset + length])

        try:
            return read_footer(name, len(raw), part, self.repository.keys)
        except IntegrityError as error:
            self._problem(f"{error.message} (what can be read without it is checked all the same)")
        try:
            return list(scan_records(name, raw))
        except IntegrityError:
            return []

    def _record(self, name: str, raw: memoryview, entry: Entry) -> None:
        if raw[entry.offset : entry.payload_offset] != record_header(entry):
            self._problem(
                f"{name}: the record header at {entry.offset} is damaged; its chunk is "
                "found through the footer"
            )
        try:
            self.repository.decode(entry, raw[entry.payload_offset : entry.end], name)
        except IntegrityError as error:
            with self.tally.lock:
                self.tally.bad[entry.id] = error.message

    def map_damage(self, backups: Sequence[Backup]) -> None:
        """Say which ranges of which backups the damaged and missing chunks hit."""
        for ident, what in list(self.tally.bad.items()):
            if not self._still_bad(ident):
                self._problem(f"{what}; readers use another copy")
                del self.tally.bad[ident]
        unused = dict(self.tally.bad)
        for backup in backups:
            for image in backup.images:
                self._map_image(backup, image, unused)
        for what in sorted(set(unused.values())):
            self._problem(f"{what}; no backup needs it")

    def _still_bad(self, ident: bytes) -> bool:
        """Whether the copy that readers use is bad (a chunk can be stored twice)."""
        location = self.repository.index.find(ident)
        if location is None:
            return True
        try:
            self.repository.read_at(location)
        except OffloadError:
            return True
        return False

    def _map_image(self, backup: Backup, image: ImageRecord, unused: dict[bytes, str]) -> None:
        tree = self._tree(image)
        for page in self._pages(tree, backup, image, unused):
            leaves = tree.leaf_page(page)
            ids = {i for leaf in leaves if leaf for i in (leaf.base, *leaf.deltas)}
            known = self.repository.index.find_many(list(ids))
            for index, leaf in enumerate(leaves):
                slot = page * tree.shape.page_entries + index
                for ident in (leaf.base, *leaf.deltas) if leaf else ():
                    if ident in self.tally.bad:
                        unused.pop(ident, None)
                        what = _CHUNK_MISSING if ident in self.missing else _CHUNK_DAMAGED
                        self._hit(backup, image, tree.shape.slot_range(slot), what)
                    elif ident not in known:
                        self._hit(backup, image, tree.shape.slot_range(slot), _CHUNK_MISSING)

    def _hit(self, backup: Backup, image: ImageRecord, where: tuple[int, int], what: str) -> None:
        self._problem(
            what, backup=backup.id, volume=image.volume, offset=where[0], length=where[1] - where[0]
        )

    def _tree(self, image: ImageRecord) -> TreeReader:
        shape = self.repository.shape(image.size_bytes)
        return TreeReader(self.repository, bytes.fromhex(image.root), shape)

    def _pages(
        self, tree: TreeReader, backup: Backup, image: ImageRecord, unused: dict[bytes, str]
    ) -> Iterator[int]:
        """Leaf pages that can be read; a page that cannot is a range that is lost."""
        stack = [(tree.shape.levels - 1, 0)]
        while stack:
            level, page = stack.pop()
            try:
                ident = tree.page_id(level, page)
                if ident is None:
                    continue
                if level == 0:
                    tree.leaf_page(page)
                    yield page
                    continue
                children = tree.inner_page(level, page)
            except (IntegrityError, NotFoundError):
                if (bad := tree.page_id(level, page)) is not None:
                    unused.pop(bad, None)
                span = tree.shape.page_bytes * tree.shape.page_entries**level
                end = min((page + 1) * span, image.size_bytes)
                self._hit(backup, image, (page * span, end), "a damaged or missing tree page")
                continue
            first = page * tree.shape.page_entries
            stack += [
                (level - 1, first + i) for i in range(len(children) - 1, -1, -1) if children[i]
            ]

    # -- the chunks of one backup ----------------------------------------------------------------

    def backup(self, backup: Backup) -> None:
        """Read the chunks (or a sample) of one backup's trees."""
        for image in backup.images:
            task = f"{backup.id}/{image.volume}"
            self.progress.start(task, image.size_bytes)
            tree = self._tree(image)

            def job(page: int, _tool: None, *, tree: TreeReader = tree, task: str = task,
                    image: ImageRecord = image) -> None:  # fmt: skip
                self._page(backup, image, tree, page)
                self.progress.advance(task, tree.shape.page_bytes)

            @contextmanager
            def nothing() -> Iterator[None]:
                yield None

            run_workers(self._pages(tree, backup, image, {}), nothing, job)
            self.progress.finish(task)

    def _page(self, backup: Backup, image: ImageRecord, tree: TreeReader, page: int) -> None:
        leaves = tree.leaf_page(page)
        for index, leaf in enumerate(leaves):
            if leaf is None or (self.sample is not None and self.choose.random() >= self.sample):
                continue
            slot = page * tree.shape.page_entries + index
            for ident in (leaf.base, *leaf.deltas):
                what = self._chunk(ident)
                if what:
                    self._hit(backup, image, tree.shape.slot_range(slot), what)

    def _chunk(self, ident: bytes) -> str:
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
            if raw[: RECORD.size] != record_header(entry):
                self._problem(
                    f"{location.pack}: the record header at {entry.offset} is damaged; its chunk "
                    "is found through the footer"
                )
            self.repository.decode(entry, raw[RECORD.size :], location.pack)
        except IntegrityError:
            return _CHUNK_DAMAGED
        except NotFoundError:
            return _CHUNK_MISSING
        with self.tally.lock:
            self.tally.checked_bytes += len(raw)
            self.tally.chunks += 1
        return ""


def _merge(problems: Sequence[Problem]) -> Iterator[Problem]:
    """Neighbouring ranges of one volume with one cause as one problem."""
    ranges: dict[tuple[str, str, str, str], list[tuple[int, int]]] = defaultdict(list)
    for p in problems:
        if p.length:
            ranges[p.store, p.backup, p.volume, p.what].append((p.offset, p.offset + p.length))
        else:
            yield p
    for (store, backup, volume, what), found in ranges.items():
        for start, end in normalize(found):
            yield Problem(
                store=store,
                backup=backup,
                volume=volume,
                offset=start,
                length=end - start,
                what=what,
            )
