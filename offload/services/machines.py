"""Settings of VMs: taken with a TimeMark, kept with its backups, found again for both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from offload import compose
from offload.config import Config
from offload.configs.quiesce import LibvirtFreeze, VmwareFreeze
from offload.engine.manifests import read_manifest
from offload.errors import NotFoundError, OffloadError
from offload.machine import Machine
from offload.origin import Origin, OriginKind
from offload.services import stores
from offload.services.context import Context
from offload.services.disk_volumes import volume_of


def capture(
    ctx: Context, chosen: Mapping[str, Iterable[str]], group: str
) -> tuple[tuple[Machine, ...], tuple[str, ...]]:
    """The settings of the VMs of a group now, and warnings for those that could not be had.

    `chosen`: ids of VMs that were looked up, by hypervisor. To them come the VMs of the
    configuration with a disk on the group's volumes, whose hypervisor is known by their `freeze`.
    A backup without them is better than none, so nothing is raised.
    """
    wanted = {name: dict.fromkeys(ids) for name, ids in chosen.items()}
    named = _configured(ctx.instance.config, group)
    found: list[Machine] = []
    warnings: list[str] = []
    for name in dict.fromkeys([*wanted, *named]):
        try:
            with compose.hypervisor(name, ctx.instance) as hypervisor:
                ids = dict(wanted.get(name, {}))
                for vm in named.get(name, ()):
                    try:
                        ids[hypervisor.find(vm)] = None
                    except OffloadError as error:
                        warnings.append(f"the settings of VM {vm} are not kept: {error.message}")
                for vm_id in ids:
                    try:
                        machine = hypervisor.machine(vm_id)
                    except OffloadError as error:
                        warnings.append(f"the settings of VM {vm_id} are not kept: {error.message}")
                    else:
                        found.append(placed(ctx.instance.config, machine))
                        lost = machine.summary.get("left_out", ())
                        warnings += [f"of VM {machine.name} is not kept: {what}" for what in lost]
        except OffloadError as error:
            warnings.append(f"settings of VMs on {name} are not kept: {error.message}")
    return tuple(sorted(found, key=lambda m: (m.hypervisor, m.name, m.id))), tuple(warnings)


def _configured(config: Config, group: str) -> dict[str, list[str]]:
    """By hypervisor, how `[vms]` name those with a disk on the group's volumes."""
    found: dict[str, list[str]] = {}
    for vm in config.vms_of(group).values():
        match vm.freeze:
            case LibvirtFreeze():
                found.setdefault(vm.freeze.hypervisor, []).append(vm.freeze.domain)
            case VmwareFreeze():
                found.setdefault(vm.freeze.hypervisor, []).append(vm.freeze.vm)
    return found


def placed(config: Config, machine: Machine) -> Machine:
    """With the volumes of ours that hold its disks."""
    disks = (replace(disk, volume=volume_of(config, disk)) for disk in machine.disks)
    return replace(machine, disks=tuple(disks))


def machines_of(ctx: Context, origin: Origin) -> tuple[Machine, ...]:
    """The settings that were kept with a TimeMark, or with a backup: from its store.

    Raises NotFoundError, and what stores raise.
    """
    if origin.kind is OriginKind.TIMEMARK:
        return ctx.catalog.timemark(origin.id).machines
    known = ctx.catalog.backup(origin.id)
    with stores.opened(ctx, known.store, exclusive=False) as repository:
        return read_manifest(repository, known.id, known.store).machines


def chosen(machines: Sequence[Machine], names: Sequence[str]) -> tuple[Machine, ...]:
    """Those of these names, UUIDs or ids; all where none is named.

    Raises NotFoundError (`unknown-vm`, `ambiguous-vm`).
    """
    if not names:
        return tuple(machines)
    found = {}
    for name in names:
        keys = {name, name.lower()}
        hits = [m for m in machines if keys & {m.name, m.id, m.uuid.lower(), m.instance_uuid}]
        if not hits:
            known = ", ".join(sorted(m.name for m in machines)) or "none"
            raise NotFoundError(
                f"there is no VM '{name}' at this point in time",
                code="unknown-vm",
                hint=f"it has: {known}",
            )
        if len(hits) > 1:
            ids = ", ".join(sorted(m.instance_uuid or m.uuid for m in hits))
            raise NotFoundError(
                f"there are {len(hits)} VMs '{name}' at this point in time",
                code="ambiguous-vm",
                hint=f"name it by its UUID: {ids}",
            )
        found[hits[0].id] = hits[0]
    return tuple(found.values())
