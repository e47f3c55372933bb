"""An island is built on its host, step by step. On an error the caller takes it down.

| step | is there | taken down by |
| --- | --- | --- |
| `targets` | static targets | IQN |
| `luns` | LUNs that the host is logged in to | canonical name |
| `resignatured` | datastores, under names `snap-…` | canonical name of their extents |
| `renamed` | the same under names of ours | the same |
| `settings` | settings of placeholders in the copies | they go with the views |
| `registered`, `reverted`, `shown` | placeholders | datastore, or mark |
| `settled` | all of it | |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from offload.errors import NotFoundError
from offload.hypervisor import IslandRequest, Step
from offload.hypervisors.vsphere import fixups, rdm
from offload.hypervisors.vsphere.attaching import Attaching, Copy
from offload.hypervisors.vsphere.files import Files, datastore_files
from offload.hypervisors.vsphere.preflight import is_scattered
from offload.hypervisors.vsphere.record import MARK, Record
from offload.hypervisors.vsphere.register import Wanted, ensure_folder, register, registered
from offload.hypervisors.vsphere.vmx import Vmx, make_placeholder
from offload.island import Placeholder, Shown
from offload.machine import DiskKind, Machine
from offload.vsphere import Vsphere


@dataclass(slots=True)
class Building:
    """Placeholders on what `attaching` has attached. Pieces of it are run again where the session
    is lost: see Link."""

    attaching: Attaching
    request: IslandRequest
    names: dict[str, str]  # of placeholders, by reference of the production VM
    notes: dict[str, list[str]] = field(default_factory=dict)  # by reference of production

    @property
    def _record(self) -> Record:
        return self.attaching.record

    @property
    def _timeout_s(self) -> float:
        return self.attaching.timeout_s

    def expected(self) -> set[str]:
        """A canonical name of each LUN that must have a VMFS: not those that are mapped whole."""
        flat = {
            lun
            for machine in self.request.machines
            for disk in machine.disks
            if disk.kind not in rdm.KINDS
            for lun in disk.luns
        }
        views = {
            view.view.id
            for view in self.request.views
            if not view.luns or not flat or set(view.luns) & flat
        }
        return {lun.names[0] for lun in self._record.luns if lun.view in views}

    def populate(self, step: Step) -> tuple[Placeholder, ...]:
        """Placeholders on the datastores of `attach`."""
        link, timeout_s = self.attaching.link, self._timeout_s
        wanted = link.do(self._prepare)
        step("settings")
        morefs = link.do(lambda vsphere: self._register(vsphere, wanted))
        step("registered")
        vms = [self._registered(machine, morefs[machine.id]) for machine in self.request.machines]
        ground = fixups.Ground(
            mark=self._record.mark,
            datastores=frozenset(copy.name for copy in self.attaching.copies),
            luns=frozenset(self.attaching.luns),
        )
        link.do(lambda vsphere: fixups.revert(vsphere, vms, timeout_s))
        step("reverted")
        link.do(lambda vsphere: fixups.remove_snapshots(vsphere, vms, timeout_s))
        step("shown")
        said = link.do(lambda vsphere: fixups.settle(vsphere, vms, ground, timeout_s))
        step("settled")
        paths = {entry.vm: entry.path for entry in wanted}
        return tuple(
            self._placeholder(machine, vm, paths[machine.id], said.get(vm.moref, []))
            for machine, vm in zip(self.request.machines, vms, strict=True)
        )

    def _prepare(self, vsphere: Vsphere) -> list[Wanted]:
        """The settings of each VM in the copy, changed to those of its placeholder."""
        wanted = []
        with datastore_files(vsphere, self.attaching.host.datacenter_name) as files:
            for machine in self.request.machines:
                copy, path = self._home(machine)
                mappings = self._mappings(machine)
                vmx = Vmx(read_settings(files, machine, copy, path))
                rdm.apply(vsphere, self.attaching.host, mappings, self._timeout_s)
                # what was left out is found once, should this be run again
                self.notes.setdefault(machine.id, self._turn(machine, vmx, mappings))
                files.write(copy.name, path, vmx.text().encode("utf-8", "surrogateescape"))
                place = f"[{copy.name}] {path}"
                wanted.append(Wanted(vm=machine.id, name=self.names[machine.id], path=place))
        return wanted

    def _turn(self, machine: Machine, vmx: Vmx, mappings: Sequence[rdm.Mapping]) -> list[str]:
        """Settings of a VM into those of its placeholder; notes."""
        for mapping in mappings:
            if not mapping.device:
                vmx.drop(mapping.disk)
        notes = make_placeholder(
            vmx,
            mark=self._record.mark,
            mark_key=MARK,
            annotation=self._annotation(machine),
            volumes=self.attaching.moves(),
        )
        return [*(mapping.note for mapping in mappings if mapping.note), *notes]

    def _home(self, machine: Machine) -> tuple[Copy, str]:
        """The copy of the datastore where a VM's settings lie, and their path on it."""
        label, path = split(machine.definition_path)
        if not path:
            raise NotFoundError(
                f"it is not known where the settings of VM {machine.name} lie",
                code="vm-not-in-copy",
            )
        found = self._copies_of(label, machine)
        if len(found) != 1:
            known = ", ".join(sorted(copy.label for copy in self.attaching.copies)) or "none"
            raise NotFoundError(
                f"the datastore {label} of VM {machine.name} is not in the island (there: {known})",
                code="vm-not-in-copy",
                hint="configure a volume for each of its LUNs, and put all into the group",
            )
        return found[0], path

    def _copies_of(self, label: str, machine: Machine) -> list[Copy]:
        """By its LUNs where disks tell them, else by its label: several may share that."""
        luns = {
            lun
            for disk in machine.disks
            if disk.datastore == label and disk.kind is DiskKind.FLAT
            for lun in disk.luns
        }
        views = {view.view.id for view in self.request.views if set(view.luns) & luns}
        names = {name for lun in self._record.luns if lun.view in views for name in lun.names}
        by_lun = [copy for copy in self.attaching.copies if copy.names & names]
        return by_lun or [copy for copy in self.attaching.copies if copy.label == label]

    def _mappings(self, machine: Machine) -> list[rdm.Mapping]:
        def place(production: str) -> str:
            label, path = split(production)
            found = self._copies_of(label, machine)
            return f"[{found[0].name}] {path}" if len(found) == 1 else ""

        def device(luns: Sequence[str]) -> str:
            views = [v.view.id for v in self.request.views if set(v.luns) & set(luns)]
            return self.attaching.devices[views[0]] if views else ""

        return rdm.plan(machine, place, device, at_parents=self._reverts(machine))

    def _register(self, vsphere: Vsphere, wanted: Sequence[Wanted]) -> dict[str, str]:
        """References by that of the production VM."""
        host = self.attaching.host
        folder = ensure_folder(vsphere, host, self._record.folder)
        there = registered(vsphere, self.attaching.datastores(vsphere))
        found = register(vsphere, host, folder, wanted, there, timeout_s=self._timeout_s)
        return {entry.vm: found[entry.path] for entry in wanted}

    def _reverts(self, machine: Machine) -> bool:
        """Whether it is to show its own instant, and can."""
        chosen = self.request.shown is Shown.VM and machine.name in self.request.vm_snapshot
        return chosen and not is_scattered(machine)

    def _registered(self, machine: Machine, moref: str) -> fixups.Registered:
        return fixups.Registered(
            moref=moref,
            name=self.names[machine.id],
            snapshot=self.request.vm_snapshot.get(machine.name, ""),
            revert=self._reverts(machine),
            annotation=self._annotation(machine),
        )

    def _placeholder(
        self, machine: Machine, vm: fixups.Registered, path: str, said: Sequence[str]
    ) -> Placeholder:
        notes = [*self.notes.get(machine.id, ()), *said]
        if self.request.shown is Shown.VM and not vm.revert:
            why = "its disks lie on several datastores" if vm.snapshot else "it has no VM snapshot"
            notes.append(f"{why}: it shows the group's instant")
        return Placeholder(
            id=vm.moref,
            name=vm.name,
            vm=machine.name,
            hypervisor=machine.hypervisor,
            production=machine.id,
            at=self._at(machine),
            shown=Shown.VM if vm.revert else Shown.GROUP,
            consistency=self._consistency(machine),
            disks=machine.disks,
            notes=tuple(dict.fromkeys(notes)),
            record={"path": path},
        )

    def _at(self, machine: Machine) -> datetime:
        at = self.request.vm_at.get(machine.name) if self._reverts(machine) else None
        return at or self.request.at

    def _consistency(self, machine: Machine) -> str:
        """The group's instant lies after the VM's snapshot: what was quiesced is its parent."""
        if self._reverts(machine) or machine.name not in self.request.vm_snapshot:
            return self.request.consistency.get(machine.name, "crash")
        return "crash"

    def _annotation(self, machine: Machine) -> str:
        what = "its own quiesced instant" if self._reverts(machine) else "the group's instant"
        return (
            f"Placeholder of VM {machine.name}, made by offload for backups: leave it powered off. "
            f"Its disks show {what} of {self._at(machine):%Y-%m-%d %H:%M:%S} UTC "
            f"({self._consistency(machine)}-consistent), group {self.request.group}. "
            f"It goes with: offload unmount {self.request.name}"
        )


def split(path: str) -> tuple[str, str]:
    """`[datastore] folder/file` in its two parts."""
    label, _, rest = path.removeprefix("[").partition("] ")
    return label, rest


def read_settings(files: Files, machine: Machine, copy: Copy, path: str) -> str:
    """The text of its .vmx in the copy."""
    try:
        found = files.read(copy.name, path)
    except NotFoundError as error:
        raise NotFoundError(
            f"VM {machine.name} is not in the copy of datastore {copy.label}: there is no {path}",
            code="vm-not-in-copy",
            hint="it was moved while the TimeMark was made: take a new one",
        ) from error
    return found.decode("utf-8", "surrogateescape")
