"""VM snapshots: deltas over disks, their tree in the .vmsd, reverting, removing, consolidating.

They are made in the files on the datastore: a snapshot of its LUN has them. Source of the rules,
unless another is named: vSphere Web Services API reference, VirtualMachine and
VirtualMachineSnapshot; vSphere Virtual Machine Administration, "Using snapshots".
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pyVmomi import vim

from tests.vsphere_sim import vmdks, vmx
from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault
from tests.vsphere_sim.vmsd import Snapshot, Tree, from_vmsd, to_vmsd

_DEPTH = 32  # snapshots in a chain ("Snapshot limitations")


@dataclass(eq=False)
class _Known:
    """The snapshots of one VM. `refs`: their objects, by uid."""

    tree: Tree = field(default_factory=Tree)
    refs: dict[int, Any] = field(default_factory=dict)


class Snapshots(Part):
    """Of all VMs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.specs: list[Any] = []  # how they were to be quiesced
        self._known: dict[str, _Known] = {}  # by the VM's moid
        self._of: dict[str, tuple[Managed, int]] = {}  # VM and uid, by the snapshot's moid

    # -- for tests -------------------------------------------------------------------------------

    def names(self, vm: Managed) -> list[str]:
        """Of all branches."""
        with self.model.changed:
            return [found.name for found in self._known[vm.moid].tree.all]

    def add(self, vm: Managed, name: str) -> None:
        """As its user made it, below those that there are."""
        with self.model.changed:
            self._grow(vm, name, "", quiesced=False)

    def drop(self, vm: Managed, name: str) -> None:
        """As an administrator removes it."""
        with self.model.changed:
            for found in [s for s in self._known[vm.moid].tree.all if s.name == name]:
                self._remove(vm, found.uid)
            self.model.changed.notify_all()

    # -- what others ask -------------------------------------------------------------------------

    def vm_of(self, found: Managed) -> Managed:
        """The VM of a snapshot, or the object itself."""
        return self._of[found.moid][0] if found.moid in self._of else found

    def load(self, vm: Managed) -> None:
        """What its .vmsd says."""
        store, path = self.model.registration.files(vm)
        known = self._known[vm.moid] = _Known()
        listed = path.removesuffix(".vmx") + ".vmsd"
        if listed in store.volume.files:
            known.tree = from_vmsd(store.volume.text(listed))
        self._publish(vm)

    def forget(self, vm: Managed) -> None:
        """With its snapshots' objects."""
        for ref in self._known.pop(vm.moid).refs.values():
            self._of.pop(ref._moId, None)
            self.model.forget(self.model.objects[ref._moId])

    # -- as properties ---------------------------------------------------------------------------

    def _publish(self, vm: Managed) -> None:
        known = self._known[vm.moid]
        for found in known.tree.all:
            if found.uid not in known.refs:
                made = self.model.add(vim.vm.Snapshot, "snapshot", vm=vm.ref)
                made.properties["config"] = vm.properties["config"]
                known.refs[found.uid] = made.ref
                self._of[made.moid] = (vm, found.uid)
        for uid in set(known.refs) - {found.uid for found in known.tree.all}:
            ref = known.refs.pop(uid)
            self._of.pop(ref._moId)
            self.model.forget(self.model.objects[ref._moId])
        if not known.tree.all:
            vm.properties["snapshot"] = None  # unset where there are none
            return
        vm.properties["snapshot"] = vim.vm.SnapshotInfo(
            currentSnapshot=known.refs.get(known.tree.current),
            rootSnapshotList=[self._entry(vm, known, s) for s in known.tree.children(0)],
        )

    def _entry(self, vm: Managed, known: _Known, found: Snapshot) -> Any:
        children = [self._entry(vm, known, s) for s in known.tree.children(found.uid)]
        return vim.vm.SnapshotTree(
            snapshot=known.refs[found.uid], vm=vm.ref, name=found.name,
            description=found.description, id=found.uid, createTime=found.created,
            state="poweredOff", quiesced=found.quiesced, replaySupported=False,
            childSnapshotList=children,
        )  # fmt: skip

    def _save(self, vm: Managed, values: dict[str, str], **more: str) -> None:
        _, path = self.model.registration.files(vm)
        name = posixpath.basename(path).removesuffix(".vmx") + ".vmsd"
        texts = {name: to_vmsd(self._known[vm.moid].tree), **more}
        self.model.registration.write(vm, values, **texts)
        self._publish(vm)

    # -- making ----------------------------------------------------------------------------------

    def CreateSnapshotEx_Task(
        self,
        _call: Call,
        of: Managed,
        name: str,
        description: str | None,
        memory: bool,
        quiesceSpec: Any,
    ) -> Any:
        """Without Tools that run, a quiesceSpec is refused: ToolsUnavailable."""
        self.specs.append(quiesceSpec)
        if quiesceSpec is not None and not _tools(of):
            raise SoapFault(vim.fault.ToolsUnavailable(), "Cannot complete operation: no Tools")
        quiesced = quiesceSpec is not None and self.model.weather.quiesces
        return self._grow(of, name, description or "", quiesced=quiesced)

    def CreateSnapshot_Task(
        self,
        _call: Call,
        of: Managed,
        name: str,
        description: str | None,
        memory: bool,
        quiesce: bool,
    ) -> Any:
        """Without Tools, `quiesce` is ignored: the snapshot is made, and says quiesced = false. The
        reference describes the flag for a VM with Tools that runs only."""
        self.specs.append(quiesce)
        quiesced = quiesce and _tools(of) and self.model.weather.quiesces
        return self._grow(of, name, description or "", quiesced=quiesced)

    def _grow(self, vm: Managed, name: str, description: str, *, quiesced: bool) -> Any:
        """A new leaf; disks of mode persistent get a delta, whose parent stands still."""
        known = self._known[vm.moid]
        if len(list(known.tree.path(known.tree.current))) >= _DEPTH:
            raise SoapFault(vim.fault.TooManySnapshotLevels(), "Too many levels of snapshots.")
        self._check_disks(vm)
        path = vm.properties["config"].files.vmPathName
        values = self.model.registration.settings(vm)
        uid = known.tree.last_uid = known.tree.last_uid + 1
        stem = posixpath.basename(path).removesuffix(".vmx")
        state = {f"{stem}-Snapshot{uid}.vmsn": vmx.compose(values)}
        disks = {}
        for key, file in list(self._snapshotted(vm, values)):
            disks[key.removesuffix(".fileName")] = file
            store, inside = self.model.registration.place(vm, file)
            made = vmdks.grow(store.volume, inside)
            values[key] = posixpath.join(posixpath.dirname(file), posixpath.basename(made))
        found = Snapshot(
            uid=uid, name=name, description=description, parent=known.tree.current,
            created=self.model.now(), quiesced=quiesced, disks=disks,
        )  # fmt: skip
        known.tree.all.append(found)
        known.tree.current = uid
        self._save(vm, values, **state)
        return known.refs[uid]

    def _check_disks(self, vm: Managed) -> None:
        """VMs with a shared bus have no snapshots (Snapshot limitations)."""
        for device in vm.properties["config"].hardware.device:
            if getattr(device, "sharedBus", "noSharing") != "noSharing":
                raise SoapFault(
                    vim.fault.SnapshotFault(), "Virtual machine is configured for bus sharing."
                )

    def _snapshotted(self, vm: Managed, values: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Keys and files in the .vmx of disks that snapshots have: neither independent ones nor
        RDMs in physical mode (Snapshot limitations)."""
        path = vm.properties["config"].files.vmPathName
        for key, file in values.items():
            place = key.removesuffix(".fileName")
            if place == key or not file.endswith(".vmdk"):
                continue
            if values.get(f"{place}.mode", "persistent") != "persistent":
                continue
            if self.model.registration.facts(path, file).rdm != "physicalMode":
                yield key, file

    # -- removing --------------------------------------------------------------------------------

    def RemoveSnapshot_Task(
        self, _call: Call, of: Managed, removeChildren: bool, consolidate: bool | None
    ) -> None:
        """Without removeChildren the children take its place, and its delta is merged."""
        vm, uid = self._of[of.moid]
        tree = self._known[vm.moid].tree
        below = list(tree.below(uid)) if removeChildren else []
        for each in (*below, uid):
            self._remove(vm, each)

    def RemoveAllSnapshots_Task(
        self, _call: Call, of: Managed, consolidate: bool | None, spec: Any
    ) -> None:
        """The user's too."""
        for found in list(self._known[of.moid].tree.all):
            self._remove(of, found.uid)

    def _remove(self, vm: Managed, uid: int) -> None:
        tree = self._known[vm.moid].tree
        tree.remove(uid)
        values = self.model.registration.settings(vm)
        if self.model.weather.consolidation_fails:
            self._needs_consolidation(vm, needed=True)
        else:
            self._consolidate(vm, values)
        _, path = self.model.registration.files(vm)
        stem = posixpath.basename(path).removesuffix(".vmx")
        store, _ = self.model.registration.files(vm)
        store.volume.remove(vmdks.beside(path, f"{stem}-Snapshot{uid}.vmsn"))
        self._save(vm, values)

    def ConsolidateVMDisks_Task(self, _call: Call, of: Managed) -> None:
        """Merges deltas that no snapshot needs."""
        values = self.model.registration.settings(of)
        self._consolidate(of, values)
        self._save(of, values)
        self._needs_consolidation(of, needed=False)

    def _needs_consolidation(self, vm: Managed, *, needed: bool) -> None:
        vm.properties["runtime"].consolidationNeeded = needed
        vm.properties.touch("runtime")

    def _consolidate(self, vm: Managed, values: dict[str, str]) -> None:
        """Merge each file of the running disks' chains into its parent where no snapshot needs the
        parent as it is, and nobody else grows from it."""
        tree = self._known[vm.moid].tree
        for key, file in list(self._snapshotted(vm, values)):
            place, folder = key.removesuffix(".fileName"), posixpath.dirname(file)
            store, inside = self.model.registration.place(vm, file)
            while True:
                links = [posixpath.basename(p) for p, _ in vmdks.chain(store.volume, inside)]
                kept = {posixpath.basename(s.disks.get(place, "")) for s in tree.all}
                free = (p for p in pairwise(links) if p[1] not in kept)
                pair = next((p for p in free if not _forked(store, inside, p)), None)
                if pair is None:
                    break
                child, parent = pair
                self._merge(store, vmdks.beside(inside, child))
                for found in tree.all:
                    if posixpath.basename(found.disks.get(place, "")) == child:
                        found.disks[place] = posixpath.join(folder, parent)
                if links[0] == child:
                    inside = vmdks.beside(inside, parent)
                    values[key] = posixpath.join(folder, parent)

    def _merge(self, store: Any, path: str) -> None:
        """Into its parent; those that grew from it grow from the parent then."""
        parent = vmdks.merge(store.volume, path)
        name = posixpath.basename(path)
        for other in _grown_from(store, path, name):
            text = store.volume.text(other)
            store.volume.write_text(
                other, text.replace(f'"{name}"', f'"{posixpath.basename(parent)}"')
            )

    # -- reverting -------------------------------------------------------------------------------

    def RevertToSnapshot_Task(
        self, _call: Call, of: Managed, host: Any, suppressPowerOn: bool | None
    ) -> None:
        """Its disks and its settings are those of then, and the deltas since are thrown away.
        Without memory in the snapshot the VM is powered off."""
        vm, uid = self._of[of.moid]
        known = self._known[vm.moid]
        found = next(s for s in known.tree.all if s.uid == uid)
        now = self.model.registration.settings(vm)
        store, path = self.model.registration.files(vm)
        stem = posixpath.basename(path).removesuffix(".vmx")
        state = store.volume.files.get(vmdks.beside(path, f"{stem}-Snapshot{uid}.vmsn"))
        values = vmx.parse(state.text or "") if state is not None else dict(now)
        values["displayName"] = now["displayName"]
        frozen = {posixpath.basename(f) for s in known.tree.all for f in s.disks.values()}
        for _, file in list(self._snapshotted(vm, now)):
            on, inside = self.model.registration.place(vm, file)
            if posixpath.basename(inside) not in frozen:
                vmdks.drop(on.volume, inside)
        for place, file in found.disks.items():
            on, inside = self.model.registration.place(vm, file)
            made = vmdks.grow(on.volume, inside)
            folder = posixpath.dirname(file)
            values[f"{place}.fileName"] = posixpath.join(folder, posixpath.basename(made))
        known.tree.current = uid
        self._save(vm, values)
        self.model.inventory.set_power(vm, "poweredOff", clean=False)

    def RevertToCurrentSnapshot_Task(
        self, call: Call, of: Managed, host: Any, suppressPowerOn: bool | None
    ) -> None:
        """NotFound for a VM without one."""
        known = self._known[of.moid]
        if known.tree.current not in known.refs:
            raise SoapFault(vim.fault.NotFound(), "There is no current snapshot.")
        found = self.model.of(known.refs[known.tree.current])
        self.RevertToSnapshot_Task(call, found, host, suppressPowerOn)


def _tools(vm: Managed) -> bool:
    return bool(vm.properties["guest"].toolsRunningStatus == "guestToolsRunning")


def _grown_from(store: Any, path: str, name: str) -> list[str]:
    """Descriptors in the same folder whose parent has this name."""
    hint = f'parentFileNameHint="{name}"'
    folder = posixpath.dirname(path)
    return [
        other
        for other, file in store.volume.files.items()
        if posixpath.dirname(other) == folder and hint in (file.text or "")
    ]


def _forked(store: Any, inside: str, pair: tuple[str, str]) -> bool:
    return len(_grown_from(store, inside, pair[1])) > 1
