"""Algebra of byte ranges: sorted, disjoint, half-open `(start, end)` pairs.

A `Ranges` value is a list in normal form: sorted by start, no overlap, no touching neighbours, no
empty range. Every function takes normal form and gives it back, except `normalize`, which makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from offload.model import Extent, ExtentKind

Ranges = list[tuple[int, int]]


def normalize(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sort, drop empty ranges, and merge what overlaps or touches."""
    out: Ranges = []
    for start, end in sorted(r for r in ranges if r[0] < r[1]):
        if out and start <= out[-1][1]:
            if end > out[-1][1]:
                out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out


def union(a: Ranges, b: Ranges) -> Ranges:
    """What is in either."""
    return normalize([*a, *b])


def intersect(a: Ranges, b: Ranges) -> Ranges:
    """What is in both."""
    out: Ranges = []
    i = j = 0
    while i < len(a) and j < len(b):
        start = max(a[i][0], b[j][0])
        end = min(a[i][1], b[j][1])
        if start < end:
            out.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return out


def subtract(a: Ranges, b: Ranges) -> Ranges:
    """What is in `a` and not in `b`."""
    if not a:
        return []
    return intersect(a, complement(b, a[-1][1]))


def complement(ranges: Ranges, size: int) -> Ranges:
    """What of `[0, size)` is in no range."""
    out: Ranges = []
    at = 0
    for start, end in ranges:
        if start >= size:
            break
        if at < start:
            out.append((at, start))
        at = end
    if at < size:
        out.append((at, size))
    return out


def clip(ranges: Ranges, start: int, end: int) -> Ranges:
    """The part inside `[start, end)`."""
    return intersect(ranges, [(start, end)]) if start < end else []


def align(ranges: Ranges, unit: int, size: int) -> Ranges:
    """Widen each range outwards to multiples of `unit`, but never past `size`."""
    return normalize(
        (start // unit * unit, min(-(-end // unit) * unit, size)) for start, end in ranges
    )


def total(ranges: Ranges) -> int:
    """The bytes covered."""
    return sum(end - start for start, end in ranges)


def data_ranges(extents: Iterable[Extent]) -> Ranges:
    """The ranges of the extents that hold data."""
    return normalize((e.offset, e.end) for e in extents if e.kind is ExtentKind.DATA)


def to_extents(data: Ranges, offset: int, length: int) -> Iterator[Extent]:
    """Extents that cover exactly `[offset, offset + length)`: `data` as data, the rest as holes."""
    at, end = offset, offset + length
    for start, stop in clip(data, offset, end):
        if at < start:
            yield Extent(at, start - at, ExtentKind.HOLE)
        yield Extent(start, stop - start, ExtentKind.DATA)
        at = stop
    if at < end:
        yield Extent(at, end - at, ExtentKind.HOLE)
