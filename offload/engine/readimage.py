"""Reading an image out of a store: leaves to chunks, chunks to bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from offload.engine.chunkindex import Location
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.errors import IntegrityError
from offload.extents import normalize, to_extents
from offload.format.delta import apply_delta
from offload.format.pack import Kind
from offload.format.tree import Leaf, Shape
from offload.model import Extent

_CACHED_PLACES = 16  # leaf pages
_CACHED_CHUNKS = 32  # for reads smaller than a chunk: 8 MiB at 256 KiB chunks


Places = Mapping[bytes, Location]


def read_leaf(
    repository: Repository, leaf: Leaf, length: int, places: Places | None = None
) -> bytes | bytearray:
    """The content of a chunk slot: the base with its deltas applied, oldest first.

    `places` may hold locations that were looked up beforehand, many at once.
    """
    base = _read_kind(repository, leaf.base, Kind.DATA, places)
    if len(base) != length:
        raise IntegrityError(
            f"chunk {leaf.base.hex()[:16]} has {len(base)} bytes, its place {length}",
            code="bad-page",
        )
    if not leaf.deltas:
        return base
    chunk = bytearray(base)
    for ident in leaf.deltas:
        apply_delta(_read_kind(repository, ident, Kind.DELTA, places), chunk)
    return chunk


def _read_kind(repository: Repository, ident: bytes, kind: Kind, places: Places | None) -> bytes:
    location = (places.get(ident) if places else None) or repository.locate(ident)
    if location.entry.kind != kind:
        raise IntegrityError(f"chunk {ident.hex()[:16]} is no {kind.name.lower()}", code="bad-page")
    return repository.read_at(location)


class StoredImage:
    """One volume of a backup as an Image (see `offload.image`). Safe from any thread.

    `tree`: one under the same root that is there already, with the pages that it has read.
    """

    def __init__(
        self,
        repository: Repository,
        root: bytes,
        size_bytes: int,
        sector_size: int,
        tree: TreeReader | None = None,
    ) -> None:
        self.repository = repository
        self.shape: Shape = repository.shape(size_bytes)
        self.tree = tree or TreeReader(repository, root, self.shape)
        self._size = size_bytes
        self._sector = sector_size
        self._mutex = threading.Lock()
        self._chunks: OrderedDict[int, bytes | bytearray] = OrderedDict()
        self._places: OrderedDict[int, Places] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """The size of the volume in bytes."""
        return self._size

    @property
    def block_size(self) -> int:
        """The logical sector size of the volume."""
        return self._sector

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Chunks that are not zeros are data, the rest are holes."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError("outside the image")
        return to_extents(self._data(offset, offset + length), offset, length)

    def _data(self, start: int, end: int) -> list[tuple[int, int]]:
        found = []
        slot = start // self.shape.chunk_bytes
        while slot < self.shape.slots and slot * self.shape.chunk_bytes < end:
            page, index = divmod(slot, self.shape.page_entries)
            entries = self.tree.leaf_page(page)
            for at in range(index, len(entries)):
                if entries[at] is not None:
                    found.append(self.shape.slot_range(page * self.shape.page_entries + at))
                if (page * self.shape.page_entries + at + 1) * self.shape.chunk_bytes >= end:
                    break
            slot = (page + 1) * self.shape.page_entries
        return normalize(found)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; every chunk is checked against its id."""
        end = offset + len(buffer)
        if offset < 0 or end > self._size:
            raise ValueError("outside the image")
        at = offset
        while at < end:
            slot = at // self.shape.chunk_bytes
            start, stop = self.shape.slot_range(slot)
            upto = min(end, stop)
            part = buffer[at - offset : upto - offset]
            chunk = self.chunk(slot, keep=len(part) < stop - start)
            if chunk is None:
                part[:] = bytes(len(part))
            elif len(part) == len(chunk):
                part[:] = chunk
            else:
                part[:] = memoryview(chunk)[at - start : upto - start]
            at = upto

    def chunk(self, slot: int, *, keep: bool) -> bytes | bytearray | None:
        """The content of a slot, None where it is zeros. `keep`: it will be asked for again."""
        with self._mutex:
            known = self._chunks.get(slot)
            if known is not None:
                self._chunks.move_to_end(slot)
                return known
        leaf = self.tree.leaf(slot)
        if leaf is None:
            return None
        start, stop = self.shape.slot_range(slot)
        places = None if keep else self._places_of(slot // self.shape.page_entries)
        chunk = read_leaf(self.repository, leaf, stop - start, places)
        if keep:
            with self._mutex:
                self._chunks[slot] = chunk
                if len(self._chunks) > _CACHED_CHUNKS:
                    self._chunks.popitem(last=False)
        return chunk

    def _places_of(self, page: int) -> Places:
        """Where all chunks of a leaf page are: one look-up for a reader of whole chunks, who will
        want them all. Places stay true while the store is held against prune."""
        with self._mutex:
            known = self._places.get(page)
        if known is not None:
            return known
        leaves = self.tree.leaf_page(page)
        ids = {ident for leaf in leaves if leaf for ident in (leaf.base, *leaf.deltas)}
        found = self.repository.index.find_many(list(ids))
        with self._mutex:
            self._places[page] = found
            if len(self._places) > _CACHED_PLACES:
                self._places.popitem(last=False)
        return found

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        out = bytearray(length)
        self.readinto(offset, memoryview(out))
        return bytes(out)

    def close(self) -> None:
        """Nothing is held beyond the repository, which its opener closes."""
        with self._mutex:
            self._chunks.clear()
            self._places.clear()
