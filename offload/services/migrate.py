"""Migrate: move the bytes of a writable view home while its clients read and write.

| killed at | the view is served from | recovery |
| --- | --- | --- |
| before `row` | its overlay and origin | the copy is ended, what was made for it goes |
| before `row`, once held | none: its clients wait | it goes on as before |
| after `row`, before the switch | none: its clients wait | it goes on, at home |
| after that | its home | overlay and source go |

The row of the catalog decides, also after a reboot. It changes while clients wait, so that
whichever place it names has every write that was acknowledged. Clients do not wait for a person:
a process of its own (`migrate_guard.py`) recovers at once what is killed then.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from offload import compose, mirror, overlay, qemu_storage
from offload.catalog.store import Catalog
from offload.errors import BusyError, UnavailableError, UsageError
from offload.holds import claim_view
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import Operation
from offload.mirror import State
from offload.model import HomeSource, View
from offload.origin import OriginKind, parse_origin
from offload.progress import NoProgress, Progress
from offload.qemu_storage import Node
from offload.qmp import Qmp, QmpGoneError
from offload.services import homes, migrate_guard, overlays, timemark
from offload.services.context import Context
from offload.services.homes import Home
from offload.services.island_record import check_free
from offload.services.undo import dump
from offload.sources import source_from_dict, source_to_dict
from offload.target import Movable

UNDO = "settle-migration"
_QMP_S = 30.0  # the daemon answers between two requests to its storage


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateReport:
    """A view that is at home. `held_s`: for how long its clients were kept waiting, at most."""

    view: View
    place: str
    seconds: float
    held_s: float


def migrate(ctx: Context, name: str, place: str, progress: Progress | None = None) -> MigrateReport:
    """Copy a writable view to `place` (a new file, a block device, an NBD URI) and serve it from
    there; clients stay connected.

    Raises UsageError (`view-read-only`, `view-unmovable`, `bad-target`), NotFoundError, BusyError
    (`view-claimed`, `view-in-island`), UnavailableError (`view-dead`, `migration-failed`), and what
    `open_home` raises. On an error the view goes on as before.
    """
    began = time.monotonic()
    known = ctx.catalog.view(name)
    with ExitStack() as stack:
        if not stack.enter_context(claim_view(ctx.instance, known.id, wait=False)):
            raise BusyError(
                f"view {known.name} is being mounted, unmounted or migrated", code="view-claimed"
            )
        view = ctx.catalog.view(known.id)
        check_free(ctx, [view])
        target = _movable(ctx, view)
        tag = new_id()
        if "://" in place:
            qemu_storage.home_node(place, view.size_bytes)  # refuses what QEMU cannot write to
        home = homes.open_home(place, view.size_bytes, tag)
        stack.callback(home.close)
        monitor = target.monitor(ctx.instance.views_dir / view.id)
        with ctx.journal.operation("migrate", f"{view.name} to {home.place}") as op:
            made = _timemark_of(view)
            if made:
                op.intend("timemark", "delete-unused", {"ids": dump([made])})
            with closing(_connect(monitor, view)) as qmp:
                args = _undo_args(view, home, mirror.served_node(qmp), f"home-{tag}")
                op.intend("target", UNDO, args)
                home.prepare()
                op.done("target")
                mirror.start(qmp, args["node"], args["home"], _node(home, view))
                op.done("mirror")
                _copy(qmp, view, progress or NoProgress())
                home.flush()
                op.done("ready")
                stack.enter_context(migrate_guard.guarded(ctx))  # also while it is taken back
                held_s, moved = _switch(ctx, op, qmp, view, home)
            _settle(ctx.instance, ctx.catalog, op, args)
            if made:
                timemark.delete_if_unused(ctx, made)
    return MigrateReport(
        view=moved, place=home.place, seconds=time.monotonic() - began, held_s=held_s
    )


def undo_migration(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Serve the view from where the catalog says that it is, and remove what the other place was.

    Idempotent; also where the daemon is gone.
    """
    view = next((view for view in catalog.views() if view.id == args["id"]), None)
    home = view is not None and _is_at(view, args["place"])
    served = _served(instance, view, args, go=home) if view is not None else ""
    if home and served in {args["home"], ""}:
        _settle(instance, catalog, None, args)
        return
    if home and view is not None:  # the switch was refused: the old place has every write
        catalog.update_view(_put_back(view, args))
    homes.discard(args["place"], args["opened"])


# -- before anything is changed ---------------------------------------------------------------


def _movable(ctx: Context, view: View) -> Movable:
    if not view.writable:
        raise UsageError(
            f"view {view.name} is read-only: there is nothing to bring home but its origin",
            code="view-read-only",
            hint=f"offload restore, or mount it with --writable: offload mount {view.origin} "
            "--writable",
        )
    target = _target(ctx.instance, view)
    server = compose.target(view.target, ctx.instance)
    if not server.alive(ctx.instance.views_dir / view.id, view.server):
        raise UnavailableError(
            f"view {view.name} is not served", code="view-dead", hint="first: offload recover"
        )
    return target


def _target(instance: Instance, view: View) -> Movable:
    target = compose.target(view.target, instance)
    if not isinstance(target, Movable):
        raise UsageError(
            f"the target {view.target} cannot exchange what is under a view that it serves",
            code="view-unmovable",
            hint="views of the targets nbd and lio can be migrated",
        )
    return target


def _connect(monitor: Path, view: View) -> Qmp:
    if not monitor.exists():
        raise UsageError(
            f"view {view.name} was mounted by an older version, which gave its daemon no monitor",
            code="view-unmovable",
            hint=f"offload unmount {view.name} --keep; offload mount --again {view.name}",
        )
    return Qmp(monitor, _QMP_S)


def _undo_args(view: View, home: Home, old: str, new: str) -> dict[str, str]:
    return {
        "id": view.id,
        "place": home.place,
        "opened": home.opened,
        "node": old,
        "home": new,
        "origin": view.origin,
        "source": dump(source_to_dict(view.source)),
        "server": dump(dict(view.server)),
        "overlay_limit_bytes": str(view.overlay_limit_bytes),
    }


def _node(home: Home, view: View) -> Node:
    return qemu_storage.home_node(home.opened, view.size_bytes)


# -- the copy and the switch ------------------------------------------------------------------


def _copy(qmp: Qmp, view: View, progress: Progress) -> None:
    done = 0

    def moved(now: int, total: int) -> None:  # noqa: ARG001 - what clients write comes on top
        nonlocal done
        upto = min(now, view.size_bytes)
        if upto > done:
            progress.advance(view.name, upto - done)
            done = upto

    progress.start(view.name, view.size_bytes)
    mirror.wait_ready(qmp, moved)
    progress.finish(view.name)


def _switch(ctx: Context, op: Operation, qmp: Qmp, view: View, home: Home) -> tuple[float, View]:
    """While the clients wait: durable, named, on record."""
    began = time.monotonic()
    mirror.hold(qmp)
    op.done("held")
    home.flush()  # what was written since it was flushed last
    home.publish()
    op.done("published")
    moved = _at_home(view, home.place, _target(ctx.instance, view))
    ctx.catalog.update_view(moved)
    op.done("row")
    mirror.switch(qmp)
    held_s = time.monotonic() - began
    op.done("switched")
    return held_s, moved


def _at_home(view: View, place: str, target: Movable) -> View:
    source = HomeSource(place=place, size_bytes=view.size_bytes, sector_size=view.sector_size)
    return replace(
        view,
        origin=f"home:{place}",
        source=source,
        server=target.settled(view.server),
        overlay_limit_bytes=0,
    )


def _put_back(view: View, args: Mapping[str, str]) -> View:
    return replace(
        view,
        origin=args["origin"],
        source=source_from_dict(json.loads(args["source"])),
        server=json.loads(args["server"]),
        overlay_limit_bytes=int(args["overlay_limit_bytes"]),
    )


def _is_at(view: View, place: str) -> bool:
    return isinstance(view.source, HomeSource) and view.source.place == place


# -- afterwards, or after a crash -------------------------------------------------------------


def _served(instance: Instance, view: View, args: Mapping[str, str], *, go: bool) -> str:
    """The node that clients read and write, with no mirror any more; "" where no daemon runs.

    One that was held goes on to its new node, if it is to `go`; else the mirror is cancelled.
    """
    try:
        qmp = Qmp(_target(instance, view).monitor(instance.views_dir / view.id), _QMP_S)
    except QmpGoneError:
        return ""
    with closing(qmp):
        match mirror.state(qmp):
            case State.HELD if go:
                with contextlib.suppress(UnavailableError):  # refused: then it is the old one
                    mirror.switch(qmp)
            case State.NONE:
                pass
            case _:
                mirror.cancel(qmp)
        now = mirror.served_node(qmp)
        mirror.close_node(qmp, args["node"] if now == args["home"] else args["home"])
        return now


def _settle(
    instance: Instance, catalog: Catalog, op: Operation | None, args: Mapping[str, str]
) -> None:
    """What the view had before it came home goes. Idempotent."""
    view = catalog.view(args["id"])
    _served(instance, view, args, go=True)
    _target(instance, view).end_source(instance.views_dir / view.id)
    if op is not None:
        op.done("source")
    overlay.remove(overlays.overlay_of(instance, view).path)
    homes.keep(args["opened"])
    if op is not None:
        op.done("overlay")


def _timemark_of(view: View) -> str | None:
    """The TimeMark that it shows."""
    if isinstance(view.source, HomeSource):
        return None
    origin = parse_origin(view.origin)
    return origin.id if origin.kind is OriginKind.TIMEMARK else None
