"""Islands: the placeholders of one mount on one backup host. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NewType

from offload.machine import MachineDisk

IslandId = NewType("IslandId", str)


class Shown(StrEnum):
    """Which of the two points in time of a TimeMark placeholders show."""

    GROUP = "group"  # the one instant of all volumes
    VM = "vm"  # each VM's own quiesced instant, seconds earlier: the parents of its disks


class IslandState(StrEnum):
    """The life of an island in the catalog."""

    BUILDING = "building"
    STANDING = "standing"
    GOING = "going"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placeholder:
    """A VM that is registered powered off on a backup host, and whose disks are TimeViews.

    `id`: moRef or UUID of the placeholder itself; `production` the id of the VM that it stands for,
    on `hypervisor`. `disks`: the production VM's as of the point in time: drift is told by them.
    `notes`: what a person must know of it (a disk that was left out, a lesser point in time).
    """

    id: str
    name: str  # as the backup host shows it
    vm: str  # name of the production VM
    hypervisor: str
    production: str
    at: datetime  # the instant that its disks show
    shown: Shown = Shown.GROUP
    consistency: str = "crash"
    disks: tuple[MachineDisk, ...] = ()
    notes: tuple[str, ...] = ()
    record: Mapping[str, str] = field(default_factory=dict)  # the driver's own, strings only


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """What one `offload mount --placeholder` made on one backup host.

    `views`: ids of its TimeViews: they go with it. `record`: what the driver needs to take it all
    down, known before anything was made.
    """

    id: IslandId
    name: str
    host: str  # [backup_hosts.NAME]
    group: str
    origin: str  # timemark:ID or backup:ID
    created_at: datetime
    views: tuple[str, ...]
    placeholders: tuple[Placeholder, ...] = ()
    state: IslandState = IslandState.STANDING
    record: Mapping[str, str] = field(default_factory=dict)
