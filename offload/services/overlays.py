"""What is written to views: where it is kept, how full it is, what belongs to nobody."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from offload import overlay
from offload.errors import BusyError, PolicyError, UnavailableError, UsageError
from offload.filesystem import space_of
from offload.image_lock import open_for_writing
from offload.instance import Instance
from offload.model import View
from offload.overlay import Usage
from offload.quantity import Watermark, parse_size, show_size
from offload.services.context import Context
from offload.target import Overlay


def overlay_of(instance: Instance, view: View) -> Overlay:
    """The overlay of a writable view. The instance is part of its name: a folder may be shared."""
    path = instance.overlays_dir / f"{instance.id}.{view.id}.qcow2"
    return Overlay(path=path, limit_bytes=view.overlay_limit_bytes)


def usage_of(instance: Instance, view: View) -> Usage | None:
    """How full it is; None where the view has none, or its overlay is gone."""
    return overlay.usage(overlay_of(instance, view)) if view.on_overlay else None


def limit_of(ctx: Context, asked_bytes: int | None) -> int:
    """The limit of a new overlay, in bytes.

    Raises UsageError (`overlay-limit-small`), and PolicyError (`overlays-full`) where the file
    system of the folder has less space than must stay free on it.
    """
    config = ctx.instance.config.overlays
    limit = parse_size(config.limit) if asked_bytes is None else asked_bytes
    if limit < overlay.LIMIT_MIN_BYTES:
        raise UsageError(
            f"an overlay of {show_size(limit)} is too small for any image",
            code="overlay-limit-small",
            hint=f"{show_size(overlay.LIMIT_MIN_BYTES)} at least, and what is to be written",
        )
    free, floor = _space(ctx.instance)
    if free < floor:
        raise PolicyError(
            f"the file system of {ctx.instance.overlays_dir} has {show_size(free)} free, "
            f"{show_size(floor)} must stay free",
            code="overlays-full",
            hint="unmount writable views, make room, or set [overlays] folder or min_free",
        )
    return limit


def warnings(ctx: Context, limits_bytes: int) -> Iterator[str]:
    """What to say of new overlays that may grow to `limits_bytes` together."""
    free, _ = _space(ctx.instance)
    if limits_bytes > free:
        yield (
            f"what is written may take {show_size(limits_bytes)}, but {ctx.instance.overlays_dir} "
            f"has {show_size(free)} free: writes fail when that is used up"
        )


def alarms(ctx: Context) -> list[str]:
    """Overlays that are nearly full or gone, and a file system that is; lines for a person."""
    writable = [view for view in ctx.catalog.views() if view.on_overlay]
    found: list[str] = []
    for view in writable:
        found += _alarms_of(ctx, view)
    if writable:
        free, floor = _space(ctx.instance)
        if free < floor:
            found.append(
                f"{ctx.instance.overlays_dir} has {show_size(free)} free, under "
                f"{show_size(floor)}: writes to views will fail when that is used up"
            )
    return found


def find_orphans(ctx: Context) -> list[Path]:
    """Overlays of this instance that no view of the catalog has.

    Only while no operation runs: one that is being made has no view yet.
    """
    known = {overlay_of(ctx.instance, view).path for view in ctx.catalog.views() if view.on_overlay}
    found = ctx.instance.overlays_dir.glob(f"{ctx.instance.id}.*.qcow2")
    return sorted(path for path in found if path not in known)


def delete_orphan(path: Path) -> None:
    """Remove an overlay that no view has. BusyError (`overlay-in-use`) if a server has it open."""
    try:
        served = open_for_writing(path)
    except UnavailableError:
        if path.exists():
            raise
        return
    if served:
        raise BusyError(
            f"the overlay {path} is served, though no view of the catalog has it",
            code="overlay-in-use",
            hint="end the qemu-storage-daemon that has it open",
        )
    overlay.remove(path)


def _alarms_of(ctx: Context, view: View) -> Iterator[str]:
    used = usage_of(ctx.instance, view)
    if used is None:
        yield (
            f"the overlay of view {view.name} is gone, and with it what was written: "
            f"put {overlay_of(ctx.instance, view).path} back, or: offload unmount {view.name}"
        )
        return
    if used.used_bytes >= Watermark.parse(ctx.instance.config.overlays.alarm).of(used.limit_bytes):
        yield (
            f"what was written to view {view.name} takes {show_size(used.used_bytes)} of "
            f"{show_size(used.limit_bytes)}: writes will fail at the limit"
        )


def _space(instance: Instance) -> tuple[int, int]:
    """Bytes free on the file system of the folder, made or not, and bytes that must stay free."""
    place = instance.overlays_dir
    while not place.exists():
        place = place.parent
    fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, free = space_of(fd)
    finally:
        os.close(fd)
    return free, Watermark.parse(instance.config.overlays.min_free).of(size)
