"""Which pools a TimeMark draws on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from offload.services.context import Context
from offload.services.pools import survey
from offload.snapshot import VolumeState


def _state(pool: str, metadata_free: int = 0, metadata_size: int = 0) -> VolumeState:
    return VolumeState(
        size_bytes=1 << 30,
        sector_size=512,
        identity="i",
        allocated_bytes=0,
        extents=0,
        estimate_s=0.0,
        pool=pool,
        pool_size_bytes=100 if pool else 0,
        pool_free_bytes=50 if pool else 0,
        needed_bytes=0,
        metadata_size_bytes=metadata_size,
        metadata_free_bytes=metadata_free,
    )


def _context(min_free: str) -> Context:
    config = SimpleNamespace(pool=SimpleNamespace(min_free=min_free))
    return cast("Context", SimpleNamespace(instance=SimpleNamespace(config=config)))


def test_survey_device_without_a_pool_is_under_no_watermark() -> None:
    """A watermark in bytes would refuse it for ever: it has no free space to speak of."""
    states = {"lun": _state(""), "db": _state("/srv/pool"), "web": _state("/srv/pool")}
    (pool,) = survey(_context("20GiB"), states)
    assert (pool.name, pool.volumes, pool.low) == ("/srv/pool", ("db", "web"), True)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("min_free", "size", "wanted"),
    [
        ("10%", 1000 * MIB, 100 * MIB),
        ("30%", 1000 * MIB, 300 * MIB),
        ("20GiB", 1000 * MIB, 100 * MIB),  # bytes of data say nothing about metadata
        ("10%", 2 * MIB, MIB // 2),  # LVM wants a quarter of a small one
        ("0%", 1000 * MIB, 4 * MIB),  # and 4 MiB of any
        ("0%", 0, 0),  # a pool that does not keep it apart
    ],
)
def test_survey_metadata_has_a_watermark_of_its_own(min_free: str, size: int, wanted: int) -> None:
    (pool,) = survey(_context(min_free), {"db": _state("vg0/pool", size, size)})
    assert pool.metadata_wanted_bytes == wanted


def test_pool_low_on_metadata_alone_is_low_and_says_of_what() -> None:
    (good,) = survey(_context("0%"), {"db": _state("vg0/pool", 5 * MIB, 100 * MIB)})
    (low,) = survey(_context("0%"), {"db": _state("vg0/pool", 3 * MIB, 100 * MIB)})
    assert (good.low, low.low) == (False, True)
    assert low.shortage() == "3.0 MiB free for metadata, under its watermark of 4.0 MiB"
