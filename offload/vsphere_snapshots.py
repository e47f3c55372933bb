"""Snapshots of VMs on vSphere: quiesced ones, their removal, what was left of them.

Sources: the vSphere Web Services API reference (VirtualMachine.CreateSnapshotEx_Task, of 6.5;
VirtualMachineSnapshot; VirtualMachineSnapshotTree).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pyVmomi import vim, vmodl

from offload.errors import NotFoundError, UnavailableError
from offload.vsphere import TaskLateError, Vsphere

_RETRY_S = 0.5
_CREATE = "VirtualMachine.createSnapshot"  # how recentTask names it, Ex or not


def create_quiesced(
    vsphere: Vsphere, vm: Any, name: str, *, family: str | None, description: str, until: float
) -> None:
    """A snapshot without memory, the guest's file systems quiesced by VMware Tools. `family`: its
    guestFamily.

    Raises UnavailableError (`quiesce-failed`, `vsphere-late`: the snapshot may appear later).
    """

    def start() -> Any:
        return vm.CreateSnapshotEx_Task(
            name=name, description=description, memory=False, quiesceSpec=_quiesce_spec(family)
        )

    _finish(vsphere, start, f"the quiesced snapshot {name}", until)


def _finish(vsphere: Vsphere, start: Callable[[], Any], what: str, until: float) -> None:
    """A task to its end. A VM that is busy with another one (it is migrated, its disks are moved)
    is tried again until then."""
    while True:
        try:
            with vsphere.translated(what):
                task = start()
            vsphere.wait(task, until, what)
            return
        except UnavailableError as error:
            busy = isinstance(error.__cause__, vim.fault.TaskInProgress)
            if not busy or time.monotonic() + _RETRY_S > until:
                raise
            time.sleep(_RETRY_S)


def remove(vsphere: Vsphere, vm: Any, name: str, until: float, *, creating: bool) -> bool:
    """Remove the snapshot of this name, wait until its delta is merged; whether there was one.

    `creating`: it may be in creation still, and that is waited for. Idempotent. Raises
    UnavailableError; TaskLateError: the server goes on.
    """
    try:
        if creating:
            _await_creations(vsphere, vm, until)
        with vsphere.translated("the snapshots of a VM"):
            info = vsphere.read(vm, "snapshot").get("snapshot")
        found = [entry for entry in all_snapshots(info) if entry.name == name]
        for entry in found:
            gone = partial(
                entry.snapshot.RemoveSnapshot_Task, removeChildren=False, consolidate=True
            )
            _finish(vsphere, gone, f"the removal of the snapshot {name}", until)
    except NotFoundError:  # the VM, or the snapshot, went meanwhile
        return False
    return bool(found)


def _await_creations(vsphere: Vsphere, vm: Any, until: float) -> None:
    with vsphere.translated("the tasks of a VM"):
        tasks = [task for task in vm.recentTask if _creates(task)]
    for task in tasks:
        try:
            vsphere.wait(task, until, "a snapshot that is being created")
        except TaskLateError:
            raise
        except UnavailableError:  # it has failed: there is nothing of it
            continue


def consolidate(vsphere: Vsphere, vm: Any, until: float) -> None:
    """Merge deltas without a snapshot, where the server says that there are some."""
    with vsphere.translated("the disks of a VM"):
        needed = any(vsphere.read(vm, "runtime.consolidationNeeded").values())
    if needed:
        _finish(vsphere, vm.ConsolidateVMDisks_Task, "the consolidation of a VM's disks", until)


def all_snapshots(info: Any) -> Iterator[Any]:
    """All entries of a VM's `snapshot`, which is None where it has none."""
    todo = list(info.rootSnapshotList) if info is not None else []
    while todo:
        entry = todo.pop()
        yield entry
        todo += entry.childSnapshotList


def of_prefix(vsphere: Vsphere, prefix: str) -> Iterator[tuple[Any, str, str]]:
    """All VMs' snapshots whose names begin so: the VM, its name, the snapshot's."""
    with vsphere.translated("the snapshots of all VMs"):
        for vm, fields in vsphere.collect(vim.VirtualMachine, ("name", "snapshot")):
            for entry in all_snapshots(fields.get("snapshot")):
                if entry.name.startswith(prefix):
                    yield vm, fields.get("name", ""), entry.name


def _quiesce_spec(family: str | None) -> Any:
    """Windows: by VSS with the writers of its applications; a copy backup, so that no application
    takes it for its own (VSS_BT_COPY of vss.h). Never less than that: it fails instead."""
    if family == "windowsGuest":
        return vim.vm.WindowsQuiesceSpec(
            vssBackupType=5,
            vssBackupContext="ctx_backup",
            vssBootableSystemState=True,
            vssPartialFileSupport=False,
        )
    return vim.vm.GuestQuiesceSpec()


def _creates(task: Any) -> bool:
    """Of a task that may be gone already."""
    try:
        return task.info.descriptionId == _CREATE and task.info.state in ("queued", "running")
    except vmodl.fault.ManagedObjectNotFound:
        return False
