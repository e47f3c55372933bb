"""Datastores of ours on one host, as the inventory shows them.

Sources: vSphere Web Services API, Datastore, HostSystem.datastore. They are found by the LUNs that
they lie on; the inventory follows the host's storage some time later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim

from offload.errors import UnavailableError
from offload.hypervisors.vsphere.hosts import Host, reference
from offload.hypervisors.vsphere.properties import read_each
from offload.hypervisors.vsphere.record import Record
from offload.vsphere import Vsphere

LABEL_MAX = 42  # characters of a VMFS label (vSphere client, New Datastore)
_POLL_S = 0.5
_FIRST_POLL_S = 0.05
_TRIES = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class OurDatastore:
    """`vms`: references of all VMs that have anything on it."""

    moref: str
    name: str
    uuid: str  # of the VMFS
    names: frozenset[str]  # canonical names of its LUNs
    accessible: bool
    vms: tuple[str, ...]


def our_datastores(vsphere: Vsphere, host: Host, record: Record) -> list[OurDatastore]:
    """Those of the host on a LUN of the island."""
    with vsphere.translated(f"the datastores of host {host.name}"):
        system = vim.HostSystem(host.host, vsphere.stub)
        known = vsphere.read(system, "datastore").get("datastore", ())
        fields = read_each(vsphere, list(known), "name", "info", "summary.accessible", "vm")
    found = [_datastore(moref, values) for moref, values in fields.items() if "info" in values]
    return [datastore for datastore in found if datastore.names & record.names]


def _datastore(moref: str, values: dict[str, Any]) -> OurDatastore:
    vmfs = getattr(values["info"], "vmfs", None)  # not of NFS and others
    return OurDatastore(
        moref=moref,
        name=values.get("name", ""),
        uuid=vmfs.uuid if vmfs else "",
        names=frozenset(extent.diskName for extent in vmfs.extent) if vmfs else frozenset(),
        accessible=bool(values.get("summary.accessible", False)),
        vms=tuple(reference(vm) for vm in values.get("vm", ())),
    )


def wait_for_datastores(
    vsphere: Vsphere, host: Host, record: Record, uuids: frozenset[str], timeout_s: float
) -> list[OurDatastore]:
    """Until those of these VMFS are in the inventory, accessible.

    Raises UnavailableError (`datastore-missing`).
    """
    until = time.monotonic() + timeout_s
    pause_s = _FIRST_POLL_S
    while True:
        found = [d for d in our_datastores(vsphere, host, record) if d.accessible]
        if uuids <= {datastore.uuid for datastore in found}:
            return found
        if time.monotonic() + pause_s > until:
            missing = sorted(uuids - {datastore.uuid for datastore in found})
            raise UnavailableError(
                f"the resignatured datastore {', '.join(missing)} is not accessible on host "
                f"{host.name} after {timeout_s:g} s",
                code="datastore-missing",
                hint="its storage log says why; raise timeout_s of the backup host",
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_S)


def rename(vsphere: Vsphere, datastore: OurDatastore, wanted: str) -> str:
    """To this name, or to the next that is free; the name that it has then."""
    managed = vim.Datastore(datastore.moref, vsphere.stub)
    for number in range(1, _TRIES):
        tail = f"-{number}" if number > 1 else ""
        name = wanted[: LABEL_MAX - len(tail)] + tail
        if datastore.name == name:
            return name
        with vsphere.translated(f"the name of the datastore {datastore.name}"):
            try:
                managed.RenameDatastore(newName=name)
            except vim.fault.DuplicateName:
                continue
            return name
    raise UnavailableError(
        f"no name like {wanted} is free for the datastore {datastore.name}", code="name-taken"
    )
