"""Sector deltas: what is encoded is what is applied."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import IntegrityError
from offload.extents import Ranges, align, normalize
from offload.format.delta import SECTOR, apply_delta, bitmap_bytes, delta_ranges, encode_delta


@st.composite
def _cases(draw: st.DrawFn) -> tuple[bytes, bytes, Ranges]:
    """Old and new content of one length, and ranges outside which they are equal."""
    length = draw(st.integers(1, 20 * SECTOR))
    old = draw(st.randoms(use_true_random=False)).randbytes(length)
    new = bytearray(old)
    ranges = normalize(
        (min(a, b), max(a, b))
        for a, b in draw(
            st.lists(st.tuples(st.integers(0, length), st.integers(0, length)), max_size=5)
        )
    )
    for start, end in ranges:
        new[start:end] = bytes((draw(st.integers(0, 255)),)) * (end - start)
    return old, bytes(new), ranges


@given(_cases())
def test_delta_applied_to_the_old_gives_the_new(case: tuple[bytes, bytes, Ranges]) -> None:
    old, new, ranges = case
    delta = encode_delta(ranges, new)
    assert delta_ranges(delta, len(new)) == align(ranges, SECTOR, len(new))
    chunk = bytearray(old)
    apply_delta(delta, chunk)
    assert bytes(chunk) == new


@given(st.binary(max_size=3 * SECTOR), st.integers(1, 40 * SECTOR))
def test_delta_hostile_bytes_are_an_integrity_error_or_fit(raw: bytes, length: int) -> None:
    chunk = bytearray(length)
    try:
        apply_delta(raw, chunk)
    except IntegrityError:
        fits = False
    else:
        fits = True
    assert fits or not any(chunk)
    assert len(chunk) == length


@given(_cases(), st.data())
def test_delta_of_another_length_is_refused(
    case: tuple[bytes, bytes, Ranges], data: st.DataObject
) -> None:
    _, new, ranges = case
    delta = encode_delta(ranges, new)
    cut = data.draw(st.integers(0, len(delta) - 1))
    for wrong in (delta[:cut], delta + b"x"):
        with pytest.raises(IntegrityError):
            delta_ranges(wrong, len(new))


def test_delta_bit_behind_the_last_sector_is_refused() -> None:
    delta = bytearray(encode_delta([(0, 1)], bytes(3 * SECTOR)))
    delta[0] |= 1 << 3
    with pytest.raises(IntegrityError):
        delta_ranges(bytes(delta), 3 * SECTOR)


def test_bitmap_is_one_bit_a_sector_least_significant_first() -> None:
    assert bitmap_bytes(256 << 10) == 64
    chunk = bytes(9 * SECTOR) + b"end"
    delta = encode_delta([(SECTOR, SECTOR + 1), (9 * SECTOR, 9 * SECTOR + 3)], chunk)
    assert delta == b"\x02\x02" + bytes(SECTOR) + b"end"
