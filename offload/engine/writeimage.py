"""The copy path of one image: extents → chunks → hash → zstd → packs, and the tree over them.

One function, `write_image`, serves all three ways: everything (no parent), everything compared
with the parent's tree (changes unknown), or only what changed (ranges known from the storage's
metadata).
Work goes in units of one leaf page or a part of it; a page is stored when its last unit is done.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.readimage import read_leaf
from offload.engine.tree import TreeBuilder, TreeReader
from offload.engine.work import run_workers
from offload.extents import Ranges, align, clip, total
from offload.format.delta import encode_delta
from offload.format.pack import Kind, chunk_id
from offload.format.tree import MAX_DELTAS, Leaf, Shape
from offload.image import Image
from offload.model import ExtentKind

UNIT_SLOTS = 16  # chunks read with one call: 4 MiB at 256 KiB chunks
_DELTA_SHARE = 0.5  # changed share of a chunk from which it is written whole
_CHAIN_SHARE = 2  # of a chunk that its deltas may take in all, before it is written whole again


@dataclass(slots=True)
class Counts:
    """What happened, in bytes of image unless said otherwise. Written under a lock."""

    data_bytes: int = 0  # held by data extents (of what was asked to be looked at)
    read_bytes: int = 0
    zero_bytes: int = 0  # read and found to be zeros
    new_bytes: int = 0  # stored for the first time, before compression
    stored_bytes: int = 0  # compressed, with record headers; tree pages counted
    known_bytes: int = 0  # read, but the store had it
    chunks_new: int = 0
    deltas_new: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to write. `changed` None: look at everything. `bad`: chunks of the parent that cannot be
    read: nothing is built on them, and the ranges that they hit are in `changed`."""

    image: Image
    shape: Shape
    parent: TreeReader | None
    changed: Ranges | None
    advance: Callable[[int], None]
    bad: Set[bytes] = frozenset()


@dataclass(slots=True)
class _Page:
    """A leaf page being built."""

    number: int
    entries: list[Leaf | None]
    remaining: int = 0


@dataclass(slots=True)
class _Unit:
    """Slots `first … first + count` of a page, and the ranges of the image to look at in there."""

    page: _Page
    first: int
    count: int
    ranges: Ranges
    data: Ranges


@dataclass(slots=True)
class _Tool:
    """What one thread owns."""

    buffer: memoryview
    compressor: Compressor
    counts: Counts = field(default_factory=Counts)


def write_image(job: Job, writer: PackWriter) -> tuple[bytes, Counts]:
    """Store an image; returns its root id and what happened.

    The root can be read once `writer.finish()` has returned.
    """
    return _ImageWriter(job, writer).run()


class _ImageWriter:
    def __init__(self, job: Job, writer: PackWriter) -> None:
        self.job = job
        self.writer = writer
        self.repository = writer.repository
        self.keys = writer.repository.keys
        self.counts = Counts()
        self._zero_ids: dict[int, bytes] = {}
        self._mutex = threading.Lock()
        pages = Compressor(self.repository.parameters.zstd_level)
        self._page_codec = pages
        self._page_mutex = threading.Lock()
        self.builder = TreeBuilder(job.shape, job.parent, self._put_page)

    def run(self) -> tuple[bytes, Counts]:
        run_workers(self._units(), self._tool, self._work)
        return self.builder.finish(), self.counts

    def _put_page(self, raw: bytes) -> bytes:
        with self._page_mutex:
            ident, stored = self.writer.add(Kind.PAGE, raw, self._page_codec.compress)
        with self._mutex:
            self.counts.stored_bytes += stored
        return ident

    @contextmanager
    def _tool(self) -> Iterator[_Tool]:
        level = self.repository.parameters.zstd_level
        buffer = memoryview(bytearray(UNIT_SLOTS * self.job.shape.chunk_bytes))
        tool = _Tool(buffer, Compressor(level))
        try:
            yield tool
        finally:
            with self._mutex:
                for name in Counts.__dataclass_fields__:
                    mine = getattr(self.counts, name) + getattr(tool.counts, name)
                    setattr(self.counts, name, mine)

    # -- planning ------------------------------------------------------------------------------

    def _units(self) -> Iterator[_Unit]:
        shape = self.job.shape
        if self.job.changed is None:
            wanted: Iterator[tuple[int, Ranges]] = self._pages_of_extents()
        else:
            wanted = _pages_of_ranges(self.job.changed, shape)
        for number, ranges in wanted:
            yield from self._units_of_page(number, ranges)

    def _pages_of_extents(self) -> Iterator[tuple[int, Ranges]]:
        """Leaf pages to look at when changes are unknown: all with data, and, over a parent, those
        that had data then."""
        shape = self.job.shape
        old = deque(self.job.parent.data_pages() if self.job.parent else ())
        with_data = _group_by_page(
            (
                (e.offset, e.end)
                for e in self.job.image.extents(0, shape.size_bytes)
                if e.kind is ExtentKind.DATA
            ),
            shape,
        )
        for number, ranges in with_data:
            while old and old[0] < number:
                yield old.popleft(), []
            if old and old[0] == number:
                old.popleft()
            yield number, ranges
        for gone in old:
            yield gone, []

    def _units_of_page(self, number: int, ranges: Ranges) -> Iterator[_Unit]:
        shape = self.job.shape
        incremental = self.job.changed is not None
        page = _Page(number, self._first_entries(number, keep=incremental))
        units: list[_Unit] = []
        chunk = shape.chunk_bytes
        at = number * shape.page_entries
        end = at + len(page.entries)
        while at < end:
            count = min(UNIT_SLOTS, end - at)
            inside = clip(ranges, at * chunk, (at + count) * chunk)
            if inside:
                data = self._data_in(inside) if incremental else inside
                units.append(_Unit(page, at, count, inside, data))
            at += count
        page.remaining = len(units)
        if not units:
            self.builder.put_leaf_page(number, page.entries)
        yield from units

    def _first_entries(self, number: int, *, keep: bool) -> list[Leaf | None]:
        if keep and self.job.parent is not None:
            return list(self.job.parent.leaf_page(number))
        return [None] * self.job.shape.entries(0, number)

    def _data_in(self, ranges: Ranges) -> Ranges:
        """The part of the ranges that holds data (the rest became holes)."""
        out: Ranges = []
        for start, end in ranges:
            out += [
                (e.offset, e.end)
                for e in self.job.image.extents(start, end - start)
                if e.kind is ExtentKind.DATA
            ]
        return out

    # -- working -------------------------------------------------------------------------------

    def _work(self, unit: _Unit, tool: _Tool) -> None:
        if self.job.changed is None:
            self._scan(unit, tool)
        else:
            for slot in range(unit.first, unit.first + unit.count):
                self._update(unit, slot, tool)
        with self._mutex:
            unit.page.remaining -= 1
            last = unit.page.remaining == 0
        if last:
            self.builder.put_leaf_page(unit.page.number, unit.page.entries)
        self.job.advance(total(unit.ranges))

    def _scan(self, unit: _Unit, tool: _Tool) -> None:
        """Look at all data of the unit."""
        shape = self.job.shape
        base = unit.first * shape.chunk_bytes
        end = min(base + unit.count * shape.chunk_bytes, shape.size_bytes)
        window = tool.buffer[: end - base]
        self._fill(window, base, unit.data, tool)
        for index in range(unit.count):
            slot = unit.first + index
            start, stop = shape.slot_range(slot)
            if clip(unit.data, start, stop):
                chunk = window[start - base : stop - base]
                self._set(unit.page, slot, self._store_chunk(chunk, slot, tool))

    def _fill(self, window: memoryview, base: int, data: Ranges, tool: _Tool) -> None:
        """Read the data ranges into their places in the window; zeros elsewhere."""
        at = 0
        for start, end in data:
            if at < start - base:
                window[at : start - base] = bytes(start - base - at)
            self.job.image.readinto(start, window[start - base : end - base])
            at = end - base
        if at < len(window):
            window[at:] = bytes(len(window) - at)
        read = total(data)
        tool.counts.data_bytes += read
        tool.counts.read_bytes += read

    def _store_chunk(self, chunk: memoryview, slot: int, tool: _Tool) -> Leaf | None:
        ident = chunk_id(Kind.DATA, chunk, self.keys)
        if ident == self._zero_id(len(chunk)):  # as fast as looking at the bytes, and one pass less
            tool.counts.zero_bytes += len(chunk)
            return None
        same = self._same_as_parent(ident, chunk, slot)
        if same is not None:
            tool.counts.known_bytes += len(chunk)
            return same
        if self.writer.claim(ident):
            encoding, payload = tool.compressor.compress(chunk)
            stored = self.writer.append(ident, Kind.DATA, encoding, len(chunk), payload)
            tool.counts.stored_bytes += stored
            tool.counts.new_bytes += len(chunk)
            tool.counts.chunks_new += 1
        else:
            tool.counts.known_bytes += len(chunk)
        return Leaf(ident)

    def _zero_id(self, length: int) -> bytes:
        """The id that a chunk of zeros has; two lengths at most: whole chunks and the last one."""
        found = self._zero_ids.get(length)
        if found is None:
            found = self._zero_ids[length] = chunk_id(Kind.DATA, bytes(length), self.keys)
        return found

    def _same_as_parent(self, ident: bytes, chunk: memoryview, slot: int) -> Leaf | None:
        """The parent's entry if it has this very content, possibly as base and deltas."""
        if self.job.parent is None:
            return None
        old = self.job.parent.leaf(slot)
        if old is None or self._is_bad(old) or (not old.deltas and old.base != ident):
            return None
        if old.deltas and bytes(chunk) != read_leaf(self.repository, old, len(chunk)):
            return None
        return old

    def _update(self, unit: _Unit, slot: int, tool: _Tool) -> None:
        """Bring one slot from the parent's content to the image's, reading only what changed."""
        shape = self.job.shape
        start, stop = shape.slot_range(slot)
        changed = clip(unit.ranges, start, stop)
        if not changed:
            return
        old = unit.page.entries[slot % shape.page_entries]
        whole = old is not None and (
            total(changed) >= (stop - start) * _DELTA_SHARE
            or self._is_bad(old)
            or self._chain_full(old, changed, stop - start)
        )
        chunk = tool.buffer[: stop - start]
        if whole:  # rebase: read all of the chunk that is data now
            data = clip(self._data_in([(start, stop)]), start, stop)
        else:
            data = clip(unit.data, start, stop)
        self._fill(chunk, start, data, tool)
        if old is None or whole:
            self._set(unit.page, slot, self._store_chunk(chunk, slot, tool))
        else:
            local = [(a - start, b - start) for a, b in changed]
            self._set(unit.page, slot, self._store_delta(old, local, chunk, tool))

    def _is_bad(self, old: Leaf) -> bool:
        return bool(self.job.bad) and not self.job.bad.isdisjoint((old.base, *old.deltas))

    def _chain_full(self, old: Leaf, changed: Ranges, length: int) -> bool:
        """Whether the list of deltas over a chunk of `length` bytes is full, by count or size."""
        if not old.deltas:
            return False
        if len(old.deltas) >= MAX_DELTAS:
            return True
        sizes = (self.repository.locate(d).entry.raw_length for d in old.deltas)
        return sum(sizes) + total(changed) > length * _CHAIN_SHARE

    def _store_delta(self, old: Leaf, local: Ranges, chunk: memoryview, tool: _Tool) -> Leaf:
        raw = encode_delta(align(local, 512, len(chunk)), chunk)
        ident, stored = self.writer.add(Kind.DELTA, raw, tool.compressor.compress)
        if stored:
            tool.counts.stored_bytes += stored
            tool.counts.new_bytes += len(raw)
            tool.counts.deltas_new += 1
        else:
            tool.counts.known_bytes += total(local)
        return Leaf(old.base, (*old.deltas, ident))

    def _set(self, page: _Page, slot: int, leaf: Leaf | None) -> None:
        page.entries[slot % self.job.shape.page_entries] = leaf


def _pages_of_ranges(ranges: Ranges, shape: Shape) -> Iterator[tuple[int, Ranges]]:
    return _group_by_page(iter(align(ranges, 512, shape.size_bytes)), shape)


def _group_by_page(ranges: Iterator[tuple[int, int]], shape: Shape) -> Iterator[tuple[int, Ranges]]:
    """Cut sorted ranges at leaf page borders: page number and the ranges in it, in order."""
    current, inside = -1, Ranges()
    for first, end in ranges:
        start = first
        while start < end:
            number = start // shape.page_bytes
            stop = min(end, (number + 1) * shape.page_bytes)
            if number != current:
                if inside:
                    yield current, inside
                current, inside = number, []
            inside.append((start, stop))
            start = stop
    if inside:
        yield current, inside
