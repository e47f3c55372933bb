"""What the simulator knows: sessions, virtual machines, their snapshots, and tasks."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pyVmomi import vim, vmodl

from offload.testing.vsphere.properties import Managed, Watch, content
from offload.testing.vsphere.soap import SoapFault

_COLLECTOR = vmodl.query.PropertyCollector
_OPEN = ("RetrieveServiceContent", "Login", "CurrentTime")  # without a session


@dataclass(frozen=True, slots=True, kw_only=True)
class VmPlan:
    """A virtual machine. `windows`: with VSS, and disks that are told apart in the guest."""

    name: str
    instance_uuid: str
    bios_uuid: str = "564d0000-0000-4000-8000-000000000001"
    mac: str = "00:50:56:00:00:01"
    addresses: tuple[str, ...] = ()
    host_name: str = ""
    windows: bool = False
    enable_uuid: bool = True
    tools: bool = True
    power: str = "poweredOn"
    clean_power_off: bool = True
    independent_disk: bool = False


@dataclass(slots=True)
class Weather:
    """Faults on demand. `fault(method)`: what a call, or a task that it starts, fails with;
    `hold`: tasks of these methods wait for the event."""

    fault: Callable[[str], Any] = lambda _method: None
    hold: dict[str, threading.Event] = field(default_factory=dict)
    quiesces: bool = True  # else a snapshot is made, and says that it is not quiesced
    clock_ahead: timedelta = timedelta()


class Model:
    """Answers calls as a vCenter does. `calls` has their names in order. Thread safe.

    A property is read by its object's own call (Fetch), many by the property collector.
    """

    def __init__(self, user: str, password: str) -> None:
        self._login = (user, password)
        self.weather = Weather()
        self.calls: list[str] = []
        self.specs: list[Any] = []  # how snapshots were to be quiesced
        self._changed = threading.Condition(threading.RLock())
        self._numbers = itertools.count(1)
        self._objects: dict[str, Managed] = {}
        self._sessions: set[str] = set()
        self._watches: dict[str, list[Watch]] = {}  # by collector
        self._versions = itertools.count(1)
        self._views: dict[str, Any] = {}
        self._of_snapshot: dict[str, Managed] = {}  # its VM
        self._service()

    # -- for tests -------------------------------------------------------------------------------

    def add_vm(self, plan: VmPlan) -> Managed:
        """A virtual machine with one disk; two, one independent, where that is wanted."""
        vm = self._add(vim.VirtualMachine, "vm", name=plan.name, recentTask=[], snapshot=None)
        disks = [_disk(plan.name, 0, "persistent")]
        if plan.independent_disk:
            disks.append(_disk(plan.name, 1, "independent_persistent"))
        card = vim.vm.device.VirtualVmxnet3(key=4000, macAddress=plan.mac)
        vm.properties["config"] = vim.vm.ConfigInfo(
            name=plan.name,
            uuid=plan.bios_uuid,
            instanceUuid=plan.instance_uuid,
            template=False,
            changeVersion="1",
            modified=self.now(),
            version="vmx-13",
            guestId="otherGuest64",
            guestFullName="other",
            files=vim.vm.FileInfo(vmPathName=f"[ds1] {plan.name}/{plan.name}.vmx"),
            flags=vim.vm.FlagInfo(),
            defaultPowerOps=vim.vm.DefaultPowerOpInfo(),
            hardware=vim.vm.VirtualHardware(numCPU=1, memoryMB=64, device=[*disks, card]),
            extraConfig=[
                vim.option.OptionValue(key="disk.EnableUUID", value=str(plan.enable_uuid).upper())
            ],
        )
        vm.properties["guest"] = vim.vm.GuestInfo(
            guestState="running" if plan.power == "poweredOn" else "notRunning",
            guestFamily="windowsGuest" if plan.windows else "linuxGuest",
            toolsRunningStatus="guestToolsRunning" if plan.tools else "guestToolsNotRunning",
            hostName=plan.host_name or plan.name,
            net=[
                vim.vm.GuestInfo.NicInfo(
                    connected=True, deviceConfigId=4000, ipAddress=list(plan.addresses)
                )
            ],
        )
        self.set_power(vm, plan.power, clean=plan.clean_power_off)
        return vm

    def set_power(self, vm: Managed, state: str, *, clean: bool = True) -> None:
        """`poweredOn`, `poweredOff` or `suspended`."""
        with self._changed:
            vm.properties["runtime"] = vim.vm.RuntimeInfo(
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
            self._changed.notify_all()

    def snapshot_names(self, vm: Managed) -> list[str]:
        """Of all branches."""
        with self._changed:
            return [entry.name for entry, _ in _walk(vm)]

    def add_snapshot(self, vm: Managed, name: str) -> None:
        """As its user made it, below those that there are."""
        with self._changed:
            self._grow(vm, name, quiesced=False)

    def drop_snapshot(self, vm: Managed, name: str) -> None:
        """As an administrator removes it."""
        with self._changed:
            for entry, siblings in list(_walk(vm)):
                if entry.name == name:
                    self._prune(vm, entry, siblings)

    def end_sessions(self) -> None:
        """They have expired, or the server was restarted."""
        with self._changed:
            self._sessions.clear()

    @property
    def sessions(self) -> int:
        """Logged in now."""
        with self._changed:
            return len(self._sessions)

    def now(self) -> datetime:
        """The server's clock."""
        return datetime.now(UTC) + self.weather.clock_ahead

    # -- calls -----------------------------------------------------------------------------------

    def call(self, session: str, reference: Any, method: str, arguments: dict[str, Any]) -> Any:
        """As of Service."""
        with self._changed:
            self.calls.append(method)
            found = self._objects.get(reference._moId)
            if found is None:
                raise SoapFault(
                    vmodl.fault.ManagedObjectNotFound(obj=reference),
                    "The object has already been deleted or has not been completely created",
                )
            if session not in self._sessions and method not in _OPEN:
                raise SoapFault(
                    vim.fault.NotAuthenticated(object=found.ref, privilegeId="System.View"),
                    "The session is not authenticated.",
                )
        if not method.endswith("_Task"):  # a task fails by itself
            self._storm(method)
            if method == "WaitForUpdatesEx":
                return self._wait(found, **arguments)
            with self._changed:
                return getattr(self, f"_do_{method}")(session, found, **arguments)
        return self._start(found, method, arguments)

    def _storm(self, method: str) -> None:
        fault = self.weather.fault(method)
        if fault is not None:
            raise SoapFault(fault)

    def _add(self, kind: Any, prefix: str, moid: str = "", **properties: Any) -> Managed:
        made = Managed(kind(moid or f"{prefix}-{next(self._numbers)}"), dict(properties))
        self._objects[made.moid] = made
        return made

    def _service(self) -> None:
        root = self._add(vim.Folder, "group", name="Datacenters", childEntity=[])
        parts = {
            "sessionManager": vim.SessionManager,
            "propertyCollector": _COLLECTOR,
            "viewManager": vim.view.ViewManager,
        }
        found = {name: self._add(kind, name, moid=name).ref for name, kind in parts.items()}
        about = vim.AboutInfo(
            name="VMware vCenter Server", fullName="vSphere simulator", vendor="offload",
            version="8.0.1", build="0", osType="linux", productLineId="vpx",
            apiType="VirtualCenter", apiVersion="8.0.1.0",
        )  # fmt: skip
        self._content = vim.ServiceInstanceContent(rootFolder=root.ref, about=about, **found)
        self._add(vim.ServiceInstance, "service", moid="ServiceInstance")

    def _do_RetrieveServiceContent(self, _session: str, _of: Managed) -> Any:
        return self._content

    def _do_CurrentTime(self, _session: str, _of: Managed) -> datetime:
        return self.now()

    def _do_Login(
        self, session: str, _of: Managed, userName: str, password: str, locale: str | None
    ) -> Any:
        if (userName, password) != self._login:
            raise SoapFault(
                vim.fault.InvalidLogin(),
                "Cannot complete login due to an incorrect user name or password.",
            )
        self._sessions.add(session)
        now = self.now()
        return vim.UserSession(
            key=session, userName=userName, fullName=userName, loginTime=now, lastActiveTime=now,
            locale=locale or "en", messageLocale="en",
        )  # fmt: skip

    def _do_Logout(self, session: str, _of: Managed) -> None:
        self._sessions.discard(session)

    # -- properties ------------------------------------------------------------------------------

    def _do_Fetch(self, _session: str, of: Managed, prop: str) -> Any:
        return of.get(prop)

    def _do_CreateContainerView(
        self, _session: str, _of: Managed, container: Any, type: list[Any], recursive: bool
    ) -> Any:
        view = self._add(vim.view.ContainerView, "view")
        self._views[view.moid] = tuple(type)
        return view.ref

    def _do_DestroyView(self, _session: str, of: Managed) -> None:
        del self._objects[of.moid], self._views[of.moid]

    def _chosen(self, spec: Any) -> list[Managed]:
        """An object itself, or what a view shows: all that our client asks for."""
        found = []
        for wanted in spec.objectSet:
            moid = wanted.obj._moId
            kinds = self._views.get(moid)
            if kinds is not None:
                found += [o for o in self._objects.values() if isinstance(o.ref, kinds)]
            elif moid in self._objects:
                found.append(self._objects[moid])
        return found

    def _do_RetrievePropertiesEx(
        self, _session: str, of: Managed, specSet: list[Any], options: Any
    ) -> Any:
        rows = [row for spec in specSet for row in content(self._chosen(spec), spec)]
        return self._page(of, rows, options.maxObjects)

    def _do_ContinueRetrievePropertiesEx(self, _session: str, of: Managed, token: str) -> Any:
        rows, size = of.properties.pop(f"page {token}")
        return self._page(of, rows, size)

    def _page(self, of: Managed, rows: list[Any], size: int) -> Any:
        """maxObjects: more than so many come with a token for the rest."""
        if not rows:
            return None
        token = None
        if len(rows) > size:
            token = str(next(self._numbers))
            of.properties[f"page {token}"] = (rows[size:], size)
        return _COLLECTOR.RetrieveResult(objects=rows[:size], token=token)

    def _do_CreatePropertyCollector(self, _session: str, _of: Managed) -> Any:
        made = self._add(_COLLECTOR, "collector")
        self._watches[made.moid] = []
        return made.ref

    def _do_DestroyPropertyCollector(self, _session: str, of: Managed) -> None:
        del self._objects[of.moid], self._watches[of.moid]

    def _do_CreateFilter(self, _session: str, of: Managed, spec: Any, partialUpdates: bool) -> Any:
        made = self._add(_COLLECTOR.Filter, "filter")
        self._watches[of.moid].append(Watch(made.ref, spec))
        return made.ref

    def _wait(self, of: Managed, version: str, options: Any) -> Any:
        """Answers nothing where nothing has changed within maxWaitSeconds."""
        until = time.monotonic() + options.maxWaitSeconds
        with self._changed:
            while True:
                sets = []
                for watch in self._watches[of.moid]:
                    updates = watch.changes(self._chosen(watch.spec))
                    if updates:
                        sets.append(_COLLECTOR.FilterUpdate(filter=watch.ref, objectSet=updates))
                left = until - time.monotonic()
                if sets:
                    number = str(next(self._versions))
                    return _COLLECTOR.UpdateSet(version=number, filterSet=sets)
                if left <= 0:
                    return None
                self._changed.wait(left)

    # -- tasks -----------------------------------------------------------------------------------

    def _start(self, of: Managed, method: str, arguments: dict[str, Any]) -> Any:
        """Runs in a thread of its own, as a task does; recentTask of its VM names it."""
        vm = self._of_snapshot.get(of.moid, of)
        with self._changed:
            task = self._add(vim.Task, "task")
            task.properties["info"] = vim.TaskInfo(
                key=task.moid, task=task.ref, descriptionId=_DESCRIPTIONS[method],
                state="running", cancelled=False, cancelable=False, queueTime=self.now(),
                startTime=self.now(), reason=vim.TaskReasonUser(userName="user"), eventChainId=1,
            )  # fmt: skip
            vm.properties["recentTask"] = [*vm.properties["recentTask"], task.ref]
        threading.Thread(target=self._work, args=(task, of, method, arguments), daemon=True).start()
        return task.ref

    def _work(self, task: Managed, of: Managed, method: str, arguments: dict[str, Any]) -> None:
        if method in self.weather.hold:
            self.weather.hold[method].wait()
        with self._changed:
            info = task.properties["info"]
            try:
                self._storm(method)
                info.result = getattr(self, f"_do_{method}")(of, **arguments)
                info.state = "success"
            except SoapFault as error:
                info.error, info.state = error.fault, "error"
            self._changed.notify_all()

    def _do_CreateSnapshotEx_Task(
        self, of: Managed, name: str, description: str, memory: bool, quiesceSpec: Any
    ) -> Any:
        """With a quiesceSpec the guest has to run, with Tools ("If the flag is set … VMware Tools
        must be installed and running")."""
        self.specs.append(quiesceSpec)
        guest = of.properties["guest"]
        if quiesceSpec is not None and guest.toolsRunningStatus != "guestToolsRunning":
            raise SoapFault(vim.fault.ToolsUnavailable(), "Cannot complete operation: no Tools")
        quiesced = quiesceSpec is not None and self.weather.quiesces
        return self._grow(of, name, quiesced=quiesced)

    def _grow(self, vm: Managed, name: str, *, quiesced: bool) -> Any:
        """A new leaf; disks of mode persistent get a delta, whose parent stands still."""
        snapshot = self._add(vim.vm.Snapshot, "snapshot")
        self._of_snapshot[snapshot.moid] = vm
        entry = vim.vm.SnapshotTree(
            snapshot=snapshot.ref, vm=vm.ref, name=name, description="", id=next(self._numbers),
            createTime=self.now(), state=vm.properties["runtime"].powerState, quiesced=quiesced,
            replaySupported=False, childSnapshotList=[],
        )  # fmt: skip
        entries = [found for found, _ in _walk(vm)]
        if entries:
            entries[-1].childSnapshotList = [*entries[-1].childSnapshotList, entry]
        else:
            vm.properties["snapshot"] = vim.vm.SnapshotInfo(rootSnapshotList=[entry])
        vm.properties["snapshot"].currentSnapshot = snapshot.ref
        for disk in _disks(vm):
            if disk.backing.diskMode == "persistent":
                base = disk.backing
                disk.backing = _backing(f"{base.fileName[:-5]}-000001.vmdk", "persistent")
                disk.backing.parent = base
        return snapshot.ref

    def _do_RemoveSnapshot_Task(
        self, of: Managed, removeChildren: bool, consolidate: bool | None
    ) -> None:
        """removeChildren False: the children take its place, its delta is merged into them."""
        vm = self._of_snapshot[of.moid]
        for entry, siblings in list(_walk(vm)):
            if entry.snapshot._moId == of.moid:
                self._prune(vm, entry, siblings)

    def _prune(self, vm: Managed, entry: Any, siblings: list[Any]) -> None:
        siblings[:] = [
            *(found for found in siblings if found is not entry),
            *entry.childSnapshotList,
        ]
        self._objects.pop(entry.snapshot._moId, None)
        if not vm.properties["snapshot"].rootSnapshotList:
            vm.properties["snapshot"] = None  # unset where there are none
        for disk in _disks(vm):
            disk.backing = disk.backing.parent or disk.backing

    def _do_ConsolidateVMDisks_Task(self, of: Managed) -> None:
        of.properties["runtime"].consolidationNeeded = False


_DESCRIPTIONS = {
    "CreateSnapshotEx_Task": "VirtualMachine.createSnapshot",
    "RemoveSnapshot_Task": "vm.Snapshot.remove",
    "ConsolidateVMDisks_Task": "VirtualMachine.consolidateDisks",
}


def _walk(vm: Managed) -> Iterator[tuple[Any, list[Any]]]:
    """Entries of the tree, from the root down, each with the list that it is in."""
    info = vm.properties["snapshot"]
    todo = [info.rootSnapshotList] if info is not None else []
    while todo:
        siblings = todo.pop()
        for entry in siblings:
            yield entry, siblings
            todo.append(entry.childSnapshotList)


def _disks(vm: Managed) -> list[Any]:
    devices = vm.properties["config"].hardware.device
    return [d for d in devices if isinstance(d, vim.vm.device.VirtualDisk)]


def _disk(vm: str, number: int, mode: str) -> Any:
    return vim.vm.device.VirtualDisk(
        key=2000 + number,
        unitNumber=number,
        controllerKey=1000,
        capacityInKB=1024,
        deviceInfo=vim.Description(label=f"Hard disk {number + 1}", summary=""),
        backing=_backing(f"[ds1] {vm}/{vm}_{number}.vmdk", mode),
    )


def _backing(file: str, mode: str) -> Any:
    return vim.vm.device.VirtualDisk.FlatVer2BackingInfo(fileName=file, diskMode=mode)
