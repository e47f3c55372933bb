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
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from offload.configs.hypervisors import VsphereConfig
from offload.configs.quiesce import VmwareFreeze
from offload.errors import CleanupError, ConfigError, NotFoundError, OffloadError, UnavailableError
from offload.ids import new_id
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers import ourselves
from offload.vsphere import TaskLateError, Vsphere, all_snapshots

if TYPE_CHECKING:  # a thaw never loads the catalog
    from offload.catalog.store import Catalog

_REMOVE_S = 300.0  # a delta of seconds is merged in seconds; the server may be busy with others
_AT_ONCE = 5  # VM snapshots at one server: what storage vendors allow a vCenter
_DESCRIPTION = "made and removed by offload within seconds, for a snapshot of its storage"

_turns: dict[str, threading.BoundedSemaphore] = {}
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
        self._vm = vsphere.find_vm(self._entry.vm)
        with vsphere.translated(f"VM {self._entry.vm}"):
            config, guest, runtime = self._vm.config, self._vm.guest, self._vm.runtime
            if runtime.connectionState != "connected":
                raise UnavailableError(
                    f"VM {self._entry.vm} is {runtime.connectionState}", code="vm-not-ready"
                )
            ourselves.check(self._vm_name, _facts(config, guest), self._instance)
            if runtime.powerState != "poweredOn":
                self._at_rest = str(runtime.powerState)
                return
            if guest.toolsRunningStatus != "guestToolsRunning":
                raise UnavailableError(
                    f"VMware Tools do not run in VM {self._entry.vm}: nothing quiesces it",
                    code="tools-not-running",
                    hint="install open-vm-tools (Linux) or VMware Tools (Windows) in the guest",
                )
            self._look_at_snapshots(runtime)

    def _look_at_snapshots(self, runtime: Any) -> None:
        names = [entry.name for entry in all_snapshots(self._vm.snapshot)]
        if names:
            self._notes.append(
                f"it has snapshots already ({', '.join(sorted(names))}): its disks are deltas"
            )
        if runtime.consolidationNeeded:
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
        with _turn(self._config.server, until):
            self._asked = True
            made = vsphere.create_quiesced(self._vm, self.snapshot_name, _DESCRIPTION, until)
        with vsphere.translated(f"VM {self._entry.vm}"):
            if made is None or not made.quiesced:
                raise UnavailableError(
                    f"vSphere made a snapshot of VM {self._entry.vm} without quiescing it",
                    code="not-quiesced",
                    hint="look at VMware Tools in the guest; disks it cannot quiesce must not be",
                )
            # by this machine's clock, as are those that it is compared with
            self._image_at = made.createTime + (datetime.now(UTC) - vsphere.clock())
            return self._report(self._vm.config, self._vm.guest)

    def _report(self, config: Any, guest: Any) -> Consistency:
        """What was quiesced, and what it reaches."""
        disks = [d for d in config.hardware.device if getattr(d, "capacityInKB", None) is not None]
        outside = [d for d in disks if not _has_delta(d)]
        inside = [d for d in disks if _has_delta(d)]
        self.what = tuple(d.backing.parent.fileName for d in inside)
        self._notes.append(
            f"the group's image has its running disks, as of the storage snapshot: "
            f"{', '.join(d.backing.fileName for d in inside)}; their parents are quiesced, as of "
            f"{self._image_at:%Y-%m-%dT%H:%M:%S.%fZ}: VM snapshot {self.snapshot_name}"
        )
        if outside:
            self._notes.append(
                "outside of VM snapshots, so not quiesced: "
                + ", ".join(d.deviceInfo.label for d in outside)
            )
            return Consistency.CRASH
        return _reached(config, guest)

    def _freeze_at_rest(self) -> Consistency:
        if not self._stays_at_rest():
            raise UnavailableError(
                f"VM {self._entry.vm} was {self._at_rest}, and was started just now",
                code="freeze-failed",
            )
        if self._at_rest == "suspended":
            self._notes.append("the VM is suspended: its disks are as a power cut leaves them")
            return Consistency.CRASH
        with self._connected().translated(f"VM {self._entry.vm}"):
            orderly = bool(self._vm.runtime.cleanPowerOff)
        if orderly:
            self._notes.append("the VM is off: its guest shut down in good order")
            return Consistency.FILESYSTEM
        self._notes.append("the VM was cut off: its disks are as a power cut leaves them")
        return Consistency.CRASH

    def _stays_at_rest(self) -> bool:
        with self._connected().translated(f"VM {self._entry.vm}"):
            return bool(self._vm.runtime.powerState == self._at_rest)

    def still_frozen(self) -> bool:
        """Whether the VM snapshot is still there, so that its parents stood still; whether a VM
        without writers has none still."""
        try:
            if self._at_rest:
                held, why = self._stays_at_rest(), "the VM was started"
            else:
                found = self._connected().snapshots(self._vm, self.snapshot_name)
                held, why = bool(found), "somebody has removed the VM snapshot"
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
        try:
            self._remove(until)
        except OffloadError as first:
            if isinstance(first, TaskLateError):
                raise self._stuck(first) from first
            self._hang_up()  # an expired session, a vCenter that was restarted
            try:
                self._remove(until)
            except OffloadError as error:
                raise self._stuck(error) from error
        self._asked = False

    def _remove(self, until: float) -> None:
        vsphere = self._connected()
        vm = vsphere.vm(self._vm._moId)  # noqa: SLF001 - its name in the API
        vsphere.remove_snapshot(vm, self.snapshot_name, until)
        vsphere.consolidate(vm, until)

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


def _facts(config: Any, guest: Any) -> ourselves.Facts:
    macs = [getattr(device, "macAddress", None) for device in config.hardware.device]
    facts = ourselves.Facts(
        addresses=frozenset(a for nic in guest.net or () for a in nic.ipAddress or ()),
        uuids=frozenset({config.uuid}),
        host_name=guest.hostName or "",
    )
    return ourselves.with_macs(facts, [mac for mac in macs if mac])


def _has_delta(disk: Any) -> bool:
    """Independent disks and physical RDMs are no part of a VM snapshot."""
    return getattr(disk.backing, "parent", None) is not None


def _reached(config: Any, guest: Any) -> Consistency:
    """VSS writers take part on Windows where the disks are told apart in the guest (VMware's
    knowledge base, 1028881: disk.EnableUUID); elsewhere file systems are frozen, no more is known.
    """
    options = {option.key: option.value for option in config.extraConfig or ()}
    writers = (
        guest.guestFamily == "windowsGuest"
        and str(options.get("disk.EnableUUID", "")).lower() == "true"
    )
    return Consistency.APPLICATION if writers else Consistency.FILESYSTEM


@contextlib.contextmanager
def _turn(server: str, until: float) -> Iterator[None]:
    """Not more VM snapshots at once than a server takes well."""
    with _turns_lock:
        turn = _turns.setdefault(server, threading.BoundedSemaphore(_AT_ONCE))
    if not turn.acquire(timeout=max(0.0, until - time.monotonic())):
        raise UnavailableError(
            f"{server} was busy with snapshots of other VMs until the deadline",
            code="freeze-late",
            hint="raise deadline_s of the group",
        )
    try:
        yield
    finally:
        turn.release()


def undo_remove(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """The journal's `remove-vm-snapshot`. Idempotent; raises CleanupError."""
    until = time.monotonic() + _REMOVE_S
    try:
        with Vsphere(_server(instance, args["hypervisor"])) as vsphere:
            try:
                vm = vsphere.vm(args["moref"]) if args["moref"] else vsphere.find_vm(args["vm"])
                vsphere.remove_snapshot(vm, args["snapshot"], until)
                vsphere.consolidate(vm, until)
            except NotFoundError:
                return
    except OffloadError as error:
        raise CleanupError(
            f"cannot remove the snapshot {args['snapshot']} of VM {args['vm']}: {error.message}",
            hint="remove it in vSphere by hand, if it is there: its delta grows",
        ) from error
