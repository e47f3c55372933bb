"""What would be refused on the way, found out before production is frozen for it. Changes nothing.

Sources: vSphere Web Services API, AuthorizationManager.HasPrivilegeOnEntity, LicenseManager;
privileges: the "Required privileges" of each call that is made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyVmomi import vim

from offload.errors import PolicyError, PrivilegeError
from offload.hypervisor import IslandRequest
from offload.hypervisors.vsphere.hosts import Host
from offload.island import Shown
from offload.machine import DiskKind, Machine
from offload.vsphere import Vsphere

ON_HOST = ("Host.Config.Storage",)
ON_POOL = ("Resource.AssignVMToPool",)
ON_FOLDER = (
    "Folder.Create",
    "VirtualMachine.Inventory.Register",
    "VirtualMachine.Inventory.Unregister",
    "VirtualMachine.Config.AddRemoveDevice",
    "VirtualMachine.Config.AdvancedConfig",
    "VirtualMachine.Config.Annotation",
    "VirtualMachine.Config.EditDevice",
    "VirtualMachine.Config.RemoveDisk",
    "VirtualMachine.State.RevertToSnapshot",
    "VirtualMachine.State.RemoveSnapshot",
)
ON_DATACENTER = ("Datastore.Browse", "Datastore.FileManagement", "Datastore.Rename")
SCATTERED = "VM {} has disks on several datastores: it shows the group's instant, not its own"
_FREE = "esxBasic"  # edition of the free licence
_ELSEWHERE = {
    DiskKind.VSAN: "a vSAN disk is no LUN",
    DiskKind.VVOL: "a virtual volume is no LUN",
}


def check_licence(vsphere: Vsphere) -> None:
    """The API of a free ESXi is read-only. Raises PrivilegeError (`vsphere-read-only`)."""
    if vsphere.is_vcenter:
        return
    manager = vsphere.content.licenseManager
    if manager is None:
        return
    with vsphere.translated("the licence"):
        licences = vsphere.read(manager, "licenses").get("licenses", ())
    if licences and all(licence.editionKey == _FREE for licence in licences):
        raise PrivilegeError(
            f"{vsphere.server} is a free ESXi: its API is read-only", code="vsphere-read-only"
        )


def check_privileges(vsphere: Vsphere, host: Host) -> None:
    """Raises PrivilegeError (`vsphere-privilege`) with each that is missing, and on what."""
    stub = vsphere.stub
    wanted: list[tuple[Any, str, tuple[str, ...]]] = [
        (vim.HostSystem(host.host, stub), f"host {host.name}", ON_HOST),
        (vim.ResourcePool(host.pool, stub), f"the resource pool of {host.name}", ON_POOL),
        (vim.Folder(host.vm_folder, stub), f"the VM folder of {host.datacenter_name}", ON_FOLDER),
        (
            vim.Datacenter(host.datacenter, stub),
            f"datacenter {host.datacenter_name}",
            ON_DATACENTER,
        ),
    ]
    missing = []
    with vsphere.translated("the privileges of this user"):
        session = vsphere.read(vsphere.content.sessionManager, "currentSession")["currentSession"]
        for managed, name, privileges in wanted:
            lacking = _lacking(vsphere, managed, session.key, privileges)
            if lacking:
                missing.append(f"{', '.join(lacking)} on {name}")
    if missing:
        raise PrivilegeError(
            f"this user lacks privileges in vSphere: {'; '.join(missing)}",
            code="vsphere-privilege",
            hint="give its role these privileges, propagated to what is below",
        )


def _lacking(
    vsphere: Vsphere, managed: Any, session: str, privileges: tuple[str, ...]
) -> list[str]:
    has = vsphere.content.authorizationManager.HasPrivilegeOnEntity(
        entity=managed, sessionId=session, privId=list(privileges)
    )
    return [privilege for privilege, held in zip(privileges, has, strict=True) if not held]


def refuse_machines(request: IslandRequest) -> None:
    """VMs that cannot have a placeholder. Raises PolicyError, with all of them."""
    found = [said for machine in request.machines for said in _refusals(machine)]
    if found:
        raise PolicyError(
            "; ".join(found),
            code="no-placeholder",
            hint="leave them out (--vm names the others), or back them up by an agent in the guest",
        )


def _refusals(machine: Machine) -> Iterator[str]:
    if machine.kind != "vsphere":
        yield f"VM {machine.name} is of {machine.kind}: no placeholder of it can stand on vSphere"
        return
    if machine.summary.get("template"):
        yield f"{machine.name} is a template: make it a VM, or leave it out"
    if machine.summary.get("encrypted") or "encryption.keySafe" in machine.definition:
        yield f"VM {machine.name} is encrypted: its settings cannot be read without its keys"
    for disk in machine.disks:
        label = disk.label or disk.name
        if disk.kind in _ELSEWHERE:
            yield (
                f"VM {machine.name}: {label} cannot be shown: {_ELSEWHERE[disk.kind]} "
                "(an agent in the guest can back it up)"
            )
        elif disk.problem:
            yield f"VM {machine.name}: {label} cannot be shown: {disk.problem}"
        elif disk.encrypted:
            yield f"VM {machine.name}: {label} is encrypted"
        elif disk.shared:
            yield f"VM {machine.name}: {label} is on a shared bus: VM snapshots refuse it"


def is_scattered(machine: Machine) -> bool:
    """Whether it has disks on several datastores: its snapshots name them by their places in
    production, which a revert would bring back."""
    return len({disk.datastore for disk in machine.disks if disk.datastore}) > 1


def warnings_of(request: IslandRequest) -> list[str]:
    """What a person must know before: lesser points in time."""
    found = []
    for machine in request.machines:
        if request.shown is not Shown.VM or machine.name not in request.vm_snapshot:
            continue
        if is_scattered(machine):
            found.append(SCATTERED.format(machine.name))
        apart = [disk.label or disk.name for disk in machine.disks if disk.independent]
        if apart:
            found.append(
                f"VM {machine.name}: {', '.join(apart)} is independent, so in no VM snapshot: "
                "it is shown as of the group's instant"
            )
    return found
