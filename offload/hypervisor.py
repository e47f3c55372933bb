"""The contracts of hypervisors: what production runs on, and where placeholders stand.

Two roles: a *hypervisor* (`[hypervisors.NAME]`) is asked what there is; a *backup host*
(`[backup_hosts.NAME]`: one host of a hypervisor) is where islands are built. Drivers come from the
tables in `offload.compose` (`HYPERVISORS`, `BACKUP_HOSTS`) and from entry points
(`offload.hypervisors`, `offload.backup_hosts`). They are constructed with the name in the
configuration, its entry, and the instance; constructing does nothing outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from offload.inventory import Inventory, InventoryChange
from offload.island import Placeholder, Shown
from offload.machine import Machine
from offload.model import Exposure, View

Step = Callable[[str], None]  # told after each change outside; tests kill the process in it


class Hypervisor(Protocol):
    """What production VMs run on. A session while it is entered; one thread at a time."""

    name: str
    kind: str

    def __enter__(self) -> Self:
        """Connect. Raises ConfigError (credentials, certificates), UnavailableError."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def inventory(self) -> Inventory:
        """All of it, read whole. Begins the following of changes."""
        ...

    def changes(self, wait_s: float) -> InventoryChange:
        """What changed since the last `inventory` or `changes`, waiting that long for the first
        change; empty if there was none. A lost session is made again: then all that differs from
        what was known comes as changes. Raises UnavailableError where that fails too."""
        ...

    def find(self, wanted: str) -> str:
        """The id of the one VM of this name, UUID or instance UUID, without reading the inventory.

        Placeholders of ours are no candidates. Raises NotFoundError (`unknown-vm`, `ambiguous-vm`).
        """
        ...

    def machine(self, vm_id: str) -> Machine:
        """The settings of one VM now. Raises NotFoundError (`unknown-vm`)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSnapshot:
    """A snapshot of a VM, on its hypervisor."""

    hypervisor: str  # its name in the configuration
    vm: str  # its name
    vm_id: str
    name: str


@runtime_checkable
class TakesVmSnapshots(Protocol):
    """Of a Hypervisor on which a TimeMark makes VM snapshots of seconds, by names of ours."""

    def vm_snapshots(self, prefix: str) -> list[VmSnapshot]:
        """Those of all VMs whose names begin so, but for placeholders of ours: what they show has
        such a snapshot in it. Raises PrivilegeError, UnavailableError."""
        ...

    def remove_vm_snapshot(self, snapshot: VmSnapshot) -> None:
        """Remove it alone, and merge its delta. Idempotent. Raises PrivilegeError,
        UnavailableError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandView:
    """A TimeView that an island is made of, as exported."""

    view: View
    volume: str
    identity: str  # of the production volume
    luns: tuple[str, ...] = ()  # NAAs of the production LUN, where the configuration says so


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandRequest:
    """What to build. `machines`: the settings of the VMs as of the point in time; of those that
    were chosen only. `at`: of the TimeMark; `vm_at`: of the VMs' own quiesced images, by VM name,
    and `vm_snapshot` the names of the snapshots that have them (see offload.quiescers.vmware)."""

    id: str
    name: str
    group: str
    origin: str
    at: datetime
    consistency: Mapping[str, str]  # by VM name
    shown: Shown
    views: Sequence[IslandView]
    machines: Sequence[Machine]
    vm_at: Mapping[str, datetime] = field(default_factory=dict)
    vm_snapshot: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is there now of a placeholder. `problem`: what is wrong with it, "" if nothing is; `do`:
    what to do about that."""

    placeholder: str  # its id
    there: bool
    power: str = ""
    problem: str = ""
    do: str = ""


class BackupHost(Protocol):
    """Where placeholders stand. All changes are for the journal's sake undone by `take_down` alone,
    which needs only the record of `plan`, and finds by it whatever was made."""

    name: str
    kind: str

    def export(self) -> tuple[str, Exposure, bool]:
        """The target, the exposure and whether writable, that views for it must have.

        Asks the host where need be (its initiator's name). Raises what `check` raises.
        """
        ...

    def check(self) -> list[str]:
        """Refuse what would be refused on the way: before production is frozen for it. Changes
        nothing; warnings. Raises ConfigError, PrivilegeError, UnavailableError, NotFoundError."""
        ...

    def refuse(self, request: IslandRequest) -> list[str]:
        """The same, for what is to stand there; `views` may be empty still. Warnings."""
        ...

    def plan(self, request: IslandRequest) -> dict[str, str]:
        """The record for `build` and `take_down`; journalled before `build`. Changes nothing."""
        ...

    def build(
        self, request: IslandRequest, record: Mapping[str, str], step: Step
    ) -> tuple[Placeholder, ...]:
        """Make all of it. On an error the caller takes it down."""
        ...

    def take_down(self, record: Mapping[str, str], step: Step) -> None:
        """Remove whatever was made of it. Idempotent; raises CleanupError for what could not be
        confirmed: then the views must stay, as a LUN that is pulled hangs a host."""
        ...

    def look(
        self, record: Mapping[str, str], placeholders: Sequence[Placeholder]
    ) -> list[Standing]:
        """What stands now. Raises UnavailableError."""
        ...

    def check_create(self, machine: Machine, disks: Mapping[str, str], name: str) -> list[str]:
        """Refuse what `create` would refuse, before anything is restored for it; warnings: what of
        the settings this host cannot have. `disks` need not be there yet. Changes nothing.

        Raises BusyError (`name-taken`), UsageError, and what `check` raises.
        """
        ...

    def create(
        self, machine: Machine, disks: Mapping[str, str], name: str, mark: str, step: Step
    ) -> str:
        """Register a real VM (not a placeholder) from its settings: a restore. It is not started.

        `disks`: where each disk lies now, by its name: a path, or the URI of a TimeView, that this
        host can use; a disk that is not in it is left out. UUIDs and MACs are fresh unless nothing
        else has them. `mark` is put with it, and `destroy` finds it by that alone. Its id.
        """
        ...

    def destroy(self, mark: str) -> None:
        """Take the VM that `create` made with this mark from the host's list, half made or whole;
        its disks stay. Idempotent. Raises CleanupError."""
        ...
