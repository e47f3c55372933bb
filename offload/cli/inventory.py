"""`offload inventory`."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from offload.cli import complete
from offload.cli.app import Group, Settings, settings_of
from offload.cli.output import emit, facts, note, show_age, show_time, table, to_json
from offload.cli.session import reading_context
from offload.quantity import show_size

if TYPE_CHECKING:
    from offload.inventory import Inventory, InventoryVm
    from offload.services.inventory import Event, ShownVm

_KINDS = ("vms", "datastores", "hosts")
_BY = ("folder", "host", "datastore", "tag")


@click.group(
    cls=Group,
    examples=[
        "offload inventory refresh",
        "offload inventory list --tag backup:nightly",
        "offload inventory show web1",
    ],
)
def inventory() -> None:
    """What the hypervisors have: VMs, their disks, datastores and LUNs, hosts.

    `refresh` reads it and keeps it in the catalog; the other verbs show it from there. Groups that
    choose VMs read it anew each time.
    """


@inventory.command(
    "refresh",
    json_help="Print one JSON array; with --follow one object a line.",
    examples=["offload inventory refresh", "offload inventory refresh vc --follow"],
)
@click.argument("hypervisor", required=False, shell_complete=complete.hypervisors)
@click.option("--follow", is_flag=True, help="Keep it current until Ctrl-C, printing changes.")
@click.pass_context
def refresh(ctx: click.Context, hypervisor: str | None, follow: bool) -> None:
    """Read the inventory of a hypervisor, or of all, and keep it in the catalog."""
    from offload.services import inventory as service

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        chosen = service.names(context, hypervisor)
        if follow:
            if len(chosen) > 1:
                raise click.UsageError("--follow needs the name of one hypervisor", ctx)
            _follow(settings, service.follow(context, chosen[0]))
            return
        found = [service.fresh(context, name) for name in chosen]
    _tell_problems(settings, found)
    emit(settings, [_counts(each) for each in found], lambda: _show_counts(found))


def _follow(settings: Settings, events: Iterator[Event]) -> None:
    signal.signal(signal.SIGTERM, _end)
    try:
        for event in events:
            if settings.json:
                click.echo(json.dumps(to_json(event), ensure_ascii=False))
            else:
                what = f"{event.kind} {event.name}: " if event.name else ""
                click.echo(f"{show_time(event.at)}  {event.hypervisor}: {what}{event.message}")
    except KeyboardInterrupt:
        return  # the way in which it is meant to end


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _counts(found: Inventory) -> dict[str, Any]:
    return {
        "hypervisor": found.hypervisor,
        "taken_at": found.taken_at,
        "vms": len(found.vms),
        "datastores": len(found.datastores),
        "hosts": len(found.hosts),
        "tags_problem": found.tags_problem,
    }


def _show_counts(found: Sequence[Inventory]) -> None:
    header = ["hypervisor", "vms", "datastores", "hosts"]
    rows = [
        [each.hypervisor, str(len(each.vms)), str(len(each.datastores)), str(len(each.hosts))]
        for each in found
    ]
    table(header, rows, "")


@inventory.command(
    "list",
    examples=[
        "offload inventory list",
        "offload inventory list vc --folder /DC0/vm/web",
        "offload inventory list --kind datastores --json",
    ],
)
@click.argument("hypervisor", required=False, shell_complete=complete.hypervisors)
@click.option("--kind", type=click.Choice(_KINDS), default="vms", show_default=True)
@click.option("--tag", help="VMs with this tag (category:tag).")
@click.option("--folder", help="VMs in this folder, and below it.")
@click.option("--datastore", help="VMs with a disk on this datastore.")
@click.option("--host", help="VMs that run on this host.")
@click.pass_context
def list_(ctx: click.Context, /, hypervisor: str | None, kind: str, **wanted: str | None) -> None:
    """List VMs, datastores or hosts, as of the last refresh."""
    from offload.services import inventory as service
    from offload.services.inventory_views import fits

    settings = settings_of(ctx)
    chosen = {key: value for key, value in wanted.items() if value is not None}
    if chosen and kind != "vms":
        raise click.UsageError(f"--{next(iter(chosen))} goes with --kind vms only", ctx)
    with reading_context(settings) as context:
        found = [service.last(context, name) for name in service.names(context, hypervisor)]
    _tell_age(settings, found)
    rows = [
        (each.hypervisor, entry)
        for each in found
        for entry in getattr(each, kind)
        if kind != "vms" or fits(entry, **chosen)
    ]
    show = {"vms": _show_vms, "datastores": _show_stores, "hosts": _show_hosts}[kind]
    emit(
        settings,
        [{"hypervisor": name, **to_json(entry)} for name, entry in rows] if settings.json else [],
        lambda: show(rows),
    )


def _tell_age(settings: Settings, found: Sequence[Inventory]) -> None:
    for each in found:
        age_s = (datetime.now(UTC) - each.taken_at).total_seconds()
        note(settings, f"{each.hypervisor}: read {show_age(age_s)} ago, {show_time(each.taken_at)}")
    _tell_problems(settings, found)


def _tell_problems(settings: Settings, found: Sequence[Inventory]) -> None:
    for each in found:
        if each.tags_problem:
            note(settings, f"{each.hypervisor}: tags are not known: {each.tags_problem}")


def _show_vms(rows: Sequence[tuple[str, Any]]) -> None:
    header = [
        "hypervisor",
        "name",
        "power",
        "tools",
        "host",
        "folder",
        "disks",
        "size",
        "on",
        "tags",
    ]
    table(
        header,
        [
            [
                name,
                vm.name + _remark(vm),
                vm.power,
                vm.tools or "-",
                vm.host or "-",
                vm.folder or "-",
                str(len(vm.disks)),
                show_size(sum(disk.size_bytes for disk in vm.disks)),
                ", ".join(dict.fromkeys(d.datastore for d in vm.disks if d.datastore)) or "-",
                ", ".join(vm.tags) or "-",
            ]
            for name, vm in rows
        ],
        "no VMs",
    )


def _remark(vm: InventoryVm) -> str:
    if vm.placeholder:
        return f" (placeholder of {vm.placeholder})"
    return " (template)" if vm.template else ""


def _show_stores(rows: Sequence[tuple[str, Any]]) -> None:
    header = ["hypervisor", "name", "kind", "size", "free", "luns"]
    table(
        header,
        [
            [
                name,
                store.name,
                store.kind + ("" if store.accessible else ", not accessible"),
                show_size(store.capacity_bytes),
                show_size(store.free_bytes),
                ", ".join(store.luns) or "-",
            ]
            for name, store in rows
        ],
        "no datastores",
    )


def _show_hosts(rows: Sequence[tuple[str, Any]]) -> None:
    table(
        ["hypervisor", "name", "state"],
        [[name, host.name, host.state] for name, host in rows],
        "no hosts",
    )


@inventory.command("show", examples=["offload inventory show web1"])
@click.argument("vm")
@click.option("--hypervisor", shell_complete=complete.hypervisors, help="Look there only.")
@click.pass_context
def show(ctx: click.Context, vm: str, hypervisor: str | None) -> None:
    """Show one VM, by name, id or UUID: its disks, their LUNs, the volumes that hold them."""
    from offload.services import inventory as service

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = service.show(context, vm, hypervisor)
    data = {
        "hypervisor": found.hypervisor,
        "taken_at": found.taken_at,
        **to_json(found.vm),
        "volumes": found.volumes,
    }
    emit(settings, data, lambda: _show_vm(found))


def _show_vm(found: ShownVm) -> None:
    vm = found.vm
    facts(
        [
            ("name", vm.name + _remark(vm)),
            ("hypervisor", f"{found.hypervisor}, read {show_time(found.taken_at)}"),
            ("id", vm.id),
            ("uuid", vm.uuid),
            ("instance uuid", vm.instance_uuid),
            ("power", vm.power),
            ("tools", vm.tools),
            ("host", vm.host),
            ("folder", vm.folder),
            ("tags", ", ".join(vm.tags)),
            ("firmware", vm.firmware),
            ("encrypted", "yes" if vm.encrypted else ""),
        ]
    )
    rows = [
        [
            disk.name,
            disk.kind.value,
            show_size(disk.size_bytes),
            disk.path,
            ", ".join(disk.luns) or disk.problem or "-",
            ", ".join(found.volumes[disk.name]) or "-",
            ", ".join(_properties(disk)) or "-",
        ]
        for disk in vm.disks
    ]
    table(["disk", "kind", "size", "path", "on", "volume", "properties"], rows, "it has no disks")


def _properties(disk: Any) -> Iterator[str]:
    if disk.chain:
        yield f"{len(disk.chain)} parents"
    for name in ("independent", "shared", "encrypted"):
        if getattr(disk, name):
            yield name


@inventory.command("tree", examples=["offload inventory tree", "offload inventory tree --by host"])
@click.argument("hypervisor", required=False, shell_complete=complete.hypervisors)
@click.option("--by", type=click.Choice(_BY), default="folder", show_default=True)
@click.pass_context
def tree(ctx: click.Context, hypervisor: str | None, by: str) -> None:
    """Show VMs below their folders, hosts, datastores or tags, as of the last refresh."""
    from offload.services import inventory as service
    from offload.services.inventory_views import tree_of

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = [service.last(context, name) for name in service.names(context, hypervisor)]
    _tell_age(settings, found)
    trees = {each.hypervisor: tree_of(each, by) for each in found}
    emit(settings, trees, lambda: _show_tree(trees, 0))


def _show_tree(below: dict[str, Any], depth: int) -> None:
    for name, inner in sorted(below.items()):
        said = f"  {inner}" if isinstance(inner, str) else ""
        click.echo(f"{'  ' * depth}{name}{said}")
        if isinstance(inner, dict):
            _show_tree(inner, depth + 1)
