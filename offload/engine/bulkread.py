"""Reading much of a stored image: window by window, and in a window in the order of the packs.

All chunks and deltas of a window are looked up at once; what lies close together in a pack is
fetched with one request. The deltas of one night lie together, so that a window costs a request or
two a night, not one a chunk: on S3 that is what a restore's time is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from offload.engine.chunkindex import Location
from offload.engine.readimage import StoredImage
from offload.engine.requests import Request, coalesce
from offload.engine.work import worker_count
from offload.errors import IntegrityError, NotFoundError
from offload.extents import Ranges
from offload.format.delta import apply_delta
from offload.format.pack import Kind
from offload.format.tree import Leaf

_WINDOWS_BYTES = 64 << 20  # of all threads together
_WINDOW_MIN = 8 << 20
_WINDOW_MAX = 32 << 20
_REQUESTS = 8  # at once, of all threads
_AHEAD = 4  # of one window


def window_bytes(chunk_bytes: int) -> int:
    """How much of an image one thread should ask for at once: a multiple of the chunk size."""
    share = max(_WINDOW_MIN, min(_WINDOW_MAX, _WINDOWS_BYTES // worker_count()))
    return max(share // chunk_bytes, 1) * chunk_bytes


Put = Callable[[int, bytes | bytearray], None]  # offset in the image, content


@dataclass(slots=True)
class _Chain:
    """A chunk that is more than its base: what has come of it."""

    offset: int
    leaf: Leaf
    base: bytes = b""


@dataclass(slots=True)
class _Wanted:
    """What a window needs: where each plain chunk goes, what each chain waits for."""

    put: Put
    plain: dict[bytes, list[tuple[int, int]]] = field(default_factory=dict)  # offset, length
    bases: dict[bytes, list[_Chain]] = field(default_factory=dict)
    deltas: dict[bytes, bytes] = field(default_factory=dict)
    chains: list[_Chain] = field(default_factory=list)

    def add(self, offset: int, length: int, leaf: Leaf) -> None:
        """A whole chunk is wanted."""
        if not leaf.deltas:
            self.plain.setdefault(leaf.base, []).append((offset, length))
            return
        chain = _Chain(offset, leaf)
        self.chains.append(chain)
        self.bases.setdefault(leaf.base, []).append(chain)
        self.deltas.update(dict.fromkeys(leaf.deltas, b""))


class BulkReader:
    """Reads windows of one stored image. Safe from any thread. Close it before the image."""

    def __init__(self, image: StoredImage) -> None:
        self.image = image
        self.repository = image.repository
        self.window_bytes = window_bytes(image.shape.chunk_bytes)
        self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="fetch")

    def read(self, ranges: Ranges, put: Put) -> None:
        """Hand all of the ranges to `put`, chunk by chunk, in any order, each byte once.

        Ranges that are no whole chunks, and chunks that are not where the index says, are read the
        plain way.
        """
        wanted = _Wanted(put)
        other: Ranges = []
        for offset, length, leaf in self._slots(ranges):
            if leaf is None:
                other.append((offset, offset + length))
            else:
                wanted.add(offset, length, leaf)
        missing = self._fetch(wanted)
        for chain in wanted.chains:
            if missing.isdisjoint((chain.leaf.base, *chain.leaf.deltas)):
                chunk = bytearray(chain.base)
                for ident in chain.leaf.deltas:
                    apply_delta(wanted.deltas[ident], chunk)
                put(chain.offset, chunk)
            else:
                other.append(self.image.shape.slot_range(self._slot(chain.offset)))
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

    def _fetch(self, wanted: _Wanted) -> set[bytes]:
        """Get all that is wanted; returns the ids that were not where the index said."""
        ids = list({*wanted.plain, *wanted.bases, *wanted.deltas})
        places = self.repository.index.find_many(ids)
        missing = {ident for ident in ids if ident not in places}
        ahead: list[tuple[Request, Future[bytes]]] = []
        try:
            for request in coalesce(list(places.values())):
                ahead.append((request, self._pool.submit(self._get, request)))
                if len(ahead) == _AHEAD:
                    missing |= self._take(*ahead.pop(0), wanted)
            while ahead:
                missing |= self._take(*ahead.pop(0), wanted)
        finally:
            for _, future in ahead:
                future.cancel()
        return missing

    def _get(self, request: Request) -> bytes:
        return self.repository.store.get_range(
            request.pack, request.start, request.end - request.start
        )

    def _take(self, request: Request, future: Future[bytes], wanted: _Wanted) -> set[bytes]:
        try:
            raw = memoryview(future.result())
        except NotFoundError:  # moved by a prune: the image's own way looks again
            return {place.entry.id for place in request.places}
        missing = set()
        for place in request.places:
            entry = place.entry
            at = entry.payload_offset - request.start
            try:
                content = self.repository.decode(
                    entry, raw[at : at + entry.stored_length], place.pack
                )
            except IntegrityError:  # damaged here; there may be another copy of it
                missing.add(entry.id)
                continue
            _give(place, content, wanted)
        return missing

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _give(place: Location, content: bytes, wanted: _Wanted) -> None:
    """Where a chunk that has come goes."""
    ident = place.entry.id
    if ident in wanted.deltas:
        _check(place, Kind.DELTA, len(content))
        wanted.deltas[ident] = content
    for chain in wanted.bases.get(ident, ()):
        _check(place, Kind.DATA, len(content))
        chain.base = content
    for offset, length in wanted.plain.get(ident, ()):
        _check(place, Kind.DATA, length)
        wanted.put(offset, content)


def _check(place: Location, kind: Kind, length: int) -> None:
    entry = place.entry
    if entry.kind != kind or entry.raw_length != length:
        raise IntegrityError(
            f"chunk {entry.id.hex()[:16]} is not what its place needs", code="bad-page"
        )
