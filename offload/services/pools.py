"""Care of production storage: a pool that fills up stops production VMs.

Before each TimeMark the free space of every pool it touches is compared with the watermark
(`[pool] min_free`). Below it, and if `reclaim` is on, TimeMarks of that pool go, oldest first
within each class, until there is room:

1. those that offload made for a mount or a backup and that nothing needs any more;
2. those that a person made and did not protect (`--keep`);
3. those that only serve as parents: the next backup then reads the whole volume.

Never: one that a view, a backup or a restore is reading, one that a running operation has made, and
one that is protected. A pool that keeps its metadata apart (a thin pool) is as full as the fuller
of both. `offload watch` makes the same comparison all the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from json import loads

from offload import compose
from offload.errors import BusyError, OffloadError, PolicyError
from offload.model import TimeMark
from offload.quantity import Watermark, show_size
from offload.services.context import Context
from offload.snapshot import VolumeState

log = logging.getLogger(__name__)

_SETTLE_S = 1.0
# Of a pool's metadata, whatever [pool] min_free says in bytes of data. LVM makes no snapshot with
# less than the smaller of a quarter and 4 MiB free (lib/metadata/thin_manip.c).
_METADATA = Watermark(fraction=0.1)
_METADATA_SHARE, _METADATA_BYTES = 0.25, 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """Space of one pool now, in bytes. `wanted_bytes` is what must stay free. Of metadata all is 0
    where the pool does not keep it apart."""

    name: str
    size_bytes: int
    free_bytes: int
    wanted_bytes: int
    volumes: tuple[str, ...]
    metadata_size_bytes: int = 0
    metadata_free_bytes: int = 0
    metadata_wanted_bytes: int = 0

    @property
    def low(self) -> bool:
        """Whether new TimeMarks are refused."""
        return self.lacks(0)

    def lacks(self, needed_bytes: int) -> bool:
        """Whether too little would be free once `needed_bytes` more are taken."""
        return (
            self.free_bytes - needed_bytes < self.wanted_bytes
            or self.metadata_free_bytes < self.metadata_wanted_bytes
        )

    def shortage(self) -> str:
        """What is free and what must stay free, for a person; of what is scarce."""
        free, wanted, what = self.free_bytes, self.wanted_bytes, ""
        if self.metadata_free_bytes < self.metadata_wanted_bytes:
            free, wanted = self.metadata_free_bytes, self.metadata_wanted_bytes
            what = " for metadata"
        return f"{show_size(free)} free{what}, under its watermark of {show_size(wanted)}"


def survey(ctx: Context, states: Mapping[str, VolumeState]) -> list[PoolState]:
    """The pools of these volumes; a volume whose snapshots take no space anywhere has none."""
    mark = Watermark.parse(ctx.instance.config.pool.min_free)
    found: dict[str, PoolState] = {}
    for volume, state in states.items():
        if not state.pool:
            continue
        before = found.get(state.pool)
        found[state.pool] = _pool(mark, state, (*before.volumes, volume) if before else (volume,))
    return list(found.values())


def _pool(mark: Watermark, state: VolumeState, volumes: tuple[str, ...]) -> PoolState:
    whole = state.metadata_size_bytes
    share = max(mark.fraction, _METADATA.fraction if mark.bytes else 0.0)
    floor = min(int(whole * _METADATA_SHARE), _METADATA_BYTES)
    return PoolState(
        name=state.pool,
        size_bytes=state.pool_size_bytes,
        free_bytes=state.pool_free_bytes,
        wanted_bytes=mark.of(state.pool_size_bytes),
        volumes=volumes,
        metadata_size_bytes=whole,
        metadata_free_bytes=state.metadata_free_bytes,
        metadata_wanted_bytes=max(int(whole * share), floor),
    )


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
        left, went = _make_room(ctx, pool, needed)
        for timemark in went:
            log.warning(
                "pool is low on space: deleted timemark %s of group %s", timemark.id, timemark.group
            )
        gone += went
        if left.lacks(needed):
            more = f" once {show_size(needed)} are taken" if needed else ""
            raise PolicyError(
                f"the pool {pool.name} has {left.shortage()}{more}",
                code="pool-full",
                hint="delete TimeMarks (offload timemark list), grow the pool, "
                "or lower [pool] min_free",
            )
    return gone


def relieve(ctx: Context, pool: PoolState) -> tuple[PoolState, list[TimeMark]]:
    """Make room in a pool that is low, as far as that goes; how it is then, and what went."""
    return _make_room(ctx, pool, 0)


def _make_room(
    ctx: Context, pool: PoolState, needed_bytes: int
) -> tuple[PoolState, list[TimeMark]]:
    """Delete TimeMarks until so much can be taken, or none may go."""
    gone: list[TimeMark] = []
    if not pool.lacks(needed_bytes) or not ctx.instance.config.pool.reclaim:
        return pool, gone
    candidates = _candidates(ctx, pool)
    while pool.lacks(needed_bytes) and candidates:
        oldest = candidates.pop(0)
        if _reclaim(ctx, oldest):
            gone.append(oldest)
            pool = _after(ctx, pool)
    return pool, gone


def _candidates(ctx: Context, pool: PoolState) -> list[TimeMark]:
    """TimeMarks that may go, in the order of this module's documentation."""
    here = _volumes_of(ctx, pool)
    shown = {view.origin.partition("/")[0] for view in ctx.catalog.views()}
    parents = {link.timemark for link in ctx.catalog.parents()}
    in_work = _in_work(ctx)

    def rank(timemark: TimeMark) -> int:
        if timemark.id in parents:
            return 3
        return 2 if timemark.purpose == "user" else 1

    free_to_go = [
        t
        for t in ctx.catalog.timemarks()
        if not t.keep
        and t.id not in in_work
        and f"timemark:{t.id}" not in shown
        and any(s.volume in here for s in t.snapshots)
    ]
    return sorted(free_to_go, key=lambda t: (rank(t), t.created_at))


def _in_work(ctx: Context) -> set[str]:
    """TimeMarks that running operations have made for themselves: until there is a view, or the
    backup reads it, nothing else tells that they are needed."""
    return {
        timemark
        for intent in ctx.journal.running_intents()
        if intent.step == "timemark" and "ids" in intent.args
        for timemark in loads(intent.args["ids"])
    }


def _volumes_of(ctx: Context, pool: PoolState) -> set[str]:
    states, _ = inspect_all(ctx)
    return {name for name, state in states.items() if state.pool == pool.name}


def _reclaim(ctx: Context, timemark: TimeMark) -> bool:
    from offload.services import timemark as timemarks

    try:
        timemarks.delete(ctx, timemark.id)
    except BusyError:
        return False
    return True


def _after(ctx: Context, before: PoolState) -> PoolState:
    """The pool once a deletion shows: XFS gives blocks back a moment later, and deciding too soon
    would cost one TimeMark more than needed."""
    volume = ctx.instance.config.volume(before.volumes[0])
    provider = compose.snapshot_provider(volume.provider, ctx.instance.id)
    mark = Watermark.parse(ctx.instance.config.pool.min_free)
    until = time.monotonic() + _SETTLE_S
    while True:
        now = _pool(mark, provider.inspect(volume), before.volumes)
        more = now.free_bytes > before.free_bytes
        if more or now.metadata_free_bytes > before.metadata_free_bytes:
            return now
        if time.monotonic() > until:
            return now
        time.sleep(0.05)
