"""The algebra of ranges against sets of bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from offload import extents as x
from offload.model import Extent, ExtentKind

_TOP = 60
_raw = st.lists(st.tuples(st.integers(0, _TOP), st.integers(0, _TOP)), max_size=8)
_ranges = _raw.map(x.normalize)


def _bytes(ranges: list[tuple[int, int]]) -> set[int]:
    return {b for start, end in ranges for b in range(start, end)}


def _is_normal(ranges: x.Ranges) -> bool:
    return all(a < b for a, b in ranges) and all(p[1] < q[0] for p, q in pairwise(ranges))


@given(_raw)
def test_normalize_any_pairs_gives_normal_form_of_the_same_bytes(raw: x.Ranges) -> None:
    made = x.normalize(raw)
    assert _is_normal(made)
    assert _bytes(made) == _bytes(raw)
    assert x.normalize(made) == made
    assert x.total(made) == len(_bytes(raw))


@given(_ranges, _ranges)
def test_operations_agree_with_sets(a: x.Ranges, b: x.Ranges) -> None:
    for made, wanted in (
        (x.union(a, b), _bytes(a) | _bytes(b)),
        (x.intersect(a, b), _bytes(a) & _bytes(b)),
        (x.subtract(a, b), _bytes(a) - _bytes(b)),
    ):
        assert _is_normal(made)
        assert _bytes(made) == wanted


@given(_ranges, st.integers(0, _TOP + 5))
def test_complement_is_the_rest_of_the_size(a: x.Ranges, size: int) -> None:
    made = x.complement(a, size)
    assert _is_normal(made)
    assert _bytes(made) == set(range(size)) - _bytes(a)


@given(_ranges, st.integers(0, _TOP), st.integers(0, _TOP))
def test_clip_is_the_intersection_with_one_range(a: x.Ranges, start: int, end: int) -> None:
    assert _bytes(x.clip(a, start, end)) == _bytes(a) & set(range(start, end))


@given(_ranges, st.integers(1, 16), st.integers(0, 20))
def test_align_widens_to_units_and_never_past_the_size(a: x.Ranges, unit: int, more: int) -> None:
    size = (a[-1][1] if a else 0) + more
    made = x.align(a, unit, size)
    units = {b // unit for b in _bytes(a)}
    assert _is_normal(made)
    assert _bytes(made) == {b for b in range(size) if b // unit in units}


@given(_ranges, st.integers(0, _TOP), st.integers(0, _TOP))
def test_to_extents_covers_exactly_and_tells_data_from_holes(
    a: x.Ranges, offset: int, length: int
) -> None:
    made = list(x.to_extents(a, offset, length))
    at = offset
    for extent in made:
        assert extent.offset == at
        assert extent.length > 0
        at = extent.end
    assert at == offset + length
    assert x.data_ranges(made) == x.clip(a, offset, offset + length)


def test_data_ranges_leaves_out_zeros_and_holes() -> None:
    kinds = [ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.DATA, ExtentKind.DATA, ExtentKind.HOLE]
    made = x.data_ranges(Extent(i * 10, 10, kind) for i, kind in enumerate(kinds))
    assert made == [(0, 10), (20, 40)]
