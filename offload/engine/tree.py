"""Reading trees and building them: a full image's, and a changed copy of a parent's."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

from offload.engine.repository import Repository
from offload.format.tree import (
    Leaf,
    Shape,
    decode_inner_page,
    decode_leaf_page,
    encode_inner_page,
    encode_leaf_page,
)

_CACHED_LEAVES = 64


class TreeReader:
    """The tree under one root. Safe from any thread; keeps a few leaf pages."""

    def __init__(self, repository: Repository, root: bytes, shape: Shape) -> None:
        self.repository = repository
        self.root = root
        self.shape = shape
        self._mutex = threading.Lock()
        self._leaves: OrderedDict[int, list[Leaf | None]] = OrderedDict()
        self._inner: dict[tuple[int, int], list[bytes | None]] = {}

    def leaf_page(self, page: int) -> list[Leaf | None]:
        """The entries of leaf page number `page`."""
        with self._mutex:
            found = self._leaves.get(page)
            if found is not None:
                self._leaves.move_to_end(page)
                return found
        entries = self._load_leaf(page)
        with self._mutex:
            self._leaves[page] = entries
            if len(self._leaves) > _CACHED_LEAVES:
                self._leaves.popitem(last=False)
        return entries

    def _load_leaf(self, page: int) -> list[Leaf | None]:
        count = self.shape.entries(0, page)
        ident = self.page_id(0, page)
        if ident is None:
            return [None] * count
        return decode_leaf_page(self.repository.read_page(ident), count)

    def page_id(self, level: int, page: int) -> bytes | None:
        """The id of a page, None where the whole subtree is zeros."""
        if level == self.shape.levels - 1:
            return self.root
        width = self.shape.page_entries
        above = self.inner_page(level + 1, page // width)
        return above[page % width]

    def inner_page(self, level: int, page: int) -> list[bytes | None]:
        """The entries of a page of level 1 or higher."""
        with self._mutex:
            known = self._inner.get((level, page))
        if known is not None:
            return known
        count = self.shape.entries(level, page)
        ident = self.page_id(level, page)
        raw = None if ident is None else self.repository.read_page(ident)
        entries: list[bytes | None] = [None] * count
        if raw is not None:
            entries = decode_inner_page(raw, level, count)
        with self._mutex:
            self._inner[level, page] = entries
        return entries

    def leaf(self, slot: int) -> Leaf | None:
        """The entry of one chunk slot."""
        page, index = divmod(slot, self.shape.page_entries)
        return self.leaf_page(page)[index]

    def data_pages(self) -> Iterator[int]:
        """Numbers of leaf pages that are not all zeros, in order."""
        if self.shape.levels == 1 and not any(self.leaf_page(0)):
            return  # a root is a page even where all is zeros
        yield from self._data_pages(self.shape.levels - 1, 0)

    def _data_pages(self, level: int, page: int) -> Iterator[int]:
        if level == 0:
            yield page
            return
        for index, child in enumerate(self.inner_page(level, page)):
            if child is not None:
                yield from self._data_pages(level - 1, page * self.shape.page_entries + index)

    def data_slots(self) -> Iterator[tuple[int, Leaf]]:
        """Slot number and entry of every chunk that is not zeros, in order."""
        for page in self.data_pages():
            for index, leaf in enumerate(self._load_leaf(page)):
                if leaf is not None:
                    yield page * self.shape.page_entries + index, leaf


def walk_pages(
    repository: Repository, root: bytes, shape: Shape, seen: set[bytes]
) -> Iterator[tuple[int, int, bytes, list[Leaf | None]]]:
    """All pages under a root that are not in `seen` yet: level, number, id, leaf entries (empty
    for inner pages). Adds to `seen` as it goes: shared subtrees are visited once.

    `seen` must only ever be used with one shape: position and depth follow from it.
    """
    stack: list[tuple[int, int, bytes]] = [(shape.levels - 1, 0, root)]
    while stack:
        level, page, ident = stack.pop()
        if ident in seen:
            continue
        raw = repository.read_page(ident)
        count = shape.entries(level, page)
        if level == 0:
            yield level, page, ident, decode_leaf_page(raw, count)
        else:
            children = decode_inner_page(raw, level, count)
            yield level, page, ident, []
            for index in range(len(children) - 1, -1, -1):
                child = children[index]
                if child is not None:
                    stack.append((level - 1, page * shape.page_entries + index, child))
        seen.add(ident)


def diff_slots(a: TreeReader, b: TreeReader) -> Iterator[tuple[int, Leaf | None, Leaf | None]]:
    """Slots whose entries differ between two trees of one shape; equal subtrees are not read."""
    if a.shape != b.shape:
        raise ValueError("trees of different shapes have no common slots")
    yield from _diff(a, b, a.shape.levels - 1, 0)


def _diff(
    a: TreeReader, b: TreeReader, level: int, page: int
) -> Iterator[tuple[int, Leaf | None, Leaf | None]]:
    if a.page_id(level, page) == b.page_id(level, page):
        return
    first = page * a.shape.page_entries
    if level == 0:
        for index, (x, y) in enumerate(zip(a.leaf_page(page), b.leaf_page(page), strict=True)):
            if x != y:
                yield first + index, x, y
        return
    pairs = zip(a.inner_page(level, page), b.inner_page(level, page), strict=True)
    for index, (left, right) in enumerate(pairs):
        if left != right:
            yield from _diff(a, b, level - 1, first + index)


PutPage = Callable[[bytes], bytes]  # stores a page, returns its id


class TreeBuilder:
    """Builds a tree from leaf pages in any order, over a parent's tree or over zeros.

    `put_leaf_page` may be called from many threads; `finish` once, at the end. Memory: one id a
    leaf page touched.
    """

    def __init__(self, shape: Shape, parent: TreeReader | None, put_page: PutPage) -> None:
        self.shape = shape
        self.parent = parent
        self._put = put_page
        self._mutex = threading.Lock()
        self._leaves: dict[int, bytes | None] = {}

    def put_leaf_page(self, page: int, entries: list[Leaf | None]) -> None:
        """Store a finished leaf page."""
        ident = self._put(encode_leaf_page(entries)) if any(entries) else None
        with self._mutex:
            self._leaves[page] = ident

    def finish(self) -> bytes:
        """Build the levels above and return the root's id."""
        changed = self._leaves
        for level in range(1, self.shape.levels):
            changed = self._raise_level(level, changed)
        if not changed and self.parent is not None:
            return self.parent.root
        root = changed.get(0)
        return self._put(self._empty_root()) if root is None else root

    def _raise_level(self, level: int, below: dict[int, bytes | None]) -> dict[int, bytes | None]:
        width = self.shape.page_entries
        pages: dict[int, list[bytes | None]] = {}
        for child, ident in below.items():
            number = child // width
            if number not in pages:
                pages[number] = (
                    [None] * self.shape.entries(level, number)
                    if self.parent is None
                    else list(self.parent.inner_page(level, number))
                )
            pages[number][child % width] = ident
        return {
            number: self._put(encode_inner_page(level, entries)) if any(entries) else None
            for number, entries in pages.items()
        }

    def _empty_root(self) -> bytes:
        top = self.shape.levels - 1
        if top == 0:
            return encode_leaf_page([None] * self.shape.entries(0, 0))
        return encode_inner_page(top, [None] * self.shape.entries(top, 0))
