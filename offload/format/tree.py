"""Pages of the Merkle tree over an image's chunks. See docs/store-format.md for the layout.

Level 0 pages (leaves) hold one entry a chunk slot; higher pages one a page of the level below.
A page is itself a chunk (kind PAGE): its id is the keyed hash of its bytes. The root is the one
page of the top level; an image of zeros has a root too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from offload.errors import IntegrityError
from offload.format.keys import HASH_BYTES

_HEAD = struct.Struct("<2sBBI")  # magic version level count
_MAGIC = b"PG"
_VERSION = 1
_ZERO, _PLAIN, _DELTAS = b"\x00", b"\x01", b"\x02"

MAX_DELTAS = 64  # of one leaf entry; then the chunk is written whole again


@dataclass(frozen=True, slots=True)
class Leaf:
    """One chunk of the image: a whole base chunk, and deltas over it, newest last."""

    base: bytes
    deltas: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of a tree: how an image of `size_bytes` is cut."""

    size_bytes: int
    chunk_bytes: int
    page_entries: int

    @property
    def slots(self) -> int:
        """How many chunks the image has; the last one may be short."""
        return -(-self.size_bytes // self.chunk_bytes)

    @property
    def levels(self) -> int:
        """How many levels of pages, at least 1."""
        levels, reach = 1, self.page_entries
        while reach < self.slots:
            levels, reach = levels + 1, reach * self.page_entries
        return levels

    @property
    def page_bytes(self) -> int:
        """The bytes of image that a full leaf page covers."""
        return self.chunk_bytes * self.page_entries

    def pages(self, level: int) -> int:
        """How many pages a level has (empty ones counted)."""
        count = self.slots
        for _ in range(level + 1):
            count = -(-count // self.page_entries)
        return max(count, 1)

    def entries(self, level: int, page: int) -> int:
        """How many entries page number `page` of a level has."""
        below = self.slots if level == 0 else self.pages(level - 1)
        return max(0, min(self.page_entries, below - page * self.page_entries))

    def slot_range(self, slot: int) -> tuple[int, int]:
        """First byte and end of a chunk slot in the image."""
        start = slot * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.size_bytes)


def encode_leaf_page(entries: list[Leaf | None]) -> bytes:
    """The bytes of a level 0 page; None is a chunk of zeros."""
    parts = [_HEAD.pack(_MAGIC, _VERSION, 0, len(entries))]
    for leaf in entries:
        if leaf is None:
            parts.append(_ZERO)
        elif not leaf.deltas:
            parts += (_PLAIN, leaf.base)
        else:
            parts += (_DELTAS, leaf.base, bytes((len(leaf.deltas),)), *leaf.deltas)
    return b"".join(parts)


def encode_inner_page(level: int, entries: list[bytes | None]) -> bytes:
    """The bytes of a page of a higher level; None is a subtree of zeros."""
    parts = [_HEAD.pack(_MAGIC, _VERSION, level, len(entries))]
    for child in entries:
        parts += (_ZERO,) if child is None else (_PLAIN, child)
    return b"".join(parts)


def decode_leaf_page(raw: bytes, count: int) -> list[Leaf | None]:
    """The entries of a level 0 page that must have `count` of them. IntegrityError (`bad-page`)."""
    at = _check_head(raw, 0, count)
    entries: list[Leaf | None] = []
    try:
        for _ in range(count):
            tag = raw[at : at + 1]
            at += 1
            if tag == _ZERO:
                entries.append(None)
                continue
            base = _hash(raw, at)
            at += HASH_BYTES
            deltas: tuple[bytes, ...] = ()
            if tag == _DELTAS:
                listed = raw[at]
                at += 1
                deltas = tuple(_hash(raw, at + HASH_BYTES * i) for i in range(listed))
                at += HASH_BYTES * listed
            elif tag != _PLAIN:
                raise _bad("an unknown tag")
            entries.append(Leaf(base, deltas))
    except IndexError:
        raise _bad("a cut end") from None
    if at != len(raw):
        raise _bad("bytes behind its end")
    return entries


def decode_inner_page(raw: bytes, level: int, count: int) -> list[bytes | None]:
    """The entries of a page of a higher level. IntegrityError (`bad-page`)."""
    at = _check_head(raw, level, count)
    entries: list[bytes | None] = []
    for _ in range(count):
        tag = raw[at : at + 1]
        at += 1
        if tag == _ZERO:
            entries.append(None)
        elif tag == _PLAIN:
            entries.append(_hash(raw, at))
            at += HASH_BYTES
        else:
            raise _bad("an unknown tag")
    if at != len(raw):
        raise _bad("bytes behind its end")
    return entries


def _check_head(raw: bytes, level: int, count: int) -> int:
    if len(raw) < _HEAD.size:
        raise _bad("a cut head")
    if _HEAD.unpack_from(raw) != (_MAGIC, _VERSION, level, count):
        raise _bad("another level or size than its place in the tree")
    return _HEAD.size


def _hash(raw: bytes, at: int) -> bytes:
    value = raw[at : at + HASH_BYTES]
    if len(value) != HASH_BYTES:
        raise _bad("a cut end")
    return value


def _bad(what: str) -> IntegrityError:
    return IntegrityError(f"a tree page has {what}", code="bad-page")
