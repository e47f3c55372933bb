"""Recovery: take back what dead processes left, serve again what should be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from offload import compose
from offload.errors import OffloadError
from offload.hypervisor import VmSnapshot
from offload.island import Island, IslandState
from offload.journal import Leftover
from offload.model import Connection, View, ViewState
from offload.services import (
    connect,
    island_away,
    mount,
    overlays,
    restore_record,
    vm_snapshots,
)
from offload.services.connect import ConnectionState
from offload.services.context import Context
from offload.services.restore_record import Unfinished
from offload.snapshot_ref import ref_key


class OrphanKind(StrEnum):
    """What may be left that nobody knows."""

    SNAPSHOT = "snapshot"
    OVERLAY = "overlay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """Something that bears this instance's name and that the catalog does not know.

    `ref` is the provider's address of a snapshot, or the path of an overlay.
    """

    kind: OrphanKind = OrphanKind.SNAPSHOT
    provider: str = ""
    ref: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverReport:
    """What was (with `dry_run`: would be) done."""

    undone: tuple[Leftover, ...]
    taken_down: tuple[Island, ...]  # islands that were going
    remounted: tuple[View, ...]
    reconnected: tuple[Connection, ...]
    warnings: tuple[str, ...]
    orphans: tuple[Orphan, ...]
    orphans_deleted: bool
    vm_snapshots: tuple[VmSnapshot, ...]  # that nobody had announced, or removed
    unfinished: tuple[Unfinished, ...]  # restores that the same command goes on with


def find_orphans(ctx: Context) -> list[Orphan]:
    """Snapshots with this instance's name that no TimeMark knows, and overlays that no view has,
    while nothing runs.

    They are never deleted unasked: with a lost catalog they are the last TimeMarks there are, and
    all that is left of what was written to views.
    """
    if ctx.journal.running():
        return []
    stray = [
        Orphan(kind=OrphanKind.OVERLAY, ref={"path": str(path)})
        for path in overlays.find_orphans(ctx)
    ]
    return [*_find_snapshots(ctx), *stray]


def _find_snapshots(ctx: Context) -> list[Orphan]:
    known = {
        ref_key(snapshot.ref)
        for timemark in ctx.catalog.timemarks()
        for snapshot in timemark.snapshots
    }
    found = []
    config = ctx.instance.config
    for name in dict.fromkeys(v.provider for v in config.volumes.values()):
        volumes = [config.volume(v) for v in config.volumes if config.volumes[v].provider == name]
        try:
            refs = compose.snapshot_provider(name, ctx.instance.id).leftovers(volumes)
        except OffloadError:
            continue  # storage that cannot be looked at is `doctor`'s and `volume list`'s to report
        found += [Orphan(provider=name, ref=ref) for ref in refs if ref_key(ref) not in known]
    return found


def recover(ctx: Context, *, orphans: bool = False, dry_run: bool = False) -> RecoverReport:
    """Roll back leftovers, serve views again whose server is gone, take down what is left of
    islands that were going, connect again what is no longer connected, remove VM snapshots of ours
    that nobody uses, and, if asked, delete orphans.

    Raises CleanupError if something could not be taken back (the rest was).
    """
    if dry_run:
        dead = tuple(
            s.view for s in mount.views(ctx) if not s.alive and s.view.state is not ViewState.KEPT
        )
        return RecoverReport(
            undone=tuple(ctx.journal.leftovers()),
            taken_down=tuple(
                entry for entry in ctx.catalog.islands() if entry.state is IslandState.GOING
            ),
            remounted=dead,
            reconnected=tuple(
                status.connection
                for status in connect.connections(ctx)
                if status.state is not ConnectionState.CONNECTED
            ),
            warnings=(),
            orphans=tuple(find_orphans(ctx)),
            orphans_deleted=False,
            vm_snapshots=vm_snapshots.find(ctx.instance, ctx.journal).found,
            unfinished=tuple(_unfinished(ctx)),
        )
    undone = ctx.journal.recover()
    remounted = mount.remount(ctx)
    taken_down, still_going = island_away.finish(ctx)
    reconnected = connect.reconnect(ctx)
    swept = vm_snapshots.sweep(ctx.instance, ctx.journal)
    stray = find_orphans(ctx)
    if orphans:
        for orphan in stray:
            _delete(ctx, orphan)
    return RecoverReport(
        undone=tuple(undone),
        taken_down=tuple(taken_down),
        remounted=remounted.views,
        reconnected=reconnected.connections,
        warnings=(
            *remounted.warnings,
            *still_going,
            *reconnected.warnings,
            *swept.warnings,
        ),
        orphans=tuple(stray),
        orphans_deleted=orphans,
        vm_snapshots=swept.found,
        unfinished=tuple(_unfinished(ctx)),
    )


def _unfinished(ctx: Context) -> list[Unfinished]:
    """Restores that were interrupted; those that run are none."""
    return [entry for entry in restore_record.unfinished(ctx.instance) if not entry.running]


def _delete(ctx: Context, orphan: Orphan) -> None:
    match orphan.kind:
        case OrphanKind.SNAPSHOT:
            compose.snapshot_provider(orphan.provider, ctx.instance.id).delete(dict(orphan.ref))
        case OrphanKind.OVERLAY:
            overlays.delete_orphan(Path(orphan.ref["path"]))
