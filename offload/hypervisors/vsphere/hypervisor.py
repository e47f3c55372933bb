"""The vSphere hypervisor: what a vCenter server, or one ESXi host, has."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from pyVmomi import vim

from offload.configs.hypervisors import VsphereConfig
from offload.errors import (
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)
from offload.hypervisor import VmSnapshot
from offload.hypervisors.vsphere import settings
from offload.hypervisors.vsphere.following import PATHS, Follower, Update
from offload.hypervisors.vsphere.marks import islands_of
from offload.hypervisors.vsphere.tags import read_tags
from offload.hypervisors.vsphere.world import Touched, World, reference
from offload.instance import Instance
from offload.inventory import Entry, Inventory, InventoryChange, by_kind
from offload.machine import Machine
from offload.vsphere import Vsphere
from offload.vsphere_snapshots import consolidate, of_prefix, remove

_REMOVE_S = 300.0  # the delta of one that was forgotten may be large
_TAGS_S = 60.0  # nothing tells of changed tags: how often they are read while changes are followed


class VsphereHypervisor:
    """`[hypervisors.NAME]` of kind vsphere."""

    kind = "vsphere"

    def __init__(self, name: str, entry: VsphereConfig, instance: Instance) -> None:
        self.name = name
        self._entry = entry
        self._instance = instance
        self._session: Vsphere | None = None
        self._follower: Follower | None = None
        self._world = World()
        self._known: dict[str, Entry] = {}  # what was told
        self._tags_at = 0.0  # of time.monotonic; 0: never
        self._tags_problem = ""

    def __enter__(self) -> Self:
        """Raises ConfigError (`secret-…`, `vsphere-certificate`, `vsphere-login`),
        UnavailableError (`vsphere-unavailable`)."""
        self._vsphere()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hang_up()

    def _vsphere(self) -> Vsphere:
        if self._session is None:
            self._session = Vsphere(self._entry)
        return self._session

    def _hang_up(self) -> None:
        follower, self._follower = self._follower, None
        session, self._session = self._session, None
        if follower is not None:
            follower.close()
        if session is not None:
            session.close()

    # -- the inventory ---------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """Raises PrivilegeError, UnavailableError."""
        self._read_all()
        self._known = self._entries(self._world.vm_ids)
        return Inventory(
            hypervisor=self.name,
            taken_at=datetime.now(UTC),
            **by_kind(self._known.values()),
            tags_problem=self._tags_problem,
        )

    def changes(self, wait_s: float) -> InventoryChange:
        """Raises ConfigError, PrivilegeError, UnavailableError; then the next call begins anew."""
        if self._follower is not None:
            try:
                return self._followed(wait_s)
            except (NotFoundError, UnavailableError):
                self._hang_up()  # an expired session, a server that was restarted
            except OffloadError:
                self._hang_up()
                raise
        self._read_all()
        return self._difference(self._entries(self._world.vm_ids), whole=True)

    def _read_all(self) -> None:
        vsphere = self._vsphere()
        if self._follower is not None:
            self._follower.close()
        # tags that cannot be read just now are not gone
        self._world = World(self._world.tags)
        try:
            self._follower = Follower(vsphere)
            self._world.apply(self._follower.look(0))
            self._look_closer(self._world.vm_ids)
        except OffloadError:
            self._hang_up()
            raise
        self._read_tags()

    def _followed(self, wait_s: float) -> InventoryChange:
        """Waits for something that shows: much of what a server tells does not."""
        assert self._follower is not None  # noqa: S101 - changes() has seen to it
        until = time.monotonic() + wait_s
        while True:
            touched = self._world.apply(self._follower.look(max(0.0, until - time.monotonic())))
            self._look_closer(touched.vms)
            if time.monotonic() - self._tags_at > _TAGS_S:
                before = self._world.tags
                self._read_tags()
                touched.all_vms |= before != self._world.tags
            found = self._difference(self._touched(touched), gone=touched.gone)
            if found or time.monotonic() + 1 > until:  # the server counts in whole seconds
                return found

    def _look_closer(self, ids: Iterable[str]) -> None:
        """What updates do not tell: marks of placeholders, names of RDMs' LUNs."""
        ids = list(ids)
        suspects = self._world.suspects(ids)
        for moref in ids:
            self._world.islands.pop(moref, None)
        self._world.islands |= islands_of(self._vsphere(), suspects)
        for host, uuids in self._world.unknown_luns(ids).items():
            if host and not uuids <= self._world.luns.keys():
                self._world.luns |= self._luns_of(host)

    def _luns_of(self, host: str) -> dict[str, str]:
        """By their UUIDs, canonical names of what a host sees."""
        vsphere = self._vsphere()
        path = "config.storageDevice.scsiLun"
        with vsphere.translated("the LUNs of a host"):
            found = vsphere.read(vim.HostSystem(host, vsphere.stub), path)
        return {lun.uuid: lun.canonicalName for lun in found.get(path) or ()}

    def _read_tags(self) -> None:
        """Another service of the server gives them: without it all the rest is known still."""
        try:
            self._world.tags = read_tags(self._vsphere(), self._entry)
            self._tags_problem = ""
        except (ConfigError, PrivilegeError, UnavailableError) as error:
            self._tags_problem = error.message
        self._tags_at = time.monotonic()

    def _entries(self, vms: Iterable[str]) -> dict[str, Entry]:
        """These VMs, and all the rest."""
        world = self._world
        return {moref: world.vm(moref) for moref in vms} | world.datastores | world.hosts

    def _touched(self, touched: Touched) -> dict[str, Entry]:
        if touched.all_vms:
            return self._entries(self._world.vm_ids)
        return self._entries(touched.vms - touched.gone)

    def _difference(
        self, now: Mapping[str, Entry], *, gone: Iterable[str] = (), whole: bool = False
    ) -> InventoryChange:
        """To what was told before; told from here on. `whole`: what is not in it is gone."""
        lost = set(self._known) - set(now) if whole else set(gone)
        lost = {moref for moref in lost if moref in self._known and moref not in now}
        changed = {moref: entry for moref, entry in now.items() if self._known.get(moref) != entry}
        for moref in lost:
            del self._known[moref]
        self._known |= changed
        return InventoryChange(
            at=datetime.now(UTC),
            **by_kind(changed.values()),
            gone=tuple(sorted(lost)),
            tags_problem=self._tags_problem,
        )

    # -- VM snapshots of ours --------------------------------------------------------------------

    def vm_snapshots(self, prefix: str) -> list[VmSnapshot]:
        """Raises PrivilegeError, UnavailableError."""
        vsphere = self._vsphere()
        found = [
            VmSnapshot(hypervisor=self.name, vm=vm, vm_id=reference(managed), name=name)
            for managed, vm, name in of_prefix(vsphere, prefix)
        ]
        ours = islands_of(vsphere, sorted({snapshot.vm_id for snapshot in found}))
        return [snapshot for snapshot in found if snapshot.vm_id not in ours]

    def remove_vm_snapshot(self, snapshot: VmSnapshot) -> None:
        """Raises PrivilegeError, UnavailableError."""
        vsphere = self._vsphere()
        vm, until = vsphere.vm(snapshot.vm_id), time.monotonic() + _REMOVE_S
        try:
            remove(vsphere, vm, snapshot.name, until, creating=False)
            consolidate(vsphere, vm, until)
        except NotFoundError:
            return  # the VM is gone

    # -- one VM ----------------------------------------------------------------------------------

    def find(self, wanted: str) -> str:
        """Raises NotFoundError (`unknown-vm`, `ambiguous-vm`), PrivilegeError, UnavailableError."""
        return reference(self._vsphere().find_vm(wanted))

    def machine(self, vm_id: str) -> Machine:
        """Raises NotFoundError (`unknown-vm`, `unknown-file`), PrivilegeError, UnavailableError."""
        vsphere = self._vsphere()
        vm = vsphere.vm(vm_id)
        paths = PATHS[vim.VirtualMachine]
        with vsphere.translated(f"VM {vm_id}"):
            seen = vsphere.read(vm, *dict.fromkeys((*paths, *settings.PATHS)))
            self._know(vm, {path: seen.get(path) for path in paths})
            while missing := self._world.missing(vm_id):
                for kind, moref in missing:
                    managed = kind(moref, vsphere.stub)
                    self._know(managed, vsphere.read(managed, *PATHS[kind]))
        self._look_closer([vm_id])
        if not self._tags_at:
            self._read_tags()
        datacenter = self._world.datacenter_of(vm_id)
        return settings.machine_of(vsphere, self.name, self._world.vm(vm_id), datacenter, seen)

    def _know(self, managed: Any, values: Mapping[str, Any]) -> None:
        self._world.apply([Update(managed=managed, gone=False, values=values)])
