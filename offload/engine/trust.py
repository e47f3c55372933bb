"""Change tracking is never trusted blindly: a sample of what it calls unchanged is read again.

The sample is taken at random places of the data that lies outside the changed ranges, and compared
with what the parent backup holds there. It grows with the change (a tenth of it, at least 64 KiB,
at most 4 MiB), so that an incremental still reads only what changed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.extents import Ranges, complement, intersect, total
from offload.image import Image
from offload.model import ExtentKind

_PIECE = 4096
_LEAST, _MOST = 64 << 10, 4 << 20
_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the sample said. `alarm` is empty, or a sentence that says where the parent differs."""

    read_bytes: int
    alarm: str


def sample_unchanged(
    repository: Repository,
    parent: TreeReader,
    image: Image,
    changed: Ranges,
    chooser: random.Random | None = None,
) -> Verdict:
    """Read a sample of what is called unchanged, and compare it with the parent backup."""
    size = image.size_bytes
    unchanged = complement(changed, size)
    room = total(unchanged)
    if not room:
        return Verdict(read_bytes=0, alarm="")
    pick = chooser or random.SystemRandom()
    budget = min(_MOST, max(_LEAST, int(total(changed) * _SHARE)))
    stored = StoredImage(repository, parent.root, size, image.block_size, parent)
    read = 0
    for turn in range(max(2, budget // _PIECE)):
        page = _random_page(parent, pick) if turn % 2 else None
        if page is not None:  # where the parent has data: the rest may be mostly holes
            found = _piece_of_page(parent, page, pick)
            if intersect(changed, [found]):
                continue
        else:
            found = _piece(unchanged, pick.randrange(room))
        start, end = found
        if not _has_data(image, stored, start, end):
            continue
        read += end - start
        if image.pread(start, end - start) != stored.pread(start, end - start):
            alarm = (
                f"integrity: {end - start} bytes at {start} changed, though the storage says they "
                "did not; the whole volume was compared instead"
            )
            return Verdict(read_bytes=read, alarm=alarm)
    return Verdict(read_bytes=read, alarm="")


def _random_page(parent: TreeReader, pick: random.Random) -> int | None:
    """A random leaf page with data, or None if there is none.

    Found from the root down, one page a level: to list them all is to read a whole large tree.
    """
    page = 0
    for level in range(parent.shape.levels - 1, 0, -1):
        children = [i for i, child in enumerate(parent.inner_page(level, page)) if child]
        if not children:
            return None
        page = page * parent.shape.page_entries + pick.choice(children)
    return page if any(parent.leaf_page(page)) else None


def _piece_of_page(parent: TreeReader, page: int, pick: random.Random) -> tuple[int, int]:
    """A random block of a random chunk with data in a leaf page that has some."""
    entries = parent.leaf_page(page)
    slots = [index for index, leaf in enumerate(entries) if leaf is not None]
    slot = page * parent.shape.page_entries + pick.choice(slots)
    start, stop = parent.shape.slot_range(slot)
    at = start + pick.randrange(stop - start) // _PIECE * _PIECE
    return at, min(at + _PIECE, stop)


def _piece(ranges: Ranges, target: int) -> tuple[int, int]:
    """The block of `_PIECE` bytes (cut to its range) that holds byte number `target` of them."""
    for start, end in ranges:
        if target < end - start:
            at = max(start, (start + target) // _PIECE * _PIECE)
            return at, min(at + _PIECE, end)
        target -= end - start
    raise ValueError("outside the ranges")


def _has_data(image: Image, stored: StoredImage, start: int, end: int) -> bool:
    """Whether either side holds data there: two holes need no reading."""
    return any(
        extent.kind is ExtentKind.DATA
        for side in (image, stored)
        for extent in side.extents(start, end - start)
    )
