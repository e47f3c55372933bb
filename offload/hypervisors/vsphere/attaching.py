"""LUNs of ours become datastores of a host: the part of a build in which its storage changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.errors import UnavailableError
from offload.hypervisor import Step
from offload.hypervisors.vsphere.datastore import OurDatastore, rename, wait_for_datastores
from offload.hypervisors.vsphere.hosts import Host
from offload.hypervisors.vsphere.link import Link
from offload.hypervisors.vsphere.record import Record
from offload.hypervisors.vsphere.storage import HostStorage
from offload.iscsi import Chap
from offload.vsphere import Vsphere


@dataclass(slots=True)
class Copy:
    """A production datastore's copy. `label` and `origin`: name and UUID in production."""

    label: str
    origin: str
    names: frozenset[str]  # canonical names of its LUNs
    uuid: str = ""  # once it is in the inventory
    name: str = ""  # its name then


@dataclass(slots=True)
class Attaching:
    """Pieces of it are run again where the session is lost: see Link. `title`: what names of
    datastores begin with."""

    link: Link
    host: Host
    record: Record
    title: str
    timeout_s: float
    copies: list[Copy] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)  # of LUNs on the host, by view
    luns: set[str] = field(default_factory=set)  # their UUIDs there

    def attach(self, expected: set[str], chap: Chap | None, step: Step) -> None:
        """Up to datastores that are mounted. `expected`: a canonical name of each LUN that must
        have a VMFS. To be done alone on the host."""
        self.link.do(lambda vsphere: self._storage(vsphere).add_targets(chap))
        step("targets")
        self.link.do(lambda vsphere: self._storage(vsphere).rescan())
        self.link.do(lambda vsphere: self._storage(vsphere).wait_for_luns())
        step("luns")
        self.link.do(lambda vsphere: self._resignature(vsphere, expected))
        step("resignatured")
        self.link.do(self._rename)
        step("renamed")

    def _storage(self, vsphere: Vsphere) -> HostStorage:
        return HostStorage(vsphere, self.host, self.record, timeout_s=self.timeout_s)

    def _resignature(self, vsphere: Vsphere, expected: set[str]) -> None:
        storage = self._storage(vsphere)
        for copy in storage.wait_for_copies(expected):
            if not any(known.names == copy.names for known in self.copies):
                self.copies.append(Copy(copy.label, copy.uuid, copy.names))
            try:
                storage.resignature(copy)
            except UnavailableError:
                # a task of a session that was lost went on, and was faster
                if not any(copy.names <= volume.names for volume in storage.volumes()):
                    raise
        for volume in storage.volumes():
            if not volume.mounted:
                storage.mount(volume)
        for disk in storage.disks():
            lun = self.record.lun(disk.canonicalName)
            if lun is not None:
                self.devices[lun.view] = disk.deviceName
                self.luns.add(disk.uuid)

    def _rename(self, vsphere: Vsphere) -> None:
        for datastore in self.datastores(vsphere):
            for copy in self.copies:
                if datastore.names & copy.names:
                    copy.uuid = datastore.uuid
                    copy.name = rename(vsphere, datastore, f"{self.title}-{copy.label}")

    def datastores(self, vsphere: Vsphere) -> list[OurDatastore]:
        """As the inventory has them now, once it has them."""
        uuids = frozenset(volume.uuid for volume in self._storage(vsphere).volumes())
        return wait_for_datastores(vsphere, self.host, self.record, uuids, self.timeout_s)

    def moves(self) -> dict[str, str]:
        """By UUID and label in production, the UUID of the copy; by that, itself."""
        found = {}
        for copy in self.copies:
            found[copy.origin] = found[copy.label] = found[copy.uuid] = copy.uuid
        return found
