"""Islands taken away: the placeholders first, then their views, then the TimeMark.

`unmount` journals the undo actions of `mount`, so that recovery finishes it. Where the host cannot
be asked, or something there holds on, the island is `going`: its views are served, and another
`unmount`, or `recover`, tries again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from offload import compose
from offload.catalog.store import Catalog
from offload.errors import BusyError, OffloadError
from offload.holds import claim_island, claim_view
from offload.hypervisor import BackupHost
from offload.instance import Instance
from offload.island import Island, IslandState
from offload.model import View
from offload.origin import OriginKind
from offload.services import mount as views
from offload.services.context import Context
from offload.services.island_record import host_step, record_of, undo_args


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """What was taken away. `views`: also those of the islands."""

    islands: tuple[Island, ...] = ()
    views: tuple[View, ...] = ()


def find(ctx: Context, name: str) -> Island | None:
    """The island of this name or id."""
    return next((entry for entry in ctx.catalog.islands() if name in (entry.name, entry.id)), None)


def of_group(ctx: Context, group: str) -> list[Island]:
    """The islands that mounting the group by its name made: as of `Catalog.views_of_group`."""
    made = {
        f"{OriginKind.TIMEMARK}:{m.id}"
        for m in ctx.catalog.timemarks(group)
        if m.purpose == "mount"
    }
    return [entry for entry in ctx.catalog.islands() if entry.origin in made]


def unmount(ctx: Context, island: Island, *, force: bool = False) -> tuple[Island, list[View]]:
    """Take an island down, then its views away, then the TimeMark that was made for it.

    Raises BusyError (`island-busy`, `view-busy`, `view-connected`), and what its host raises: then
    the island is `going`, its views stay, and it can be tried again.
    """
    with ExitStack() as claims:
        claims.enter_context(claim_island(ctx.instance, island.id))
        known = next((entry for entry in ctx.catalog.islands() if entry.id == island.id), None)
        if known is None:
            return island, []
        shown = [view for view in ctx.catalog.views() if view.id in known.views]
        for view in sorted(shown, key=lambda view: view.id):
            claims.enter_context(claim_view(ctx.instance, view.id, wait=True))
        host = compose.backup_host(known.host, ctx.instance)
        views.let_go(ctx, shown, force, _hosts(host, shown))
        failed = _take_down(ctx, known, host, shown)
    if failed is not None:
        raise failed
    return known, shown


def check_unused(ctx: Context, island: Island, *, force: bool) -> None:
    """Raises BusyError (`view-busy`, `view-connected`) unless it is forced; changes nothing."""
    if not force:
        shown = [view for view in ctx.catalog.views() if view.id in island.views]
        host = compose.backup_host(island.host, ctx.instance)
        views.let_go(ctx, shown, force, _hosts(host, shown))


def _hosts(host: BackupHost, shown: Sequence[View]) -> set[str]:
    """Whoever may log in is the host of the placeholders. One of vSphere is logged in all the time,
    and lets go when it is told to; one of libvirt is while something reads a disk."""
    if host.kind != "vsphere":
        return set()
    return {name for view in shown for name in view.exposure.initiators}


def _take_down(
    ctx: Context, island: Island, host: BackupHost, shown: Sequence[View]
) -> OffloadError | None:
    made = views.fresh_timemarks(ctx, shown)
    with ctx.journal.operation("unmount", island.name) as op:
        views.intend_away(ctx, op, shown, made)
        op.intend("placeholders", "take-down-island", undo_args(island))
        ctx.catalog.update_island(replace(island, state=IslandState.GOING))
        op.done("going")
        try:
            host.take_down(record_of(island), partial(host_step, "down"))
        except OffloadError as error:
            return error  # known as it is: not to be tried again by each command
        op.done("placeholders")
        ctx.catalog.delete_island(island.id)
        op.done("island")
        views.take_away(ctx, op, shown, made)
    return None


def unmount_all(
    ctx: Context,
    names: Sequence[str] = (),
    *,
    group: str | None = None,
    all_views: bool = False,
    force: bool = False,
) -> Gone:
    """Islands and views by name, all that mounting a group made, or all there are.

    An island that cannot be taken down does not keep the others: the first error is raised at the
    end, the others are its notes. Raises what `unmount` raises, also that of views.
    """
    islands, rest = _named(ctx, names, group, all_views=all_views)
    gone: list[Island] = []
    shown: list[View] = []
    failed: list[OffloadError] = []
    for island in islands:
        try:
            known, went = unmount(ctx, island, force=force)
            gone.append(known)
            shown += went
        except OffloadError as error:
            failed.append(error)
    if rest:
        shown += views.unmount(ctx, rest, force=force)
    for other in failed[1:]:
        failed[0].add_note(other.message)
    if failed:
        raise failed[0]
    return Gone(islands=tuple(gone), views=tuple(shown))


def _named(
    ctx: Context, names: Sequence[str], group: str | None, *, all_views: bool
) -> tuple[list[Island], list[str]]:
    """The islands, and the names of views that are of none."""
    if names:
        found = {name: find(ctx, name) for name in dict.fromkeys(names)}
        islands = {island.id: island for island in found.values() if island is not None}
        return list(islands.values()), [name for name, hit in found.items() if hit is None]
    wanted = ctx.catalog.islands() if all_views else of_group(ctx, group or "")
    shown = ctx.catalog.views() if all_views else ctx.catalog.views_of_group(group or "")
    if group is not None and not shown:
        ctx.instance.config.group(group)  # an unknown group is an error
    on_islands = {view for island in ctx.catalog.islands() for view in island.views}
    return wanted, [view.name for view in shown if view.id not in on_islands]


def finish(ctx: Context) -> tuple[list[Island], list[str]]:
    """Take down what was left going: those that are gone, and warnings."""
    gone, warnings = [], []
    for island in ctx.catalog.islands():
        if island.state is not IslandState.GOING:
            continue
        try:
            gone.append(unmount(ctx, island, force=True)[0])
        except BusyError:
            continue  # somebody is at it
        except OffloadError as error:
            way_out = f" ({error.hint})" if error.hint else ""
            warnings.append(f"island {island.name} is not gone: {error.message}{way_out}")
    return gone, warnings


def undo_island(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Take an island down, half made or half gone. Raises what its host raises; then its row, and
    with it its views, stay."""
    host = compose.backup_host(args["host"], instance)
    host.take_down(json.loads(args["record"]), partial(host_step, "down"))
    catalog.delete_island(args["id"])
