"""Placeholders are registered: their folder, their names, their VMs.

Source: vSphere Web Services API, Folder.RegisterVM_Task, Folder.CreateFolder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyVmomi import vim, vmodl

from offload.errors import BusyError
from offload.hypervisors.vsphere.datastore import OurDatastore
from offload.hypervisors.vsphere.hosts import Host, reference
from offload.hypervisors.vsphere.properties import read_each
from offload.hypervisors.vsphere.tasks import Job, error_of, run_all
from offload.machine import Machine
from offload.vsphere import Vsphere

NAME_MAX = 79  # characters: a name has fewer than 80 (VirtualMachine, `name`)
_DIGEST = 6
# RegisterVM_Task: "%", "/" and "\" are written %25, %2f and %5c, in either case
_PERCENT = re.compile(r"%(?!25|2[fF]|5[cC])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A placeholder to be: its name, and its .vmx (`[datastore] folder/name.vmx`)."""

    vm: str  # reference of the production VM
    name: str
    path: str


def escaped(name: str) -> str:
    """A name as the API takes it; one that comes from there stays as it is."""
    return _PERCENT.sub("%25", name).replace("/", "%2f").replace("\\", "%5c")


def placeholder_names(prefix: str, machines: Iterable[Machine]) -> dict[str, str]:
    """By reference of the production VM, the name of its placeholder: at most NAME_MAX characters,
    and each once. The same from the same machines."""
    names: dict[str, str] = {}
    for machine in sorted(machines, key=lambda m: (m.name, m.id)):
        name = _short(escaped(f"{prefix}{machine.name}"), machine.id)
        if name in names.values():
            name = _short(f"{name}-{machine.id}", machine.id)
        names[machine.id] = name
    return names


def _short(name: str, moref: str) -> str:
    if len(name) <= NAME_MAX:
        return name
    tail = f"-{hashlib.sha256(f'{name}{moref}'.encode()).hexdigest()[:_DIGEST]}"
    cut = name[: NAME_MAX - len(tail)]
    return re.sub(r"%[0-9a-fA-F]?$", "", cut) + tail  # no half of an escape


def find_folder(vsphere: Vsphere, host: Host, name: str) -> Any | None:
    """Our folder of VMs in the host's datacenter, if it is there."""
    parent = vim.Folder(host.vm_folder, vsphere.stub)
    with vsphere.translated(f"the folder {name}"):
        children = vsphere.read(parent, "childEntity").get("childEntity", ())
        folders = [child for child in children if isinstance(child, vim.Folder)]
        known = read_each(vsphere, folders, "name")
    return next(
        (f for f in folders if known.get(reference(f), {}).get("name") == escaped(name)), None
    )


def ensure_folder(vsphere: Vsphere, host: Host, name: str) -> Any:
    """The same; made if it is missing. It stays when its last placeholder goes."""
    found = find_folder(vsphere, host, name)
    if found is not None:
        return found
    with vsphere.translated(f"the folder {name}"):
        try:
            return vim.Folder(host.vm_folder, vsphere.stub).CreateFolder(name=escaped(name))
        except vim.fault.DuplicateName as there:  # somebody was faster
            return there.object


def vms_in(vsphere: Vsphere, folder: Any) -> dict[str, str]:
    """References and names of the VMs in a folder."""
    with vsphere.translated("the folder of placeholders"):
        children = vsphere.read(folder, "childEntity").get("childEntity", ())
        vms = [child for child in children if isinstance(child, vim.VirtualMachine)]
        known = read_each(vsphere, vms, "name")
    return {moref: fields.get("name", "") for moref, fields in known.items()}


def registered(vsphere: Vsphere, datastores: Sequence[OurDatastore]) -> dict[str, str]:
    """By path of the .vmx, the references of VMs that are registered from these datastores."""
    vms = [vim.VirtualMachine(m, vsphere.stub) for d in datastores for m in d.vms]
    with vsphere.translated("the placeholders that stand"):
        known = read_each(vsphere, vms, "config.files.vmPathName")
    return {
        str(fields["config.files.vmPathName"]): moref
        for moref, fields in known.items()
        if "config.files.vmPathName" in fields
    }


def register(
    vsphere: Vsphere,
    host: Host,
    folder: Any,
    wanted: Sequence[Wanted],
    there: dict[str, str],
    *,
    timeout_s: float,
) -> dict[str, str]:
    """References by path of the .vmx. What is in `there` already is not registered again.

    Raises BusyError (`name-taken`), and what `Vsphere.translated` raises.
    """
    todo = [entry for entry in wanted if entry.path not in there]
    pool = vim.ResourcePool(host.pool, vsphere.stub)
    system = vim.HostSystem(host.host, vsphere.stub)
    results = run_all(
        vsphere,
        [
            Job(
                f"the registration of {entry.name}",
                partial(
                    folder.RegisterVM_Task,
                    path=entry.path,
                    name=entry.name,
                    asTemplate=False,
                    pool=pool,
                    host=system,
                ),
            )
            for entry in todo
        ],
        timeout_s=timeout_s,
    )
    found = dict(there)
    for entry, result in zip(todo, results, strict=True):
        if isinstance(result, vim.fault.DuplicateName):
            raise BusyError(
                f"there is a VM {entry.name} already",
                code="name-taken",
                hint="unmount its island, or give the backup host another prefix",
            )
        if isinstance(result, vmodl.MethodFault):
            raise error_of(vsphere, result, f"the registration of {entry.name}")
        found[entry.path] = reference(result)
    return {entry.path: found[entry.path] for entry in wanted}
