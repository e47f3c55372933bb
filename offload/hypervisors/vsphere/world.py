"""What is known of a server's objects, and the inventory that they make. No I/O here.

Values of pyVmomi are reduced as they come: ten thousand VMs with all their devices would not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyVmomi import vim

from offload.hypervisors.vsphere.disks import DiskFacts, disks_of, machine_disk
from offload.hypervisors.vsphere.following import Update
from offload.inventory import Datastore, HypervisorHost, InventoryVm

_POWER = {"poweredOn": "on", "poweredOff": "off", "suspended": "suspended"}
_FIRMWARE = {"bios": "bios", "efi": "uefi"}
_DEVICES = "config.hardware.device"


@dataclass(slots=True)
class Touched:
    """What some updates were about. `all_vms`: something that shows in any VM."""

    vms: set[str] = field(default_factory=set)
    stores: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    all_vms: bool = False


class World:
    """Objects by their ids (moRefs)."""

    def __init__(self, tags: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self._vms: dict[str, dict[str, Any]] = {}
        self._places: dict[str, dict[str, Any]] = {}  # folders, datacenters, vApps
        self._stores: dict[str, dict[str, Any]] = {}
        self._hosts: dict[str, dict[str, Any]] = {}
        self.datastores: dict[str, Datastore] = {}
        self.hosts: dict[str, HypervisorHost] = {}
        self.luns: dict[str, str] = {}  # of RDMs: UUID → canonical name
        self.tags: Mapping[str, tuple[str, ...]] = tags or {}  # by VM
        self.islands: dict[str, str] = {}  # by VM: the island of a placeholder of ours

    def apply(self, updates: Iterable[Update]) -> Touched:
        """Take updates in."""
        touched = Touched()
        for update in updates:
            self._take(update, touched)
        return touched

    def _take(self, update: Update, touched: Touched) -> None:
        moref = reference(update.managed)
        table, seen = self._table(update.managed, touched)
        if update.gone:
            table.pop(moref, None)
            touched.gone.add(moref)
            self._forget(moref)
        else:
            known = table.setdefault(moref, {})
            known.update({key: _plain(key, value) for key, value in update.values.items()})
            seen.add(moref)
        if table is self._stores:
            self._make_store(moref, touched)
        elif table is self._hosts:
            self._make_host(moref, touched)
        elif table is self._places:
            touched.all_vms = True

    def _table(self, managed: Any, touched: Touched) -> tuple[dict[str, dict[str, Any]], set[str]]:
        if isinstance(managed, vim.VirtualMachine):
            return self._vms, touched.vms
        if isinstance(managed, vim.Datastore):
            return self._stores, touched.stores
        if isinstance(managed, vim.HostSystem):
            return self._hosts, touched.hosts
        return self._places, set()

    def _forget(self, moref: str) -> None:
        self.islands.pop(moref, None)

    def _make_store(self, moref: str, touched: Touched) -> None:
        known = self._stores.get(moref)
        before = self.datastores.pop(moref, None)
        if known is not None:
            self.datastores[moref] = _datastore(moref, known)
        after = self.datastores.get(moref)
        touched.all_vms |= _shown_of(before) != _shown_of(after)

    def _make_host(self, moref: str, touched: Touched) -> None:
        known = self._hosts.get(moref)
        before = self.hosts.pop(moref, None)
        if known is not None:
            self.hosts[moref] = _host(moref, known)
        after = self.hosts.get(moref)
        touched.all_vms |= (before and before.name) != (after and after.name)

    # -- VMs -------------------------------------------------------------------------------------

    @property
    def vm_ids(self) -> list[str]:
        """All."""
        return list(self._vms)

    def suspects(self, ids: Iterable[str]) -> list[str]:
        """VMs whose notes speak of us: their mark says whether they are placeholders of ours."""
        texts = ((moref, self._vms.get(moref, {}).get("config.annotation")) for moref in ids)
        return [moref for moref, text in texts if text and "offload" in text.lower()]

    def host_of(self, moref: str) -> str:
        """Id of the host that runs a VM; "" where that is not known."""
        return _id(self._vms.get(moref, {}).get("runtime.host"))

    def unknown_luns(self, ids: Iterable[str]) -> dict[str, set[str]]:
        """UUIDs of RDMs' LUNs whose names are not known yet, by host."""
        found: dict[str, set[str]] = {}
        for moref in ids:
            for disk in self._vms.get(moref, {}).get(_DEVICES) or ():
                for backing in disk.backings:
                    if backing.lun_uuid and backing.lun_uuid not in self.luns:
                        found.setdefault(self.host_of(moref), set()).add(backing.lun_uuid)
        return found

    def missing(self, moref: str) -> set[tuple[Any, str]]:
        """Kinds and ids of what a VM refers to and is not known: of a VM that was read alone."""
        vm = self._vms[moref]
        disks: tuple[DiskFacts, ...] = vm.get(_DEVICES) or ()
        found = {
            (vim.Datastore, backing.datastore)
            for disk in disks
            for backing in disk.backings
            if backing.datastore and backing.datastore not in self._stores
        }
        if self.host_of(moref) and self.host_of(moref) not in self._hosts:
            found.add((vim.HostSystem, self.host_of(moref)))
        *_, (kind, place) = self._up(vm)
        if place and place not in self._places:
            found.add((kind, place))
        return found

    def _up(self, fields: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
        """Kinds and ids of what an object is in, from the inside; the last one is not known."""
        while True:
            refs = (fields.get(key) for key in ("parent", "parentFolder", "parentVApp"))
            kind, place = next((ref for ref in refs if ref is not None), (None, ""))
            yield kind, place
            if place not in self._places:
                return
            fields = self._places[place]

    def vm(self, moref: str) -> InventoryVm:
        """As the inventory shows it."""
        vm = self._vms[moref]
        host = self.hosts.get(self.host_of(moref))
        return InventoryVm(
            id=moref,
            name=vm.get("name") or moref,
            power=_POWER.get(vm.get("runtime.powerState") or "", "off"),
            uuid=vm.get("config.uuid") or "",
            instance_uuid=vm.get("config.instanceUuid") or "",
            host=host.name if host is not None else "",
            folder=self._folder(vm),
            tags=self.tags.get(moref, ()),
            template=bool(vm.get("config.template")),
            tools=_tools(vm),
            encrypted=bool(vm.get("config.keyId")),
            firmware=_FIRMWARE.get(vm.get("config.firmware") or "", ""),
            placeholder=self.islands.get(moref, ""),
            disks=tuple(
                machine_disk(disk, self.datastores, lambda uuid: self.luns.get(uuid, ""))
                for disk in vm.get(_DEVICES) or ()
            ),
        )

    def _folder(self, vm: Mapping[str, Any]) -> str:
        """`/DC0/vm/web`: without the root folder, which no view shows."""
        return sys.intern("".join(f"/{name}" for _, name in self._places_of(vm)))

    def _places_of(self, vm: Mapping[str, Any]) -> list[tuple[Any, str]]:
        """Kinds and names, from the outside. Only the root folder has no parent: it is in no
        path."""
        known = [
            (kind, self._places[place])
            for kind, place in self._up(vm)
            if place in self._places and self._places[place].get("parent") is not None
        ]
        return [(kind, place.get("name") or "") for kind, place in reversed(known)]

    def datacenter_of(self, moref: str) -> str:
        """Path of the datacenter of a VM, as URLs of its files want it: `DC0`, `Folder/DC0`."""
        places = self._places_of(self._vms[moref])
        inner = next((n for n, (kind, _) in enumerate(places) if kind is vim.Datacenter), -1)
        return "/".join(name for _, name in places[: inner + 1])


def _id(ref: tuple[Any, str] | None) -> str:
    return ref[1] if ref is not None else ""


def _tools(vm: Mapping[str, Any]) -> str:
    if vm.get("guest.toolsVersionStatus2") == "guestToolsNotInstalled":
        return "not-installed"
    running = vm.get("guest.toolsRunningStatus") in (
        "guestToolsRunning",
        "guestToolsExecutingScripts",
    )
    return "running" if running else "not-running"


def _datastore(moref: str, known: Mapping[str, Any]) -> Datastore:
    return Datastore(
        id=moref,
        name=known.get("name") or moref,
        kind=known.get("summary.type") or "",
        luns=known.get("info") or (),
        capacity_bytes=known.get("summary.capacity") or 0,
        free_bytes=known.get("summary.freeSpace") or 0,
        accessible=bool(known.get("summary.accessible")),
    )


def _shown_of(store: Datastore | None) -> tuple[Any, ...]:
    """What of a datastore shows in VMs."""
    return (store.name, store.kind, store.luns) if store is not None else ()


def _host(moref: str, known: Mapping[str, Any]) -> HypervisorHost:
    state = known.get("runtime.connectionState") or "unknown"
    if state == "connected" and known.get("runtime.inMaintenanceMode"):
        state = "maintenance"
    return HypervisorHost(id=moref, name=known.get("name") or moref, state=state)


def _plain(path: str, value: Any) -> Any:
    """What is kept of a property."""
    if path == _DEVICES:
        return disks_of(value or ())
    if path == "info":
        vmfs = getattr(value, "vmfs", None)
        return tuple(extent.diskName for extent in vmfs.extent) if vmfs is not None else ()
    if path == "config.keyId":
        return value is not None
    if hasattr(value, "_moId"):
        return type(value), sys.intern(reference(value))
    return sys.intern(str(value)) if isinstance(value, str) and len(value) < 64 else value


def reference(managed: Any) -> str:
    """By which an object is found again in any session."""
    return str(managed._moId)  # noqa: SLF001 - its name in the API
