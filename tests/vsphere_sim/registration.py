"""Registering, reconfiguring and unregistering VMs. Their settings are those of the .vmx on the
datastore.

Source of the rules: vSphere Web Services API reference, Folder.RegisterVM_Task and VirtualMachine.
"""

from __future__ import annotations

import posixpath
from typing import Any

from pyVmomi import vim, vmodl

from tests.vsphere_sim import vmdks, vmx
from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.datastores import Store
from tests.vsphere_sim.disks import DiskError
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault
from tests.vsphere_sim.vms import DiskFacts, config_of

_ASSIGN = "Resource.AssignVMToPool"


class Registration(Part):
    """Folder.RegisterVM_Task, and what ends it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.destroyed: list[str] = []  # VMs whose files a client deleted

    # -- files -----------------------------------------------------------------------------------

    def files(self, vm: Managed) -> tuple[Store, str]:
        """The datastore of a VM, and the path of its .vmx there."""
        found: tuple[Store, str] = self.model.datastores.path(
            vm.properties["config"].files.vmPathName
        )
        return found

    def settings(self, vm: Managed) -> dict[str, str]:
        """Its .vmx."""
        store, path = self.files(vm)
        return vmx.parse(store.volume.text(path))

    def write(self, vm: Managed, values: dict[str, str], **more: str) -> None:
        """Its .vmx, with other texts of the same folder, and what the API shows of it."""
        store, path = self.files(vm)
        texts = {vmdks.beside(path, name): text for name, text in more.items()}
        try:
            store.volume.write_texts({path: vmx.compose(values), **texts})
        except DiskError as error:
            raise SoapFault(
                vim.fault.FileFault(file=path), f"Cannot write {path}: {error}"
            ) from error
        self.reload(vm)

    def locate(self, vmx_path: str, file: str) -> tuple[Store | None, str]:
        """A disk as a .vmx names it: beside it, or by the path of a mounted datastore. None: its
        datastore is not known here."""
        own, path = self.model.datastores.path(vmx_path)
        if not file.startswith("/vmfs/volumes/"):
            return own, vmdks.beside(path, file)
        name, _, rest = file.removeprefix("/vmfs/volumes/").partition("/")
        store = self.model.datastores.by_uuid(name) or self.model.datastores.by_name(name)
        return store, rest

    def place(self, vm: Managed, file: str) -> tuple[Store, str]:
        """The same, of a disk that has to be there. Raises SoapFault."""
        store, path = self.locate(vm.properties["config"].files.vmPathName, file)
        if store is None or path not in store.volume.files:
            raise SoapFault(vim.fault.FileNotFound(file=file), f"File {file} was not found")
        return store, path

    def facts(self, vmx_path: str, file: str) -> DiskFacts:
        """What the API says of a disk of a .vmx. One whose file is not there has no size."""
        store, path = self.locate(vmx_path, file)
        if store is None:
            return DiskFacts(path=f"[] {file}")
        shown = f"[{store.name}] {path}"
        try:
            links = list(vmdks.chain(store.volume, path))
        except (FileNotFoundError, ValueError):
            return DiskFacts(path=shown, datastore=store.managed.ref)
        last, base = links[-1]
        device = ""
        if base.kind.startswith("VMFSRDM"):
            device = store.volume.text(vmdks.beside(last, base.extent))
        return DiskFacts(
            path=shown,
            datastore=store.managed.ref,
            size_bytes=base.size_bytes,
            rdm={"VMFSRDM": "virtualMode", "VMFSRDMP": "physicalMode"}.get(base.kind, ""),
            lun_uuid=self.model.storage.lun_uuid(device) if device else "",
            device_name=f"vml.{self.model.storage.lun_uuid(device)}" if device else "",
            chain=tuple(f"[{store.name}] {link}" for link, _ in links[1:]),
        )

    # -- in the inventory ------------------------------------------------------------------------

    def load(
        self, path: str, name: str, folder: Managed, host: str = "", *, template: bool = False
    ) -> Managed:
        """Register what a .vmx says. FileNotFoundError."""
        config = self._config(path, name, template=template)
        where = self.model.hosts.pick(host)
        vm = self.model.add(
            vim.VirtualMachine, "vm", name=config.name, parent=folder, config=config,
            recentTask=[], snapshot=None, datastore=[],
            resourcePool=where.pool.ref if where and not template else None,
            runtime=vim.vm.RuntimeInfo(
                host=where.managed.ref if where else None, connectionState="connected",
                powerState="poweredOff", toolsInstallerMounted=False, numMksConnections=0,
                faultToleranceState="notConfigured", recordReplayState="inactive",
                consolidationNeeded=False, device=[],
            ),
            guest=vim.vm.GuestInfo(
                guestState="notRunning", toolsRunningStatus="guestToolsNotRunning"
            ),
        )  # fmt: skip
        made: Managed = vm
        if where is not None:
            where.managed.properties["vm"] = [*where.managed.properties["vm"], made.ref]
        self._place(made)
        self.model.snapshots.load(made)
        return made

    def _config(self, path: str, name: str, *, template: bool) -> Any:
        store, inside = self.model.datastores.path(path)
        values = vmx.parse(store.volume.text(inside))
        return config_of(
            values, path, lambda file: self.facts(path, file), name=name, template=template,
            modified=self.model.now(),
        )  # fmt: skip

    def reload(self, vm: Managed) -> None:
        """Its settings have changed."""
        before = vm.properties["config"]
        made = self._config(before.files.vmPathName, before.name, template=before.template)
        made.changeVersion = str(int(before.changeVersion) + 1)
        vm.properties["config"] = made
        self._place(vm)

    def _place(self, vm: Managed) -> None:
        """Which datastores it is on, and what those say of it."""
        own, _ = self.files(vm)
        disks = [d for d in vm.properties["config"].hardware.device if hasattr(d, "capacityInKB")]
        refs = {d.backing.datastore._moId for d in disks if d.backing.datastore is not None}
        refs.add(own.managed.moid)
        if {ref._moId for ref in vm.properties["datastore"]} == refs:
            return
        self._leave(vm)
        stores = [self.model.objects[moid] for moid in sorted(refs)]
        vm.properties["datastore"] = [store.ref for store in stores]
        for store in stores:
            store.properties["vm"] = [*store.properties["vm"], vm.ref]

    def _leave(self, vm: Managed) -> None:
        for ref in vm.properties["datastore"]:
            store = self.model.objects.get(ref._moId)
            if store is not None:
                store.properties["vm"] = [r for r in store.properties["vm"] if r != vm.ref]

    def renamed_datastore(self, store: Store, before: str) -> None:
        """Paths of the VMs on it have the new name."""
        for vm in self.model.datastores.vms(store):
            files = vm.properties["config"].files
            if files.vmPathName.startswith(f"[{before}] "):
                files.vmPathName = f"[{store.name}]" + files.vmPathName[len(before) + 2 :]
            self.reload(vm)

    def forget(self, vm: Managed) -> None:
        """It is not registered any more."""
        self._leave(vm)
        for host in self.model.hosts.all.values():
            refs = host.managed.properties["vm"]
            if vm.ref in refs:
                host.managed.properties["vm"] = [r for r in refs if r != vm.ref]
        self.model.snapshots.forget(vm)
        self.model.forget(vm)

    # -- calls -----------------------------------------------------------------------------------

    def RegisterVM_Task(
        self,
        _call: Call,
        of: Managed,
        path: str,
        name: str | None,
        asTemplate: bool,
        pool: Any,
        host: Any,
    ) -> Any:
        """AlreadyExists for a .vmx that is registered; NotFound for one that is not there;
        InvalidDatastore for a datastore that the host does not have; DuplicateName for a name that
        another one in the folder has."""
        if pool is not None and not self.model.privileges.has(_ASSIGN, self.model.of(pool)):
            raise self.model.privileges.refusal(_ASSIGN, self.model.of(pool))
        target = self._target(pool, host)
        self.model.hosts.check(target)
        if target.managed.properties["runtime"].inMaintenanceMode:
            raise SoapFault(
                vim.fault.InvalidState(), "The operation is not allowed in maintenance mode."
            )
        store, inside = self.model.datastores.path(path)
        if not store.hosts.get(target.name):
            raise SoapFault(
                vim.fault.InvalidDatastore(datastore=store.managed.ref, name=store.name),
                f"The host {target.name} has no access to the datastore {store.name}.",
            )
        if not store.managed.properties["summary"].accessible:
            raise SoapFault(
                vim.fault.InaccessibleDatastore(datastore=store.managed.ref, name=store.name)
            )
        for found in self.model.objects.values():
            if not isinstance(found.ref, vim.VirtualMachine):
                continue
            if found.properties["config"].files.vmPathName == path:
                raise SoapFault(
                    vim.fault.AlreadyExists(name=found.properties["name"]),
                    f"The specified key, name, or identifier '{path}' already exists.",
                )
        try:
            text = store.volume.text(inside)
        except FileNotFoundError as error:
            raise SoapFault(vim.fault.NotFound(), f"The file {path} could not be found.") from error
        shown = name or vmx.parse(text).get("displayName", posixpath.basename(inside))
        self.model.inventory.check_name(of, shown)
        made = self.load(path, shown, of, target.name, template=asTemplate)
        self.model.events.post(vim.event.VmRegisteredEvent, made)
        return made.ref

    def _target(self, pool: Any, host: Any) -> Any:
        """The host that is named, or one of the pool. Only a template needs no pool:
        InvalidArgument else."""
        if host is not None:
            return self.model.hosts.of(self.model.of(host))
        if pool is None:
            raise SoapFault(
                vmodl.fault.InvalidArgument(invalidProperty="pool"), "No pool is given."
            )
        return next(h for h in self.model.hosts.all.values() if h.pool.ref == pool)

    def UnregisterVM(self, _call: Call, of: Managed) -> None:
        """Its files stay. InvalidPowerState for a VM that is not powered off."""
        self._check_off(of)
        self.model.events.post(vim.event.VmRemovedEvent, of)
        self.forget(of)

    def _check_off(self, vm: Managed) -> None:
        state = vm.properties["runtime"].powerState
        if state != "poweredOff":
            raise SoapFault(
                vim.fault.InvalidPowerState(existingState=state, requestedState="poweredOff"),
                "The attempted operation cannot be performed in the current state.",
            )

    def Destroy_Task(self, _call: Call, of: Managed) -> None:
        """With what it has: a VM's files, all VMs in a folder; of a datastore its VMFS."""
        if isinstance(of.ref, vim.VirtualMachine):
            self._check_off(of)
            store, path = self.files(of)
            folder = posixpath.dirname(path) + "/"
            store.volume.remove(*[p for p in store.volume.files if p.startswith(folder)])
            self.destroyed.append(of.properties["name"])
            self.forget(of)
        elif isinstance(of.ref, vim.Datastore):
            self.model.datastores.destroy(of)
        else:
            for child in [o for o in self.model.objects.values() if o.parent is of]:
                self.Destroy_Task(_call, child)
            self.model.forget(of)

    def UnregisterAndDestroy_Task(self, _call: Call, of: Managed) -> None:
        """A folder goes; the VMs in it are unregistered, their files stay."""
        for child in [o for o in self.model.objects.values() if o.parent is of]:
            if isinstance(child.ref, vim.VirtualMachine):
                self._check_off(child)
                self.forget(child)
            else:
                self.UnregisterAndDestroy_Task(_call, child)
        self.model.forget(of)
