"""A VM made again from writable TimeViews of the datastores that it lay on: a restore.

The views become datastores of the host as those of an island do; there the VM's settings get a new
name and fresh identities, and it is registered. What `destroy` needs is kept in a file of the state
folder before anything is made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from pyVmomi import vim

from offload import iscsi
from offload.errors import NotFoundError, PolicyError, UsageError
from offload.filesystem import fsync_folder
from offload.hypervisor import Step
from offload.hypervisors.vsphere.attaching import Attaching
from offload.hypervisors.vsphere.building import read_settings, split
from offload.hypervisors.vsphere.files import datastore_files
from offload.hypervisors.vsphere.hosts import Host
from offload.hypervisors.vsphere.record import Record, RecordedLun
from offload.hypervisors.vsphere.register import Wanted, escaped, register, registered, vms_in
from offload.hypervisors.vsphere.vmx import Vmx, make_restored
from offload.instance import Instance
from offload.machine import Machine
from offload.vsphere import Vsphere

_PORT = 3260  # RFC 7143, 14
_MARK = "offload.restored"  # not that of placeholders: it may become production, and move elsewhere
_VIEW = re.compile(
    r":[^:.]+\.([^:.]+)(?:\.[^:]*)?$"
)  # what offload.iqn.view_iqn makes of a view's id


def refuse(machine: Machine) -> None:
    """Raises PolicyError (`vm-encrypted`), UsageError (`other-hypervisor`)."""
    if machine.kind != "vsphere":
        raise UsageError(
            f"VM {machine.name} is of {machine.kind}: it cannot be made again on vSphere",
            code="other-hypervisor",
            hint="name a backup host of its own kind",
        )
    if machine.summary.get("encrypted") or "encryption.keySafe" in machine.definition:
        raise PolicyError(
            f"VM {machine.name} is encrypted: its settings cannot be changed without its keys",
            code="vm-encrypted",
            hint="restore its LUN, and register it in vSphere, where its keys are",
        )


def taken_names(vsphere: Vsphere, host: Host) -> set[str]:
    """Of the VMs in the folder in which it will be."""
    return set(vms_in(vsphere, vim.Folder(host.vm_folder, vsphere.stub)).values())


def record_of(
    uris: Iterable[str], instance: Instance, *, mark: str, host: str, adapter: str, target: str
) -> Record:
    """Of views `iscsi://ADDRESS:PORT/IQN/LUN`. Raises UsageError (`not-a-view`)."""
    luns = []
    for uri in dict.fromkeys(uris):
        where = urlsplit(uri)
        iqn = where.path.strip("/").rpartition("/")[0]
        view = _VIEW.search(iqn)
        if where.scheme != "iscsi" or view is None:
            raise UsageError(
                f"{uri} is no view over iSCSI: a host of vSphere can use nothing else",
                code="not-a-view",
                hint="leave out --to: --instant presents its datastores to the host",
            )
        luns.append(
            RecordedLun(
                view=view[1],
                volume=view[1],
                iqn=iqn,
                address=where.hostname or "",
                port=where.port or _PORT,
                names=iscsi.canonical_names(target, view[1]),
            )
        )
    return Record(
        island=f"vm-{mark}",
        instance=instance.id,
        host=host,
        adapter=adapter,
        folder="",
        luns=tuple(luns),
    )


def keep(place: Path, record: Record) -> None:
    """Durable on return."""
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = place.with_suffix(".new")
    with fresh.open("w") as out:
        json.dump(record.to_strings(), out)
        out.flush()
        os.fsync(out.fileno())
    fresh.rename(place)
    fsync_folder(place.parent)


def kept(place: Path) -> Record | None:
    """None: nothing was made under it."""
    try:
        return Record.from_strings(json.loads(place.read_text()))
    except FileNotFoundError:
        return None


def register_vm(
    attaching: Attaching, machine: Machine, disks: Mapping[str, str], name: str, step: Step
) -> str:
    """Its reference. Raises NotFoundError (`vm-not-in-copy`), BusyError (`name-taken`)."""
    label, path = split(machine.definition_path)
    home = [copy for copy in attaching.copies if copy.label == label]
    if len(home) != 1:
        known = ", ".join(sorted(copy.label for copy in attaching.copies)) or "none"
        raise NotFoundError(
            f"the datastore {label} of VM {machine.name} is in none of the views (there: {known})",
            code="vm-not-in-copy",
        )
    wanted = Wanted(vm=machine.id, name=escaped(name), path=f"[{home[0].name}] {path}")

    def prepare(vsphere: Vsphere) -> None:
        with datastore_files(vsphere, attaching.host.datacenter_name) as files:
            vmx = Vmx(read_settings(files, machine, home[0], path))
            for disk in machine.disks:
                if disk.name not in disks:
                    vmx.drop(disk.name)
            make_restored(
                vmx,
                name=name,
                uuid=uuid4(),
                mark=(_MARK, attaching.record.mark),
                volumes=attaching.moves(),
            )
            files.write(home[0].name, path, vmx.text().encode("utf-8", "surrogateescape"))

    def put(vsphere: Vsphere) -> str:
        folder = vim.Folder(attaching.host.vm_folder, vsphere.stub)
        there = registered(vsphere, attaching.datastores(vsphere))
        timeout_s = attaching.timeout_s
        found = register(vsphere, attaching.host, folder, [wanted], there, timeout_s=timeout_s)
        return found[wanted.path]

    attaching.link.do(prepare)
    step("settings")
    moref = attaching.link.do(put)
    step("registered")
    return moref
