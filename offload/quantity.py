"""Sizes, shares and durations as people write them, both ways."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_UNITS = {
    "": 1, "B": 1,
    "K": 1 << 10, "KIB": 1 << 10, "KB": 1000,
    "M": 1 << 20, "MIB": 1 << 20, "MB": 1000**2,
    "G": 1 << 30, "GIB": 1 << 30, "GB": 1000**3,
    "T": 1 << 40, "TIB": 1 << 40, "TB": 1000**4,
}  # fmt: skip
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}


def parse_size(text: str) -> int:
    """Bytes of `10GiB`, `512K`, `4096`. A ValueError names the text and what is accepted."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None:
        raise ValueError(f"'{text}' is no size; write for example 512MiB, 10GiB or 4096")
    return int(Decimal(found.group(1)) * unit)  # a float is not exact from 2**53


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `36h`, `14d`, `8w`, `1y` (365 days)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdwy])\s*", text)
    if found is None:
        raise ValueError(f"'{text}' is no duration; write for example 90s, 36h, 14d or 1y")
    return float(found.group(1)) * _SPANS[found.group(2)]


def parse_percent(text: str) -> float:
    """The fraction (0 < f ≤ 1) of `5%`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if found is None or not 0 < float(found.group(1)) <= 100:
        raise ValueError(f"'{text}' is no share; write for example 5%")
    return float(found.group(1)) / 100


@dataclass(frozen=True, slots=True)
class Watermark:
    """Free space that must stay: bytes, or a fraction of the whole."""

    bytes: int = 0
    fraction: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Watermark:
        """`10%` or `20GiB`."""
        if text.strip().endswith("%"):
            return cls(fraction=parse_percent(text) if text.strip() != "0%" else 0.0)
        return cls(bytes=parse_size(text))

    def of(self, whole_bytes: int) -> int:
        """The watermark in bytes for a pool of `whole_bytes`."""
        return max(self.bytes, int(self.fraction * whole_bytes))


def show_size(count: float) -> str:
    """`1.5 GiB`; whole bytes below 1 KiB."""
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.1f} {unit}" if count < 100 else f"{count:.0f} {unit}"


def show_seconds(seconds: float) -> str:
    """`83 ms`, `2.41 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def count_of(count: int, what: str) -> str:
    """`1 pack`, `2 packs`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
