"""TimeViews: mount, unmount, what is mounted, and serving it again after a reboot.

What a crash leaves at each step of `mount` (recovery ends the server, removes its folder and row,
then deletes the TimeMark if it was made for this mount):

| killed | left |
| --- | --- |
| `mount.timemark.intended` | perhaps a fresh TimeMark |
| `mount.timemark.done` | a fresh TimeMark |
| `mount.overlay-N.intended`, `.done` | perhaps an empty overlay |
| `mount.server-N.intended` | perhaps a server and its folder |
| `mount.server-N.done` | a server that no catalog knows |
| `mount.row-N.done`, `mount.commit.before` | complete views that nobody was told of |
| `mount.commit.after` | nothing: the view is mounted |

`unmount` journals the same undo actions, so that recovery finishes it. `remount` journals only the
end of the new server: the row stays, and the next recovery serves it again. So does `keep`, whose
row says whether it is to be served.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from offload import compose, overlay
from offload.catalog.store import Catalog
from offload.errors import BusyError, CleanupError, OffloadError, UsageError
from offload.holds import claim_view, hold_timemark
from offload.ids import new_id
from offload.instance import Instance
from offload.island import IslandState
from offload.journal import Operation
from offload.machine import Machine
from offload.model import (
    BackupSource,
    Connection,
    Exposure,
    HomeSource,
    Source,
    TimeMark,
    View,
    ViewId,
    ViewState,
    VmfsSource,
)
from offload.origin import NAME, Origin, OriginKind, parse_origin
from offload.overlay import Usage
from offload.progress import NoProgress, Progress
from offload.quantity import parse_size
from offload.services import connect, director, groups, overlays, points, restored, timemark
from offload.services.context import Context
from offload.services.groups import Resolved
from offload.services.island_record import check_free
from offload.services.points import Point
from offload.services.undo import dump
from offload.sources import lun_of, on_lun
from offload.target import Client, ExportRequest, Target

_NAME_MAX = 63
_SHORT_ID = 4  # characters of an id that a view's name shows


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """How views are wanted. `name` only where there is exactly one."""

    name: str | None = None
    target: str = "nbd"
    writable: bool = False  # on an overlay, which goes with the view
    overlay_limit_bytes: int | None = None  # None: as configured
    vmdk: str | None = None  # not the volume but a VM's disk on its VMFS, by its descriptor's path
    exposure: Exposure = field(default_factory=Exposure)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewStatus:
    """A view, and what its target says about it now."""

    view: View
    alive: bool
    clients: tuple[Client, ...] = ()
    overlay: Usage | None = None  # None: it has none, or its overlay is gone
    moving_to: str = ""  # where a running migration copies it
    island: str = ""  # the name of the island whose placeholders have it as a disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Remounted:
    """What `remount` did: the views that are served again, and what a person must know of it."""

    views: tuple[View, ...] = ()
    warnings: tuple[str, ...] = ()


def mount(
    ctx: Context,
    origins: Sequence[str],
    options: MountOptions | None = None,
    progress: Progress | None = None,
) -> list[View]:
    """Present what `origins` name, all or none; a group's name takes a fresh TimeMark of it.

    Raises UsageError, NotFoundError, BusyError (`name-taken`, `timemark-going`), PolicyError
    (`overlays-full`), and what the TimeMark and the target raise.
    """
    options = options or MountOptions()
    wanted = [parse_origin(text) for text in origins]
    chosen = {o.id: groups.resolve(ctx, o.id) for o in wanted if o.kind is OriginKind.GROUP}
    options = _check(ctx, wanted, chosen, options)
    with ctx.journal.operation("mount", ", ".join(origins)) as op, ExitStack() as holds:
        found: list[Point] = []
        for origin in wanted:
            if origin.kind is OriginKind.BACKUP:
                found += points.of_backup(ctx, origin)
                continue
            if origin.kind is OriginKind.GROUP:
                made = fresh(ctx, op, chosen[origin.id], None, progress)
                origin = Origin(kind=OriginKind.TIMEMARK, id=made.id)  # noqa: PLW2901
            known = ctx.catalog.timemark(origin.id)
            holds.enter_context(hold_timemark(ctx.instance, known.id))
            found += points.of_timemark(ctx, origin)
        if options.vmdk is not None:
            found = [points.of_vmdk(found[0], options.vmdk)]
        for warning in overlays.warnings(ctx, (options.overlay_limit_bytes or 0) * len(found)):
            (progress or NoProgress()).message(warning)
        taken = {view.name for view in ctx.catalog.views()}
        names = []
        for point in found:
            stem = f"{point.group}-{point.volume}"
            names.append(options.name or free_name(stem, f"-{point.id[:_SHORT_ID]}", taken))
            taken.add(names[-1])
        return present(ctx, op, list(zip(names, found, strict=True)), options)


def fresh(
    ctx: Context,
    op: Operation,
    chosen: Resolved,
    machines: tuple[Machine, ...] | None,
    progress: Progress | None,
) -> TimeMark:
    """A TimeMark made for a mount; its id is journalled before it exists. `machines`: settings of
    its VMs, where they were taken already."""
    ident = new_id()
    op.intend("timemark", "delete-unused", {"ids": dump([ident])})
    options = director.CreateOptions(purpose="mount", id=ident, resolved=chosen, machines=machines)
    made = director.create(ctx, chosen.name, options, progress)
    op.done("timemark")
    return made


def present(
    ctx: Context, op: Operation, found: Sequence[tuple[str, Point]], options: MountOptions
) -> list[View]:
    """Serve points as views of these names; each is journalled, and in the catalog. `options` are
    complete: see `Target.check`."""
    views = []
    for number, (name, point) in enumerate(found, 1):
        view = _planned(ctx, point, name, options)
        _make_overlay(ctx, op, number, view)
        op.intend(f"server-{number}", "withdraw-view", undo_args(ctx.instance, view))
        view = _exported(ctx, view, view.exposure)
        op.done(f"server-{number}")
        ctx.catalog.add_view(view)
        op.done(f"row-{number}")
        views.append(view)
    return views


def unmount(
    ctx: Context, names: Sequence[str], *, all_views: bool = False, force: bool = False
) -> list[View]:
    """Take views away; all are checked before the first one goes.

    Then a TimeMark that was made for them goes, if nothing else needs it. Raises UsageError,
    NotFoundError, BusyError (`view-busy`: clients are connected and it is not forced;
    `view-connected`: it is a block device of this machine, which `force` ends first;
    `view-moving`).
    """
    if all_views == bool(names):
        raise UsageError("name the views to unmount, or all", code="bad-views", hint="or: --all")
    found = ctx.catalog.views() if all_views else [ctx.catalog.view(name) for name in names]
    chosen = list({view.id: view for view in found}.values())
    if not chosen:
        return []
    check_free(ctx, chosen)
    _check_unmoved(_moving(ctx), chosen)
    with ExitStack() as claims:
        for view in sorted(chosen, key=lambda view: view.id):  # waits while one is served again
            claims.enter_context(claim_view(ctx.instance, view.id, wait=True))
        going = {view.id for view in chosen}
        return _unmount(ctx, [view for view in ctx.catalog.views() if view.id in going], force)


def _unmount(ctx: Context, chosen: Sequence[View], force: bool) -> list[View]:
    if not chosen:
        return []
    let_go(ctx, chosen, force)
    made = fresh_timemarks(ctx, chosen)
    with ctx.journal.operation("unmount", ", ".join(view.name for view in chosen)) as op:
        intend_away(ctx, op, chosen, made)
        take_away(ctx, op, chosen, made)
    return list(chosen)


def intend_away(ctx: Context, op: Operation, chosen: Sequence[View], made: Sequence[str]) -> None:
    """Announce that views go, and then TimeMarks that were `made` for them."""
    for number, ident in enumerate(made, 1):  # undone last
        op.intend(f"timemark-{number}", "delete-unused", {"ids": dump([ident])})
    for number, view in enumerate(chosen, 1):
        if view.on_overlay:
            op.intend(f"overlay-{number}", "remove-overlay", overlay_args(ctx.instance, view))
        op.intend(f"server-{number}", "withdraw-view", undo_args(ctx.instance, view))


def take_away(ctx: Context, op: Operation, chosen: Sequence[View], made: Sequence[str]) -> None:
    """Do what `intend_away` announced."""
    for number, view in enumerate(chosen, 1):
        _take_away(ctx, op, number, view)
    for number, ident in enumerate(made, 1):
        timemark.delete_if_unused(ctx, ident)
        op.done(f"timemark-{number}")


def keep(ctx: Context, names: Sequence[str], *, force: bool = False) -> list[View]:
    """End the servers of writable views; what was written stays, for `mount_again`.

    All are checked before the first one goes. Raises what `unmount` raises, UsageError
    (`view-read-only`).
    """
    chosen = list({view.id: view for view in map(ctx.catalog.view, names)}.values())
    for view in chosen:
        if not view.writable:
            raise UsageError(
                f"view {view.name} is read-only: nothing was written that could be kept",
                code="view-read-only",
                hint=f"offload unmount {view.name}",
            )
    check_free(ctx, chosen)
    _check_unmoved(_moving(ctx), chosen)
    with ExitStack() as claims:
        for view in sorted(chosen, key=lambda view: view.id):
            claims.enter_context(claim_view(ctx.instance, view.id, wait=True))
        let_go(ctx, chosen, force)
        return [_keep(ctx, ctx.catalog.view(view.id)) for view in chosen]


def mount_again(ctx: Context, names: Sequence[str]) -> list[View]:
    """Serve kept views again, at their addresses and with what was written.

    Raises NotFoundError, BusyError (`view-mounted`), and what the target raises.
    """
    chosen = list({view.id: view for view in map(ctx.catalog.view, names)}.values())
    served = []
    with ExitStack() as stack:
        for view in sorted(chosen, key=lambda view: view.id):
            stack.enter_context(claim_view(ctx.instance, view.id, wait=True))
            if ctx.catalog.view(view.id).state is not ViewState.KEPT:
                raise BusyError(
                    f"view {view.name} is mounted", code="view-mounted", hint="see: offload views"
                )
        for view in chosen:
            again = _with_source(ctx, ctx.catalog.view(view.id), stack)
            served.append(_serve_again(ctx, again))
    return served


def _keep(ctx: Context, view: View) -> View:
    with ctx.journal.operation("keep", view.name) as op:
        op.intend("server", "stop-server", undo_args(ctx.instance, view))
        kept = replace(view, state=ViewState.KEPT)
        ctx.catalog.update_view(kept)
        op.done("row")
        target = compose.target(view.target, ctx.instance)
        target.withdraw(_run_dir(ctx, view.id), view.server)
        op.done("server")
    return kept


def views(ctx: Context) -> list[ViewStatus]:
    """What is mounted, the newest last, and whether it is served now. Changes nothing."""
    found = []
    moving = _moving(ctx)
    islands = {view: island.name for island in ctx.catalog.islands() for view in island.views}
    targets: dict[str, Target] = {}
    for view in ctx.catalog.views():
        run_dir = _run_dir(ctx, view.id)
        if view.target not in targets:
            targets[view.target] = compose.target(view.target, ctx.instance)
        target = targets[view.target]
        alive = target.alive(run_dir, view.server)
        clients = tuple(target.clients(run_dir, view.server)) if alive else ()
        used = overlays.usage_of(ctx.instance, view)
        found.append(
            ViewStatus(
                view=view,
                alive=alive,
                clients=clients,
                overlay=used,
                moving_to=moving.get(view.id, ""),
                island=islands.get(view.id, ""),
            )
        )
    return found


def _moving(ctx: Context) -> dict[str, str]:
    """Where running migrations go, by the view's id."""
    intents = ctx.journal.running_intents()
    return {i.args["id"]: i.args["place"] for i in intents if i.undo == "settle-migration"}


def remount(ctx: Context) -> Remounted:
    """Serve again, at the same address, every view whose server is gone (a reboot, a kill).

    One that cannot be served is a warning, and the next ones are tried all the same. Left alone are
    those that another process is mounting, taking away or serving again.
    """
    served, warnings = [], []
    for status in views(ctx):
        view = status.view
        if status.alive or view.state is ViewState.KEPT:
            continue
        try:
            with claim_view(ctx.instance, view.id, wait=False) as mine:
                again = _serve_if_dead(ctx, view.id) if mine else None
        except OffloadError as error:
            way_out = f" ({error.hint})" if error.hint else ""
            warnings.append(f"view {view.name} cannot be served again: {error.message}{way_out}")
        else:
            served += [again] if again is not None else []
    return Remounted(views=tuple(served), warnings=tuple(warnings))


def undo_view(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Take a view away, half made or half gone. `server` is what was known when it was intended.

    Not from under placeholders: one of an island that stands, because its unmount was cut off
    before all its intents were durable, stays. CleanupError (`view-in-island`) while an island is
    not gone for sure.
    """
    for island in catalog.islands():
        if args["id"] not in island.views:
            continue
        if island.state is IslandState.STANDING:
            return
        raise CleanupError(
            f"view {args['id']} stays: island {island.name} is not gone for sure",
            code="view-in-island",
        )
    _withdraw(instance, catalog, args)
    catalog.delete_view(args["id"])


def undo_server(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """End the server of a view that stays in the catalog."""
    _withdraw(instance, catalog, args)


def undo_overlay(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Remove what was written to a view that is gone, or never came to be. One that stays, because
    its unmount was cut off before all its intents were durable, keeps it."""
    if all(view.id != args["id"] for view in catalog.views()):
        overlay.remove(Path(args["path"]))


# -- before anything is changed ---------------------------------------------------------------


def _check(
    ctx: Context,
    wanted: Sequence[Origin],
    chosen: Mapping[str, Resolved],
    options: MountOptions,
) -> MountOptions:
    """Refuse before production is frozen for it; what comes back is complete."""
    if not wanted:
        raise UsageError("nothing to mount", code="bad-origin", hint="name an ORIGIN")
    exposure = compose.target(options.target, ctx.instance).check(options.exposure)
    count = sum(
        len(chosen[origin.id].config.volumes)
        if origin.kind is OriginKind.GROUP
        else len(points.volumes(ctx, origin))
        for origin in wanted
    )
    # a server a view, as NBD has it, needs a port of its own for each
    port = options.exposure.port if options.target == "nbd" else None
    one = (("name", options.name), ("port", port), ("vmdk", options.vmdk))
    for option, value in one:
        if value is not None and count != 1:
            raise UsageError(
                f"one {option} cannot be given to {count} views",
                code=f"{option}-for-several",
                hint="mount one volume: ORIGIN/VOLUME, or leave it out",
            )
    if options.name is not None:
        check_name(ctx, "view", options.name)
    limit = overlays.limit_of(ctx, options.overlay_limit_bytes) if options.writable else None
    return replace(options, exposure=exposure, overlay_limit_bytes=limit)


def check_name(ctx: Context, kind: str, name: str) -> None:
    """UsageError (`bad-name`), BusyError (`name-taken`): views and islands are unmounted by it."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is no name for a {kind}",
            code="bad-name",
            hint="up to 63 lower-case letters, digits, '.', '_' and '-'; a letter or digit first",
        )
    taken = {
        **{view.name: "a view" for view in ctx.catalog.views()},
        **{island.name: "an island" for island in ctx.catalog.islands()},
    }
    if name in taken:
        raise BusyError(
            f"there is {taken[name]} '{name}' already",
            code="name-taken",
            hint=f"choose another name, or: offload unmount {name}",
        )


def _check_unmoved(moving: Mapping[str, str], chosen: Sequence[View]) -> None:
    for view in chosen:
        if view.id in moving:
            raise BusyError(
                f"view {view.name} is being migrated to {moving[view.id]}",
                code="view-moving",
                hint="wait for it, or end the migration with Ctrl-C",
            )


def let_go(ctx: Context, chosen: Sequence[View], force: bool, ours: Collection[str] = ()) -> None:
    """Refuse while somebody uses them, or, if forced, disconnect what is connected here, and have
    hosts let go of their LUNs. Clients of the names `ours` are no reason to refuse."""
    attached = connect.of_views(ctx.catalog, chosen)
    if not force:
        _check_unconnected(attached)
        for view in chosen:
            _check_idle(ctx, view, ours)
    elif attached:
        connect.disconnect(ctx, [connection.id for connection in attached], force=True)
    restored.let_go(ctx, chosen)


def _check_unconnected(attached: Sequence[Connection]) -> None:
    if attached:
        names = " ".join(connection.name for connection in attached)
        raise BusyError(
            f"connected as a block device of this machine: {names}",
            code="view-connected",
            hint=f"offload disconnect {names}; or unmount with --force",
        )


def _check_idle(ctx: Context, view: View, ours: Collection[str]) -> None:
    target = compose.target(view.target, ctx.instance)
    connected = target.clients(_run_dir(ctx, view.id), view.server)
    clients = [client for client in connected if client.name not in ours]
    if clients:
        who = ", ".join(client.who for client in clients)
        number = f"{len(clients)} client" + ("s" if len(clients) > 1 else "")
        raise BusyError(
            f"view {view.name} has {number} connected ({who})",
            code="view-busy",
            hint="disconnect them first, or unmount with --force",
        )


# -- what is new ------------------------------------------------------------------------------


def free_name(stem: str, tail: str, taken: Collection[str]) -> str:
    """The stem, cut short for the tail; a number behind it where that is taken."""
    number = 1
    while True:
        end = tail + (f"-{number}" if number > 1 else "")
        name = stem[: _NAME_MAX - len(end)] + end
        if name not in taken:
            return name
        number += 1


# -- servers and rows -------------------------------------------------------------------------


def _cached(ctx: Context, source: Source) -> Source:
    """A backup that many small reads will come to: with the caches of the configuration."""
    if isinstance(source, VmfsSource):
        return on_lun(_cached(ctx, lun_of(source)), source.path, source.size_bytes)
    if not isinstance(source, BackupSource):
        return source
    cache = ctx.instance.config.cache
    return replace(
        source,
        block_dir=cache.folder,
        cache_bytes=parse_size(cache.disk),
        memory_bytes=parse_size(cache.memory),
        ahead_bytes=parse_size(cache.read_ahead),
    )


def _planned(ctx: Context, point: Point, name: str, options: MountOptions) -> View:
    """The view before it is served: its id is journalled first."""
    return View(
        id=ViewId(new_id()),
        name=name,
        origin=point.origin,
        target=options.target,
        uri="",
        writable=options.writable,
        size_bytes=point.source.size_bytes,
        sector_size=point.source.sector_size,
        created_at=datetime.now(UTC),
        source=_cached(ctx, point.source),
        exposure=options.exposure,
        overlay_limit_bytes=options.overlay_limit_bytes or 0,
    )


def _make_overlay(ctx: Context, op: Operation, number: int, view: View) -> None:
    if not view.writable:
        return
    op.intend(f"overlay-{number}", "remove-overlay", overlay_args(ctx.instance, view))
    overlay.create(overlays.overlay_of(ctx.instance, view), view.size_bytes)
    op.done(f"overlay-{number}")


def overlay_args(instance: Instance, view: View) -> dict[str, str]:
    """Of `undo_overlay`."""
    return {"id": view.id, "path": str(overlays.overlay_of(instance, view).path)}


def _exported(ctx: Context, view: View, exposure: Exposure) -> View:
    """Served; its exposure says which port it got."""
    endpoint = compose.target(view.target, ctx.instance).export(
        ExportRequest(
            view_id=view.id,
            name=view.name,
            source=view.source,
            run_dir=_run_dir(ctx, view.id),
            exposure=exposure,
            overlay=overlays.overlay_of(ctx.instance, view) if view.on_overlay else None,
        )
    )
    return replace(view, uri=endpoint.uri, server=endpoint.server)


def _serve_if_dead(ctx: Context, view_id: str) -> View | None:
    """With the view claimed: as it is now, which need not be what it was before."""
    view = next((view for view in ctx.catalog.views() if view.id == view_id), None)
    if view is None or view.state is not ViewState.MOUNTED:
        return None
    if any(intent.args.get("id") == view_id for intent in ctx.journal.running_intents()):
        return None  # mounted just now, or taken back by a recovery
    if compose.target(view.target, ctx.instance).alive(_run_dir(ctx, view.id), view.server):
        return None
    with ExitStack() as stack:
        return _serve_again(ctx, _with_source(ctx, view, stack))


def _with_source(ctx: Context, view: View, stack: ExitStack) -> View:
    """A snapshot may have to be made readable again after a reboot; its TimeMark is held."""
    if isinstance(view.source, HomeSource):
        return view
    origin = parse_origin(view.origin)
    if origin.kind is not OriginKind.TIMEMARK:
        return view
    stack.enter_context(hold_timemark(ctx.instance, origin.id))
    (point,) = points.of_timemark(ctx, origin)
    if isinstance(view.source, VmfsSource):
        point = points.of_vmdk(point, view.source.path)
    return replace(view, source=point.source)


def _serve_again(ctx: Context, view: View) -> View:
    with ctx.journal.operation("remount", view.name) as op:
        op.intend("server", "stop-server", undo_args(ctx.instance, view))
        # what no reboot has removed: the folder, and a server of a remount that was cut off
        target = compose.target(view.target, ctx.instance)
        target.withdraw(_run_dir(ctx, view.id), view.server)
        # at the port that it had
        again = _exported(ctx, view, replace(view.exposure, port=urlsplit(view.uri).port))
        again = replace(again, state=ViewState.MOUNTED)
        op.done("server")
        ctx.catalog.update_view(again)
        op.done("row")
    return again


def _take_away(ctx: Context, op: Operation, number: int, view: View) -> None:
    ctx.catalog.update_view(replace(view, state=ViewState.CLOSING))
    op.done(f"closing-{number}")
    target = compose.target(view.target, ctx.instance)
    target.withdraw(_run_dir(ctx, view.id), view.server)
    op.done(f"server-{number}")
    if view.on_overlay:
        overlay.remove(overlays.overlay_of(ctx.instance, view).path)
        op.done(f"overlay-{number}")
    ctx.catalog.delete_view(view.id)
    op.done(f"row-{number}")


def _withdraw(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    server: Mapping[str, str] = json.loads(args.get("server", "{}"))
    known = next((view for view in catalog.views() if view.id == args["id"]), None)
    if known is not None:  # newer than what was intended
        server = known.server
    compose.target(args["target"], instance).withdraw(Path(args["run_dir"]), server)


def fresh_timemarks(ctx: Context, chosen: Sequence[View]) -> list[str]:
    """TimeMarks that were made for a mount and that only these views show."""
    going = {view.id for view in chosen}
    stay = {_timemark_of(view) for view in ctx.catalog.views() if view.id not in going}
    made = {t.id for t in ctx.catalog.timemarks() if t.purpose == "mount"}
    found = dict.fromkeys(number for view in chosen if (number := _timemark_of(view)))
    return [number for number in found if number not in stay and number in made]


def _timemark_of(view: View) -> str | None:
    if isinstance(view.source, HomeSource):
        return None
    origin = parse_origin(view.origin)
    return origin.id if origin.kind is OriginKind.TIMEMARK else None


def undo_args(instance: Instance, view: View) -> dict[str, str]:
    """Of `undo_view` and `undo_server`."""
    return {
        "id": view.id,
        "target": view.target,
        "run_dir": str(instance.views_dir / view.id),
        "server": dump(dict(view.server)),
    }


def _run_dir(ctx: Context, view_id: str) -> Path:
    return ctx.instance.views_dir / view_id
