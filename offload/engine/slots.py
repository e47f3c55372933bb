"""Chunk slots of a stored image, several at once, with few requests and through the cache on disk.

What a slot is made of, its base and its deltas, is fetched together; so are neighbours in a pack.
Whatever is not where the index says, or damaged there, is left to the image's plain way, which
looks again and elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from offload.engine.blockcache import BlockCache
from offload.engine.chunkindex import Location
from offload.engine.readahead import Chunk
from offload.engine.readimage import StoredImage, read_leaf
from offload.engine.requests import Request, coalesce
from offload.errors import IntegrityError, NotFoundError
from offload.format.delta import apply_delta
from offload.format.pack import Kind
from offload.format.tree import Leaf
from offload.store import Store

_AT_ONCE = 8  # requests for one slot that a reader waits for


class SlotReader:
    """The slots of one image, decoded. Safe from any thread.

    Requests go to `store`, past a cache that the repository's may have: they span records. `cache`
    None: nothing is kept.
    """

    def __init__(self, image: StoredImage, store: Store, cache: BlockCache | None) -> None:
        self.image = image
        self.store = store
        self.repository = image.repository
        self.cache = cache

    def fetch(self, slot: int) -> Chunk:
        """One, for a reader that waits: its parts are asked for at the same time."""
        found: list[Chunk] = []
        self._fetch([slot], lambda _slot, chunk: found.append(chunk), at_once=_AT_ONCE)
        if found:
            return found[0]
        leaf = self.image.tree.leaf(slot)
        return None if leaf is None else read_leaf(self.repository, leaf, self._length(slot))

    def fetch_many(self, slots: Sequence[int], put: Callable[[int, Chunk], None]) -> None:
        """Several; see `readahead.Slots`."""
        self._fetch(slots, put, at_once=1)

    def _fetch(
        self, slots: Sequence[int], put: Callable[[int, Chunk], None], *, at_once: int
    ) -> None:
        leaves = {slot: self.image.tree.leaf(slot) for slot in slots}
        parts = self._parts([leaf for leaf in leaves.values() if leaf is not None], at_once)
        for slot, leaf in leaves.items():
            if leaf is None:
                put(slot, None)
                continue
            chunk = _made(leaf, parts, self._length(slot))
            if chunk is not None:
                put(slot, chunk)

    def _length(self, slot: int) -> int:
        start, stop = self.image.shape.slot_range(slot)
        return stop - start

    def _parts(self, leaves: list[Leaf], at_once: int) -> dict[bytes, tuple[Kind, bytes]]:
        """Contents by their ids, of what could be read."""
        ids = {ident for leaf in leaves for ident in (leaf.base, *leaf.deltas)}
        places = self.repository.index.find_many(list(ids))
        found: dict[bytes, tuple[Kind, bytes]] = {}
        missing = [place for place in places.values() if not self._take_cached(place, found)]
        requests = list(coalesce(missing))
        if at_once == 1 or len(requests) < 2:
            for request in requests:
                self._take(request, found)
        else:
            with ThreadPoolExecutor(min(at_once, len(requests))) as crew:
                list(crew.map(lambda request: self._take(request, found), requests))
        return found

    def _take_cached(self, place: Location, found: dict[bytes, tuple[Kind, bytes]]) -> bool:
        entry = place.entry
        if self.cache is None:
            return False
        stored = self.cache.get(place.pack, entry.payload_offset, entry.stored_length)
        return stored is not None and self._decode(place, memoryview(stored), found)

    def _take(self, request: Request, found: dict[bytes, tuple[Kind, bytes]]) -> None:
        length = request.end - request.start
        try:
            raw = memoryview(self.store.get_range(request.pack, request.start, length))
        except NotFoundError:
            return  # moved by a prune
        for place in request.places:
            at = place.entry.payload_offset - request.start
            stored = raw[at : at + place.entry.stored_length]
            if self._decode(place, stored, found) and self.cache is not None:
                self.cache.put(place.pack, place.entry.payload_offset, stored)

    def _decode(
        self, place: Location, stored: memoryview, found: dict[bytes, tuple[Kind, bytes]]
    ) -> bool:
        entry = place.entry
        try:
            found[entry.id] = Kind(entry.kind), self.repository.decode(entry, stored, place.pack)
        except IntegrityError:
            return False
        return True


def _made(leaf: Leaf, parts: dict[bytes, tuple[Kind, bytes]], length: int) -> Chunk:
    """The content of a slot, or None where a part is missing or not what its place needs."""
    kind, base = parts.get(leaf.base, (Kind.PAGE, b""))
    if kind is not Kind.DATA or len(base) != length:
        return None
    if not leaf.deltas:
        return base
    chunk = bytearray(base)
    for ident in leaf.deltas:
        kind, delta = parts.get(ident, (Kind.PAGE, b""))
        if kind is not Kind.DELTA:
            return None
        apply_delta(delta, chunk)
    return chunk
