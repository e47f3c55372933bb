"""Where a chunk that a store has lost may still be, and what is made of what is there.

Nothing is invented: a candidate counts only if it hashes to the id of what was lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from offload.engine.chunkindex import Location
from offload.engine.damage import Hit
from offload.engine.readimage import StoredImage, read_leaf
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.errors import IntegrityError, NotFoundError, OffloadError, UnavailableError
from offload.extents import normalize
from offload.format import layout
from offload.format.delta import SECTOR, encode_delta
from offload.format.pack import Kind, chunk_id
from offload.format.tree import Leaf, Shape, encode_inner_page, encode_leaf_page
from offload.image import Image
from offload.model import Backup, ImageRecord

_GRAINS = (SECTOR, 4096, 65536)  # in which change tracking may have said what a delta holds


@dataclass(frozen=True, slots=True)
class Where:
    """One place at which a lost chunk is needed."""

    backup: Backup
    image: ImageRecord
    hit: Hit


@dataclass(slots=True)
class Need:
    """A lost chunk, and all that need it."""

    ident: bytes
    kind: Kind
    wheres: list[Where] = field(default_factory=list)


def needs_of(hits: Iterable[Where]) -> list[Need]:
    """Hits by chunk, pages first: what hides behind them is not known yet."""
    found: dict[bytes, Need] = {}
    for where in hits:
        hit = where.hit
        kind = Kind.PAGE if hit.is_page else Kind.DELTA if hit.piece else Kind.DATA
        found.setdefault(hit.ident, Need(hit.ident, kind)).wheres.append(where)
    return sorted(found.values(), key=lambda need: need.kind != Kind.PAGE)


class Finder(Protocol):
    """A place to look at. `name` is for the report."""

    name: str

    def candidates(self, need: Need) -> Iterator[bytes]:
        """Contents that may be the lost chunk's. Damage and absence end it without an error."""
        ...


def find(need: Need, finders: Sequence[Finder], repository: Repository) -> tuple[str, bytes] | None:
    """The first candidate that is what was lost, and who had it."""
    for finder in finders:
        for raw in finder.candidates(need):
            if chunk_id(need.kind, raw, repository.keys) == need.ident:
                return finder.name, raw
    return None


class SameStore:
    """Packs that no index object names, and places that are noted as bad but read well again."""

    name = "this store"

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._places: dict[bytes, list[Location]] | None = None

    def candidates(self, need: Need) -> Iterator[bytes]:
        """See `Finder`."""
        known = [*self.repository.index.places(need.ident), *self._orphans().get(need.ident, ())]
        for place in known:
            with contextlib.suppress(IntegrityError, NotFoundError, UnavailableError):
                yield self.repository.read_place(place)

    def _orphans(self) -> Mapping[bytes, list[Location]]:
        if self._places is None:
            self._places = {}
            named = set(self.repository.index.packs())
            for pack in self.repository.store.list(layout.PACKS):
                if pack not in named:
                    with contextlib.suppress(IntegrityError, NotFoundError):
                        for entry in self.repository.pack_entries(pack):
                            self._places.setdefault(entry.id, []).append(Location(pack, entry))
        return self._places


class StoreWithSameIds:
    """Another store that shares the id key."""

    def __init__(self, name: str, other: Repository) -> None:
        self.name = f"store {name}"
        self.other = other

    def candidates(self, need: Need) -> Iterator[bytes]:
        """See `Finder`."""
        if self.other.index.find(need.ident) is not None:
            with contextlib.suppress(OffloadError):
                yield self.other.read(need.ident)


class CopiesElsewhere:
    """A store with another id key that has copies of backups: piece by piece, at the same places.

    `copies`: id of a backup here → the copy there.
    """

    def __init__(
        self, name: str, other: Repository, copies: Mapping[str, Backup], here: Repository
    ) -> None:
        self.name = f"store {name}"
        self.other = other
        self.copies = copies
        self.here = here

    def candidates(self, need: Need) -> Iterator[bytes]:
        """See `Finder`."""
        for where in need.wheres:
            copy = self.copies.get(where.backup.id)
            image = copy.image(where.image.volume) if copy is not None else None
            if image is None or image.size_bytes != where.image.size_bytes:
                continue
            stored = StoredImage(self.other, bytes.fromhex(image.root), image.size_bytes, 512)
            with contextlib.suppress(IntegrityError, NotFoundError):
                yield from self._of(stored, where.hit)

    def _of(self, stored: StoredImage, hit: Hit) -> Iterator[bytes]:
        shape = self.here.shape(stored.size_bytes)
        if hit.is_page:
            if stored.shape == shape:
                yield _page(shape, hit, lambda page: self._entries(stored, page), self.here)
            return
        if stored.shape == shape:
            leaf = stored.tree.leaf(hit.page)
            if leaf is not None and hit.piece <= len(leaf.deltas):
                yield self.other.read((leaf.base, *leaf.deltas)[hit.piece])
        if not hit.piece:
            yield stored.pread(hit.start, hit.end - hit.start)

    def _entries(self, stored: StoredImage, page: int) -> list[Leaf | None]:
        """A leaf page as it is here, told from the pieces there."""
        return [leaf and self._translated(leaf) for leaf in stored.tree.leaf_page(page)]

    def _translated(self, leaf: Leaf) -> Leaf:
        keys = self.here.keys
        return Leaf(
            chunk_id(Kind.DATA, self.other.read(leaf.base), keys),
            tuple(chunk_id(Kind.DELTA, self.other.read(i), keys) for i in leaf.deltas),
        )


class SourceImages:
    """TimeMarks: what production storage showed, and perhaps shows still.

    `images` opens those of a volume; `others` are backups whose trees may hold the same entries.
    """

    name = "a TimeMark"

    def __init__(
        self,
        repository: Repository,
        images: Callable[[str], Sequence[Image]],
        others: Sequence[Backup],
    ) -> None:
        self.repository = repository
        self.images = images
        self.others = others

    def candidates(self, need: Need) -> Iterator[bytes]:
        """See `Finder`."""
        for where in need.wheres:
            for image in self.images(where.image.volume):
                if image.size_bytes == where.image.size_bytes:
                    with contextlib.suppress(IntegrityError, NotFoundError, UnavailableError):
                        yield from self._of(image, where)

    def _of(self, image: Image, where: Where) -> Iterator[bytes]:
        hit = where.hit
        if hit.is_page:
            yield from self._pages(image, where)
        elif not hit.piece:
            yield _content(image, hit.start, hit.end)
        else:
            yield from self._deltas(image, where)

    def _deltas(self, image: Image, where: Where) -> Iterator[bytes]:
        """What differs from the state before, in the grains of change tracking."""
        hit = where.hit
        tree = _tree(self.repository, where.image)
        leaf = tree.leaf(hit.page)
        if leaf is None:
            return
        before = Leaf(leaf.base, leaf.deltas[: hit.piece - 1])
        old = bytes(read_leaf(self.repository, before, hit.end - hit.start))
        new = _content(image, hit.start, hit.end)
        for grain in _GRAINS:
            spots = range(0, len(new), grain)
            differing = normalize(
                (at, min(at + grain, len(new)))
                for at in spots
                if old[at : at + grain] != new[at : at + grain]
            )
            yield encode_delta(differing, new)

    def _pages(self, image: Image, where: Where) -> Iterator[bytes]:
        """The page over these contents: as whole chunks, or in the pieces of another backup."""
        shape = self.repository.shape(where.image.size_bytes)
        yield _page(shape, where.hit, lambda page: self._whole(image, shape, page), self.repository)
        for backup in self.others:
            other = backup.image(where.image.volume)
            if other is None or other.size_bytes != where.image.size_bytes:
                continue
            tree = _tree(self.repository, other)
            with contextlib.suppress(IntegrityError, NotFoundError):
                yield _page(
                    shape,
                    where.hit,
                    lambda page, tree=tree: self._like(image, tree, page),  # type: ignore[misc]
                    self.repository,
                )

    def _whole(self, image: Image, shape: Shape, page: int) -> list[Leaf | None]:
        first = page * shape.page_entries
        return [
            self._leaf(_content(image, *shape.slot_range(slot)))
            for slot in range(first, first + shape.entries(0, page))
        ]

    def _leaf(self, content: bytes) -> Leaf | None:
        if not content.strip(b"\0"):
            return None
        return Leaf(chunk_id(Kind.DATA, content, self.repository.keys))

    def _like(self, image: Image, tree: TreeReader, page: int) -> list[Leaf | None]:
        entries = self._whole(image, tree.shape, page)
        for index, leaf in enumerate(tree.leaf_page(page)):
            start, end = tree.shape.slot_range(page * tree.shape.page_entries + index)
            if leaf is not None and leaf.deltas:
                content = read_leaf(self.repository, leaf, end - start)
                if content == _content(image, start, end):
                    entries[index] = leaf
        return entries


def _tree(repository: Repository, image: ImageRecord) -> TreeReader:
    shape = repository.shape(image.size_bytes)
    return TreeReader(repository, bytes.fromhex(image.root), shape)


def _content(image: Image, start: int, end: int) -> bytes:
    out = bytearray(end - start)
    image.readinto(start, memoryview(out))
    return bytes(out)


def _page(
    shape: Shape, hit: Hit, entries: Callable[[int], list[Leaf | None]], repository: Repository
) -> bytes:
    """The bytes of a page made anew from its leaf entries."""
    return _built(shape, hit.level, hit.page, entries, repository) or b""


def _built(
    shape: Shape, level: int, page: int, entries: Callable[[int], list[Leaf | None]],
    repository: Repository,
) -> bytes | None:  # fmt: skip
    """None where all below is zeros (but for the root, which is a page all the same)."""
    top = level == shape.levels - 1
    if level == 0:
        leaves = entries(page)
        return encode_leaf_page(leaves) if any(leaves) or top else None
    first = page * shape.page_entries
    below = [
        _built(shape, level - 1, first + index, entries, repository)
        for index in range(shape.entries(level, page))
    ]
    ids = [None if raw is None else chunk_id(Kind.PAGE, raw, repository.keys) for raw in below]
    return encode_inner_page(level, ids) if any(ids) or top else None
