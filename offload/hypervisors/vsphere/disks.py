"""What a VM's disks are, out of its devices.

Sources: vSphere Web Services API, VirtualDisk and its backings; names of disks (`scsi0:1`) as in a
.vmx file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim

from offload.inventory import Datastore
from offload.machine import DiskKind, MachineDisk

_DEVICE = vim.vm.device
_BUSES = (
    (_DEVICE.VirtualSCSIController, "scsi"),
    (_DEVICE.VirtualSATAController, "sata"),
    (_DEVICE.VirtualNVMEController, "nvme"),
    (_DEVICE.VirtualIDEController, "ide"),
)
_FILES = ("VMFS", "NFS", "NFS41", "OTHER")  # kinds of datastores that hold a disk as a file
_KINDS = {"vsan": DiskKind.VSAN, "VVOL": DiskKind.VVOL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backing:
    """A file of a disk: the running one, or one of its parents."""

    path: str
    datastore: str  # its id, "" where the server names none
    lun_uuid: str = ""  # of an RDM's mapping file: what is mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """A disk as its VM names it. `backings`: the running file, then its parents."""

    name: str
    label: str
    size_bytes: int
    backings: tuple[Backing, ...]
    physical: bool
    independent: bool
    shared: bool
    encrypted: bool


def disks_of(devices: Sequence[Any]) -> tuple[DiskFacts, ...]:
    """The disks among `config.hardware.device`."""
    controllers: dict[Any, tuple[str, Any]] = {
        device.key: (bus, device)
        for device in devices
        for kind, bus in _BUSES
        if isinstance(device, kind)
    }
    disks = [device for device in devices if isinstance(device, _DEVICE.VirtualDisk)]
    nowhere: tuple[str, Any] = ("", None)
    return tuple(_facts(disk, *controllers.get(disk.controllerKey, nowhere)) for disk in disks)


def _facts(disk: Any, bus: str, controller: Any) -> DiskFacts:
    backings = []
    backing = disk.backing
    while backing is not None:
        backings.append(_backing(backing))
        backing = getattr(backing, "parent", None)
    running = disk.backing
    shared_bus = getattr(controller, "sharedBus", None) or "noSharing"
    place = f"{bus}{controller.busNumber}:{disk.unitNumber}" if controller else f"disk{disk.key}"
    return DiskFacts(
        name=sys.intern(place),
        label=sys.intern(disk.deviceInfo.label if disk.deviceInfo else place),
        size_bytes=disk.capacityInBytes or disk.capacityInKB * 1024,
        backings=tuple(backings),
        physical=_base_mode(running) == "physicalMode",
        independent=str(getattr(running, "diskMode", "")).startswith("independent"),
        shared=shared_bus != "noSharing"
        or getattr(running, "sharing", None) == "sharingMultiWriter",
        encrypted=getattr(running, "keyId", None) is not None,
    )


def _backing(backing: Any) -> Backing:
    datastore = getattr(backing, "datastore", None)
    return Backing(
        path=getattr(backing, "fileName", "") or "",
        datastore=sys.intern(datastore._moId) if datastore is not None else "",  # noqa: SLF001
        lun_uuid=getattr(backing, "lunUuid", None) or "",
    )


def _base_mode(backing: Any) -> str:
    while getattr(backing, "parent", None) is not None:
        backing = backing.parent
    return getattr(backing, "compatibilityMode", None) or ""


def machine_disk(
    facts: DiskFacts, datastores: Mapping[str, Datastore], lun_of: Callable[[str], str]
) -> MachineDisk:
    """With the LUNs that it lies on. `lun_of`: the canonical name of an RDM's LUN by its UUID, ""
    where no host knows it."""
    running = facts.backings[0]
    store = datastores.get(running.datastore)
    luns: dict[str, None] = {}
    problem = ""
    base = facts.backings[-1]
    if base.lun_uuid:
        lun = lun_of(base.lun_uuid)
        luns[lun] = None
        problem = "" if lun else f"no host knows the LUN that {base.path} maps"
    for backing in facts.backings:
        if backing is base and base.lun_uuid:
            continue  # the mapping file has nothing of the disk's data; a delta over it has
        found, bad = _luns(backing, datastores.get(backing.datastore))
        luns |= dict.fromkeys(found)
        problem = problem or bad
    return MachineDisk(
        name=facts.name,
        label=facts.label,
        kind=_kind(facts, store),
        path=running.path,
        size_bytes=facts.size_bytes,
        datastore=store.name if store is not None else "",
        luns=() if problem else tuple(luns),
        chain=tuple(backing.path for backing in facts.backings[1:]),
        independent=facts.independent,
        shared=facts.shared,
        encrypted=facts.encrypted,
        problem=problem,
    )


def _kind(facts: DiskFacts, store: Datastore | None) -> DiskKind:
    if facts.backings[-1].lun_uuid:
        return DiskKind.RDM_PHYSICAL if facts.physical else DiskKind.RDM
    if store is None:
        return DiskKind.OTHER
    if store.kind in _FILES:
        return DiskKind.FLAT
    return _KINDS.get(store.kind, DiskKind.OTHER)


def _luns(backing: Backing, store: Datastore | None) -> tuple[tuple[str, ...], str]:
    """On which LUNs a file lies; or why it lies on none."""
    if store is None:
        return (), f"{backing.path} lies on no datastore that this user may see"
    if store.luns:
        return store.luns, ""
    return (), f"{backing.path} lies on {store.name} ({store.kind}): there is no LUN behind it"
