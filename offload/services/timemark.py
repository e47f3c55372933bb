"""TimeMarks: who uses them, and their end. `services/director.py` makes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from json import loads

from offload import compose
from offload.catalog.store import Catalog
from offload.errors import BusyError, NotFoundError, OffloadError
from offload.holds import claim_timemark
from offload.instance import Instance
from offload.model import TimeMark
from offload.services.context import Context

log = logging.getLogger(__name__)


def users(ctx: Context, timemark: str) -> list[str]:
    """Names of the views that show a TimeMark."""
    start = f"timemark:{timemark}/"
    return [view.name for view in ctx.catalog.views() if view.origin.startswith(start)]


def check_deletable(ctx: Context, timemark: TimeMark) -> None:
    """BusyError (`timemark-in-use`) if a view shows it."""
    shown = users(ctx, timemark.id)
    if shown:
        raise BusyError(
            f"timemark {timemark.id} is shown by {', '.join(shown)}",
            code="timemark-in-use",
            hint=f"first: offload unmount {' '.join(shown)}",
        )


def delete(ctx: Context, prefix: str) -> TimeMark:
    """Delete a TimeMark and its snapshots. BusyError while a view, backup or restore reads it."""
    timemark = ctx.catalog.timemark(prefix)
    check_deletable(ctx, timemark)
    with claim_timemark(ctx.instance, timemark.id):
        check_deletable(ctx, timemark)
        with ctx.journal.operation("timemark-delete", timemark.id) as op:
            # one intent for all: of several, a crash between two would make half durable
            op.intend("all", "delete-timemark", {"id": timemark.id})
            for snapshot in timemark.snapshots:
                provider = compose.snapshot_provider(snapshot.provider, ctx.instance.id)
                provider.delete(dict(snapshot.ref))
                op.done(f"snapshot-{snapshot.volume}")
            _forget(ctx.catalog, timemark.id)
            op.done("catalog")
    return timemark


def delete_if_unused(ctx: Context, timemark: str) -> bool:
    """Delete a TimeMark that offload made for itself, once nothing needs it any more.

    Needed by: a view, a running reader, being the parent of the next incremental.
    """
    if _unneeded(ctx.catalog, timemark) is None:
        return False
    try:
        delete(ctx, timemark)
    except BusyError:
        return False
    except OffloadError as error:  # what it served for is done; the journal keeps it for later
        log.warning("timemark %s could not be deleted yet: %s", timemark, error.message)
        return False
    return True


def _unneeded(catalog: Catalog, timemark: str) -> TimeMark | None:
    """The TimeMark, if offload made it for itself and neither a view nor a parent link needs it."""
    try:
        known = catalog.timemark(timemark)
    except NotFoundError:
        return None
    if known.purpose == "user" or known.keep or _is_parent(catalog, known.id):
        return None
    start = f"timemark:{known.id}/"
    return None if any(v.origin.startswith(start) for v in catalog.views()) else known


def _is_parent(catalog: Catalog, timemark: str) -> bool:
    return any(link.timemark == timemark for link in catalog.parents())


def _forget(catalog: Catalog, timemark: str) -> None:
    catalog.drop_parents(timemark)
    catalog.delete_timemark(timemark)


def undo_snapshot(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Delete a snapshot, made or half made."""
    compose.snapshot_provider(args["provider"], instance.id).delete(loads(args["ref"]))


def undo_timemark(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Forget a TimeMark whose snapshots are gone."""
    _forget(catalog, args["id"])


def undo_delete(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Finish the deletion of a TimeMark: the row goes last, it names the snapshots."""
    try:
        known = catalog.timemark(args["id"])
    except NotFoundError:
        return
    for snapshot in known.snapshots:
        compose.snapshot_provider(snapshot.provider, instance.id).delete(dict(snapshot.ref))
    _forget(catalog, known.id)


def undo_unused(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """Delete TimeMarks (`ids`, JSON) that offload made for itself, where nothing needs them."""
    for timemark in loads(args["ids"]):
        if _unneeded(catalog, timemark) is None:
            continue
        try:
            with claim_timemark(instance, timemark):
                undo_delete(instance, catalog, {"id": timemark})
        except BusyError:
            continue  # somebody reads it; it stays, and goes with the next backup or prune
