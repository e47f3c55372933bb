"""Islands: placeholders of VMs on a backup host, powered off, whose disks are TimeViews.

What a crash leaves at each step of `mount` (recovery takes the placeholders down, then the views
away, then deletes the TimeMark if it was made for this):

| killed | left |
| --- | --- |
| `island.timemark.intended`, `.done` | perhaps a fresh TimeMark |
| `island.overlay-N`, `island.server-N`, `island.row-N` | perhaps views |
| `island.placeholders.intended`, `island.known.done`, `island.build.STEP` | some of it |
| `island.placeholders.done`, `island.standing.done`, `island.commit.before` | all of it |

The row of an island is there before the host knows anything of it, and goes when the host has
nothing of it any more: until then none of its views does, as a LUN that is pulled hangs a host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from offload import compose
from offload.config import Config
from offload.errors import BusyError, OffloadError, PolicyError, UsageError
from offload.holds import claim_island, hold_timemark, naming_islands
from offload.hypervisor import BackupHost, IslandRequest, IslandView
from offload.ids import new_id
from offload.island import Island, IslandId, IslandState
from offload.journal import Operation
from offload.machine import Machine
from offload.model import View
from offload.origin import Origin, OriginKind, parse_origin
from offload.progress import NoProgress, Progress
from offload.services import groups, island_away, island_point, overlays, points
from offload.services import mount as views
from offload.services.context import Context
from offload.services.disk_volumes import volumes_of
from offload.services.groups import Resolved
from offload.services.island_point import Past
from offload.services.island_record import (
    IslandOptions,
    asked_fields,
    asked_of,
    host_step,
    record_of,
    undo_args,
)
from offload.services.points import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandReport:
    """What `mount` made, and what a person must know of it."""

    island: Island
    views: tuple[View, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """A backup host that was looked at, and how its views are to be."""

    name: str
    host: BackupHost
    options: views.MountOptions
    warnings: tuple[str, ...]


def mount(
    ctx: Context,
    what: str,
    options: IslandOptions | None = None,
    progress: Progress | None = None,
) -> IslandReport:
    """Let placeholders of VMs stand on a backup host; a group's name takes a fresh TimeMark of it.

    All that can be refused is refused before the TimeMark. Raises UsageError, NotFoundError,
    PolicyError, BusyError (`name-taken`), and what the TimeMark, the target and the host raise.
    """
    options = options or IslandOptions()
    progress = progress or NoProgress()
    origin = parse_origin(what)
    if origin.volume is not None:
        raise UsageError(
            f"'{what}' is one volume: an island shows VMs, whole",
            code="bad-origin",
            hint="name the group, timemark:ID or backup:ID, and the VMs with --vm",
        )
    if options.name is not None:
        views.check_name(ctx, "island", options.name)
    site = look_at(ctx, options.host)
    if origin.kind is OriginKind.GROUP:
        chosen = groups.resolve(ctx, origin.id)
        machines, warnings = island_point.machines_now(ctx, chosen)
        request = _request(ctx, options, _future(chosen, machines))
        warnings += _refuse(site, request)
        build = _Build(ctx, site, options, progress, (*site.warnings, *warnings))
        return build.run(chosen=chosen, machines=machines)
    past = island_point.of_origin(ctx, origin)
    warnings = _refuse(site, _request(ctx, options, past))
    build = _Build(ctx, site, options, progress, (*site.warnings, *warnings))
    return build.run(past=past)


def replace_island(
    ctx: Context, old: Island, progress: Progress, *, force: bool = False
) -> IslandReport:
    """An island of a fresh TimeMark in place of one that stands, with its names and options.

    All is looked at and the TimeMark is there before the old one goes. Raises what `mount` and
    `unmount` raise; where the new one fails, a note says that the old one is gone.
    """
    options = asked_of(old)
    island_away.check_unused(ctx, old, force=force)
    site = look_at(ctx, options.host)
    chosen = groups.resolve(ctx, old.group)
    machines, warnings = island_point.machines_now(ctx, chosen)
    with contextlib.suppress(BusyError):  # the old ones have these names
        warnings += _refuse(site, _request(ctx, options, _future(chosen, machines)))
    build = _Build(ctx, site, options, progress, (*site.warnings, *warnings))
    return build.run(chosen=chosen, machines=machines, old=old)


def look_at(ctx: Context, name: str | None) -> _Site:
    """The backup host of this name, or the only one, and how it wants its views. Changes nothing.

    Raises NotFoundError (`unknown-backup-host`), UsageError (`no-backup-host`), and what its
    `check` raises.
    """
    name = _host_name(ctx.instance.config, name)
    host = compose.backup_host(name, ctx.instance)
    warnings = host.check()
    target, exposure, writable = host.export()
    options = views.MountOptions(
        target=target,
        writable=writable,
        exposure=compose.target(target, ctx.instance).check(exposure),
        overlay_limit_bytes=overlays.limit_of(ctx, None) if writable else None,
    )
    return _Site(name=name, host=host, options=options, warnings=tuple(warnings))


def _host_name(config: Config, name: str | None) -> str:
    if name is None and len(config.backup_hosts) == 1:
        (name,) = config.backup_hosts
    if name is None:
        known = ", ".join(sorted(config.backup_hosts))
        raise UsageError(
            "no backup host chosen",
            code="no-backup-host",
            hint=f"give --host with one of: {known}" if known else "add a [backup_hosts.NAME]",
        )
    config.backup_host(name)
    return name


def _refuse(site: _Site, request: IslandRequest) -> tuple[str, ...]:
    """Warnings. Raises UsageError (`wrong-host`), and what the host's `refuse` raises."""
    for machine in request.machines:
        if machine.kind != site.host.kind:
            raise UsageError(
                f"VM {machine.name} is of {machine.kind}: it cannot stand on {site.name}, which is "
                f"of {site.host.kind}",
                code="wrong-host",
                hint=f"choose a backup host of {machine.kind} with --host",
            )
    return tuple(site.host.refuse(request))


def _future(chosen: Resolved, machines: tuple[Machine, ...]) -> Past:
    """What a fresh TimeMark of a group will be, as far as it is known before."""
    return Past(
        origin=chosen.name,
        id="",
        group=chosen.name,
        at=datetime.now(UTC),
        consistency=chosen.config.consistency,
        machines=machines,
    )


def _request(ctx: Context, options: IslandOptions, past: Past) -> IslandRequest:
    """What to build, without views. Raises NotFoundError (`unknown-vm`, `ambiguous-vm`)."""
    from offload.services.machines import chosen

    machines = chosen(past.machines, options.vms)
    asked = options.shows if past.id else None  # a fresh TimeMark has yet to show what it has
    instants = island_point.instants(ctx.instance.config, past, machines, asked)
    return IslandRequest(
        id=new_id(),
        name=options.name or "",
        group=past.group,
        origin=past.origin,
        at=past.at,
        consistency=instants.consistency,
        shown=instants.shown,
        views=(),
        machines=machines,
        vm_at=instants.at,
        vm_snapshot=instants.snapshot,
    )


class _Build:
    """An island being made."""

    def __init__(
        self,
        ctx: Context,
        site: _Site,
        options: IslandOptions,
        progress: Progress,
        warnings: Sequence[str],
    ) -> None:
        self.ctx = ctx
        self.site = site
        self.options = options
        self.progress = progress
        self.warnings: list[str] = []
        self._warn(warnings)

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            self.progress.message(warning)
            self.warnings.append(warning)

    def run(
        self,
        *,
        past: Past | None = None,
        chosen: Resolved | None = None,
        machines: tuple[Machine, ...] = (),
        old: Island | None = None,
    ) -> IslandReport:
        """Of a point in time that exists, or of a fresh TimeMark of what was `chosen`; in place of
        an `old` one."""
        subject = past.origin if past is not None else chosen.name if chosen is not None else ""
        with self.ctx.journal.operation("island", subject) as op, ExitStack() as holds:
            if chosen is not None:
                mark = views.fresh(self.ctx, op, chosen, machines, self.progress)
                self.warnings += mark.warnings  # which it has told
                past = island_point.of_timemark(mark)
            assert past is not None  # noqa: S101 - one of both is given
            if past.origin.startswith(OriginKind.TIMEMARK):
                holds.enter_context(hold_timemark(self.ctx.instance, past.id))
            request = _request(self.ctx, self.options, past)
            found = _points(self.ctx, past, request.machines, self.options)
            holds.enter_context(claim_island(self.ctx.instance, request.id))
            if old is not None:
                self.progress.message(f"the old placeholders of island {old.name} go first")
                island_away.unmount(self.ctx, old, force=True)
            try:
                return self._stand(op, request, found)
            except OffloadError as error:
                if old is not None:
                    error.add_note(
                        f"the old island {old.name} is gone; once mended: offload mount "
                        f"{old.group} --placeholder --host {old.host} --name {old.name}"
                    )
                raise

    def _stand(self, op: Operation, request: IslandRequest, found: Sequence[Point]) -> IslandReport:
        with naming_islands(self.ctx.instance):
            request, island, shown = self._announce(op, request, found)
        self.progress.message(f"placeholders of {len(request.machines)} VMs on {self.site.name}")
        step = partial(host_step, "build")
        placeholders = self.site.host.build(request, record_of(island), step)
        op.done("placeholders")
        island = replace(island, placeholders=placeholders, state=IslandState.STANDING)
        self.ctx.catalog.update_island(island)
        op.done("standing")
        return IslandReport(
            island=island, views=tuple(shown), warnings=tuple(dict.fromkeys(self.warnings))
        )

    def _announce(
        self, op: Operation, request: IslandRequest, found: Sequence[Point]
    ) -> tuple[IslandRequest, Island, list[View]]:
        """Views, and all that is known before the host is: intended, and in the catalog."""
        name = self.options.name or self._free_name(request.group)
        shown = self._present(op, name, found)
        request = replace(request, name=name, views=_exported(self.ctx.instance.config, shown))
        record = self.site.host.plan(request)
        island = Island(
            id=IslandId(request.id),
            name=name,
            host=self.site.name,
            group=request.group,
            origin=request.origin,
            created_at=datetime.now(UTC),
            views=tuple(view.id for _, view in shown),
            state=IslandState.BUILDING,
            record={**record, **asked_fields(self.options)},
        )
        op.intend("placeholders", "take-down-island", undo_args(island))
        self.ctx.catalog.add_island(island)
        op.done("known")
        return request, island, [view for _, view in shown]

    def _present(
        self, op: Operation, name: str, found: Sequence[Point]
    ) -> list[tuple[Point, View]]:
        """A view a volume, `ISLAND-VOLUME`."""
        limit = self.site.options.overlay_limit_bytes or 0
        self._warn(overlays.warnings(self.ctx, limit * len(found)))
        taken = self._taken()
        named = []
        for point in found:
            named.append((views.free_name(f"{name}-{point.volume}", "", taken), point))
            taken.add(named[-1][0])
        made = views.present(self.ctx, op, named, self.site.options)
        return list(zip(found, made, strict=True))

    def _free_name(self, group: str) -> str:
        """`GROUP-HOST`: the same each time, where it is free."""
        return views.free_name(f"{group}-{self.site.name}", "", self._taken())

    def _taken(self) -> set[str]:
        catalog = self.ctx.catalog
        return {view.name for view in catalog.views()} | {entry.name for entry in catalog.islands()}


def _points(
    ctx: Context, past: Past, machines: Sequence[Machine], options: IslandOptions
) -> list[Point]:
    """The volumes to show: all of the point in time, or those of the VMs that were named.

    Raises PolicyError (`vm-without-disks`).
    """
    kind, _, ident = past.origin.partition(":")
    origin = Origin(kind=OriginKind(kind), id=ident)
    of = points.of_backup if origin.kind is OriginKind.BACKUP else points.of_timemark
    found = of(ctx, origin)
    there = {point.volume for point in found}
    for machine in machines:
        if not there & {disk.volume for disk in machine.disks}:
            raise PolicyError(
                f"VM {machine.name} has no disk on the volumes of {past.origin}",
                code="vm-without-disks",
                hint=f"they are: {', '.join(sorted(there))}; name other VMs with --vm",
            )
    if not options.vms:
        return found
    needed = _needed(ctx.instance.config, machines)
    return [point for point in found if needed is None or point.volume in needed]


def _needed(config: Config, machines: Sequence[Machine]) -> set[str] | None:
    """The volumes that VMs lie on; None where one may have its settings elsewhere."""
    found: set[str] = set()
    for machine in machines:
        home = machine.definition_path.partition("]")[0].removeprefix("[")
        if home and home not in {disk.datastore for disk in machine.disks}:
            return None
        for disk in machine.disks:
            found |= {disk.volume, *volumes_of(config, disk)}
    return found


def _exported(config: Config, shown: Sequence[tuple[Point, View]]) -> tuple[IslandView, ...]:
    def luns(volume: str) -> tuple[str, ...]:
        known = config.volumes.get(volume)
        return (known.lun,) if known is not None and known.lun is not None else ()

    return tuple(
        IslandView(view=view, volume=point.volume, identity=point.identity, luns=luns(point.volume))
        for point, view in shown
    )
