"""Tree pages and their geometry."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import IntegrityError
from offload.format.tree import (
    Leaf,
    Shape,
    decode_inner_page,
    decode_leaf_page,
    encode_inner_page,
    encode_leaf_page,
)

_id = st.binary(min_size=32, max_size=32)
_leaf = st.builds(Leaf, _id, st.lists(_id, max_size=64).map(tuple))
_leaves = st.lists(st.none() | _leaf, max_size=12)


@given(_leaves)
def test_leaf_page_round_trip(entries: list[Leaf | None]) -> None:
    assert decode_leaf_page(encode_leaf_page(entries), len(entries)) == entries


@given(st.integers(1, 7), st.lists(st.none() | _id, max_size=12))
def test_inner_page_round_trip(level: int, entries: list[bytes | None]) -> None:
    raw = encode_inner_page(level, entries)
    assert decode_inner_page(raw, level, len(entries)) == entries
    with pytest.raises(IntegrityError):
        decode_inner_page(raw, level + 1, len(entries))
    with pytest.raises(IntegrityError):
        decode_inner_page(raw, level, len(entries) + 1)


@given(_leaves.filter(bool), st.data())
def test_leaf_page_mutilated_is_an_integrity_error_or_a_page(
    entries: list[Leaf | None], data: st.DataObject
) -> None:
    raw = bytearray(encode_leaf_page(entries))
    cut = data.draw(st.integers(0, len(raw)))
    spot = data.draw(st.integers(0, len(raw) - 1))
    raw[spot] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(raw), bytes(raw[:cut]), bytes(raw) + b"\x00"):
        with suppress(IntegrityError):
            assert len(decode_leaf_page(wrong, len(entries))) == len(entries)


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_page_hostile_bytes_never_raise_anything_else(raw: bytes, count: int, level: int) -> None:
    head = b"PG\x01" + bytes((level,)) + count.to_bytes(4, "little")
    for wrong in (raw, head + raw):
        for decode in (
            lambda page: decode_leaf_page(page, count),
            lambda page: decode_inner_page(page, level, count),
        ):
            with suppress(IntegrityError):
                assert len(decode(wrong)) == count


@given(st.integers(0, 5000), st.integers(1, 9), st.integers(2, 5))
def test_shape_pages_hold_every_slot_once(size: int, chunk: int, width: int) -> None:
    shape = Shape(size, chunk, width)
    below = shape.slots
    assert below == len(range(0, size, chunk))
    for level in range(shape.levels):
        pages = shape.pages(level)
        assert sum(shape.entries(level, page) for page in range(pages)) == below
        assert all(shape.entries(level, page) == width for page in range(pages - 1))
        below = pages
    assert below == 1
    spans = [shape.slot_range(slot) for slot in range(shape.slots)]
    assert [b for start, end in spans for b in range(start, end)] == list(range(size))


def test_shape_levels_grow_just_past_a_full_tree() -> None:
    assert Shape(256 * 256, 1, 256).levels == 2
    assert Shape(256 * 256 + 1, 1, 256).levels == 3
    assert Shape(0, 256, 256).levels == 1
