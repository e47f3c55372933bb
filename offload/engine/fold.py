"""Folding: deltas that no kept backup ends at are merged, and bases made new where that pays.

Nights leave chains in the leaves: a base and its deltas, `B d1 d2 d3 …`, each backup using the
chain up to its own night. Where the backups of some nights are gone, the steps between the kept
ones serve nobody: they become one delta (the union of their sectors, the newest bytes), and the
steps before the first kept one go into a new base, if what that frees is worth what it writes.

`fold` walks all kept trees of a volume at once, page by page: pages that several share are handled
once, and memory holds one path of each tree. Content never changes: only how it is stored.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise

from offload.engine.chunkindex import Location
from offload.engine.fences import look_for_fences
from offload.engine.manifests import Folds
from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.readimage import Places, read_leaf
from offload.engine.repository import Repository
from offload.errors import BusyError, IntegrityError
from offload.extents import Ranges, normalize
from offload.format import layout
from offload.format.delta import apply_delta, delta_ranges, encode_delta
from offload.format.fold import Fold, Roots, encode_fold
from offload.format.pack import ENTRY, RECORD, Kind
from offload.format.tree import (
    Leaf,
    Shape,
    decode_inner_page,
    decode_leaf_page,
    encode_inner_page,
    encode_leaf_page,
)
from offload.journal import step
from offload.model import Backup

_AROUND = RECORD.size + 2 * ENTRY.size  # what a chunk takes beside its payload: pack, footer, index

Chain = tuple[bytes, ...]  # the deltas of a leaf


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRule:
    """When folding pays.

    A new base is written when it frees this share more than it takes: less, and a window of kept
    nights that moves on by one would rewrite whole chunks every night. So long a run of steps that
    serve nobody becomes one delta; each prune would else rewrite the run for one step more. And a
    leaf page waits until the pages that must be written anew for it, one for each backup that has
    its own, take no more than this share of the deltas that go: a prune each night would else write
    more pages than anything else.
    """

    gain: float = 0.5
    dead_steps: int = 8
    pages: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldImage:
    """One volume of a kept backup, with the root that is read now."""

    backup: str
    volume: str
    size_bytes: int
    root: bytes


@dataclass(slots=True)
class FoldReport:
    """What was folded. `roots`: backup → volume → its new root, where it has one."""

    roots: dict[str, dict[str, str]] = field(default_factory=dict)
    bases: int = 0  # made new
    merged: int = 0  # deltas that went into another piece
    written_bytes: int = 0  # of new chunks and pages, compressed


def images_of(kept: Iterable[Backup]) -> list[FoldImage]:
    """What `fold` takes, of backups that `offload.engine.manifests` has resolved."""
    return [
        FoldImage(
            backup=backup.id,
            volume=image.volume,
            size_bytes=image.size_bytes,
            root=bytes.fromhex(image.root),
        )
        for backup in kept
        for image in backup.images
    ]


def fold(
    repository: Repository,
    writer: PackWriter,
    images: Sequence[FoldImage],
    *,
    pinned: Iterable[tuple[bytes, int]] = (),
    locked: Set[str] = frozenset(),
    rule: FoldRule | None = None,
) -> FoldReport:
    """Fold the chains of all kept images; new chunks go to `writer`.

    `pinned`: roots (with the size of their image) that must stay as they are; what they use is not
    freed by folding, and neither is what lies in the packs `locked`, so that it does not pay there.
    The new roots can be read once `writer.finish()` has returned, and count once `publish` has.
    IntegrityError if a page or a chunk cannot be read: then nothing was changed.
    """
    report = FoldReport()
    volumes: dict[tuple[str, int], list[FoldImage]] = defaultdict(list)
    for image in images:
        volumes[image.volume, image.size_bytes].append(image)
    by_size: dict[int, set[bytes]] = defaultdict(set)
    for root, size in pinned:
        by_size[size].add(root)
    for (volume, size), mine in sorted(volumes.items()):
        folder = _Folder(writer, repository.shape(size), locked, rule or FoldRule(), report)
        top = folder.shape.levels - 1
        made = folder.walk(top, 0, {image.root for image in mine}, by_size[size])
        for image in mine:
            if image.root in made:
                new = made[image.root].hex()
                report.roots.setdefault(image.backup, {})[volume] = new
    return report


def publish(
    repository: Repository, prune: str, folds: Folds, kept: Set[str], roots: Roots
) -> list[str]:
    """Put `folds/PRUNE`; returns the folds that it replaces, for the caller to delete.

    `folds` are those that were read, `kept` the backups that exist: what earlier folds say of these
    is taken along, so that the new object alone is enough. Raises BusyError (`prune-given-up`), and
    the object is gone again, if another prune has given this one up. Without new roots nothing is
    put, and folds are replaced that no backup needs any more.
    """
    if not roots:
        needed = any(kept & old.backups.keys() for old in folds.objects.values())
        return [] if needed else list(folds.objects)
    merged: dict[str, dict[str, str]] = {}
    for backup in sorted(kept):
        volumes = {v for old in folds.objects.values() for v in old.backups.get(backup, {})}
        before = {volume: folds.root(backup, volume) or "" for volume in sorted(volumes)}
        if entry := {**before, **roots.get(backup, {})}:
            merged[backup] = entry
    name = layout.fold_name(prune)
    raw = encode_fold(name, Fold(folds.next_sequence, merged), repository.keys)
    repository.store.put(name, [raw])
    step("prune.fold.written")
    if look_for_fences(repository.store, prune):
        repository.store.delete(name)
        raise BusyError(
            "this prune took too long and was given up by another one",
            code="prune-given-up",
            hint="run it again",
        )
    return [old for old in folds.objects if old != name]


class _Folder:
    """One volume's trees, all at once."""

    def __init__(
        self,
        writer: PackWriter,
        shape: Shape,
        locked: Set[str],
        rule: FoldRule,
        report: FoldReport,
    ) -> None:
        self.writer = writer
        self.repository = writer.repository
        self.shape = shape
        self.locked = locked
        self.rule = rule
        self.report = report
        self._compressor = Compressor(self.repository.parameters.zstd_level)

    def walk(
        self, level: int, page: int, kept: Set[bytes], pinned: Set[bytes]
    ) -> dict[bytes, bytes]:
        """Fold what lies under the pages at one place of all trees; old page id → new page id."""
        if level == 0:
            return self._leaves(page, kept, pinned)
        count = self.shape.entries(level, page)
        below = {
            ident: decode_inner_page(self.repository.read_page(ident), level, count)
            for ident in kept | pinned
        }
        changed: dict[bytes, list[bytes | None]] = {}
        for index in range(count):
            made = self.walk(
                level - 1,
                page * self.shape.page_entries + index,
                {child for ident in kept if (child := below[ident][index]) is not None},
                {child for ident in pinned if (child := below[ident][index]) is not None},
            )
            for ident in kept:
                new = made.get(below[ident][index] or b"")
                if new is not None:
                    changed.setdefault(ident, list(below[ident]))[index] = new
        return {
            ident: self._put(Kind.PAGE, encode_inner_page(level, entries))
            for ident, entries in changed.items()
        }

    def _leaves(self, page: int, kept: Set[bytes], pinned: Set[bytes]) -> dict[bytes, bytes]:
        count = self.shape.entries(0, page)
        shared = _Shared()
        entries = {
            ident: [
                None if leaf is None else shared.leaf(leaf)
                for leaf in decode_leaf_page(self.repository.read_page(ident), count)
            ]
            for ident in kept | pinned
        }
        slots = [
            {leaf for ident in kept if (leaf := entries[ident][index]) is not None}
            for index in range(count)
        ]
        wanted = [ident for slot in slots for ident in _pieces_of(slot)]
        if not wanted:
            return {}
        page_view = _Page(
            places=self.repository.index.find_many(list(dict.fromkeys(wanted))),
            stays=_pieces(leaf for ident in pinned for leaf in entries[ident])
            | _repeated_bases(slots),
        )
        anew = sum(_stored(self.repository.locate(ident)) for ident in kept)
        if sum(self._worth(slot, page_view) for slot in slots) * self.rule.pages < anew:
            return {}
        changed: dict[bytes, list[Leaf | None]] = {}
        for index, slot in enumerate(slots):
            start, stop = self.shape.slot_range(page * self.shape.page_entries + index)
            made = self._slot(slot, stop - start, page_view)
            for ident in kept:
                leaf = entries[ident][index]
                if leaf is not None and leaf in made:
                    changed.setdefault(ident, list(entries[ident]))[index] = made[leaf]
        return {
            ident: self._put(Kind.PAGE, encode_leaf_page(leaves))
            for ident, leaves in changed.items()
        }

    def _slot(self, leaves: Set[Leaf], length: int, page: _Page) -> dict[Leaf, Leaf]:
        """What becomes of the leaves of one slot; those that stay are not named."""
        made: dict[Leaf, Leaf] = {}
        for base, chains in self._chained(leaves, page):
            made.update(self._chains(base, chains, length, page))
        return made

    def _worth(self, leaves: Set[Leaf], page: _Page) -> int:
        """The stored bytes of the deltas that folding would merge in a slot."""
        merged: list[bytes] = []
        for base, chains in self._chained(leaves, page):
            for before, run in _runs(_stops(chains)):
                if self._merge_pays(run, page) or (
                    before is None and self._base_pays(base, run, page)
                ):
                    merged += run
        return sum(_stored(self._place(ident, page)) for ident in merged)

    def _chained(self, leaves: Set[Leaf], page: _Page) -> Iterator[tuple[bytes, set[Chain]]]:
        """The bases of a slot that have deltas and can be read, each with its chains."""
        by_base: dict[bytes, set[Chain]] = defaultdict(set)
        for leaf in leaves:
            by_base[leaf.base].add(leaf.deltas)
        for base, chains in by_base.items():
            if any(chains) and not self._hurt(base, chains, page):
                yield base, chains

    def _hurt(self, base: bytes, chains: Set[Chain], page: _Page) -> bool:
        """Whether a piece is noted as bad: it may be mended yet, and cannot be read before."""
        if not self.repository.quarantine.notes:
            return False
        places = (self._place(ident, page) for ident in {base}.union(*chains))
        return any(self.repository.quarantine.has(p.pack, p.entry.offset) for p in places)

    def _chains(
        self, base: bytes, chains: Set[Chain], length: int, page: _Page
    ) -> dict[Leaf, Leaf]:
        """Fold the chains over one base."""
        new_base = base
        pieces: dict[Chain, Chain] = {}
        for before, run in _runs(_stops(chains)):
            if before is None:
                new_base = self._new_base(base, run, length, page)
                pieces[run] = self._merged(run, length, page) if new_base == base else ()
            else:
                pieces[before + run] = pieces[before] + self._merged(run, length, page)
        return {
            Leaf(base, chain): Leaf(new_base, pieces[chain])
            for chain in chains
            if (new_base, pieces[chain]) != (base, chain)
        }

    def _new_base(self, base: bytes, run: Chain, length: int, page: _Page) -> bytes:
        """The base with the run's sectors in it, where that pays; else the base as it is."""
        if not self._base_pays(base, run, page):
            return base
        raw = read_leaf(self.repository, Leaf(base, run), length, page.places)
        if not any(raw):  # a chunk of zeros is not stored, so that it cannot be a base
            return base
        self.report.bases += 1
        self.report.merged += len(run)
        return self._put(Kind.DATA, raw)

    def _base_pays(self, base: bytes, run: Chain, page: _Page) -> bool:
        takes = _stored(self._place(base, page))  # the new one is about as large
        frees = sum(_stored(p) for p in self._freed((base, *run), page))
        return bool(run) and frees - takes >= self.rule.gain * takes

    def _merge_pays(self, run: Chain, page: _Page) -> bool:
        return len(run) >= self.rule.dead_steps and len(self._freed(run, page)) == len(run)

    def _merged(self, run: Chain, length: int, page: _Page) -> Chain:
        """The same sectors in one delta, where the run is long and all of it is freed."""
        if not self._merge_pays(run, page):
            return run
        chunk = bytearray(length)
        ranges: Ranges = []
        for ident in run:
            place = self._place(ident, page)
            if place.entry.kind != Kind.DELTA:
                raise IntegrityError(f"chunk {ident.hex()[:16]} is no delta", code="bad-page")
            delta = self.repository.read_at(place)
            apply_delta(delta, chunk)
            ranges += delta_ranges(delta, length)
        self.report.merged += len(run)
        return (self._put(Kind.DELTA, encode_delta(normalize(ranges), chunk)),)

    def _freed(self, ids: Sequence[bytes], page: _Page) -> list[Location]:
        """Where those of the chunks are that nobody needs once the kept leaves do not."""
        places = [self._place(ident, page) for ident in ids if ident not in page.stays]
        return [place for place in places if place.pack not in self.locked]

    def _place(self, ident: bytes, page: _Page) -> Location:
        return page.places.get(ident) or self.repository.locate(ident)

    def _put(self, kind: Kind, raw: bytes | bytearray) -> bytes:
        ident, stored = self.writer.add(kind, raw, self._compressor.compress)
        self.report.written_bytes += stored
        return ident


class _Shared:
    """One object for all that is equal: the pages of a thousand nights differ in little, and as
    they are decoded, each has its own copy of every id."""

    def __init__(self) -> None:
        self._ids: dict[bytes, bytes] = {}
        self._leaves: dict[Leaf, Leaf] = {}

    def leaf(self, leaf: Leaf) -> Leaf:
        """The leaf, or the one that equals it."""
        known = self._leaves.get(leaf)
        if known is None:
            ids = [self._ids.setdefault(i, i) for i in (leaf.base, *leaf.deltas)]
            known = Leaf(ids[0], tuple(ids[1:]))
            self._leaves[known] = known
        return known


@dataclass(frozen=True, slots=True)
class _Page:
    """What is known while one leaf page's slots are folded: where their chunks are, and which of
    them stay whatever becomes of the kept leaves."""

    places: Places
    stays: Set[bytes]


def _stops(chains: Set[Chain]) -> set[Chain]:
    """Where steps must not be merged across: ends of chains, and where two part."""
    ordered = sorted(chains)
    return set(ordered) | {_common(a, b) for a, b in pairwise(ordered)}


def _runs(stops: Set[Chain]) -> Iterator[tuple[Chain | None, Chain]]:
    """The steps between stops: the stop before them (None: the base) and the steps; shorter chains
    first. All stops begin with the shortest."""
    ordered = sorted(stops, key=len)
    yield None, ordered[0]
    for number, chain in enumerate(ordered[1:], 1):
        before = next(s for s in reversed(ordered[:number]) if chain[: len(s)] == s)
        yield before, chain[len(before) :]


def _common(a: Chain, b: Chain) -> Chain:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return a[:length]


def _pieces_of(slot: Set[Leaf]) -> list[bytes]:
    """The ids that matter for folding a slot: those of the leaves that have deltas."""
    return [ident for leaf in slot if leaf.deltas for ident in (leaf.base, *leaf.deltas)]


def _pieces(leaves: Iterable[Leaf | None]) -> set[bytes]:
    return {ident for leaf in leaves if leaf for ident in (leaf.base, *leaf.deltas)}


def _repeated_bases(slots: Sequence[Set[Leaf]]) -> set[bytes]:
    """Bases that several slots of the page share: a new one for one of them frees nothing."""
    counted = Counter(base for slot in slots for base in {leaf.base for leaf in slot})
    return {base for base, times in counted.items() if times > 1}


def _stored(place: Location) -> int:
    return place.entry.stored_length + _AROUND
