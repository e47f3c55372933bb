"""Which VMs and volumes the selectors of a group choose from an inventory, and why others not."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from offload.config import Config
from offload.errors import NotFoundError, PolicyError, UnavailableError
from offload.inventory import Datastore, Inventory, InventoryVm
from offload.machine import DiskKind, MachineDisk
from offload.services.disk_volumes import by_lun, volumes_of

_NAMED = 3  # VMs in a note; the others are counted
_AGENT = "; back it up by an agent in the guest, or move it to a LUN that is a [volumes] entry"


class Choice:
    """One group being looked up. After `make`: `volumes`, `vms` with the volume that holds each
    disk, and `notes` for a person."""

    def __init__(self, config: Config, name: str, inventory: Inventory) -> None:
        self.config = config
        self.name = name
        self.group = config.group(name)
        self.inventory = inventory
        self.volumes: tuple[str, ...] = self.group.volumes
        self.vms: list[InventoryVm] = []
        self.notes: list[str] = []
        self._datastores = self._wanted_datastores()

    def make(self) -> None:
        """Choose, then find the disks. Raises NotFoundError, PolicyError: see `groups.resolve`."""
        vms = self._chosen()
        found = dict.fromkeys(self.group.volumes)
        for vm in vms:
            disks = []
            for disk in vm.disks:
                held = self._volumes_of(vm, disk)
                found |= dict.fromkeys(held)
                disks.append(replace(disk, volume=held[0]))
            self.vms.append(replace(vm, disks=tuple(disks)))
        found |= dict.fromkeys(self._storage_asked_for())
        more = (name for name in self.config.volumes if name in found)
        self.volumes = tuple(dict.fromkeys((*self.group.volumes, *more)))
        self._name_neighbours()

    # -- which VMs ---------------------------------------------------------------------------------

    def _chosen(self) -> list[InventoryVm]:
        """In the order of the inventory, each once."""
        if self.group.tags and self.inventory.tags_problem:
            raise UnavailableError(
                f"group {self.name} chooses VMs by tags, and those are not known: "
                f"{self.inventory.tags_problem}",
                code="tags-unknown",
            )
        ids = {vm.id for wanted in self.group.vms for vm in [self._named(wanted)]}
        candidates = [vm for vm in self.inventory.vms if not vm.placeholder]
        for what, matches in self._selectors():
            hit = [vm for vm in candidates if matches(vm)]
            usable = [vm for vm in hit if not vm.template and vm.disks]
            self._note("templates are left out", [vm for vm in hit if vm.template])
            idle = [vm for vm in hit if not vm.template and not vm.disks]
            self._note("left out, without disks", idle)
            if not hit:
                self.notes.append(f"no VM has {what}")
            ids |= {vm.id for vm in usable}
        if not ids and not (self.group.volumes or self.group.luns or self._datastores):
            raise PolicyError(
                f"group {self.name} chooses no VM on {self.group.hypervisor}: "
                + "; ".join(self.notes),
                code="nothing-chosen",
                hint=f"correct groups.{self.name}; see: offload inventory list",
            )
        return [vm for vm in self.inventory.vms if vm.id in ids]

    def _named(self, wanted: str) -> InventoryVm:
        """The one VM of a name or UUID; refused where it cannot be in a group."""
        plain = wanted.lower()
        hits = [
            vm
            for vm in self.inventory.vms
            if wanted in (vm.name, vm.id) or plain in (vm.instance_uuid.lower(), vm.uuid.lower())
        ]
        exact = [vm for vm in hits if vm.instance_uuid.lower() == plain]
        hits = exact or [vm for vm in hits if not vm.placeholder] or hits
        if not hits:
            raise self._unknown("VM", wanted, [vm.name for vm in self.inventory.vms])
        if len(hits) > 1:
            ids = ", ".join(sorted(vm.instance_uuid or vm.uuid or vm.id for vm in hits))
            raise NotFoundError(
                f"group {self.name}: there are {len(hits)} VMs '{wanted}' on "
                f"{self.group.hypervisor}",
                code="ambiguous-vm",
                hint=f"name the one in groups.{self.name}.vms by its UUID: {ids}",
            )
        self._refuse_kind(hits[0])
        return hits[0]

    def _refuse_kind(self, vm: InventoryVm) -> None:
        way_out = f"take it out of groups.{self.name}.vms"
        if vm.placeholder:
            raise PolicyError(
                f"VM {vm.name} is a placeholder of ours: its disks are copies",
                code="vm-is-placeholder",
                hint=way_out,
            )
        if vm.template:
            raise PolicyError(
                f"VM {vm.name} is a template: it never runs, and cannot have a placeholder",
                code="vm-is-template",
                hint=f"{way_out}; its volume can be backed up by its own name",
            )
        if not vm.disks:
            raise PolicyError(f"VM {vm.name} has no disks", code="vm-without-disks", hint=way_out)

    def _selectors(self) -> Iterator[tuple[str, Callable[[InventoryVm], bool]]]:
        for tag in self.group.tags:
            yield f"the tag {tag}", partial(_has_tag, tag)
        for folder in self.group.folders:
            yield f"its place in the folder {folder}", partial(_in_folder, folder.rstrip("/"))
        for store in self._datastores:
            yield f"a disk on the datastore {store.name}", partial(_on_datastore, store.name)
        for lun in self.group.luns:
            yield f"a disk on {lun}", partial(_on_lun, lun.lower())

    def _wanted_datastores(self) -> list[Datastore]:
        known = {store.name: store for store in self.inventory.datastores}
        for name in self.group.datastores:
            if name not in known:
                raise self._unknown("datastore", name, list(known))
        return [known[name] for name in self.group.datastores]

    def _unknown(self, kind: str, wanted: str, known: Sequence[str]) -> NotFoundError:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return NotFoundError(
            f"group {self.name}: {self.group.hypervisor} has no {kind} '{wanted}'",
            code=f"unknown-{kind.lower()}",
            hint=f"{hint}see: offload inventory list",
        )

    def _note(self, what: str, vms: Sequence[InventoryVm]) -> None:
        if vms:
            self.notes.append(f"{what}: {_names(vms)}")

    # -- where their disks are ---------------------------------------------------------------------

    def _volumes_of(self, vm: InventoryVm, disk: MachineDisk) -> tuple[str, ...]:
        found = volumes_of(self.config, disk)
        if found:
            return found
        what = f"disk {disk.called} of VM {vm.name}"
        if disk.luns:
            known = by_lun(self.config)
            missing = [lun for lun in disk.luns if lun.lower() not in known]
            raise PolicyError(
                f"group {self.name}: {what} is on {', '.join(missing)}, which is no volume here",
                code="disk-without-volume",
                hint=f'add lun = "{missing[0]}" to the [volumes] entry of that LUN',
            )
        if disk.kind in (DiskKind.FILE, DiskKind.BLOCK, DiskKind.NETWORK):
            raise PolicyError(
                f"group {self.name}: {what} is {disk.path}, which is no volume here",
                code="disk-without-volume",
                hint=self._how_to_add(disk),
            )
        raise PolicyError(
            f"group {self.name}: {what} is on {self._kind_of(disk)}, which has no LUN that could "
            "have a snapshot",
            code="disk-without-lun",
            hint=f"take the VM out of the group{_AGENT}",
        )

    def _how_to_add(self, disk: MachineDisk) -> str:
        if disk.path.startswith("rbd:"):
            return f'add a [volumes] entry with image = "{disk.path.removeprefix("rbd:")}"'
        if disk.path.startswith("/"):
            return f'add a [volumes] entry with path = "{disk.path}"'
        return f"this machine cannot make snapshots of it: take the VM out of the group{_AGENT}"

    def _kind_of(self, disk: MachineDisk) -> str:
        """`the NFS datastore nas1`, `vSAN`."""
        kind = {DiskKind.VSAN: "vSAN", DiskKind.VVOL: "vVol"}.get(disk.kind, "")
        known = {store.name: store.kind for store in self.inventory.datastores}
        kind = kind or known.get(disk.datastore, "")
        where = f"the {kind} datastore {disk.datastore}" if disk.datastore else kind or disk.path
        return " ".join(where.split())

    def _storage_asked_for(self) -> Iterator[str]:
        """Volumes of the datastores and LUNs that the group names: all of them, also those that
        hold no disk of a chosen VM."""
        known = by_lun(self.config)
        for lun in self.group.luns:
            if lun.lower() not in known:
                raise NotFoundError(
                    f"group {self.name}: the LUN {lun} is no volume here",
                    code="unknown-lun",
                    hint=f'add lun = "{lun}" to its [volumes] entry',
                )
            yield known[lun.lower()]
        for store in self._datastores:
            for lun in store.luns:
                if lun.lower() not in known:
                    raise PolicyError(
                        f"group {self.name}: the datastore {store.name} lies on {lun} too, which "
                        "is no volume here",
                        code="disk-without-volume",
                        hint=f'add lun = "{lun}" to the [volumes] entry of that LUN',
                    )
                yield known[lun.lower()]

    def _name_neighbours(self) -> None:
        """Whoever else writes to these volumes is in the snapshots as a power cut leaves it."""
        ours, volumes = {vm.id for vm in self.vms}, set(self.volumes)
        self._note(
            f"on the same volumes, but not in group {self.name}, so as a power cut leaves them",
            [
                vm
                for vm in self.inventory.vms
                if vm.id not in ours
                and vm.power == "on"
                and not vm.template
                and not vm.placeholder
                and any(volumes & set(volumes_of(self.config, disk)) for disk in vm.disks)
            ],
        )


def _has_tag(tag: str, vm: InventoryVm) -> bool:
    return tag in vm.tags


def _in_folder(folder: str, vm: InventoryVm) -> bool:
    return vm.folder == folder or vm.folder.startswith(f"{folder}/")


def _on_datastore(name: str, vm: InventoryVm) -> bool:
    return any(disk.datastore == name for disk in vm.disks)


def _on_lun(lun: str, vm: InventoryVm) -> bool:
    return any(lun == each.lower() for disk in vm.disks for each in disk.luns)


def _names(vms: Sequence[InventoryVm]) -> str:
    names = sorted(vm.name for vm in vms)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
