"""Care of production storage: a pool that fills up stops production VMs.

Before each TimeMark the free space of every pool it touches is compared with the watermark
(`[pool] min_free`). Below it, and if `reclaim` is on, TimeMarks of that pool go, oldest first
within each class, until there is room:

1. those that offload made for a mount or a backup and that nothing needs any more;
2. those that a person made and did not protect (`--keep`);
3. those that only serve as parents: the next backup then reads the whole volume.

Never: one that a view, a backup or a restore is reading, and one that is protected.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from offload import compose
from offload.errors import BusyError, OffloadError, PolicyError
from offload.model import TimeMark
from offload.quantity import Watermark, show_size
from offload.services.context import Context
from offload.snapshot import VolumeState

log = logging.getLogger(__name__)

_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """Space of one pool now, in bytes. `wanted_bytes` is what must stay free."""

    name: str
    size_bytes: int
    free_bytes: int
    wanted_bytes: int
    volumes: tuple[str, ...]

    @property
    def low(self) -> bool:
        """Whether new TimeMarks are refused."""
        return self.free_bytes < self.wanted_bytes


def survey(ctx: Context, states: Mapping[str, VolumeState]) -> list[PoolState]:
    """The pools of these volumes; a volume whose snapshots take no space anywhere has none."""
    mark = Watermark.parse(ctx.instance.config.pool.min_free)
    found: dict[str, PoolState] = {}
    for volume, state in states.items():
        if not state.pool:
            continue
        before = found.get(state.pool)
        found[state.pool] = PoolState(
            name=state.pool,
            size_bytes=state.pool_size_bytes,
            free_bytes=state.pool_free_bytes,
            wanted_bytes=mark.of(state.pool_size_bytes),
            volumes=((*before.volumes, volume) if before else (volume,)),
        )
    return list(found.values())


def inspect_all(ctx: Context) -> tuple[dict[str, VolumeState], dict[str, OffloadError]]:
    """The state of every configured volume, and the errors of those that cannot be looked at."""
    states: dict[str, VolumeState] = {}
    errors: dict[str, OffloadError] = {}
    for name in ctx.instance.config.volumes:
        volume = ctx.instance.config.volume(name)
        try:
            provider = compose.snapshot_provider(volume.provider, ctx.instance.id)
            states[name] = provider.inspect(volume)
        except OffloadError as error:
            errors[name] = error
    return states, errors


def ensure_room(ctx: Context, states: Mapping[str, VolumeState]) -> list[TimeMark]:
    """Make room for a TimeMark of these volumes; returns the TimeMarks that had to go.

    Raises PolicyError (`pool-full`) when there is not enough all the same.
    """
    gone: list[TimeMark] = []
    for pool in survey(ctx, states):
        needed = sum(states[v].needed_bytes for v in pool.volumes)
        free = pool.free_bytes
        candidates = _candidates(ctx, pool) if ctx.instance.config.pool.reclaim else []
        while free - needed < pool.wanted_bytes and candidates:
            oldest = candidates.pop(0)
            if _reclaim(ctx, oldest):
                gone.append(oldest)
                free = _free_after(ctx, pool, free)
        if free - needed < pool.wanted_bytes:
            raise PolicyError(
                f"the pool {pool.name} has {show_size(free)} free; a TimeMark needs "
                f"{show_size(needed)} and {show_size(pool.wanted_bytes)} must stay free",
                code="pool-full",
                hint="delete TimeMarks (offload timemark list), grow the pool, "
                "or lower [pool] min_free",
            )
    return gone


def _candidates(ctx: Context, pool: PoolState) -> list[TimeMark]:
    """TimeMarks that may go, in the order of this module's documentation."""
    here = _volumes_of(ctx, pool)
    shown = {view.origin.partition("/")[0] for view in ctx.catalog.views()}
    parents = {link.timemark for link in ctx.catalog.parents()}

    def rank(timemark: TimeMark) -> int:
        if timemark.id in parents:
            return 3
        return 2 if timemark.purpose == "user" else 1

    free_to_go = [
        t
        for t in ctx.catalog.timemarks()
        if not t.keep
        and f"timemark:{t.id}" not in shown
        and any(s.volume in here for s in t.snapshots)
    ]
    return sorted(free_to_go, key=lambda t: (rank(t), t.created_at))


def _volumes_of(ctx: Context, pool: PoolState) -> set[str]:
    states, _ = inspect_all(ctx)
    return {name for name, state in states.items() if state.pool == pool.name}


def _reclaim(ctx: Context, timemark: TimeMark) -> bool:
    from offload.services import timemark as timemarks

    try:
        timemarks.delete(ctx, timemark.id)
    except BusyError:
        return False
    log.warning(
        "pool is low on space: deleted timemark %s of group %s", timemark.id, timemark.group
    )
    return True


def _free_after(ctx: Context, pool: PoolState, before: int) -> int:
    """Free space once a deletion shows: XFS gives blocks back a moment later, and deciding too
    soon would cost one TimeMark more than needed."""
    volume = ctx.instance.config.volume(pool.volumes[0])
    provider = compose.snapshot_provider(volume.provider, ctx.instance.id)
    until = time.monotonic() + _SETTLE_S
    while True:
        free = provider.inspect(volume).pool_free_bytes
        if free > before or time.monotonic() > until:
            return free
        time.sleep(0.05)
