"""Which ranges of which images bad and missing chunks hit: a walk over their trees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.errors import IntegrityError, NotFoundError
from offload.extents import Ranges, normalize
from offload.format.tree import Leaf
from offload.model import ImageRecord

_KNOWN = 100_000  # ids remembered: some 10 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A chunk of an image that cannot be read; bytes `start` to `end` of the image are lost by it.

    `level` and `page` are those of a tree page; of data (`level` -1), `page` is its slot, and
    `piece` its place in the leaf: 0 the base, from 1 the deltas.
    """

    ident: bytes
    start: int
    end: int
    level: int
    page: int
    piece: int = 0
    missing: bool = False

    @property
    def is_page(self) -> bool:
        """Whether it is a page of the tree."""
        return self.level >= 0


@dataclass(frozen=True, slots=True)
class Hurt:
    """What is known to be unreadable in an image: chunks, the ranges that they hit, and whether
    there are tree pages among them."""

    ids: frozenset[bytes] = frozenset()
    ranges: Ranges = field(default_factory=list)
    pages: bool = False


def known_damage(repository: Repository, image: ImageRecord) -> Hurt:
    """By the notes in the store alone: without any the tree is not walked."""
    notes = repository.quarantine.notes
    if not notes:
        return Hurt()
    bad: set[bytes] = set()
    for note in notes:
        for entry in repository.index.entries(note.pack):
            if note.gone or entry.offset in note.offsets:
                best = repository.index.find(entry.id)
                if best is None or repository.quarantine.has(best.pack, best.entry.offset):
                    bad.add(entry.id)
    hits = list(DamageMap(repository, bad).image(image))
    return Hurt(
        frozenset(hit.ident for hit in hits),
        normalize((hit.start, hit.end) for hit in hits),
        any(hit.is_page for hit in hits),
    )


class DamageMap:
    """Finds hits. Subtrees that are whole are walked once, however many images share them."""

    def __init__(self, repository: Repository, bad: Container[bytes]) -> None:
        self.repository = repository
        self.bad = bad
        self._whole: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        self._known: set[bytes] = set()  # pieces that the index has, of the pages read last

    def image(self, image: ImageRecord) -> Iterator[Hit]:
        """All hits in one image, in its order."""
        shape = self.repository.shape(image.size_bytes)
        tree = TreeReader(self.repository, bytes.fromhex(image.root), shape)
        walk = _Walk(self, tree, self._whole[shape.levels, shape.slots])
        yield from walk.subtree(shape.levels - 1, 0, tree.root)

    def leaf_hits(self, leaves: list[Leaf | None], first_slot: int, tree: TreeReader) -> list[Hit]:
        """Hits among the pieces of one leaf page."""
        pieces = [
            (first_slot + index, number, ident)
            for index, leaf in enumerate(leaves)
            if leaf is not None
            for number, ident in enumerate((leaf.base, *leaf.deltas))
        ]
        known = self._look_up({ident for _, _, ident in pieces})
        found = []
        for slot, number, ident in pieces:
            missing = ident not in known
            if missing or ident in self.bad:
                start, end = tree.shape.slot_range(slot)
                found.append(
                    Hit(ident=ident, start=start, end=end, level=-1, page=slot, piece=number,
                        missing=missing)
                )  # fmt: skip
        return found

    def _look_up(self, ids: set[bytes]) -> set[bytes]:
        """Those that the index has. Backups of one image share most of a page's pieces."""
        if len(self._known) > _KNOWN:
            self._known.clear()
        self._known |= self.repository.index.known(ids - self._known)
        return ids & self._known


class _Walk:
    """One image; `whole` has ids of pages that have no damage below."""

    def __init__(self, damage: DamageMap, tree: TreeReader, whole: set[bytes]) -> None:
        self.damage = damage
        self.tree = tree
        self.whole = whole

    def subtree(self, level: int, page: int, ident: bytes) -> Iterator[Hit]:
        """Hits below one page."""
        if ident in self.whole:
            return
        clean = True
        for hit in self._page(level, page, ident):
            clean = False
            yield hit
        if clean:
            self.whole.add(ident)

    def _page(self, level: int, page: int, ident: bytes) -> Iterator[Hit]:
        shape = self.tree.shape
        first = page * shape.page_entries
        try:
            leaves = self.tree.leaf_page(page) if level == 0 else []
            children = self.tree.inner_page(level, page) if level else []
        except (IntegrityError, NotFoundError) as error:
            span = shape.page_bytes * shape.page_entries**level
            end = min((page + 1) * span, shape.size_bytes)
            gone = error.code in ("chunk-missing", "pack-missing")
            yield Hit(ident=ident, start=page * span, end=end, level=level, page=page, missing=gone)
            return
        yield from self.damage.leaf_hits(leaves, first, self.tree)
        for index, child in enumerate(children):
            if child is not None:
                yield from self.subtree(level - 1, first + index, child)
