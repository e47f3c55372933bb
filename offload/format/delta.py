"""Sector deltas: which 512-byte sectors of a chunk are new, and their bytes.

Layout: a bitmap of one bit a sector (least significant bit first), rounded up to whole bytes, then
the bytes of the marked sectors in order. A short last sector (an image whose size is no multiple
of 512) is stored short.
"""

from __future__ import annotations

from offload.errors import IntegrityError
from offload.extents import Ranges, align

SECTOR = 512


def bitmap_bytes(chunk_length: int) -> int:
    """Size of the bitmap for a chunk of this length."""
    return (chunk_length + SECTOR * 8 - 1) // (SECTOR * 8)


def encode_delta(ranges: Ranges, chunk: bytes | bytearray | memoryview) -> bytes:
    """A delta of the sectors that `ranges` (inside the chunk) touch; `chunk` has their new bytes
    in place."""
    length = len(chunk)
    bitmap = bytearray(bitmap_bytes(length))
    parts: list[bytes | bytearray | memoryview] = [bitmap]
    for start, end in align(ranges, SECTOR, length):
        for sector in range(start // SECTOR, -(-end // SECTOR)):
            bitmap[sector >> 3] |= 1 << (sector & 7)
        parts.append(chunk[start:end])
    return b"".join(parts)


def delta_ranges(delta: bytes | memoryview, chunk_length: int) -> Ranges:
    """The ranges of the chunk that a delta replaces. IntegrityError (`bad-delta`)."""
    size = bitmap_bytes(chunk_length)
    bits = int.from_bytes(delta[:size], "little")
    if len(delta) < size or bits >> -(-chunk_length // SECTOR):
        raise IntegrityError("a sector delta does not fit its chunk", code="bad-delta")
    out: Ranges = []
    at, rest = 0, len(delta) - size
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        run = (~bits & (bits + 1)).bit_length() - 1
        bits >>= run
        start = (at + skip) * SECTOR
        at += skip + run
        end = min(at * SECTOR, chunk_length)
        out.append((start, end))
        rest -= end - start
    if rest:
        raise IntegrityError("a sector delta has another length than its map", code="bad-delta")
    return out


def apply_delta(delta: bytes | memoryview, chunk: bytearray | memoryview) -> None:
    """Write a delta's sectors into the chunk."""
    at = bitmap_bytes(len(chunk))
    for start, end in delta_ranges(delta, len(chunk)):
        chunk[start:end] = delta[at : at + end - start]
        at += end - start
