"""What hosts do with LUNs: static targets, rescans, detaching. They really log in.

Source of the rules, unless another is named: vSphere Web Services API reference,
HostStorageSystem, in our own words.
"""

from __future__ import annotations

import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyVmomi import vim

from tests.vsphere_sim.calls import Call, Part, unlocked
from tests.vsphere_sim.disks import Disk, DiskError, FileDisk, IscsiDisk, luns_of
from tests.vsphere_sim.hosts import Host, adapters, key_of
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault

_PATIENCE_MS = 500  # after which new sessions are seen
_PAUSE_S = 0.02  # between looks: a disk that is being used is attended to by its user


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLoss:
    """A LUN that went away from a host that had not let go of it. With a datastore mounted on it
    that is "all paths down", which can hang a host (VMware KB 2004684)."""

    at: float  # of time.monotonic
    host: str
    naa: str
    mounted: bool
    vms: tuple[str, ...]


class Storage(Part):
    """HostStorageSystem."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.losses: list[PathLoss] = []
        self._lost: set[tuple[str, str]] = set()  # host and NAA, until it is back
        self._ended = threading.Event()
        self._attendant: threading.Thread | None = None

    # -- for tests -------------------------------------------------------------------------------

    def give(self, host: str, path: Path, naa: str) -> FileDisk:
        """Connect a LUN of production storage to a host: a file."""
        disk = FileDisk(path, naa)
        found = self.model.hosts.all[host]
        found.local[naa] = disk
        self.rescan(found)
        return disk

    def lun_uuid(self, naa: str) -> str:
        """ScsiLun.uuid of a LUN, by which RDMs and DetachScsiLun name it."""
        return f"02000000{naa.partition('.')[2]}4f46464c4f41"

    def all_paths_down(self) -> list[PathLoss]:
        """LUNs that were pulled from under a mounted datastore, until now."""
        for host in self.model.hosts.all.values():
            with host.lock:
                self._look(host)
        return [loss for loss in self.losses if loss.mounted]

    def close(self) -> None:
        """Log out everywhere."""
        self._ended.set()
        if self._attendant is not None:
            self._attendant.join()
        for host in self.model.hosts.all.values():
            with host.lock:
                for disk in host.sessions:
                    disk.close()

    # -- what hosts see --------------------------------------------------------------------------

    def rescan(self, host: Host) -> None:
        """Log in to what is configured, out of what is not, and look at what there is. A target
        that refuses, or is not there, gives no LUNs; the rescan itself succeeds."""
        with host.lock:
            self._look(host)
            wanted = {key_of(t): host.target_of(t) for t in host.targets}
            for disk in host.sessions:
                key = (disk.target.address, disk.target.port, disk.target.iqn)
                if key not in wanted or not disk.alive():
                    if key not in wanted:
                        self._note_loss(host, disk)
                    disk.close()
                    del host.disks[disk.naa]
            host.refused = []
            have = {(d.target.iqn, d.target.address, d.target.port, d.lun) for d in host.sessions}
            for target in wanted.values():
                try:
                    for lun in luns_of(target):
                        if (target.iqn, target.address, target.port, lun) not in have:
                            self._found(host, IscsiDisk(target, lun))
                except DiskError as error:
                    host.refused.append(f"{target.iqn}: {error}")
            for naa in [n for n, d in host.disks.items() if isinstance(d, FileDisk)]:
                del host.disks[naa]
            host.disks |= {naa: disk for naa, disk in host.local.items() if disk.alive()}
        self.publish(host)

    def _found(self, host: Host, disk: IscsiDisk) -> None:
        if disk.naa in host.disks:  # another path to the same LUN
            disk.close()
            return
        host.disks[disk.naa] = disk
        self._lost.discard((host.name, disk.naa))
        if self._attendant is None:
            self._attendant = threading.Thread(target=self._attend, name="iSCSI", daemon=True)
            self._attendant.start()

    def _attend(self) -> None:
        """Sessions answer their targets' NOP-Ins at once, as hosts do, and notice when one ends."""
        while not self._ended.wait(_PAUSE_S):
            poll, disks = select.poll(), {}
            for host in list(self.model.hosts.all.values()):
                for disk in host.sessions:
                    if (number := disk.fileno()) >= 0:
                        disks[number] = (host, disk)
                        poll.register(number, select.POLLIN)
            for number, _ in poll.poll(_PATIENCE_MS):
                host, disk = disks[number]
                if not disk.attend():
                    with host.lock:
                        self._look(host)

    def _look(self, host: Host) -> None:
        """Whether each LUN still answers; one that was lost is logged in to again."""
        for disk in host.sessions:
            if disk.alive():
                continue
            self._note_loss(host, disk)
            disk.close()
            try:
                again = IscsiDisk(disk.target, disk.lun)
            except DiskError:
                continue
            if again.naa == disk.naa:
                host.disks[disk.naa] = again
                self._lost.discard((host.name, disk.naa))
                self.model.datastores.swap(host, disk, again)
            else:
                again.close()

    def _note_loss(self, host: Host, disk: Disk) -> None:
        if disk.naa in host.detached or (host.name, disk.naa) in self._lost:
            return
        self._lost.add((host.name, disk.naa))
        store = self.model.datastores.on(host, disk.naa)
        vms = tuple(vm.properties["name"] for vm in self.model.datastores.vms(store))
        loss = PathLoss(
            at=time.monotonic(), host=host.name, naa=disk.naa, mounted=store is not None, vms=vms
        )
        self.losses.append(loss)
        if store is not None:
            self.model.datastores.set_accessible(store, accessible=False)

    def publish(self, host: Host) -> None:
        """Its devices as properties."""
        with self.model.changed:
            luns = [self._lun(host, disk) for _, disk in sorted(host.disks.items())]
            host.system.properties["storageDeviceInfo"] = vim.host.StorageDeviceInfo(
                hostBusAdapter=adapters(host),
                scsiLun=luns,
                softwareInternetScsiEnabled=bool(host.adapter),
            )
            self.model.changed.notify_all()

    def _lun(self, host: Host, disk: Disk) -> Any:
        path = f"/vmfs/devices/disks/{disk.naa}"
        return vim.host.ScsiDisk(
            key=f"key-vim.host.ScsiDisk-{self.lun_uuid(disk.naa)}",
            uuid=self.lun_uuid(disk.naa),
            canonicalName=disk.naa,
            deviceName=path,
            devicePath=path,
            deviceType="disk",
            lunType="disk",
            displayName=f"{getattr(disk, 'vendor', 'ARRAY')} iSCSI Disk ({disk.naa})",
            vendor=getattr(disk, "vendor", "ARRAY"),
            model=getattr(disk, "product", "LUN"),
            capacity=vim.host.DiskDimensions.Lba(blockSize=512, block=disk.size_bytes // 512),
            operationalState=["off" if disk.naa in host.detached else "ok"],
        )

    # -- calls: targets --------------------------------------------------------------------------

    def _adapter(self, of: Managed, device: str) -> Host:
        """Raises SoapFault: NotFound for an adapter that the host does not have."""
        host: Host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        if not host.adapter or device != host.adapter:
            raise SoapFault(vim.fault.NotFound(), f"The adapter {device} could not be found.")
        return host

    def AddInternetScsiStaticTargets(
        self, _call: Call, of: Managed, iScsiHbaDevice: str, targets: list[Any]
    ) -> None:
        """The adapter knows these targets from its next rescan on; one that it knows already is
        left as it is."""
        host = self._adapter(of, iScsiHbaDevice)
        have = {key_of(t) for t in host.targets}
        host.targets += [t for t in targets if key_of(t) not in have]
        self.publish(host)

    def RemoveInternetScsiStaticTargets(
        self, _call: Call, of: Managed, iScsiHbaDevice: str, targets: list[Any]
    ) -> None:
        """Removes those that it knows, and only then throws NotFound for any that it does not: the
        reference says so of the list of targets."""
        host = self._adapter(of, iScsiHbaDevice)
        have, gone = {key_of(t) for t in host.targets}, {key_of(t) for t in targets}
        host.targets = [t for t in host.targets if key_of(t) not in gone]
        self.publish(host)
        if gone - have:
            raise SoapFault(vim.fault.NotFound(), "The object or item could not be found.")

    def UpdateInternetScsiAuthenticationProperties(
        self,
        _call: Call,
        of: Managed,
        iScsiHbaDevice: str,
        authenticationProperties: Any,
        targetSet: Any,
    ) -> None:
        """CHAP of the targets that are named in the set; without a set, of the adapter."""
        host = self._adapter(of, iScsiHbaDevice)
        if targetSet is None or not targetSet.staticTargets:
            host.chap = authenticationProperties
        else:
            chosen = {key_of(t) for t in targetSet.staticTargets}
            for entry in host.targets:
                if key_of(entry) in chosen:
                    entry.authenticationProperties = authenticationProperties
        self.publish(host)

    # -- calls: rescans --------------------------------------------------------------------------

    @unlocked
    def RescanAllHba(self, _call: Call, of: Managed) -> None:
        """Looks for new devices at all adapters. It says nothing of file systems."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        self.rescan(host)

    @unlocked
    def RescanHba(self, _call: Call, of: Managed, hbaDevice: str) -> None:
        """One of them."""
        self.rescan(self._adapter(of, hbaDevice))

    @unlocked
    def RescanVmfs(self, _call: Call, of: Managed) -> None:
        """Looks for new VMFS on the devices that are known. The inventory hears of it later: see
        Weather.inventory_lag_s."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        self.model.datastores.rescan(host)

    @unlocked
    def RefreshStorageSystem(self, _call: Call, of: Managed) -> None:
        """Both rescans."""
        self.RescanAllHba(_call, of)
        self.RescanVmfs(_call, of)

    # -- calls: detaching ------------------------------------------------------------------------

    def _disk(self, host: Host, uuid: str) -> Disk:
        found = next((d for d in host.disks.values() if self.lun_uuid(d.naa) == uuid), None)
        if found is None:
            raise SoapFault(vim.fault.NotFound(), "The LUN could not be found.")
        return found

    @unlocked
    def DetachScsiLun(self, _call: Call, of: Managed, lunUuid: str) -> None:
        """InvalidState for a LUN that is detached already; ResourceInUse while a mounted VMFS has
        an extent on it. Being detached survives rescans and reboots (vSphere Storage, on detaching
        storage devices)."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        with host.lock, self.model.changed:
            disk = self._disk(host, lunUuid)
            if disk.naa in host.detached:
                raise SoapFault(vim.fault.InvalidState(), "The LUN is already detached.")
            if self.model.datastores.on(host, disk.naa) is not None:
                raise SoapFault(
                    vim.fault.ResourceInUse(type=vim.host.ScsiLun, name=disk.naa),
                    f"The resource '{disk.naa}' is in use.",
                )
            host.detached.add(disk.naa)
        self.publish(host)

    def AttachScsiLun(self, _call: Call, of: Managed, lunUuid: str) -> None:
        """InvalidState for a LUN that is not detached."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        disk = self._disk(host, lunUuid)
        if disk.naa not in host.detached:
            raise SoapFault(vim.fault.InvalidState(), "The LUN is already attached.")
        host.detached.discard(disk.naa)
        self.publish(host)

    def DeleteScsiLunState(self, _call: Call, of: Managed, lunCanonicalName: str) -> None:
        """Forgets that a LUN was detached, for one that need not be there any more; NotFound, or
        InvalidState where it is there, for one that was not detached."""
        host = self.model.hosts.of(of)
        self.model.hosts.check(host)
        if lunCanonicalName not in host.detached:
            kind = vim.fault.InvalidState if lunCanonicalName in host.disks else vim.fault.NotFound
            raise SoapFault(kind(), "The LUN has no such state.")
        host.detached.discard(lunCanonicalName)
        self.publish(host)
