"""Datacenter, folders, hosts, datastores without LUNs, and VMs: what a test puts in, what it does
to it, and what of it is done by calls."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from tests.vsphere_sim import vmdks, vmx
from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault
from tests.vsphere_sim.vms import VmPlan, vmx_of

_PARTS = {
    "sessionManager": vim.SessionManager,
    "propertyCollector": vmodl.query.PropertyCollector,
    "viewManager": vim.view.ViewManager,
    "searchIndex": vim.SearchIndex,
    "eventManager": vim.event.EventManager,
    "taskManager": vim.TaskManager,
    "fileManager": vim.FileManager,
    "authorizationManager": vim.AuthorizationManager,
    "virtualDiskManager": vim.VirtualDiskManager,
    "licenseManager": vim.LicenseManager,
}


class Inventory(Part):
    """One datacenter, DC0."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        add = model.add
        self.root: Managed = add(vim.Folder, "group", name="Datacenters", childType=["Datacenter"])
        found = {name: add(kind, name, moid=name).ref for name, kind in _PARTS.items()}
        about = vim.AboutInfo(
            name="VMware vCenter Server", fullName="vSphere simulator", vendor="offload",
            version="8.0.1", build="0", osType="linux", productLineId="vpx",
            apiType="VirtualCenter", apiVersion="8.0.1.0",
            instanceUuid="00000000-0000-4000-8000-000000000000",
        )  # fmt: skip
        self.content = vim.ServiceInstanceContent(rootFolder=self.root.ref, about=about, **found)
        sessions = model.of(found["sessionManager"])
        sessions.computed["currentSession"] = model.sessions_part.current
        service = add(vim.ServiceInstance, "service", moid="ServiceInstance")
        service.properties["content"] = self.content
        self.datacenter: Managed = add(vim.Datacenter, "datacenter", name="DC0", parent=self.root)
        self._children(self.root)
        self.folders: dict[str, Managed] = {}
        self._by_path: dict[str, Managed] = {}
        for kind in ("vm", "host", "datastore", "network"):
            made = add(vim.Folder, "group", name=kind, parent=self.datacenter)
            self._children(made)
            self.datacenter.properties[f"{kind}Folder"] = made.ref
            self.folders[kind] = made

    def _children(self, folder: Managed) -> None:
        folder.computed["childEntity"] = lambda: [
            found.ref for found in self.model.objects.values() if found.parent is folder
        ]

    def RetrieveServiceContent(self, _call: Call, _of: Managed) -> Any:
        """Where everything is."""
        return self.content

    # -- folders ---------------------------------------------------------------------------------

    def add_folder(self, path: str) -> Managed:
        """A folder of VMs, by its path below the datacenter's; there may be one."""
        known = self._by_path.get(path)
        if known is not None and known.moid in self.model.objects:
            return known
        found = self.folders["vm"]
        for name in filter(None, path.split("/")):
            inside = [o for o in self.model.objects.values() if o.parent is found]
            folders = [o for o in inside if isinstance(o.ref, vim.Folder)]
            below = next((o for o in folders if o.properties["name"] == name), None)
            if below is None:
                below = self.model.add(
                    vim.Folder, "group", name=name, parent=found, childType=["VirtualMachine"]
                )
                self._children(below)
            found = below
        self._by_path[path] = found
        return found

    def CreateFolder(self, _call: Call, of: Managed, name: str) -> Any:
        """DuplicateName where the name is taken in the folder."""
        self.check_name(of, name)
        made = self.model.add(
            vim.Folder, "group", name=name, parent=of, childType=["VirtualMachine", "Folder"]
        )
        self._children(made)
        return made.ref

    def check_name(self, folder: Managed, name: str) -> None:
        """Names are unique in a folder, under 80 characters, `/ \\ %` escaped. Source: vSphere Web
        Services API, ManagedEntity.name. Raises SoapFault."""
        if not name or len(name) >= 80 or any(c in name for c in "/\\"):
            raise SoapFault(vim.fault.InvalidName(name=name), f"The name '{name}' is invalid.")
        for found in self.model.objects.values():
            if found.parent is folder and found.properties.get("name") == name:
                raise SoapFault(
                    vim.fault.DuplicateName(name=name, object=found.ref),
                    f"The name '{name}' already exists.",
                )

    def Rename_Task(self, _call: Call, of: Managed, newName: str) -> None:
        """Of a VM, folder, datastore."""
        if isinstance(of.ref, vim.Datastore):
            self.model.datastores.rename(of, newName)
            return
        if of.parent is not None and of.properties.get("name") != newName:
            self.check_name(of.parent, newName)
        of.properties["name"] = newName
        if isinstance(of.ref, vim.VirtualMachine):
            of.properties["config"].name = newName
            of.properties.touch("config")

    def MoveIntoFolder_Task(self, _call: Call, of: Managed, list: list[Any]) -> None:
        """Names must be free there."""
        for ref in list:
            moved = self.model.of(ref)
            self.check_name(of, moved.properties["name"])
            moved.parent = of
            moved.properties["parent"] = of.ref

    # -- virtual machines ------------------------------------------------------------------------

    def add_vm(self, plan: VmPlan) -> Managed:
        """A virtual machine, with its files. On a datastore with LUNs they are really there."""
        with self.model.changed:
            made: Managed = self.model.registration.load(
                self._make_files(plan), plan.name, self.add_folder(plan.folder), plan.host,
                template=plan.template,
            )  # fmt: skip
            made.properties["guest"] = _guest(plan)
            self.set_power(made, plan.power, clean=plan.clean_power_off)
            return made

    def _make_files(self, plan: VmPlan) -> str:
        names = {}
        own = self.model.datastores.ensure(plan.datastore)
        for place, disk, name in plan.disk_files():
            store = self.model.datastores.ensure(disk.datastore or plan.datastore)
            path = f"{plan.name}/{name}"
            if disk.kind == "flat":
                vmdks.make_flat(store.volume, path, disk.size_bytes)
            else:
                physical = disk.kind == "rdm-physical"
                vmdks.make_rdm(store.volume, path, disk.size_bytes, disk.lun, physical=physical)
            names[place] = name if store is own else f"/vmfs/volumes/{store.uuid}/{path}"
        base = f"{plan.name}/{plan.name}"
        own.volume.write_texts(
            {
                f"{base}.vmx": vmx.compose(vmx_of(plan, names)),
                f"{base}.nvram": f"nvram of {plan.name}\n",
                f"{base}.vmsd": vmx.compose({".encoding": "UTF-8"}),
            }
        )
        return f"[{plan.datastore}] {base}.vmx"

    def set_power(self, vm: Managed, state: str, *, clean: bool = True) -> None:
        """`poweredOn`, `poweredOff` or `suspended`."""
        with self.model.changed:
            before = vm.properties.get("runtime")
            vm.properties["runtime"] = vim.vm.RuntimeInfo(
                host=before.host if before else None,
                connectionState="connected",
                powerState=state,
                toolsInstallerMounted=False,
                numMksConnections=0,
                faultToleranceState="notConfigured",
                recordReplayState="inactive",
                consolidationNeeded=False,
                cleanPowerOff=clean if state == "poweredOff" else None,
                device=[],
            )
            self.model.changed.notify_all()


def _guest(plan: VmPlan) -> Any:
    running = plan.tools and plan.power == "poweredOn"
    return vim.vm.GuestInfo(
        guestState="running" if plan.power == "poweredOn" else "notRunning",
        guestFamily="windowsGuest" if plan.windows else "linuxGuest",
        toolsStatus="toolsOk" if running else "toolsNotRunning" if plan.tools else None,
        toolsVersionStatus2="guestToolsCurrent" if plan.tools else "guestToolsNotInstalled",
        toolsRunningStatus="guestToolsRunning" if running else "guestToolsNotRunning",
        hostName=plan.host_name or plan.name,
        net=[
            vim.vm.GuestInfo.NicInfo(
                connected=True, deviceConfigId=4000, ipAddress=list(plan.addresses)
            )
        ],
    )
