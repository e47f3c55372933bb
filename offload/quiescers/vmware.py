"""A quiesced snapshot of a VMware VM that lives for the seconds of a TimeMark.

The guest's file systems are quiesced only while vSphere makes the VM snapshot; then it writes on,
into deltas. So nothing is held when the storage snapshot is taken, and it shows two things:

- the running disks, deltas included: what a power cut at the storage snapshot's instant leaves;
- their parents: the quiesced disks, as of `image_at`. Who wants these reverts a copy of the VM to
  its snapshot, which is in the image.

The VM snapshot is removed at the thaw, whatever happened, by its name, which nobody else uses.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from offload.configs.hypervisors import VsphereConfig
from offload.configs.quiesce import VmwareFreeze
from offload.errors import (
    CleanupError,
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)
from offload.ids import new_id
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers import ourselves
from offload.quiescers.turns import Turns
from offload.vsphere import TaskLateError, Vsphere
from offload.vsphere_snapshots import all_snapshots, consolidate, create_quiesced, remove

if TYPE_CHECKING:  # a thaw never loads the catalog
    from offload.catalog.store import Catalog

_REMOVE_S = 300.0  # a delta of seconds is merged in seconds; the server may be busy with others
_PATIENCE_S = 120.0  # with a server that is away while a VM carries a snapshot
_PAUSE_S = 2.0
_AWAY = ("vsphere-session", "vsphere-unavailable")
_DESCRIPTION = "made and removed by offload within seconds, for a snapshot of its storage"

_PROPERTIES = (
    "name", "snapshot", "runtime.connectionState", "runtime.powerState", "runtime.cleanPowerOff",
    "runtime.consolidationNeeded", "config.uuid", "config.extraConfig", "config.hardware.device",
    "guest.net", "guest.hostName", "guest.guestFamily", "guest.toolsRunningStatus",
)  # fmt: skip

_PRIVILEGES = ("VirtualMachine.State.CreateSnapshot", "VirtualMachine.State.RemoveSnapshot")

_turns: dict[str, Turns] = {}
_turns_lock = threading.Lock()


class VmwarePart:
    """`[vms.NAME.freeze]` of kind vmware."""

    kind = "vmware"

    def __init__(self, vm: str, entry: VmwareFreeze, instance: Instance) -> None:
        self._vm_name = vm
        self._entry = entry
        self._instance = instance
        self._config = _server(instance, entry.hypervisor)
        self.name = f"vmware:{entry.vm}"
        self.snapshot_name = f"offload.{instance.id}.{new_id()}"
        self._vsphere: Vsphere | None = None
        self._vm: Any = None
        self._at_rest = ""  # the power state of a VM without writers
        self._asked = False  # the server was asked for a snapshot, and it may be there
        self._creating = False  # and it may be making it still
        self._seen: dict[str, Any] = {}  # properties of the VM as of `check`
        self._behind = timedelta()  # this machine's clock minus the server's
        self._image_at: datetime | None = None
        self._notes: list[str] = []
        self.what: tuple[str, ...] = ()
        self.unbroken = True

    @property
    def holds_nothing(self) -> bool:
        """Its writers go on, unless there are none."""
        return not self._at_rest

    def check(self) -> None:
        """Raises ConfigError (`secret-…`, `vsphere-certificate`, `vsphere-login`), NotFoundError
        (`unknown-vm`), PolicyError (`would-freeze-ourselves`), PrivilegeError, UnavailableError
        (`tools-not-running`, `vm-not-ready`, `vsphere-unavailable`)."""
        vsphere = self._connected()
        self._vm = self._find(vsphere)
        with vsphere.translated(f"VM {self._entry.vm}"):
            self._behind = datetime.now(UTC) - vsphere.clock()
            self._seen = seen = vsphere.read(self._vm, *_PROPERTIES)
        if seen.get("runtime.connectionState") != "connected":
            raise UnavailableError(
                f"VM {self._entry.vm} is {seen.get('runtime.connectionState')}",
                code="vm-not-ready",
            )
        ourselves.check(self._vm_name, _facts(seen), self._instance)
        if seen["runtime.powerState"] != "poweredOn":
            self._at_rest = str(seen["runtime.powerState"])
            return
        if seen.get("guest.toolsRunningStatus") != "guestToolsRunning":
            raise UnavailableError(
                f"VMware Tools do not run in VM {self._entry.vm}: nothing quiesces it",
                code="tools-not-running",
                hint="install open-vm-tools (Linux) or VMware Tools (Windows) in the guest",
            )
        self._check_privileges(vsphere)
        self._look_at_snapshots()

    def _check_privileges(self, vsphere: Vsphere) -> None:
        """Before anything is held: a snapshot that could not be removed again is none to make."""
        with vsphere.translated(f"VM {self._entry.vm}"):
            lacking = vsphere.lacking(self._vm, _PRIVILEGES)
        if lacking:
            raise PrivilegeError(
                f"this user lacks privileges on VM {self._entry.vm}: {', '.join(lacking)}",
                code="vsphere-privilege",
                hint="give its role these privileges: docs/howto/inventory.md",
            )

    def _find(self, vsphere: Vsphere) -> Any:
        """By its id where that is known: a search reads the names of all VMs."""
        if self._entry.moref is not None:
            return vsphere.vm(self._entry.moref)
        return vsphere.find_vm(self._entry.vm)

    def _look_at_snapshots(self) -> None:
        names = [entry.name for entry in all_snapshots(self._seen.get("snapshot"))]
        if names:
            self._notes.append(
                f"it has snapshots already ({', '.join(sorted(names))}): its disks are deltas"
            )
        if self._seen.get("runtime.consolidationNeeded"):
            self._notes.append("its disks need consolidation: earlier deltas were not merged")

    def _connected(self) -> Vsphere:
        if self._vsphere is None:
            self._vsphere = Vsphere(self._config)
        return self._vsphere

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """`remove-vm-snapshot`: by name; already gone is success."""
        return [
            (
                "remove-vm-snapshot",
                {
                    "hypervisor": self._entry.hypervisor,
                    "vm": self._entry.vm,
                    "moref": self._vm._moId if self._vm is not None else "",  # noqa: SLF001
                    "snapshot": self.snapshot_name,
                },
            )
        ]

    def arm(self, deadline_s: float) -> None:
        """Nothing: the session is there, and the server has no timer to set."""

    def freeze(self, until: float) -> Consistency:
        """Make the VM snapshot. Raises UnavailableError (`quiesce-failed`, `not-quiesced`,
        `vsphere-late`); what was made of it is removed in `close`."""
        if self._at_rest:
            return self._freeze_at_rest()
        vsphere = self._connected()
        family = self._seen.get("guest.guestFamily")
        with _turn(self._config, until):
            self._asked = self._creating = True
            create_quiesced(
                vsphere,
                self._vm,
                self.snapshot_name,
                family=family,
                description=_DESCRIPTION,
                until=until,
            )
            self._creating = False
        with vsphere.translated(f"VM {self._entry.vm}"):
            seen = vsphere.read(self._vm, "snapshot", "config.hardware.device")
        made = self._ours(seen)
        if made is None or not made.quiesced:
            raise UnavailableError(
                f"vSphere made a snapshot of VM {self._entry.vm} without quiescing it",
                code="not-quiesced",
                hint="look at VMware Tools in the guest; disks it cannot quiesce must not be",
            )
        # by this machine's clock, as are those that it is compared with
        self._image_at = made.createTime + self._behind
        return self._report(seen["config.hardware.device"])

    def _ours(self, seen: Mapping[str, Any]) -> Any:
        """The entry of our snapshot in the VM's tree; None."""
        entries = all_snapshots(seen.get("snapshot"))
        return next((entry for entry in entries if entry.name == self.snapshot_name), None)

    def _report(self, devices: Sequence[Any]) -> Consistency:
        """What was quiesced, and what it reaches."""
        disks = [d for d in devices if getattr(d, "capacityInKB", None) is not None]
        outside = [d for d in disks if not _has_delta(d)]
        inside = [d for d in disks if _has_delta(d)]
        self.what = tuple(d.backing.parent.fileName for d in inside)
        self._notes.append(
            f"the group's image has its running disks, as of the storage snapshot: "
            f"{', '.join(d.backing.fileName for d in inside)}; their parents are quiesced, as of "
            f"{self._image_at:%Y-%m-%dT%H:%M:%S.%fZ}: VM snapshot {self.snapshot_name}"
        )
        if outside:
            named = ", ".join(f"{d.deviceInfo.label} ({_why_outside(d)})" for d in outside)
            self._notes.insert(  # before all else: it is why the VM reached no more
                0,
                "outside of VM snapshots, so not quiesced, and as a power cut leaves them: "
                + named,
            )
            return Consistency.CRASH
        return _reached(self._seen)

    def _freeze_at_rest(self) -> Consistency:
        if not self._stays_at_rest():
            raise UnavailableError(
                f"VM {self._entry.vm} was {self._at_rest}, and was started just now",
                code="freeze-failed",
            )
        if self._at_rest == "suspended":
            self._notes.append("the VM is suspended: its disks are as a power cut leaves them")
            return Consistency.CRASH
        if self._seen.get("runtime.cleanPowerOff"):
            self._notes.append("the VM is off: its guest shut down in good order")
            return Consistency.FILESYSTEM
        self._notes.append("the VM was cut off: its disks are as a power cut leaves them")
        return Consistency.CRASH

    def _stays_at_rest(self) -> bool:
        return bool(self._now("runtime.powerState").get("runtime.powerState") == self._at_rest)

    def _now(self, path: str) -> dict[str, Any]:
        vsphere = self._connected()
        with vsphere.translated(f"VM {self._entry.vm}"):
            return vsphere.read(self._vm, path)

    def still_frozen(self) -> bool:
        """Whether the VM snapshot is still there, so that its parents stood still; whether a VM
        without writers has none still."""
        try:
            if self._at_rest:
                held, why = self._stays_at_rest(), "the VM was started"
            else:
                found = self._ours(self._now("snapshot"))
                held, why = found is not None, "somebody has removed the VM snapshot"
        except OffloadError as error:
            held, why = False, error.message
        if not held:
            self._notes.append(f"not held all the time: {why}")
            self.unbroken = False
        return held

    def thaw(self) -> None:
        """Remove the VM snapshot. Idempotent. Raises UnavailableError (`thaw-failed`)."""
        if not self._asked:
            return
        until = time.monotonic() + _REMOVE_S
        # late, it is removed out of turn: a delta grows
        with _turns_of(self._config).one(until - _REMOVE_S / 2):
            self._remove_surely(until)
        self._asked = self._creating = False

    def _remove_surely(self, until: float) -> None:
        """Once more in another session, whatever it was; for a while where nobody answers: an
        expired session, a vCenter that is restarted."""
        patience_until = time.monotonic() + _PATIENCE_S
        again = True
        while True:
            try:
                return self._remove(until)
            except OffloadError as error:
                away = error.code in _AWAY and time.monotonic() < patience_until
                if isinstance(error, TaskLateError) or not (again or away):
                    raise self._stuck(error) from error
                if not again:
                    time.sleep(_PAUSE_S)
            again = False
            self._hang_up()

    def _remove(self, until: float) -> None:
        vsphere = self._connected()
        vm = vsphere.vm(self._vm._moId)  # noqa: SLF001 - its name in the API
        remove(vsphere, vm, self.snapshot_name, until, creating=self._creating)
        consolidate(vsphere, vm, until)

    def _stuck(self, error: OffloadError) -> UnavailableError:
        return UnavailableError(
            f"the snapshot {self.snapshot_name} of VM {self._entry.vm} could not be removed: "
            f"{error.message}",
            code="thaw-failed",
            hint="its delta grows: remove it in vSphere, or run: offload recover",
        )

    def close(self) -> None:
        """Remove what a failed freeze has left, or may yet make; log out. Raises CleanupError
        where that cannot be confirmed."""
        try:
            self.thaw()
        except UnavailableError as error:
            raise CleanupError(error.message, hint=error.hint, code=error.code) from error
        finally:
            self._asked = False
            self._hang_up()

    def _hang_up(self) -> None:
        vsphere, self._vsphere = self._vsphere, None
        if vsphere is not None:
            vsphere.close()

    @property
    def image_at(self) -> datetime | None:
        """When the parents' image was made, by this machine's clock."""
        return self._image_at

    @property
    def output(self) -> str:
        """What was noticed."""
        return "\n".join(self._notes)


def _server(instance: Instance, name: str) -> VsphereConfig:
    found = instance.config.hypervisors.get(name)
    if not isinstance(found, VsphereConfig):
        raise ConfigError(f"[hypervisors.{name}] is not there, or not of kind vsphere")
    return found


def _facts(seen: Mapping[str, Any]) -> ourselves.Facts:
    macs = [getattr(device, "macAddress", None) for device in seen["config.hardware.device"]]
    facts = ourselves.Facts(
        addresses=frozenset(a for nic in seen.get("guest.net", ()) for a in nic.ipAddress or ()),
        uuids=frozenset({seen.get("config.uuid", "")}),
        host_name=seen.get("guest.hostName", ""),
    )
    return ourselves.with_macs(facts, [mac for mac in macs if mac])


def _has_delta(disk: Any) -> bool:
    """Independent disks and physical RDMs are no part of a VM snapshot."""
    return getattr(disk.backing, "parent", None) is not None


def _why_outside(disk: Any) -> str:
    if getattr(disk.backing, "compatibilityMode", None) == "physicalMode":
        return "an RDM in physical mode"
    return str(getattr(disk.backing, "diskMode", "") or "no delta").replace("_", " ")


def _reached(seen: Mapping[str, Any]) -> Consistency:
    """VSS writers take part on Windows where the disks are told apart in the guest (VMware's
    knowledge base, 1028881: disk.EnableUUID); elsewhere file systems are frozen, no more is known.
    """
    options = {option.key: option.value for option in seen.get("config.extraConfig", ())}
    writers = (
        seen.get("guest.guestFamily") == "windowsGuest"
        and str(options.get("disk.EnableUUID", "")).lower() == "true"
    )
    return Consistency.APPLICATION if writers else Consistency.FILESYSTEM


def _turns_of(config: VsphereConfig) -> Turns:
    """Of a server, in this process."""
    with _turns_lock:
        return _turns.setdefault(config.server, Turns(config.snapshots_at_once))


@contextlib.contextmanager
def _turn(config: VsphereConfig, until: float) -> Iterator[None]:
    """Not more VM snapshots at once than a server takes well."""
    with _turns_of(config).one(until) as got:
        if not got:
            raise UnavailableError(
                f"{config.server} was busy with snapshots of other VMs until the deadline",
                code="freeze-late",
                hint="raise deadline_s of the group",
            )
        yield


def undo_remove(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """The journal's `remove-vm-snapshot`. Idempotent; raises CleanupError."""
    until = time.monotonic() + _REMOVE_S
    try:
        with Vsphere(_server(instance, args["hypervisor"])) as vsphere:
            try:
                vm = vsphere.vm(args["moref"]) if args["moref"] else vsphere.find_vm(args["vm"])
                remove(vsphere, vm, args["snapshot"], until, creating=True)
                consolidate(vsphere, vm, until)
            except NotFoundError:
                return
    except OffloadError as error:
        raise CleanupError(
            f"cannot remove the snapshot {args['snapshot']} of VM {args['vm']}: {error.message}",
            hint="remove it in vSphere by hand, if it is there: its delta grows",
        ) from error
