"""Datastores: VMFS on LUNs that hosts see, mounted, resignatured, unmounted; and others by name.

Source of the rules, unless another is named: vSphere Web Services API reference,
HostDatastoreSystem, HostStorageSystem, Datastore; vSphere Storage, "Managing duplicate VMFS
datastores".
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import NAMESPACE_DNS, uuid5

from pyVmomi import vim

from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.disks import Disk, DiskError
from tests.vsphere_sim.hosts import Host
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault
from tests.vsphere_sim.vmfs import Header, NamesOnly, Volume, read_header, wipe

_FILES = vim.host.DatastoreBrowser


@dataclass(eq=False)
class Store:
    """A datastore. `hosts`: by name, those that know it, and whether it is mounted there."""

    managed: Managed
    kind: str  # VMFS | NFS | vsan | VVOL
    volume: Volume
    hosts: dict[str, bool] = field(default_factory=dict)
    used: int = 0  # by others than VMs: HA heartbeats and such

    @property
    def name(self) -> str:
        """As in the inventory."""
        name: str = self.managed.properties["name"]
        return name

    @property
    def uuid(self) -> str:
        """Of the VMFS."""
        return self.volume.header.uuid

    @property
    def real(self) -> bool:
        """Whether there are LUNs behind it."""
        return bool(self.volume.disks)

    def has(self, naa: str) -> bool:
        """Whether an extent lies there."""
        return any(disk.naa == naa for disk in self.volume.disks)


class Datastores(Part):
    """HostDatastoreSystem, Datastore, and their browser."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._all: dict[str, Store] = {}  # by moid
        self.destroyed: list[str] = []  # datastores whose VMFS a client removed

    # -- for tests -------------------------------------------------------------------------------

    def add(self, name: str, kind: str = "VMFS", *, luns: Sequence[str] = ()) -> Store:
        """One that only has a name (and, VMFS, the NAAs of its LUNs): VMs on it have no files."""
        store = self._new(name, kind, 1 << 40, NamesOnly(name, luns))
        info: Any = {
            "VMFS": vim.host.VmfsDatastoreInfo,
            "NFS": vim.host.NasDatastoreInfo,
            "vsan": vim.host.VsanDatastoreInfo,
            "VVOL": vim.host.VvolDatastoreInfo,
        }[kind](name=name, url=f"ds:///vmfs/volumes/{name}/", freeSpace=1 << 39)
        if kind == "VMFS":
            luns = luns or (f"naa.{uuid5(NAMESPACE_DNS, name).hex}",)
            info.vmfs = _vmfs(name, store.uuid, 1 << 40, luns)
        store.managed.properties["info"] = info
        for host in self.model.hosts.all.values():
            self.mount_on(store, host)
        return store

    def make(self, name: str, disks: Sequence[Disk], hosts: Sequence[str]) -> Store:
        """A VMFS on LUNs that these hosts see."""
        volume = Volume.make(disks, name)
        for host in hosts:
            self.rescan(self.model.hosts.all[host])
        found = self.by_uuid(volume.header.uuid)
        assert found is not None, f"no host sees the LUNs of {name}"
        return found

    def by_name(self, name: str) -> Store | None:
        """None where there is none."""
        return next((store for store in self._all.values() if store.name == name), None)

    def ensure(self, name: str) -> Store:
        """That of a name: one that only has the name where there is none."""
        return self.by_name(name) or self.add(name)

    def by_uuid(self, uuid: str) -> Store | None:
        """Of a VMFS."""
        return next((s for s in self._all.values() if uuid and s.uuid == uuid), None)

    def of(self, found: Managed) -> Store:
        """Of a Datastore object."""
        return self._all[found.moid]

    def on(self, host: Host, naa: str) -> Store | None:
        """The datastore that is mounted on a host and has an extent on this LUN."""
        stores = (s for s in self._all.values() if s.hosts.get(host.name) and s.has(naa))
        return next(stores, None)

    def vms(self, store: Store | None) -> list[Managed]:
        """Registered, with a file on it."""
        refs = store.managed.properties["vm"] if store else []
        return [self.model.objects[ref._moId] for ref in refs]

    # -- what hosts find -------------------------------------------------------------------------

    def headers(self, host: Host) -> Iterator[tuple[Disk, Header]]:
        """Of all LUNs of a host that are not detached."""
        for naa, disk in sorted(host.disks.items()):
            if naa not in host.detached:
                try:
                    header = read_header(disk)
                except DiskError:
                    continue
                if header is not None:
                    yield disk, header

    def rescan(self, host: Host) -> None:
        """Mount what is bound to the LUN that it lies on; the inventory hears of it later."""
        self.model.later(lambda: self._know(host))

    def _know(self, host: Host) -> None:
        with host.lock:
            found = self._bound(host)
            with self.model.changed:
                self._apply(host, found)
                self.model.changed.notify_all()

    def _bound(self, host: Host) -> dict[str, list[Disk]]:
        """Volumes of which all extents are there, on the LUNs that they name."""
        with host.lock:
            found: dict[str, dict[int, tuple[Disk, Header]]] = {}
            for disk, header in self.headers(host):
                if header.device == disk.naa:
                    found.setdefault(header.uuid, {})[header.ordinal] = (disk, header)
        return {
            uuid: [extents[n][0] for n in range(len(extents))]
            for uuid, extents in found.items()
            if set(extents) == set(range(extents[min(extents)][1].extents))
        }

    def _apply(self, host: Host, found: dict[str, list[Disk]]) -> None:
        for uuid, disks in found.items():
            store = self.by_uuid(uuid)
            if store is not None and host.name in store.hosts:
                if store.hosts[host.name]:
                    self.set_accessible(store, accessible=True)
            elif uuid not in host.unmounted:
                self.mount(host, Volume(disks) if store is None else store.volume)
        for store in list(self._all.values()):
            if store.real and host.name in store.hosts and store.uuid not in found:
                self._left(store, host)

    def _left(self, store: Store, host: Host) -> None:
        """A host no longer sees a LUN of it: one that was unmounted there is forgotten."""
        if store.hosts[host.name]:
            self.set_accessible(store, accessible=False)
            return
        del store.hosts[host.name]
        if not store.hosts and not store.managed.properties["vm"]:
            self._all.pop(store.managed.moid)
            self.model.forget(store.managed)
        else:
            self.publish(store)
        self.publish_host(host)

    def mount(self, host: Host, volume: Volume) -> Store:
        """Make it a datastore of the host."""
        store = self.by_uuid(volume.header.uuid)
        if store is None:
            label = self._free_name(volume.header.label)
            store = self._new(label, "VMFS", volume.size_bytes, volume)
            url = f"ds:///vmfs/volumes/{volume.header.uuid}/"
            luns = [disk.naa for disk in volume.disks]
            store.managed.properties["info"] = vim.host.VmfsDatastoreInfo(
                name=store.name,
                url=url,
                freeSpace=0,
                vmfs=_vmfs(store.name, volume.header.uuid, volume.size_bytes, luns),
            )
        self.mount_on(store, host)
        return store

    def swap(self, host: Host, old: Disk, new: Disk) -> None:
        """A LUN was logged in to again."""
        with self.model.changed:
            for store in self._all.values():
                store.volume.disks = [new if d is old else d for d in store.volume.disks]
                if store.has(new.naa) and store.hosts.get(host.name):
                    self.set_accessible(store, accessible=True)

    def set_accessible(self, store: Store, *, accessible: bool) -> None:
        """Whether its LUNs answer."""
        with self.model.changed:
            store.managed.properties["summary"].accessible = accessible
            for mount in store.managed.properties["host"]:
                mount.mountInfo.accessible = accessible and mount.mountInfo.mounted
            store.managed.properties.touch("summary", "host")
            self.model.changed.notify_all()

    # -- as properties ---------------------------------------------------------------------------

    def _new(self, name: str, kind: str, size_bytes: int, volume: Volume) -> Store:
        folder = self.model.inventory.folders["datastore"]
        browser = self.model.add(_FILES, "datastoreBrowser")
        managed = self.model.add(
            vim.Datastore, "datastore", name=name, parent=folder, vm=[], host=[],
            browser=browser.ref,
            summary=vim.Datastore.Summary(
                name=name, url=f"ds:///vmfs/volumes/{name}/", capacity=size_bytes,
                freeSpace=size_bytes // 2, type=kind, accessible=True, multipleHostAccess=False,
                maintenanceMode="normal",
            ),
        )  # fmt: skip
        managed.properties["summary"].datastore = managed.ref
        browser.properties["datastore"] = [managed.ref]
        store = self._all[managed.moid] = Store(managed, kind, volume)
        return store

    def _free_name(self, label: str) -> str:
        """Names are unique in a datacenter: another of the same label gets a number."""
        name, number = label, 0
        while self.by_name(name) is not None:
            number += 1
            name = f"{label} ({number})"
        return name

    def mount_on(self, store: Store, host: Host) -> None:
        """A host has it now."""
        store.hosts[host.name] = True
        self.publish(store)
        self.publish_host(host)

    def publish(self, store: Store) -> None:
        """What the API shows of it."""
        found = store.managed.properties
        found["host"] = [
            vim.Datastore.HostMount(
                key=self.model.hosts.all[name].managed.ref,
                mountInfo=vim.host.MountInfo(
                    path=f"/vmfs/volumes/{store.uuid or store.name}", accessMode="readWrite",
                    mounted=mounted, accessible=mounted,
                ),
            )
            for name, mounted in store.hosts.items()
        ]  # fmt: skip
        found["summary"].accessible = any(store.hosts.values())
        found["summary"].multipleHostAccess = len(store.hosts) > 1
        found["summary"].url = f"ds:///vmfs/volumes/{store.uuid}/"
        found.touch("summary")

    def publish_host(self, host: Host) -> None:
        """What the API shows of a host's datastores."""
        stores = [s for s in self._all.values() if host.name in s.hosts]
        host.managed.properties["datastore"] = [s.managed.ref for s in stores]
        host.system.properties["fileSystemVolumeInfo"] = vim.host.FileSystemVolumeInfo(
            volumeTypeList=["VMFS", "NFS"],
            mountInfo=[
                vim.host.FileSystemMountInfo(
                    mountInfo=mount.mountInfo, volume=s.managed.properties["info"].vmfs
                )
                for s in stores
                if s.kind == "VMFS"
                for mount in s.managed.properties["host"]
                if mount.key == host.managed.ref
            ],
        )

    # -- calls: the end of a datastore ------------------------------------------------------------

    def destroy(self, of: Managed) -> None:
        """What RemoveDatastore and Destroy do: the file system is destroyed, its header is gone
        from the LUN."""
        store = self.of(of)
        if self.vms(store):
            raise SoapFault(vim.fault.ResourceInUse(type=vim.Datastore, name=store.name))
        self.destroyed.append(store.name)
        wipe(store.volume)
        self._all.pop(of.moid)
        self.model.forget(of)
        for name in store.hosts:
            self.publish_host(self.model.hosts.all[name])

    def RemoveDatastore(self, _call: Call, _of: Managed, datastore: Any) -> None:
        """As `destroy`."""
        self.destroy(self.model.of(datastore))

    def DestroyDatastore(self, _call: Call, of: Managed) -> None:
        """As `destroy`."""
        self.destroy(of)

    # -- calls: names, files ---------------------------------------------------------------------

    def rename(self, of: Managed, name: str) -> None:
        """DuplicateName for one that another datastore has."""
        store, other = self.of(of), self.by_name(name)
        if other is not None and other is not store:
            raise SoapFault(
                vim.fault.DuplicateName(name=name, object=other.managed.ref),
                f"The name '{name}' already exists.",
            )
        try:
            store.volume.rename(name)
        except DiskError as error:
            raise SoapFault(vim.fault.HostConfigFault(), str(error)) from error
        before, found = store.name, store.managed.properties
        found["name"] = found["summary"].name = found["info"].name = name
        if store.kind == "VMFS":
            found["info"].vmfs.name = name
        found.touch("summary", "info")
        self.model.registration.renamed_datastore(store, before)

    def RenameDatastore(self, _call: Call, of: Managed, newName: str) -> None:
        """The same, without a task."""
        self.rename(of, newName)

    def RefreshDatastore(self, _call: Call, of: Managed) -> None:
        """Reads space and capacity again."""
        of.properties.touch("summary")

    def path(self, text: str, browser: Managed | None = None) -> tuple[Store, str]:
        """`[ds1] web/web.vmx` as datastore and path in it. Raises SoapFault
        (InvalidDatastorePath, InvalidDatastore)."""
        name, closed, rest = text.removeprefix("[").partition("]")
        if not text.startswith("[") or not closed:
            raise SoapFault(
                vim.fault.InvalidDatastorePath(datastorePath=text),
                f"Invalid datastore path '{text}'.",
            )
        store = self.by_name(name)
        own = browser.properties["datastore"] if browser is not None else None
        if store is None or (own is not None and store.managed.ref not in own):
            raise SoapFault(
                vim.fault.InvalidDatastore(name=name), f"The datastore '{name}' is invalid."
            )
        return store, posixpath.normpath(rest.strip()) if rest.strip() else ""


def _vmfs(name: str, uuid: str, size_bytes: int, luns: Sequence[str]) -> Any:
    return vim.host.VmfsVolume(
        name=name,
        type="VMFS",
        capacity=size_bytes,
        uuid=uuid,
        majorVersion=6,
        version="6.82",
        blockSizeMb=1,
        maxBlocks=63963136,
        vmfsUpgradable=False,
        extent=[vim.host.ScsiDisk.Partition(diskName=naa, partition=1) for naa in luns],
    )
