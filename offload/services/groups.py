"""From a group's name to volumes and VMs: what its selectors choose now.

VMs are found on the volumes by their LUNs (`volumes.NAME.lun`), or, where the hypervisor names a
file, a block device or an RBD image, by that. The inventory is read afresh: VMs move.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from offload import compose
from offload.config import Config, GroupConfig
from offload.configs.quiesce import FreezeConfig, LibvirtFreeze, VmConfig, VmwareFreeze
from offload.inventory import Inventory, InventoryVm
from offload.machine import Machine
from offload.model import Consistency
from offload.services.context import Context
from offload.services.disk_volumes import volumes_of
from offload.services.group_choice import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A group as it is now: `config` names its volumes, `vms` are those that were chosen, their
    disks with the volume that holds them. `notes`: what a person must know of the choice."""

    name: str
    config: GroupConfig
    vms: tuple[InventoryVm, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> dict[str, tuple[str, ...]]:
        """Ids of the VMs, by hypervisor."""
        if self.config.hypervisor is None:
            return {}
        return {self.config.hypervisor: tuple(vm.id for vm in self.vms)}


def resolve(ctx: Context, name: str) -> Resolved:
    """Look up what a group is now.

    Raises NotFoundError (`unknown-group`, `unknown-vm`, `ambiguous-vm`, `unknown-datastore`,
    `unknown-lun`), PolicyError (`nothing-chosen`, `vm-is-template`, `vm-is-placeholder`,
    `vm-without-disks`, `disk-without-volume`, `disk-without-lun`), and what the hypervisor raises.
    """
    config = ctx.instance.config.group(name)
    if config.hypervisor is None:
        return Resolved(name=name, config=config)
    with compose.hypervisor(config.hypervisor, ctx.instance) as hypervisor:
        inventory = hypervisor.inventory()
    return choose(ctx.instance.config, name, inventory)


def choose(config: Config, name: str, inventory: Inventory) -> Resolved:
    """What the selectors of a group choose from an inventory. Raises what `resolve` raises."""
    choice = Choice(config, name, inventory)
    choice.make()
    return Resolved(
        name=name,
        config=config.group(name).model_copy(update={"volumes": choice.volumes}),
        vms=tuple(choice.vms),
        notes=tuple(choice.notes),
    )


def entry_of(config: Config, hypervisor: str, vm: InventoryVm | Machine) -> str:
    """The name of the `[vms]` entry of a VM; "" where it has none."""
    known = {vm.name, vm.id, vm.uuid, vm.instance_uuid} - {""}
    for name, entry in config.vms.items():
        match entry.freeze:
            case LibvirtFreeze(hypervisor=where, domain=wanted):
                if where == hypervisor and wanted in known:
                    return name
            case VmwareFreeze(hypervisor=where, vm=wanted):
                if where == hypervisor and wanted in known:
                    return name
            case _:
                if name == vm.name:
                    return name
    return ""


def to_quiesce(config: Config, resolved: Resolved, least: Consistency) -> dict[str, VmConfig]:
    """The VMs to hold for a TimeMark, by name: those of `[vms]` with a disk on its volumes, and
    those that were chosen and have no entry, by their hypervisor, where more than `crash` is asked
    for."""
    volumes = set(resolved.config.volumes)
    found = {name: vm for name, vm in config.vms.items() if volumes & set(vm.volumes)}
    hypervisor = resolved.config.hypervisor
    if hypervisor is None or least is Consistency.CRASH:
        return found
    names = Counter(vm.name for vm in resolved.vms)
    for vm in resolved.vms:
        if not entry_of(config, hypervisor, vm):
            alone = names[vm.name] == 1 and vm.name not in found
            found[vm.name if alone else full_name(vm)] = VmConfig(
                volumes=tuple(dict.fromkeys(v for d in vm.disks for v in volumes_of(config, d))),
                freeze=_freeze(config, hypervisor, vm),
            )
    return found


def _freeze(config: Config, hypervisor: str, vm: InventoryVm) -> FreezeConfig:
    if config.hypervisor(hypervisor).kind == "libvirt":
        return LibvirtFreeze(kind="libvirt", hypervisor=hypervisor, domain=vm.id)
    return VmwareFreeze(kind="vmware", hypervisor=hypervisor, vm=vm.name, moref=vm.id)


def full_name(vm: InventoryVm | Machine) -> str:
    """Names are not unique in a vCenter."""
    return f"{vm.name} ({vm.id})"
