"""Sizes, shares and durations, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.quantity import (
    Watermark,
    parse_duration,
    parse_percent,
    parse_size,
    show_seconds,
    show_size,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("4096", 4096), ("512B", 512), ("1K", 1024), ("1k", 1024), ("1KiB", 1024),
        ("1kB", 1000), ("1.5GiB", 3 << 29), (" 2 TB ", 2 * 10**12), ("3M", 3 << 20),
    ],
)  # fmt: skip
def test_parse_size_known_units_gives_bytes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1..5", "1e3", "10 Gi B", "nan"])
def test_parse_size_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_parse_size_plain_bytes_are_exact(count: int) -> None:
    assert parse_size(str(count)) == count


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("36h", 129600), ("14d", 1209600), ("8w", 4838400),
     ("1y", 31536000), ("0.5h", 1800)],
)  # fmt: skip
def test_parse_duration_known_units_gives_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "h", "-1h", "1H", "1 month"])
def test_parse_duration_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["0%", "101%", "5", "%", "-3%"])
def test_parse_percent_outside_the_whole_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no share"):
        parse_percent(text)


def test_watermark_share_and_size_give_bytes_of_a_pool() -> None:
    assert Watermark.parse("10%").of(1000) == 100
    assert Watermark.parse("0%").of(1000) == 0
    assert Watermark.parse("20KiB").of(1000) == 20480


@given(st.integers(0, 1 << 50))
def test_show_size_reads_back_within_its_rounding(count: int) -> None:
    shown = show_size(count)
    assert abs(parse_size(shown.replace(" ", "")) - count) <= max(0, count * 0.05)


def test_show_seconds_changes_unit_with_length() -> None:
    assert [show_seconds(s) for s in (0.083, 2.41, 192, 7500)] == [
        "83 ms", "2.41 s", "3 min 12 s", "2 h 5 min",
    ]  # fmt: skip
