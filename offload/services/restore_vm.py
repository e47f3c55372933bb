"""`restore --as-vm`: a VM made again from a backup, its settings and its disks, on a backup host.

Either its disks are restored into a folder first, or, `instant`, they are writable TimeViews, and
the VM can be started at once; `offload migrate` moves its disks to a place of their own while it
runs. The VM is never started by us.

| killed | left | recovery |
| --- | --- | --- |
| while disks are restored | what each restore leaves: whole files stay | none |
| from `restore-vm.views.intended` on | views that no VM uses | unmounted |
| from `restore-vm.vm.intended` on | a VM, half made or whole | it goes from the list; its views |
| `restore-vm.commit.after` | the VM, that nobody was told of | none: it is in the host's list |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload import compose
from offload.catalog.store import Catalog
from offload.errors import NotFoundError, OffloadError, PolicyError, UsageError
from offload.hypervisor import BackupHost
from offload.ids import new_id
from offload.instance import Instance
from offload.journal import Operation, step
from offload.machine import Machine, MachineDisk
from offload.origin import Origin, OriginKind, parse_origin
from offload.progress import NoProgress, Progress
from offload.services import machines, mount, restore, restored
from offload.services.context import Context
from offload.services.undo import dump

_NAME = re.compile(r"[^\x00-\x1f\x7f/\\%]{1,80}")  # what libvirt and vSphere both take as it is
_OTHERS = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRequest:
    """What is asked for: the VM `vm` of an origin. `to`: a folder of this machine for its disks;
    None: `instant`."""

    what: str
    vm: str
    host: str  # [backup_hosts.NAME]
    name: str | None = None  # None: as it was called
    to: Path | None = None
    form: str = "raw"  # raw | qcow2
    overwrite: bool = False  # files of the disks that exist

    @property
    def instant(self) -> bool:
        """Whether its disks are to be TimeViews."""
        return self.to is None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredVm:
    """A VM that was made. `disks`: where each lies, by its name."""

    id: str
    name: str
    vm: str
    host: str
    origin: str
    disks: Mapping[str, str]
    views: tuple[str, ...]
    warnings: tuple[str, ...]


def restore_vm(ctx: Context, request: VmRequest, progress: Progress | None = None) -> RestoredVm:
    """Make it; see above.

    Raises NotFoundError (`unknown-vm`, `no-vm-settings`, `unknown-backup-host`), PolicyError
    (`disk-not-in-backup`), UsageError (`bad-name`, `bad-origin`), BusyError (`name-taken`), and
    what restores, mounts and hosts raise.
    """
    progress = progress or NoProgress()
    origin = parse_origin(request.what if ":" in request.what else f"backup:{request.what}")
    machine = _machine(ctx, origin, request.vm)
    name = request.name or machine.name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' is no name for a VM",
            code="bad-name",
            hint="1 to 80 characters, without / \\ % and control characters: --name",
        )
    if machine.kind == "vsphere" and not request.instant:
        raise UsageError(
            f"the disks of VM {machine.name} lie on a VMFS with others: no folder can take them",
            code="vm-on-vmfs",
            hint="--instant presents the datastore to the host; or restore the whole LUN: "
            f"offload restore {origin} --to BLOCKDEV",
        )
    disks, warnings = _on_volumes(machine)
    host = compose.backup_host(request.host, ctx.instance)
    made = _Making(ctx, request, origin, machine, host, name, disks)
    warnings += host.check_create(machine, made.files, name)
    if not request.instant:
        made.restore(progress)
    with ctx.journal.operation("restore-vm", f"{name} on {request.host}") as op:
        if request.instant:
            made.mount(op)
        ident = made.create(op)
    return RestoredVm(
        id=ident, name=name, vm=machine.name, host=request.host, origin=str(origin),
        disks=made.paths, views=made.views, warnings=tuple(warnings),
    )  # fmt: skip


@dataclass
class _Making:
    """One VM on its way. `paths`: where its disks are by now."""

    ctx: Context
    request: VmRequest
    origin: Origin
    machine: Machine
    host: BackupHost
    name: str
    disks: Sequence[MachineDisk]
    paths: dict[str, str] = field(default_factory=dict)
    views: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, str]:
        """Where its disks are restored to."""
        folder = self.request.to or Path("/")
        return {
            disk.name: str(folder / f"{_word(self.name)}-{_word(disk.name)}.{self.request.form}")
            for disk in self.disks
        }

    def restore(self, progress: Progress) -> None:
        """The disks, into the folder."""
        for disk in self.disks:
            wanted = restore.Request(
                what=f"{self.origin}/{disk.volume}",
                to=self.files[disk.name],
                form=self.request.form,
                overwrite=self.request.overwrite,
            )
            restore.restore(self.ctx, wanted, progress=progress)
            self.paths[disk.name] = wanted.to

    def mount(self, op: Operation) -> None:
        """Writable views of the disks, by names that were chosen before."""
        target, exposure, _ = self.host.export()
        names = {disk.volume: _view_name(self.name, disk.volume) for disk in self.disks}
        op.intend("views", "unmount-named", {"names": dump(sorted(names.values()))})
        for volume, name in names.items():
            options = mount.MountOptions(name=name, target=target, writable=True, exposure=exposure)
            (view,) = mount.mount(self.ctx, [f"{self.origin}/{volume}"], options)
            on_it = [disk.name for disk in self.disks if disk.volume == volume]
            self.paths |= dict.fromkeys(on_it, view.uri)
        self.views = tuple(names.values())
        step("restore-vm.mounted")

    def create(self, op: Operation) -> str:
        """The VM itself; its id."""
        mark = new_id()
        op.intend("vm", "destroy-vm", {"host": self.host.name, "mark": mark})
        restored.note(self.ctx.instance, self.host.kind, self.host.name, mark, self.views)
        try:
            made = self.host.create(
                self.machine, self.paths, self.name, mark, lambda w: step(f"restore-vm.{w}")
            )
        except OffloadError as error:
            if not self.request.instant:
                there = f"its disks are restored: {', '.join(self.paths.values())}"
                error.hint = f"{error.hint}; {there}" if error.hint else there
            raise
        op.done("vm")
        return made


def _machine(ctx: Context, origin: Origin, vm: str) -> Machine:
    if origin.kind is OriginKind.GROUP or origin.volume is not None:
        raise UsageError(
            f"{origin} names no whole point in time",
            code="bad-origin",
            hint="a VM is restored from backup:ID or timemark:ID",
        )
    known = machines.machines_of(ctx, origin)
    if not known:
        raise NotFoundError(
            f"{origin} has no settings of VMs",
            code="no-vm-settings",
            hint="they are kept where the group's VMs have a hypervisor in the configuration; "
            "its disks can be restored without: offload restore",
        )
    (found,) = machines.chosen(known, [vm])
    return found


def _on_volumes(machine: Machine) -> tuple[list[MachineDisk], list[str]]:
    """The disks that can be had, and what is to be said of the others."""
    ours = [disk for disk in machine.disks if disk.volume]
    if not ours:
        raise PolicyError(
            f"no disk of VM {machine.name} lies on a volume of the group",
            code="disk-not-in-backup",
            hint="a volume is known by its path, or by its lun, in the configuration",
        )
    others = [disk for disk in machine.disks if not disk.volume]
    return ours, [f"left out: disk {d.name} ({d.path}), which no volume holds" for d in others]


def _view_name(name: str, volume: str) -> str:
    """One that nobody else has, so that undoing may go by it."""
    tail = f"-{_word(volume)[:30]}-{new_id()}"
    return f"{_word(name)[: 60 - len(tail)]}{tail}"


def _word(name: str) -> str:
    """What of it can stand in names of files and views."""
    return _OTHERS.sub("-", name.lower()).strip("-.") or "vm"


def undo_views(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """The journal's `unmount-named`: with what was written to them, whoever reads them."""
    names = set(json.loads(args["names"]))
    for view in [view for view in catalog.views() if view.name in names]:
        mount.undo_view(instance, catalog, mount.undo_args(instance, view))
        mount.undo_overlay(instance, catalog, mount.overlay_args(instance, view))


def undo_create(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """The journal's `destroy-vm`."""
    compose.backup_host(args["host"], instance).destroy(args["mark"])
    restored.forget(instance, args["mark"])
