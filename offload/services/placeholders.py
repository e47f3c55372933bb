"""The placeholders that stand: a look at them, drift against production, and anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from offload import compose
from offload.errors import NotFoundError, OffloadError
from offload.hypervisor import Standing
from offload.inventory import Inventory
from offload.island import Island, IslandState, Placeholder
from offload.progress import NoProgress, Progress
from offload.services import groups, island, island_away
from offload.services import mount as views
from offload.services.context import Context
from offload.services.drift import drift
from offload.services.island import IslandReport
from offload.services.island_record import asked_of, record_of


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandStatus:
    """An island and what its host says of it; `problem`: why it could not be asked. `dead`: names
    of views that are not served."""

    island: Island
    standing: tuple[Standing, ...] = ()
    problem: str = ""
    dead: tuple[str, ...] = ()

    def of(self, placeholder: Placeholder) -> Standing | None:
        """What is there of one; None where that is not known."""
        return next((s for s in self.standing if s.placeholder == placeholder.id), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong, and what to do. `placeholder`, `vm` empty: all of the island."""

    island: str
    placeholder: str = ""
    vm: str = ""
    what: str
    do: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was looked at, and what is wrong with it."""

    islands: int
    placeholders: int
    findings: tuple[Finding, ...] = field(default=())


def look(ctx: Context, names: Sequence[str] = ()) -> list[IslandStatus]:
    """The islands of these names, or all, the newest last, and what stands of them now.

    A host that does not answer does not hide the others. Raises NotFoundError (`unknown-island`).
    """
    chosen = _chosen(ctx, names)
    dead = {
        str(status.view.id): status.view.name for status in views.views(ctx) if not status.alive
    }
    return [_look(ctx, entry, dead) for entry in chosen]


def _look(ctx: Context, entry: Island, dead: dict[str, str]) -> IslandStatus:
    standing: tuple[Standing, ...] = ()
    problem = ""
    try:
        host = compose.backup_host(entry.host, ctx.instance)
        standing = tuple(host.look(record_of(entry), entry.placeholders))
    except OffloadError as error:
        problem = f"backup host {entry.host} cannot be asked: {error.message}"
    return IslandStatus(
        island=entry,
        standing=standing,
        problem=problem,
        dead=tuple(dead[view] for view in entry.views if view in dead),
    )


def _chosen(ctx: Context, names: Sequence[str]) -> list[Island]:
    known = ctx.catalog.islands()
    if not names:
        return known
    found = []
    for name in dict.fromkeys(names):
        hit = island_away.find(ctx, name)
        if hit is None:
            there = ", ".join(entry.name for entry in known) or "none"
            raise NotFoundError(
                f"no island '{name}'", code="unknown-island", hint=f"there are: {there}"
            )
        found.append(hit)
    return found


# -- check -----------------------------------------------------------------------------------------


def check(ctx: Context, names: Sequence[str] = ()) -> CheckReport:
    """Compare placeholders with production, and look whether they stand. Changes nothing.

    Raises NotFoundError (`unknown-island`).
    """
    statuses = look(ctx, names)

    @cache
    def inventory(hypervisor: str) -> Inventory:
        with compose.hypervisor(hypervisor, ctx.instance) as asked:
            return asked.inventory()

    findings: list[Finding] = []
    for status in statuses:
        findings += _standing(status)
        entry = status.island
        try:
            for name in dict.fromkeys(p.hypervisor for p in entry.placeholders):
                findings += _drift(ctx, entry, inventory(name))
        except OffloadError as error:
            findings.append(
                Finding(island=entry.name, what=error.message, do=error.hint or "mend it first")
            )
    return CheckReport(
        islands=len(statuses),
        placeholders=sum(len(status.island.placeholders) for status in statuses),
        findings=tuple(findings),
    )


def _standing(status: IslandStatus) -> Iterator[Finding]:
    entry = status.island
    if status.problem:
        yield Finding(island=entry.name, what=status.problem, do="mend that, and check again")
    if entry.state is IslandState.GOING:
        yield Finding(island=entry.name, what="it is half gone", do=f"offload unmount {entry.name}")
    if entry.state is IslandState.BUILDING:
        yield Finding(
            island=entry.name,
            what="it is being built, or its build was cut off",
            do="wait, or: offload recover",
        )
    for view in status.dead:
        yield Finding(island=entry.name, what=f"view {view} is not served", do="offload recover")
    for placeholder in entry.placeholders:
        found = status.of(placeholder)
        if found is None:
            continue
        problem = found.problem or ("" if found.there else "it is not there any more")
        if problem:
            yield Finding(
                island=entry.name,
                placeholder=placeholder.name,
                vm=placeholder.vm,
                what=problem,
                do=found.do or _anew(entry),
            )


def _drift(ctx: Context, entry: Island, inventory: Inventory) -> Iterator[Finding]:
    by_id = {vm.id: vm for vm in inventory.vms}
    mine = [p for p in entry.placeholders if p.hypervisor == inventory.hypervisor]
    for placeholder in mine:
        now = by_id.get(placeholder.production)
        for what in drift(placeholder, now):
            yield Finding(
                island=entry.name,
                placeholder=placeholder.name,
                vm=placeholder.vm,
                what=what,
                do=_anew(entry) if now is not None else _without(entry, placeholder),
            )
    yield from _choice(ctx, entry, inventory, {p.production for p in mine})


def _choice(
    ctx: Context, entry: Island, inventory: Inventory, standing: set[str]
) -> Iterator[Finding]:
    """What the group chooses now and did not, unless the VMs were named for the island."""
    config = ctx.instance.config
    group = config.groups.get(entry.group)
    if group is None or group.hypervisor != inventory.hypervisor or asked_of(entry).vms:
        return
    try:
        chosen = groups.choose(config, entry.group, inventory)
    except OffloadError as error:
        yield Finding(island=entry.name, what=error.message, do=error.hint)
        return
    for vm in chosen.vms:
        if vm.id not in standing:
            yield Finding(
                island=entry.name,
                vm=vm.name,
                what=f"group {entry.group} chooses VM {vm.name} now, which has no placeholder",
                do=_anew(entry),
            )
    there = {vm.id for vm in inventory.vms}
    for placeholder in entry.placeholders:
        if placeholder.production in there - {vm.id for vm in chosen.vms}:
            yield Finding(
                island=entry.name,
                placeholder=placeholder.name,
                vm=placeholder.vm,
                what=f"group {entry.group} does not choose VM {placeholder.vm} any more",
                do=_anew(entry),
            )


def _anew(entry: Island) -> str:
    return f"offload placeholder refresh {entry.name}"


def _without(entry: Island, placeholder: Placeholder) -> str:
    return (
        f"back it up now, if it never was; then take {placeholder.vm} out of the group and: "
        f"{_anew(entry)}"
    )


# -- refresh ---------------------------------------------------------------------------------------


def refresh(
    ctx: Context, names: Sequence[str], progress: Progress | None = None, *, force: bool = False
) -> Iterator[IslandReport]:
    """Let islands show a new TimeMark of their groups, under their names; each as it is done.

    The new TimeMark comes first, then the old placeholders go, then the new ones come: their names
    are the same, and a host has each once. Raises what `mount` and `unmount` raise.
    """
    for entry in _chosen(ctx, names):
        if entry.group not in ctx.instance.config.groups:
            raise NotFoundError(
                f"island {entry.name} is of group {entry.group}, which is not configured any more",
                code="unknown-group",
                hint=f"offload unmount {entry.name}",
            )
        yield island.replace_island(ctx, entry, progress or NoProgress(), force=force)
