"""What is done to placeholders once they are registered: brought to the point in time that was
asked for, and looked at: nothing of them may be production's, no network card may connect.

A VM's settings in the copy are changed before it is registered (`vmx.py`). But a revert brings back
those that the VM had when it was snapshot, so whoever was reverted is changed again.

Sources: vSphere Web Services API, VirtualMachineSnapshot, VirtualMachine.ReconfigVM_Task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyVmomi import vim, vmodl

from offload.errors import OffloadError, UnavailableError
from offload.hypervisors.vsphere.properties import read_each
from offload.hypervisors.vsphere.record import MARK
from offload.hypervisors.vsphere.tasks import Job, error_of, run_all
from offload.vsphere import Vsphere


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A placeholder that is registered. `snapshot`: the name of our VM snapshot in it, or "";
    `revert`: whether it is to show that."""

    moref: str
    name: str
    snapshot: str
    revert: bool
    annotation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a placeholder may stand on."""

    mark: str
    datastores: frozenset[str]  # names
    luns: frozenset[str]  # UUIDs (`ScsiLun.uuid`) of our LUNs


def revert(vsphere: Vsphere, vms: Sequence[Registered], timeout_s: float) -> None:
    """Those that show their own instant, to that. Raises UnavailableError
    (`vm-instant-missing`)."""
    chosen = [vm for vm in vms if vm.revert]
    entries = _snapshots(vsphere, chosen)
    missing = [vm.name for vm in chosen if vm.moref not in entries]
    if missing:
        raise UnavailableError(
            f"the snapshot of {', '.join(missing)} is not in the copy: it does not show the VM's "
            "own instant",
            code="vm-instant-missing",
            hint="take a new TimeMark, or mount it with --shows group",
        )
    jobs = [
        Job(
            f"the revert of {vm.name} to {vm.snapshot}",
            partial(entries[vm.moref].RevertToSnapshot_Task, suppressPowerOn=True),
        )
        for vm in chosen
    ]
    _run(vsphere, jobs, timeout_s)


def remove_snapshots(vsphere: Vsphere, vms: Sequence[Registered], timeout_s: float) -> None:
    """Our VM snapshots in the copies: never the user's, and none that hangs below."""
    entries = _snapshots(vsphere, [vm for vm in vms if vm.snapshot])
    jobs = [
        Job(
            f"the removal of {vm.snapshot} from {vm.name}",
            partial(entries[vm.moref].RemoveSnapshot_Task, removeChildren=False, consolidate=True),
        )
        for vm in vms
        if vm.moref in entries
    ]
    _run(vsphere, jobs, timeout_s)


def _snapshots(vsphere: Vsphere, vms: Sequence[Registered]) -> dict[str, Any]:
    """Of each VM, the snapshot of ours (`vim.vm.Snapshot`), in whatever branch."""
    if not vms:
        return {}
    with vsphere.translated("the snapshots of placeholders"):
        managed = [vim.VirtualMachine(vm.moref, vsphere.stub) for vm in vms]
        known = read_each(vsphere, managed, "snapshot")
    found = {}
    for vm in vms:
        for entry in _tree(known.get(vm.moref, {}).get("snapshot")):
            if entry.name == vm.snapshot:
                found[vm.moref] = entry.snapshot
    return found


def _tree(info: Any) -> Iterator[Any]:
    todo = list(info.rootSnapshotList) if info is not None else []
    while todo:
        entry = todo.pop()
        yield entry
        todo += entry.childSnapshotList


def settle(
    vsphere: Vsphere, vms: Sequence[Registered], ground: Ground, timeout_s: float
) -> dict[str, list[str]]:
    """Look at the settings of all, and change what must not be so; notes by reference.

    Raises UnavailableError (`not-a-copy`) where something of production is still in one then.
    """
    notes: dict[str, list[str]] = {}
    wrong = _wrong(vsphere, vms, ground, notes)
    _run(
        vsphere,
        [
            Job(
                f"the settings of {vm.name}",
                partial(vim.VirtualMachine(vm.moref, vsphere.stub).ReconfigVM_Task, spec=spec),
            )
            for vm, spec in wrong
        ],
        timeout_s,
    )
    changed = [vm for vm, _ in wrong]
    still = [vm.name for vm, spec in _wrong(vsphere, changed, ground, {}) if spec.deviceChange]
    if still:
        raise UnavailableError(
            f"{', '.join(still)}: a disk of production, or a network card that connects, is still "
            "in the placeholder's settings",
            code="not-a-copy",
        )
    return notes


def _wrong(
    vsphere: Vsphere, vms: Sequence[Registered], ground: Ground, notes: dict[str, list[str]]
) -> list[tuple[Registered, Any]]:
    """Placeholders that need a change, and the change (`VirtualMachineConfigSpec`)."""
    with vsphere.translated("the settings of placeholders"):
        managed = [vim.VirtualMachine(vm.moref, vsphere.stub) for vm in vms]
        known = read_each(
            vsphere, managed, "config.hardware.device", "config.extraConfig", "config.annotation"
        )
    found = []
    for vm in vms:
        fields = known.get(vm.moref)
        if fields is None:
            raise UnavailableError(f"placeholder {vm.name} has gone", code="vsphere-failed")
        spec = _spec(vm, fields, ground, notes.setdefault(vm.moref, []))
        if spec is not None:
            found.append((vm, spec))
    return found


def _spec(vm: Registered, fields: Mapping[str, Any], ground: Ground, notes: list[str]) -> Any:
    """What to change of one; None where nothing is to be."""
    changes = []
    kinds = vim.vm.device.VirtualDeviceSpec
    for device in fields.get("config.hardware.device", ()):
        if isinstance(device, vim.vm.device.VirtualEthernetCard):
            if device.connectable is not None and device.connectable.startConnected:
                device.connectable.startConnected = False
                device.connectable.connected = False
                changes.append(kinds(operation="edit", device=device))
        elif isinstance(device, vim.vm.device.VirtualDisk) and not _ours(device.backing, ground):
            changes.append(kinds(operation="remove", device=device))  # no fileOperation: files stay
            notes.append(f"{_label(device)} is left out: it is no part of the copy")
    spec = vim.vm.ConfigSpec(deviceChange=changes)
    options = {o.key: str(o.value) for o in fields.get("config.extraConfig", ())}
    wanted = {MARK: ground.mark, "uuid.action": "create"}
    spec.extraConfig = [
        vim.option.OptionValue(key=key, value=value)
        for key, value in wanted.items()
        if options.get(key) != value
    ]
    if fields.get("config.annotation", "") != vm.annotation:
        spec.annotation = vm.annotation
    return spec if changes or spec.extraConfig or spec.annotation is not None else None


def _ours(backing: Any, ground: Ground) -> bool:
    """Whether a disk, with all parents, lies on our datastores; a mapping points at our LUN."""
    while backing is not None:
        name = getattr(backing, "fileName", "") or ""
        if name.partition("] ")[0].removeprefix("[") not in ground.datastores:
            return False
        lun = getattr(backing, "lunUuid", None)  # of a raw device mapping
        if lun and lun not in ground.luns:
            return False
        backing = getattr(backing, "parent", None)
    return True


def _label(device: Any) -> str:
    return str(device.deviceInfo.label) if device.deviceInfo is not None else "a disk"


def _run(vsphere: Vsphere, jobs: Sequence[Job], timeout_s: float) -> None:
    """All; then the first fault is raised."""
    failed: OffloadError | None = None
    for job, result in zip(jobs, run_all(vsphere, jobs, timeout_s=timeout_s), strict=True):
        if isinstance(result, vmodl.MethodFault) and failed is None:
            failed = error_of(vsphere, result, job.what)
    if failed is not None:
        raise failed
