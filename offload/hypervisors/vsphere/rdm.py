"""Raw device mappings in a copy of a VMFS: they still point at the production LUN.

So each is replaced by one that points at our copy of that LUN, or removed, *before* the VM that has
it is registered: nobody ever sees a placeholder with a disk of production.

Sources: vSphere Web Services API, VirtualDiskManager (DeviceBackedVirtualDiskSpec). That deleting a
mapping leaves its LUN alone is how vmkfstools -U is documented; for this call it is our inference,
untested on a real ESXi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pyVmomi import vim, vmodl

from offload.hypervisors.vsphere.hosts import Host
from offload.hypervisors.vsphere.tasks import Job, error_of, run_all, run_one
from offload.machine import DiskKind, Machine, MachineDisk
from offload.vsphere import Vsphere

KINDS = (DiskKind.RDM, DiskKind.RDM_PHYSICAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """A mapping file of the copy, `[datastore] folder/name.vmdk`, and where it is to point: the
    device of our copy, or "" where it goes."""

    disk: str  # its name in the VM
    path: str
    physical: bool
    device: str
    note: str = ""


def plan(
    machine: Machine,
    place: Callable[[str], str],
    device: Callable[[Sequence[str]], str],
    *,
    at_parents: bool,
) -> list[Mapping]:
    """What becomes of each mapping of a VM.

    `place`: a path of production on the copy, "" where it is on none of ours; `device`: that of our
    copy of LUNs, or "". `at_parents`: the placeholder shows the parents of its disks. A delta names
    the parent that it belongs to by a number in that: over a new mapping it would not open.
    """
    found = []
    for disk in machine.disks:
        if disk.kind not in KINDS:
            continue
        path = place(disk.chain[-1] if disk.chain else disk.path)
        ours = device(disk.luns)
        kept = ours if path and (not disk.chain or at_parents) else ""
        found.append(
            Mapping(
                disk=disk.name,
                path=path,
                physical=disk.kind is DiskKind.RDM_PHYSICAL,
                device=kept,
                note=_note(disk, ours, kept),
            )
        )
    return found


def _note(disk: MachineDisk, ours: str, kept: str) -> str:
    label = disk.label or disk.name
    if kept:
        physical = disk.kind is DiskKind.RDM_PHYSICAL
        return f"{label} is a physical RDM: crash-consistent, as of the group" if physical else ""
    if ours:
        return f"{label} is left out: an RDM under a VM snapshot; mount it with --shows vm"
    where = ", ".join(disk.luns) or "an unknown LUN"
    return f"{label} is left out: an RDM of {where}, which is no volume of the group"


def apply(vsphere: Vsphere, host: Host, mappings: Sequence[Mapping], timeout_s: float) -> None:
    """Replace or remove the files. Can be done again. Raises what tasks raise."""
    manager = vsphere.content.virtualDiskManager
    datacenter = vim.Datacenter(host.datacenter, vsphere.stub)
    ours = [mapping for mapping in mappings if mapping.path]
    gone = run_all(
        vsphere,
        [
            Job(
                f"the removal of the mapping {mapping.path}",
                partial(manager.DeleteVirtualDisk_Task, name=mapping.path, datacenter=datacenter),
            )
            for mapping in ours
        ],
        timeout_s=timeout_s,
    )
    for mapping, fault in zip(ours, gone, strict=True):
        missing = isinstance(fault, vim.fault.FileNotFound | vim.fault.NotFound)
        if isinstance(fault, vmodl.MethodFault) and not missing:
            raise error_of(vsphere, fault, f"the removal of the mapping {mapping.path}")
    for mapping in ours:
        if mapping.device:
            spec = vim.VirtualDiskManager.DeviceBackedVirtualDiskSpec(
                diskType="rdmp" if mapping.physical else "rdm",
                adapterType="lsiLogic",
                device=mapping.device,
            )
            run_one(
                vsphere,
                f"the mapping {mapping.path} to {mapping.device}",
                partial(
                    manager.CreateVirtualDisk_Task,
                    name=mapping.path,
                    datacenter=datacenter,
                    spec=spec,
                ),
                timeout_s=timeout_s,
            )
