"""What a hypervisor has: VMs, datastores, hosts. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypedDict

from offload.machine import MachineDisk


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryVm:
    """A virtual machine as the inventory shows it. `id` is stable: moRef, or the domain's UUID."""

    id: str
    name: str
    power: str  # on | off | suspended
    uuid: str = ""  # what the guest sees
    instance_uuid: str = ""
    host: str = ""  # name of the host that runs it
    folder: str = ""  # `/DC0/vm/web`; libvirt: ""
    tags: tuple[str, ...] = ()  # `category:tag`; libvirt: of offload's own metadata element
    template: bool = False
    tools: str = ""  # running | not-running | not-installed; libvirt: whether an agent is connected
    encrypted: bool = False
    firmware: str = ""  # bios | uefi
    placeholder: str = ""  # the id of the island that it belongs to: it is one of ours
    disks: tuple[MachineDisk, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Datastore:
    """Where VMs' files lie. `luns`: NAA of all extents of a VMFS; none for others."""

    id: str
    name: str
    kind: str  # VMFS | NFS | vsan | VVOL …; libvirt: the pool's type
    luns: tuple[str, ...] = ()
    capacity_bytes: int = 0
    free_bytes: int = 0
    accessible: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorHost:
    """A host that runs VMs."""

    id: str
    name: str
    state: str = "connected"  # connected | disconnected | maintenance …


Entry = InventoryVm | Datastore | HypervisorHost


class Kinds(TypedDict):
    """Entries by kind, as Inventory and InventoryChange have them."""

    vms: tuple[InventoryVm, ...]
    datastores: tuple[Datastore, ...]
    hosts: tuple[HypervisorHost, ...]


def by_kind(entries: Iterable[Entry]) -> Kinds:
    """In their order."""
    found = tuple(entries)
    return {
        "vms": tuple(entry for entry in found if isinstance(entry, InventoryVm)),
        "datastores": tuple(entry for entry in found if isinstance(entry, Datastore)),
        "hosts": tuple(entry for entry in found if isinstance(entry, HypervisorHost)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All that a hypervisor has, as of `taken_at`. `tags_problem`: why the VMs' tags are not known,
    "" where they are."""

    hypervisor: str  # its name in the configuration
    taken_at: datetime
    vms: tuple[InventoryVm, ...] = ()
    datastores: tuple[Datastore, ...] = ()
    hosts: tuple[HypervisorHost, ...] = ()
    tags_problem: str = ""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Of all kinds."""
        return (*self.vms, *self.datastores, *self.hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryChange:
    """What has changed since an inventory was read: whole entries, and the ids of those gone."""

    at: datetime
    vms: tuple[InventoryVm, ...] = ()
    datastores: tuple[Datastore, ...] = ()
    hosts: tuple[HypervisorHost, ...] = ()
    gone: tuple[str, ...] = field(default=())
    tags_problem: str = ""  # as of Inventory

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Of all kinds."""
        return (*self.vms, *self.datastores, *self.hosts)

    def __bool__(self) -> bool:
        return bool(self.vms or self.datastores or self.hosts or self.gone)
