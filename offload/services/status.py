"""One look at everything: pools, TimeMarks, views, backups, leftovers, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from offload.island import Island, IslandState
from offload.journal import Leftover
from offload.model import Backup, TimeMark, ViewState
from offload.services import mount, overlays
from offload.services.context import Context
from offload.services.pools import PoolState, survey
from offload.services.volumes import VolumeReport, look_at_all


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """The space of one pool of production storage. Of metadata all is 0 where the pool does not
    keep it apart."""

    name: str
    volumes: tuple[str, ...]
    size_bytes: int
    free_bytes: int
    watermark_bytes: int
    metadata_size_bytes: int
    metadata_free_bytes: int
    metadata_watermark_bytes: int
    low: bool  # one of both is under its watermark: new TimeMarks are refused


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """The TimeMarks of one group."""

    name: str
    timemarks: int
    oldest_at: datetime | None
    newest_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewStatus:
    """A view, and whether its server runs."""

    id: str
    name: str
    origin: str
    uri: str
    alive: bool
    kept: bool  # not served, by wish
    clients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandStatus:
    """Placeholders on a backup host; whether they stand is for `placeholder check` to ask there."""

    id: str
    name: str
    host: str
    group: str
    origin: str
    created_at: datetime
    placeholders: int
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupStatus:
    """The backups of one group in one store; `last` is None where there is none yet."""

    group: str
    store: str
    backups: int
    last_id: str | None
    last_at: datetime | None
    age_s: float | None
    verified_at: datetime | None
    verified_how: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverStatus:
    """An operation of a dead process that waits to be taken back."""

    id: str
    kind: str
    subject: str
    began_at: str
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """Everything, at `at`. `alarms` are lines for a person; empty is good."""

    at: datetime
    pools: tuple[PoolStatus, ...]
    groups: tuple[GroupStatus, ...]
    views: tuple[ViewStatus, ...]
    islands: tuple[IslandStatus, ...]
    backups: tuple[BackupStatus, ...]
    leftovers: tuple[LeftoverStatus, ...]
    running: int
    alarms: tuple[str, ...]


def collect(context: Context, now: datetime | None = None) -> StatusReport:
    """Look, change nothing. A volume that cannot be looked at becomes an alarm."""
    at = now or datetime.now(UTC)
    reports = look_at_all(context.instance.config)
    states = {r.volume.name: r.state for r in reports if r.state is not None and r.state.pool}
    pools = survey(context, states)
    views = tuple(_view(status) for status in mount.views(context))
    known = context.catalog.backups()
    islands = tuple(_island(entry) for entry in context.catalog.islands())
    leftovers = tuple(_leftover(entry) for entry in context.journal.leftovers())
    alarms = [
        *_volume_alarms(reports),
        *_pool_alarms(pools),
        *(
            f"view {view.name} is not served: offload recover"
            for view in views
            if not (view.alive or view.kept)
        ),
        *(
            f"island {island.name} is half gone: offload unmount {island.name}"
            for island in islands
            if island.state == IslandState.GOING
        ),
        *overlays.alarms(context),
        *_backup_alarms(context, known),
        *(f"{entry.kind} {entry.subject} was cut off: offload recover" for entry in leftovers),
    ]
    return StatusReport(
        at=at,
        pools=tuple(_pool(pool) for pool in pools),
        groups=_groups(context),
        views=views,
        islands=islands,
        backups=_backups(context, known, at),
        leftovers=leftovers,
        running=context.journal.running(),
        alarms=tuple(alarms),
    )


def _pool(pool: PoolState) -> PoolStatus:
    return PoolStatus(
        name=pool.name,
        volumes=pool.volumes,
        size_bytes=pool.size_bytes,
        free_bytes=pool.free_bytes,
        watermark_bytes=pool.wanted_bytes,
        metadata_size_bytes=pool.metadata_size_bytes,
        metadata_free_bytes=pool.metadata_free_bytes,
        metadata_watermark_bytes=pool.metadata_wanted_bytes,
        low=pool.low,
    )


def _groups(context: Context) -> tuple[GroupStatus, ...]:
    marks: dict[str, list[TimeMark]] = {name: [] for name in context.instance.config.groups}
    for mark in context.catalog.timemarks():
        marks.setdefault(mark.group, []).append(mark)
    return tuple(
        GroupStatus(
            name=name,
            timemarks=len(found),
            oldest_at=found[0].created_at if found else None,
            newest_at=found[-1].created_at if found else None,
        )
        for name, found in marks.items()
    )


def _view(status: mount.ViewStatus) -> ViewStatus:
    view = status.view
    return ViewStatus(
        id=view.id,
        name=view.name,
        origin=view.origin,
        uri=view.uri,
        alive=status.alive,
        kept=view.state is ViewState.KEPT,
        clients=len(status.clients),
    )


def _island(island: Island) -> IslandStatus:
    return IslandStatus(
        id=island.id,
        name=island.name,
        host=island.host,
        group=island.group,
        origin=island.origin,
        created_at=island.created_at,
        placeholders=len(island.placeholders),
        state=island.state.value,
    )


def _backups(context: Context, known: Sequence[Backup], now: datetime) -> tuple[BackupStatus, ...]:
    """One row a group and store that has backups, or should have by the configuration."""
    found: dict[tuple[str, str], list[Backup]] = {
        (name, group.store): []
        for name, group in context.instance.config.groups.items()
        if group.store is not None
    }
    for backup in known:
        found.setdefault((backup.group, backup.store), []).append(backup)
    return tuple(
        _backup_row(context, group, store, backups, now)
        for (group, store), backups in sorted(found.items())
    )


def _backup_row(
    context: Context, group: str, store: str, backups: Sequence[Backup], now: datetime
) -> BackupStatus:
    last = backups[-1] if backups else None
    verified = context.catalog.last_verified(last.id) if last else None
    return BackupStatus(
        group=group,
        store=store,
        backups=len(backups),
        last_id=last.id if last else None,
        last_at=last.created_at if last else None,
        age_s=(now - last.created_at).total_seconds() if last else None,
        verified_at=verified.at if verified else None,
        verified_how=verified.how if verified else None,
    )


def _leftover(entry: Leftover) -> LeftoverStatus:
    return LeftoverStatus(
        id=entry.id,
        kind=entry.kind,
        subject=entry.subject,
        began_at=entry.began_at,
        steps=tuple(intent.step for intent in entry.intents),
    )


def _volume_alarms(reports: Sequence[VolumeReport]) -> Iterator[str]:
    for report in reports:
        if report.error is not None:
            yield f"volume {report.volume.name}: {report.error.message}"


def _pool_alarms(pools: Sequence[PoolState]) -> Iterator[str]:
    for pool in pools:
        if pool.low:
            yield f"pool {pool.name} has {pool.shortage()}: no new TimeMark is made"


def _backup_alarms(context: Context, known: Sequence[Backup]) -> Iterator[str]:
    """What the last backup of each group and store noticed, and what verification found in any."""
    last = {(backup.store, backup.group): backup for backup in known}
    for backup in known:
        if last[backup.store, backup.group] is backup:
            yield from (f"backup {backup.id}: {alarm}" for alarm in backup.alarms)
        verified = context.catalog.last_verified(backup.id)
        if verified is not None and verified.problems:
            yield (
                f"backup {backup.id} in {backup.store} showed {verified.problems} problems when it "
                f"was verified: offload verify {backup.id}"
            )
