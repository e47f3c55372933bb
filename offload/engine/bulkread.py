"""Reading much of a stored image: window by window, and in a window in the order of the packs.

All chunks and deltas of a window are looked up at once; what lies close together in a pack is
fetched with one request. The deltas of one night lie together, so that a window costs a request or
two a night, not one a chunk: on S3 that is what a restore's time is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar

from offload.engine.chunkindex import Location
from offload.engine.readimage import StoredImage
from offload.engine.requests import Request, coalesce
from offload.engine.room import Room
from offload.engine.work import worker_count
from offload.errors import IntegrityError, NotFoundError
from offload.extents import Ranges
from offload.format.delta import apply_delta
from offload.format.pack import Entry, Kind
from offload.format.tree import Leaf
from offload.store import Buffer

_WINDOWS_BYTES = 64 << 20  # of all threads together
_WINDOW_MIN = 8 << 20
_WINDOW_MAX = 32 << 20
_REQUESTS = 8  # at once, of all threads
_AHEAD = 4  # of one window
_NOTHING = memoryview(b"")

_Made = TypeVar("_Made")
_Raw = tuple[Room, memoryview]  # what was read, and the memory that it lies in


def window_bytes(chunk_bytes: int) -> int:
    """How much of an image one thread should ask for at once: a multiple of the chunk size."""
    share = max(_WINDOW_MIN, min(_WINDOW_MAX, _WINDOWS_BYTES // worker_count()))
    return max(share // chunk_bytes, 1) * chunk_bytes


Put = Callable[[int, Buffer], None]  # offset in the image, content: good until it returns


@dataclass(slots=True)
class _Chain:
    """A chunk that is more than its base; `chunk` is where it is made."""

    offset: int
    leaf: Leaf
    chunk: memoryview


class _Rooms:
    """The memory of one window: chunks that are more than their bases, and their deltas."""

    def __init__(self) -> None:
        self.chunks = Room()
        self.deltas = Room()


@dataclass(slots=True)
class _Wanted:
    """What a window needs: where each plain chunk goes, what each chain waits for."""

    put: Put
    plain: dict[bytes, list[tuple[int, int]]] = field(default_factory=dict)  # offset, length
    bases: dict[bytes, list[_Chain]] = field(default_factory=dict)
    deltas: dict[bytes, memoryview] = field(default_factory=dict)
    chains: list[_Chain] = field(default_factory=list)
    free: memoryview = _NOTHING  # for deltas

    def add(self, offset: int, length: int, leaf: Leaf) -> None:
        """A plain chunk is wanted."""
        self.plain.setdefault(leaf.base, []).append((offset, length))

    def add_chains(self, found: Sequence[tuple[int, int, Leaf]], room: Room) -> None:
        """Chunks with deltas are wanted: offset, length, leaf of each."""
        memory = room.take(sum(length for _, length, _ in found))
        for offset, length, leaf in found:
            chain = _Chain(offset, leaf, memory[:length])
            memory = memory[length:]
            self.chains.append(chain)
            self.bases.setdefault(leaf.base, []).append(chain)
            self.deltas.update(dict.fromkeys(leaf.deltas, _NOTHING))

    def delta_bytes(self, places: Mapping[bytes, Location]) -> int:
        """What the deltas take in memory. IntegrityError (`bad-page`) for a chunk that is not what
        the leaves say that it is."""
        size = 0
        for ident, (_, entry) in places.items():
            if ident in self.deltas and entry.kind == Kind.DELTA:
                size += entry.raw_length
            elif ident in self.deltas or not self._fits(entry):
                raise IntegrityError(
                    f"chunk {ident.hex()[:16]} is not what its place needs", code="bad-page"
                )
        if not self.deltas.keys().isdisjoint((*self.plain, *self.bases)):
            raise IntegrityError("a delta is listed as a whole chunk", code="bad-page")
        return size

    def _fits(self, entry: Entry) -> bool:
        lengths = [length for _, length in self.plain.get(entry.id, ())]
        lengths += [len(chain.chunk) for chain in self.bases.get(entry.id, ())]
        return entry.kind == Kind.DATA and all(length == entry.raw_length for length in lengths)

    def keep(self, ident: bytes, delta: bytes) -> None:
        """A delta has come. It is copied: thousands of small buffers that live as long as the
        window would take new pages again and again."""
        place = self.free[: len(delta)]
        place[:] = delta
        self.free = self.free[len(delta) :]
        self.deltas[ident] = place


class BulkReader:
    """Reads windows of one stored image. Safe from any thread. Close it before the image."""

    def __init__(self, image: StoredImage) -> None:
        self.image = image
        self.repository = image.repository
        self.window_bytes = window_bytes(image.shape.chunk_bytes)
        self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="fetch")
        self._raws: SimpleQueue[Room] = SimpleQueue()
        self._rooms: SimpleQueue[_Rooms] = SimpleQueue()

    def read(self, ranges: Ranges, put: Put) -> None:
        """Hand all of the ranges to `put`, chunk by chunk, in any order, each byte once.

        Ranges that are no whole chunks, and chunks that are not where the index says, are read the
        plain way.
        """
        rooms = _reused(self._rooms, _Rooms)
        wanted = _Wanted(put)
        other: Ranges = []
        chains: list[tuple[int, int, Leaf]] = []
        for offset, length, leaf in self._slots(ranges):
            if leaf is None:
                other.append((offset, offset + length))
            elif leaf.deltas:
                chains.append((offset, length, leaf))
            else:
                wanted.add(offset, length, leaf)
        wanted.add_chains(chains, rooms.chunks)
        missing = self._fetch(wanted, rooms.deltas)
        for chain in wanted.chains:
            if missing.isdisjoint((chain.leaf.base, *chain.leaf.deltas)):
                for ident in chain.leaf.deltas:
                    apply_delta(wanted.deltas[ident], chain.chunk)
                put(chain.offset, chain.chunk)
            else:
                other.append(self.image.shape.slot_range(self._slot(chain.offset)))
        self._rooms.put(rooms)
        for ident in missing & wanted.plain.keys():
            other += [(offset, offset + length) for offset, length in wanted.plain[ident]]
        for start, end in other:
            put(start, self.image.pread(start, end - start))

    def _slot(self, offset: int) -> int:
        return offset // self.image.shape.chunk_bytes

    def _slots(self, ranges: Ranges) -> Iterator[tuple[int, int, Leaf | None]]:
        """Offset, length and leaf of each chunk; no leaf for parts of chunks, and for zeros."""
        for start, end in ranges:
            at = start
            while at < end:
                slot = self._slot(at)
                first, stop = self.image.shape.slot_range(slot)
                upto = min(end, stop)
                whole = (at, upto) == (first, stop)
                yield at, upto - at, self.image.tree.leaf(slot) if whole else None
                at = upto

    def _fetch(self, wanted: _Wanted, room: Room) -> set[bytes]:
        """Get all that is wanted; returns the ids that were not where the index said."""
        ids = {*wanted.plain, *wanted.bases, *wanted.deltas}
        places = self.repository.index.find_many(ids)
        missing = ids - places.keys()
        wanted.free = room.take(wanted.delta_bytes(places))
        ahead: list[tuple[Request, Future[_Raw]]] = []
        try:
            for request in coalesce(places.values()):
                ahead.append((request, self._pool.submit(self._get, request)))
                if len(ahead) == _AHEAD:
                    missing |= self._take(*ahead.pop(0), wanted)
            while ahead:
                missing |= self._take(*ahead.pop(0), wanted)
        finally:
            for _, future in ahead:
                future.cancel()
        return missing

    def _get(self, request: Request) -> _Raw:
        room = _reused(self._raws, Room)
        length = request.end - request.start
        return room, room.read(self.repository.store, request.pack, request.start, length)

    def _take(self, request: Request, future: Future[_Raw], wanted: _Wanted) -> set[bytes]:
        try:
            room, raw = future.result()
        except NotFoundError:  # moved by a prune: the image's own way looks again
            return {place.entry.id for place in request.places}
        missing = set()
        for place in request.places:
            entry = place.entry
            at = entry.payload_offset - request.start
            try:
                content = self._decode(place, raw[at : at + entry.stored_length], wanted)
            except IntegrityError:  # damaged here; there may be another copy of it
                missing.add(entry.id)
                continue
            for offset, _ in wanted.plain.get(entry.id, ()):
                wanted.put(offset, content)
        self._raws.put(room)
        return missing

    def _decode(self, place: Location, stored: memoryview, wanted: _Wanted) -> Buffer:
        """A chunk's content; deltas and bases go to their places in memory."""
        entry = place.entry
        chains = wanted.bases.get(entry.id)
        if chains is None:
            content = self.repository.decode(entry, stored, place.pack)
            if entry.kind == Kind.DELTA:
                wanted.keep(entry.id, content)
            return content
        first = chains[0].chunk
        self.repository.decode_into(entry, stored, place.pack, first)
        for chain in chains[1:]:
            chain.chunk[:] = first
        return first

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _reused(queue: SimpleQueue[_Made], make: Callable[[], _Made]) -> _Made:
    """One that is not in use, or a new one."""
    try:
        return queue.get_nowait()
    except Empty:
        return make()
