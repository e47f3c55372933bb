"""Which pools a TimeMark draws on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from offload.services.context import Context
from offload.services.pools import survey
from offload.snapshot import VolumeState


def _state(pool: str) -> VolumeState:
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
    )


def _context(min_free: str) -> Context:
    config = SimpleNamespace(pool=SimpleNamespace(min_free=min_free))
    return cast("Context", SimpleNamespace(instance=SimpleNamespace(config=config)))


def test_survey_device_without_a_pool_is_under_no_watermark() -> None:
    """A watermark in bytes would refuse it for ever: it has no free space to speak of."""
    states = {"lun": _state(""), "db": _state("/srv/pool"), "web": _state("/srv/pool")}
    (pool,) = survey(_context("20GiB"), states)
    assert (pool.name, pool.volumes, pool.low) == ("/srv/pool", ("db", "web"), True)
