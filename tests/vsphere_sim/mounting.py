"""Copies of VMFS: found, resignatured, mounted and unmounted on a host.

Source of the rules: vSphere Web Services API reference, HostDatastoreSystem and HostStorageSystem;
vSphere Storage, "Managing duplicate VMFS datastores".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyVmomi import vim

from tests.vsphere_sim.calls import Call, Part, unlocked
from tests.vsphere_sim.datastores import Store
from tests.vsphere_sim.disks import Disk, DiskError
from tests.vsphere_sim.hosts import Host
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault
from tests.vsphere_sim.vmfs import Volume


class Mounting(Part):
    """What of HostStorageSystem and HostDatastoreSystem is about VMFS."""

    # -- copies ----------------------------------------------------------------------------------

    @unlocked
    def QueryUnresolvedVmfsVolume(self, _call: Call, of: Managed) -> Any:
        """As of the datastore system."""
        return self.unresolved(of)

    @unlocked
    def QueryUnresolvedVmfsVolumes(self, _call: Call, of: Managed) -> Any:
        """VMFS that are not bound to the device that they lie on."""
        return self.unresolved(of)

    def unresolved(self, of: Managed) -> list[Any]:
        """Copies that this host sees. One entry for a UUID, with the extents of all its copies."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        with host.lock:
            copies: dict[str, list[tuple[Disk, Any]]] = {}
            for disk, header in self.model.datastores.headers(host):
                if header.device != disk.naa:
                    copies.setdefault(header.uuid, []).append((disk, header))
        return [_unresolved(uuid, found) for uuid, found in sorted(copies.items())]

    @unlocked
    def ResignatureUnresolvedVmfsVolume_Task(
        self, _call: Call, of: Managed, resolutionSpec: Any
    ) -> Any:
        """The extents of one copy are named by their device paths. NotFound for a path that is no
        copy; VmfsAmbiguousMount where they are not exactly one volume; HostConfigFault where the
        LUN cannot be written to. It writes to the LUN."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        with host.lock:
            copies = {
                f"/vmfs/devices/disks/{disk.naa}:1": (disk, header)
                for disk, header in self.model.datastores.headers(host)
                if header.device != disk.naa
            }
            chosen = [copies.get(path) for path in resolutionSpec.extentDevicePath]
            if not chosen or None in chosen:
                raise SoapFault(vim.fault.NotFound(), "The object or item could not be found.")
            extents = sorted((c for c in chosen if c), key=lambda c: c[1].ordinal)
            if [c[1].ordinal for c in extents] != list(range(extents[0][1].extents)):
                raise SoapFault(
                    vim.fault.VmfsAmbiguousMount(), "The extents are not one copy of a volume."
                )
            label = extents[0][1].label
            try:
                volume = Volume([disk for disk, _ in extents])
                # "snap-snapID-oldLabel" (vSphere Storage, "Managing duplicate VMFS datastores")
                volume.resignature(f"snap-{self.model.number():08x}-{label}")
            except DiskError as error:
                raise SoapFault(
                    vim.fault.HostConfigFault(), f"Failed to resignature {label}: {error}"
                ) from error
        with self.model.changed:
            store = self.model.datastores.mount(host, volume)
            return vim.host.ResignatureRescanResult(result=store.managed.ref)

    # -- mounting --------------------------------------------------------------------------------

    def _mounted(self, of: Managed, uuid: str) -> tuple[Host, Store]:
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        store = self.model.datastores.by_uuid(uuid)
        if store is None or host.name not in store.hosts:
            raise SoapFault(vim.fault.NotFound(), f"The VMFS volume {uuid} could not be found.")
        return host, store

    def UnmountVmfsVolume(self, _call: Call, of: Managed, vmfsUuid: str) -> None:
        """InvalidState for a volume that is unmounted already; ResourceInUse while a VM is
        registered on it here, or somebody else (HA) uses it (vSphere Storage, on unmounting
        datastores)."""
        host, store = self._mounted(of, vmfsUuid)
        if not store.hosts[host.name]:
            raise SoapFault(vim.fault.InvalidState(), "The volume is already unmounted.")
        users = [
            vm.properties["name"]
            for vm in self.model.datastores.vms(store)
            if vm.properties["runtime"].host == host.managed.ref
        ]
        if users or store.used:
            what = f"VMs are registered: {', '.join(users)}" if users else "files are open"
            raise SoapFault(
                vim.fault.ResourceInUse(type=vim.Datastore, name=store.name),
                f"The resource '{store.name}' is in use: {what}.",
            )
        host.unmounted.add(vmfsUuid)
        store.hosts[host.name] = False
        self.model.datastores.publish(store)
        self.model.datastores.publish_host(host)

    def UnmountVmfsVolumeEx_Task(self, call: Call, of: Managed, vmfsUuid: list[str]) -> None:
        """Several."""
        for uuid in vmfsUuid:
            self.UnmountVmfsVolume(call, of, uuid)

    def MountVmfsVolume(self, _call: Call, of: Managed, vmfsUuid: str) -> None:
        """InvalidState for a volume that is mounted already."""
        host, store = self._mounted(of, vmfsUuid)
        if store.hosts[host.name]:
            raise SoapFault(vim.fault.InvalidState(), "The volume is already mounted.")
        host.unmounted.discard(vmfsUuid)
        self.model.datastores.mount_on(store, host)

    def DeleteVmfsVolumeState(self, _call: Call, of: Managed, vmfsUuid: str) -> None:
        """Forgets that a volume was unmounted, for one that need not be there any more; NotFound
        for one that was not."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        if vmfsUuid not in host.unmounted:
            raise SoapFault(vim.fault.NotFound(), "The volume has no such state.")
        host.unmounted.discard(vmfsUuid)


def _unresolved(uuid: str, copies: Iterable[tuple[Disk, Any]]) -> Any:
    copies = sorted(copies, key=lambda c: (c[1].ordinal, c[0].naa))
    ordinals = [header.ordinal for _, header in copies]
    incomplete = set(range(copies[0][1].extents)) != set(ordinals)
    multiple = len(ordinals) > len(set(ordinals))
    return vim.host.UnresolvedVmfsVolume(
        vmfsLabel=next((h.label for _, h in copies if h.label), ""),
        vmfsUuid=uuid,
        totalBlocks=sum(disk.size_bytes for disk, _ in copies) >> 20,
        resolveStatus=vim.host.UnresolvedVmfsVolume.ResolveStatus(
            resolvable=not (incomplete or multiple),
            incompleteExtents=incomplete,
            multipleCopies=multiple,
        ),
        extent=[
            vim.host.UnresolvedVmfsExtent(
                device=vim.host.ScsiDisk.Partition(diskName=disk.naa, partition=1),
                devicePath=f"/vmfs/devices/disks/{disk.naa}:1",
                vmfsUuid=uuid,
                isHeadExtent=header.ordinal == 0,
                ordinal=header.ordinal,
                startBlock=0,
                endBlock=(disk.size_bytes >> 20) - 1,
                reason="diskIdMismatch",
            )
            for disk, header in copies
        ],
    )
