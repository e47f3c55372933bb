"""What a point in time has of VMs: their settings, and how consistent their images are.

A TimeMark has each VM once or twice: the group's instant, and, where the VM had a VM snapshot when
its storage was snapshot, its own quiesced instant some seconds earlier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from offload.config import Config
from offload.errors import PolicyError, UnavailableError, UsageError
from offload.island import Shown
from offload.machine import Machine
from offload.model import Consistency, TimeMark
from offload.origin import Origin, OriginKind
from offload.services import groups
from offload.services.context import Context
from offload.services.groups import Resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class VmImage:
    """What a quiescer reached of one VM; `name` as in the report. `at`, `snapshot`: of its own
    quiesced image, where it has one."""

    name: str
    volumes: tuple[str, ...]
    consistency: Consistency
    at: datetime | None = None
    snapshot: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """A point in time. `origin`: `timemark:ID` or `backup:ID`."""

    origin: str
    id: str
    group: str
    at: datetime
    consistency: Consistency
    machines: tuple[Machine, ...]
    images: tuple[VmImage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Instants:
    """Which instant each VM is shown at, and what it is worth there; by VM name. `at`, `snapshot`:
    of the VM snapshots that are in the storage's, whichever is shown."""

    shown: Shown
    consistency: Mapping[str, str] = field(default_factory=dict)
    at: Mapping[str, datetime] = field(default_factory=dict)
    snapshot: Mapping[str, str] = field(default_factory=dict)


def of_timemark(mark: TimeMark) -> Past:
    """Of a TimeMark."""
    return Past(
        origin=f"{OriginKind.TIMEMARK}:{mark.id}",
        id=mark.id,
        group=mark.group,
        at=mark.created_at,
        consistency=mark.consistency,
        machines=mark.machines,
        images=tuple(_image(asdict(r)) for r in mark.reports if r.vm),
    )


def of_backup(ctx: Context, prefix: str) -> Past:
    """Of a backup: its manifest has the settings and the report. Raises what stores raise."""
    from offload.engine.manifests import read_manifest
    from offload.services import stores

    known = ctx.catalog.backup(prefix)
    with stores.opened(ctx, known.store, exclusive=False) as repository:
        manifest = read_manifest(repository, known.id, known.store)
    reports = manifest.timemark.get("reports", ())
    return Past(
        origin=f"{OriginKind.BACKUP}:{known.id}",
        id=known.id,
        group=known.group,
        at=known.created_at,
        consistency=known.consistency,
        machines=manifest.machines,
        images=tuple(_image(report) for report in reports if report.get("vm")),
    )


def of_origin(ctx: Context, origin: Origin) -> Past:
    """Of what exists. Raises NotFoundError, UsageError (`no-vm-settings`)."""
    if origin.kind is OriginKind.BACKUP:
        past = of_backup(ctx, origin.id)
    else:
        past = of_timemark(ctx.catalog.timemark(origin.id))
    if not past.machines:
        raise UsageError(
            f"{past.origin} has no settings of VMs: no placeholder can be made of it",
            code="no-vm-settings",
            hint=f"they are kept where groups.{past.group} has hypervisor and vms (or tags, "
            "folders, datastores, luns)",
        )
    return past


def machines_now(ctx: Context, chosen: Resolved) -> tuple[tuple[Machine, ...], tuple[str, ...]]:
    """The settings of a group's VMs now, all of them, and warnings.

    Raises PolicyError (`group-without-vms`), UnavailableError (`no-vm-settings`).
    """
    from offload.services import machines

    found, warnings = machines.capture(ctx, chosen.chosen, chosen.name)
    if not (found or warnings):
        raise PolicyError(
            f"group {chosen.name} has no VMs: no placeholder can be made of it",
            code="group-without-vms",
            hint=f"give groups.{chosen.name} a hypervisor, and vms, tags, folders, datastores or "
            "luns",
        )
    known = {machine.id for machine in found}
    if not found or any(vm.id not in known for vm in chosen.vms):
        raise UnavailableError("; ".join(warnings), code="no-vm-settings")
    return found, warnings


def instants(
    config: Config, past: Past, machines: Sequence[Machine], asked: Shown | None
) -> Instants:
    """Which instant is shown: the one that was asked for, else the VMs' own where there is one.

    Raises UsageError (`no-vm-image`, `same-names`).
    """
    _refuse_same_names(machines)
    found = {m.name: _image_of(config, past, m) for m in machines}
    own = {name: image for name, image in found.items() if image is not None and image.at}
    if asked is Shown.VM and not own:
        raise UsageError(
            f"{past.origin} has no quiesced images of its own of these VMs",
            code="no-vm-image",
            hint="it has them of VMs that a VM snapshot quiesced; without: --shows group",
        )
    shown = asked or (Shown.VM if own else Shown.GROUP)
    consistency = {m.name: _at_the_groups(past, m, found[m.name]) for m in machines}
    if shown is Shown.VM:
        consistency |= {name: image.consistency for name, image in own.items()}
    return Instants(
        shown=shown,
        consistency={name: level.value for name, level in consistency.items()},
        at={name: image.at for name, image in own.items() if image.at is not None},
        snapshot={name: image.snapshot for name, image in own.items()},
    )


def _refuse_same_names(machines: Sequence[Machine]) -> None:
    """What is known of a VM goes by its name from here on."""
    for name, number in Counter(machine.name for machine in machines).items():
        if number > 1:
            ids = ", ".join(m.instance_uuid or m.uuid or m.id for m in machines if m.name == name)
            raise UsageError(
                f"{number} VMs are called '{name}': they cannot stand on one island",
                code="same-names",
                hint=f"an island each: --vm with one of {ids}",
            )


def _image_of(config: Config, past: Past, machine: Machine) -> VmImage | None:
    entry = groups.entry_of(config, machine.hypervisor, machine)
    by_name = {image.name: image for image in past.images}
    return by_name.get(entry or groups.full_name(machine)) or by_name.get(machine.name)


def _at_the_groups(past: Past, machine: Machine, image: VmImage | None) -> Consistency:
    """At the group's instant a VM that was only quiesced by a VM snapshot writes on."""
    if image is not None:
        return Consistency.CRASH if image.at is not None else image.consistency
    on = {disk.volume for disk in machine.disks}
    others = any(on & set(each.volumes) for each in past.images)
    return Consistency.CRASH if others else past.consistency


def _image(report: Mapping[str, Any]) -> VmImage:
    """From the fields of a QuiesceReport, also as JSON."""
    at = report.get("image_at")
    return VmImage(
        name=str(report["vm"]),
        volumes=tuple(report["volumes"]),
        consistency=Consistency(report["consistency"]),
        at=datetime.fromisoformat(at) if isinstance(at, str) else at,
        snapshot=str(report.get("image_in", "")),
    )
