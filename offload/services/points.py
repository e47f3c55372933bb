"""From an origin to the volumes that can be read at it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload import compose
from offload.errors import NotFoundError
from offload.model import Snapshot, Source, TimeMark
from offload.origin import Origin, OriginKind
from offload.services import groups
from offload.services.context import Context
from offload.sources import on_lun


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One volume at one point in time: `origin` in full, `id` of the TimeMark or backup,
    `identity` of the volume. `snapshot` where it lies on production storage."""

    origin: str
    group: str
    volume: str
    id: str
    source: Source
    identity: str
    snapshot: Snapshot | None = None


def volumes(ctx: Context, origin: Origin) -> tuple[str, ...]:
    """The volumes that an origin stands for; NotFoundError (`unknown-volume`)."""
    if origin.kind is OriginKind.GROUP:
        return groups.resolve(ctx, origin.id).config.volumes
    if origin.kind is OriginKind.TIMEMARK:
        there = tuple(s.volume for s in ctx.catalog.timemark(origin.id).snapshots)
    else:
        there = tuple(i.volume for i in ctx.catalog.backup(origin.id).images)
    if origin.volume is None:
        return there
    if origin.volume not in there:
        raise NotFoundError(
            f"{origin.kind} {origin.id} has no volume '{origin.volume}'",
            code="unknown-volume",
            hint=f"it has {', '.join(there)}",
        )
    return (origin.volume,)


def of_timemark(ctx: Context, origin: Origin) -> list[Point]:
    """The volumes of a TimeMark that an origin names. Ask under a hold on it.

    Raises NotFoundError (`unknown-timemark`, `unknown-volume`, `snapshot-missing`).
    """
    wanted = volumes(ctx, origin)
    known = ctx.catalog.timemark(origin.id)
    return [
        Point(
            origin=f"{OriginKind.TIMEMARK}:{known.id}/{snapshot.volume}",
            group=known.group,
            volume=snapshot.volume,
            id=known.id,
            source=_snapshot_source(ctx, known, snapshot),
            identity=snapshot.identity,
            snapshot=snapshot,
        )
        for snapshot in known.snapshots
        if snapshot.volume in wanted
    ]


def _snapshot_source(ctx: Context, known: TimeMark, snapshot: Snapshot) -> Source:
    provider = compose.snapshot_provider(snapshot.provider, ctx.instance.id)
    if not provider.exists(dict(snapshot.ref)):
        raise NotFoundError(
            f"the snapshot of volume {snapshot.volume} of timemark {known.id} is gone",
            code="snapshot-missing",
            hint=f"nothing can be read from it any more: offload timemark delete {known.id}",
        )
    return provider.source(snapshot)


def of_vmdk(point: Point, path: str) -> Point:
    """A VM's disk on the VMFS of a volume, by the path of its descriptor.

    Raises what `offload.images.vmfs` raises.
    """
    path = path.lstrip("/")
    image = compose.open_image(on_lun(point.source, path, 0))
    try:
        return replace(point, source=on_lun(point.source, path, image.size_bytes))
    finally:
        image.close()


def of_backup(ctx: Context, origin: Origin) -> list[Point]:
    """The volumes of a backup that an origin names.

    Raises NotFoundError (`unknown-backup`, `unknown-volume`, `unknown-store`).
    """
    from offload.services import stores  # the engine with it: `views` does without

    wanted = volumes(ctx, origin)
    known = ctx.catalog.backup(origin.id)
    return [
        Point(
            origin=f"{OriginKind.BACKUP}:{known.id}/{image.volume}",
            group=known.group,
            volume=image.volume,
            id=known.id,
            source=stores.backup_source(ctx, known, image),
            identity=image.identity,
        )
        for image in known.images
        if image.volume in wanted
    ]
