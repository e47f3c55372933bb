"""Reading much of a stored image: window by window, and in a window in the order of the packs.

All chunks and deltas of a window are looked up at once; what lies close together in a pack is
fetched with one request. The deltas of one night lie together, so that a window costs a request or
two a night, not one a chunk: on S3 that is what a restore's time is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from offload.engine.chunkindex import Location
from offload.engine.readimage import StoredImage
from offload.engine.work import worker_count
from offload.errors import IntegrityError, NotFoundError
from offload.extents import Ranges
from offload.format.delta import apply_delta
from offload.format.pack import Kind
from offload.format.tree import Leaf

_WINDOWS_BYTES = 64 << 20  # of all threads together
_WINDOW_MIN = 8 << 20
_WINDOW_MAX = 32 << 20
_REQUEST_BYTES = 4 << 20
_GAP_BYTES = 128 << 10  # what is read in between and thrown away: cheaper than a request
_REQUESTS = 8  # at once, of all threads
_AHEAD = 4  # of one window


def window_bytes(chunk_bytes: int) -> int:
    """How much of an image one thread should ask for at once: a multiple of the chunk size."""
    share = max(_WINDOW_MIN, min(_WINDOW_MAX, _WINDOWS_BYTES // worker_count()))
    return max(share // chunk_bytes, 1) * chunk_bytes


@dataclass(slots=True)
class _Request:
    """Records of one pack that are fetched together."""

    pack: str
    start: int
    end: int
    places: list[Location]


@dataclass(slots=True)
class _Wanted:
    """What a window needs: where each base goes in the buffer, and the slots with deltas."""

    bases: dict[bytes, list[memoryview]] = field(default_factory=dict)
    deltas: dict[bytes, bytes] = field(default_factory=dict)
    chains: list[tuple[Leaf, memoryview]] = field(default_factory=list)


class BulkReader:
    """Fills windows of one stored image. Safe from any thread. Close it before the image."""

    def __init__(self, image: StoredImage) -> None:
        self.image = image
        self.repository = image.repository
        self.window_bytes = window_bytes(image.shape.chunk_bytes)
        self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="fetch")

    def read(self, base: int, ranges: Ranges, buffer: memoryview) -> None:
        """Fill the ranges of a window that begins at `base`; the rest of `buffer` is not touched.

        Ranges that are no whole chunks are read the plain way.
        """
        wanted, rest = self._plan(base, ranges, buffer)
        missing = self._fetch(wanted)
        for leaf, part in wanted.chains:
            if missing.isdisjoint((leaf.base, *leaf.deltas)):
                for ident in leaf.deltas:
                    apply_delta(wanted.deltas[ident], part)
        for start, end, idents in rest:
            if not idents or not missing.isdisjoint(idents):
                self.image.readinto(start, buffer[start - base : end - base])

    def _plan(
        self, base: int, ranges: Ranges, buffer: memoryview
    ) -> tuple[_Wanted, list[tuple[int, int, tuple[bytes, ...]]]]:
        """What to fetch; and every range with its chunks, for those that cannot be fetched so."""
        wanted = _Wanted()
        rest: list[tuple[int, int, tuple[bytes, ...]]] = []
        chunk = self.image.shape.chunk_bytes
        for start, end in ranges:
            at = start
            while at < end:
                first, stop = self.image.shape.slot_range(at // chunk)
                upto = min(end, stop)
                leaf = self.image.tree.leaf(at // chunk) if (at, upto) == (first, stop) else None
                if leaf is None:
                    rest.append((at, upto, ()))
                else:
                    part = buffer[at - base : upto - base]
                    wanted.bases.setdefault(leaf.base, []).append(part)
                    if leaf.deltas:
                        wanted.chains.append((leaf, part))
                        wanted.deltas.update(dict.fromkeys(leaf.deltas, b""))
                    rest.append((at, upto, (leaf.base, *leaf.deltas)))
                at = upto
        return wanted, rest

    def _fetch(self, wanted: _Wanted) -> set[bytes]:
        """Get all that is wanted; returns the ids that were not where the index said."""
        ids = [*wanted.bases, *wanted.deltas]
        places = self.repository.index.find_many(ids)
        missing = {ident for ident in ids if ident not in places}
        ahead: list[tuple[_Request, Future[bytes]]] = []
        requests = _coalesce(list(places.values()))
        try:
            for request in requests:
                ahead.append((request, self._pool.submit(self._get, request)))
                if len(ahead) == _AHEAD:
                    missing |= self._take(*ahead.pop(0), wanted)
            while ahead:
                missing |= self._take(*ahead.pop(0), wanted)
        finally:
            for _, future in ahead:
                future.cancel()
        return missing

    def _get(self, request: _Request) -> bytes:
        return self.repository.store.get_range(
            request.pack, request.start, request.end - request.start
        )

    def _take(self, request: _Request, future: Future[bytes], wanted: _Wanted) -> set[bytes]:
        try:
            raw = memoryview(future.result())
        except NotFoundError:  # moved by a prune: the image's own way looks again
            return {place.entry.id for place in request.places}
        missing = set()
        for place in request.places:
            entry = place.entry
            at = entry.payload_offset - request.start
            try:
                self._put(place, raw[at : at + entry.stored_length], wanted)
            except IntegrityError:  # damaged here; there may be another copy of it
                missing.add(entry.id)
        return missing

    def _put(self, place: Location, stored: memoryview, wanted: _Wanted) -> None:
        ident = place.entry.id
        content = self.repository.decode(place.entry, stored, place.pack)
        if ident in wanted.deltas:
            _check(place, Kind.DELTA, len(content))
            wanted.deltas[ident] = content
        for part in wanted.bases.get(ident, ()):
            _check(place, Kind.DATA, len(part))
            part[:] = content

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _check(place: Location, kind: Kind, length: int) -> None:
    entry = place.entry
    if entry.kind != kind or entry.raw_length != length:
        raise IntegrityError(
            f"chunk {entry.id.hex()[:16]} is not what its place needs", code="bad-page"
        )


def _coalesce(places: list[Location]) -> Iterator[_Request]:
    """Requests over what lies close together, in the order of the packs."""
    places.sort(key=lambda place: (place.pack, place.entry.offset))
    open_: _Request | None = None
    for place in places:
        start, end = place.entry.payload_offset, place.entry.end
        if (
            open_ is not None
            and open_.pack == place.pack
            and start - open_.end <= _GAP_BYTES
            and end - open_.start <= _REQUEST_BYTES
        ):
            open_.end = max(open_.end, end)
            open_.places.append(place)
            continue
        if open_ is not None:
            yield open_
        open_ = _Request(place.pack, start, end, [place])
    if open_ is not None:
        yield open_
