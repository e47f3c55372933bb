"""The comparison of two extent maps against a model that looks at each block alone."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from offload import fiemap
from offload.fiemap import MappedExtent, clip_extents, compare_maps

_BLOCKS = 24
_INEXACT = (
    fiemap.UNKNOWN,
    fiemap.DELALLOC,
    fiemap.ENCODED,
    fiemap.DATA_ENCRYPTED,
    fiemap.NOT_ALIGNED,
    fiemap.DATA_INLINE,
    fiemap.DATA_TAIL,
)
_HARMLESS = (0, fiemap.LAST, fiemap.MERGED, fiemap.SHARED)


@st.composite
def _maps(draw: st.DrawFn) -> list[MappedExtent]:
    """A map in file order; few places, so that two maps often agree."""
    extents = []
    at = 0
    while at < _BLOCKS:
        at += draw(st.integers(0, 3))
        length = draw(st.integers(1, 5))
        if at + length > _BLOCKS:
            break
        place = at + draw(st.sampled_from((100, 100, 100, 101, 200)))
        flags = draw(st.sampled_from(_HARMLESS)) | draw(
            st.sampled_from((0, 0, 0, fiemap.UNWRITTEN, *_INEXACT))
        )
        extents.append(MappedExtent(at, place, length, flags))
        at += length
    return extents


def _block(extents: list[MappedExtent], at: int) -> object:
    """What one byte is: 0 (reads zero), its place, or None (cannot be told)."""
    for extent in extents:
        if extent.logical <= at < extent.logical + extent.length:
            if any(extent.flags & flag for flag in _INEXACT):
                return None
            if extent.flags & fiemap.UNWRITTEN:
                return 0
            return extent.physical + at - extent.logical
    return 0


@settings(max_examples=400, deadline=None)
@given(older=_maps(), newer=_maps())
def test_compare_maps_any_two_maps_equals_the_model_of_single_blocks(
    older: list[MappedExtent], newer: list[MappedExtent]
) -> None:
    changed = compare_maps(older, newer, _BLOCKS)
    named = {at for start, end in changed for at in range(start, end)}
    expected = {
        at
        for at in range(_BLOCKS)
        if _block(older, at) is None
        or _block(newer, at) is None
        or _block(older, at) != _block(newer, at)
    }
    assert named == expected
    assert all(start < end for start, end in changed)
    assert all(a[1] < b[0] for a, b in pairwise(changed))


@settings(max_examples=100, deadline=None)
@given(extents=_maps(), size=st.integers(0, _BLOCKS + 2))
def test_clip_extents_to_a_size_keeps_places(extents: list[MappedExtent], size: int) -> None:
    clipped = list(clip_extents(extents, size))
    assert all(e.logical + e.length <= size for e in clipped)
    assert all(_block(clipped, at) == _block(extents, at) for at in range(size))


def test_clip_extents_page_that_begins_inside_the_last_extent_does_not_go_back() -> None:
    pages = [MappedExtent(0, 1000, 10, 0), MappedExtent(5, 1005, 10, 0)]
    assert list(clip_extents(pages, 100)) == [
        MappedExtent(0, 1000, 10, 0),
        MappedExtent(10, 1010, 5, 0),
    ]


def test_compare_maps_shared_flag_alone_is_no_change() -> None:
    older = [MappedExtent(0, 4096, 8192, fiemap.SHARED)]
    newer = [MappedExtent(0, 4096, 4096, 0), MappedExtent(4096, 8192, 4096, fiemap.LAST)]
    assert compare_maps(older, newer, 8192) == []


def test_compare_maps_same_place_but_encoded_is_a_change() -> None:
    extent = MappedExtent(0, 4096, 8192, fiemap.ENCODED)
    assert compare_maps([extent], [extent], 8192) == [(0, 8192)]


def test_compare_maps_half_a_million_extents_each_way_are_walked_once() -> None:
    """Two million steps would still be seconds; anything quadratic would not end."""
    count = 500_000
    older = (MappedExtent(at * 8192, at * 4096, 4096, 0) for at in range(count))
    newer = (MappedExtent(at * 8192, at * 4096 + 1, 4096, 0) for at in range(count))
    assert len(compare_maps(older, newer, count * 8192)) == count
