"""The words of the project as frozen values. No I/O here.

Sizes and offsets are bytes; times are timezone-aware UTC datetimes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import NewType

from offload.machine import Machine

TimeMarkId = NewType("TimeMarkId", str)
ViewId = NewType("ViewId", str)
BackupId = NewType("BackupId", str)
ConnectionId = NewType("ConnectionId", str)


class ExtentKind(StrEnum):
    """What a range of an image holds."""

    DATA = "data"
    ZERO = "zero"
    HOLE = "hole"


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes from `offset` (both in bytes) of one kind."""

    offset: int
    length: int
    kind: ExtentKind

    @property
    def end(self) -> int:
        """The first byte behind the extent."""
        return self.offset + self.length


class Consistency(StrEnum):
    """What a restored image can be trusted for; ordered by `rank`."""

    CRASH = "crash"
    FILESYSTEM = "filesystem"
    APPLICATION = "application"

    @property
    def rank(self) -> int:
        """0 for the weakest."""
        return list(Consistency).index(self)


class Instant(StrEnum):
    """Whether the volumes of a TimeMark show one and the same instant."""

    ONE = "one"  # one volume, or the storage makes one instant of several by itself
    HELD = "held"  # all writers were held from before the first snapshot to after the last
    NONE = "none"  # neither: recorded as not atomic, by policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A block device of production storage, as configured.

    `path` of an RBD image is what the kernel's client calls it where it is mapped:
    /dev/rbd/POOL/IMAGE, there or not.
    """

    name: str
    provider: str
    path: Path
    snapshot_dir: Path | None = None
    sector_size: int | None = None  # None: find out from the device or the partition table
    qmp_socket: Path | None = None  # of the QEMU that has the image open
    conf: Path | None = None  # of the Ceph cluster that has the image
    user: str | None = None  # of that cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One volume at one point in time, on production storage.

    `ref` is the provider's own address of it: strings only, it goes through the catalog and the
    journal as JSON. `identity` names the *volume* (inode and file system id, WWN …): a snapshot
    with another identity or size is of a re-made or resized volume and no parent of this one.
    """

    volume: str
    provider: str
    ref: Mapping[str, str]
    size_bytes: int
    sector_size: int
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPart:
    """One thing that was held for a TimeMark: file systems, a database, what a script stopped.

    `what` was held, as its own side names it: mount points, a database. `at`: when the hold was
    complete. `unbroken`: it still was after the snapshot. What holds nothing (a CHECKPOINT) has
    `held_ms` 0 and is unbroken.
    """

    name: str
    kind: str
    ok: bool
    unbroken: bool = True
    what: tuple[str, ...] = ()
    at: datetime | None = None
    freeze_ms: float = 0.0
    held_ms: float = 0.0
    detail: str = ""  # what it said, what its hooks printed, or why it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class QuiesceReport:
    """What one quiescer did, for a VM or a list of mounts: one row of a TimeMark's report.

    `image_at`: where the VM's quiesced image is of another instant than the group's snapshots (a
    VMware snapshot, which finishes when it does), when that was made; `image_in`: the name of the
    VM snapshot that has it.
    """

    name: str
    kind: str
    volumes: tuple[str, ...]
    frozen: bool
    consistency: Consistency
    freeze_ms: float = 0.0
    held_ms: float = 0.0
    detail: str = ""
    vm: str = ""
    parts: tuple[HeldPart, ...] = ()
    image_at: datetime | None = None
    image_in: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeMark:
    """A point in time of a group."""

    id: TimeMarkId
    group: str
    created_at: datetime
    snapshots: tuple[Snapshot, ...]
    consistency: Consistency
    instant: Instant
    freeze_ms: float  # from the first writer held to the last let go
    skew_ms: float = 0.0  # between the images of its VMs; 0: one instant
    purpose: str = "user"  # user | mount | backup: who made it, and so who may delete it
    keep: bool = False  # never reclaimed when the pool runs full
    reports: tuple[QuiesceReport, ...] = ()
    warnings: tuple[str, ...] = ()
    machines: tuple[Machine, ...] = ()  # the settings of its VMs

    def snapshot(self, volume: str) -> Snapshot | None:
        """The snapshot of one volume, or None."""
        return next((s for s in self.snapshots if s.volume == volume), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSource:
    """An image that is a plain file or block device: byte for byte the volume."""

    path: Path
    size_bytes: int
    sector_size: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Source:
    """An image inside a qcow2 file, or of an internal snapshot of it (`snapshot` its name)."""

    path: Path
    size_bytes: int
    snapshot: str | None = None
    sector_size: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupSource:
    """One volume of a backup in a store."""

    store: str  # how it is opened: StoreSpec.text()
    backup: str
    volume: str
    size_bytes: int
    cache_dir: Path  # where the local chunk index lives
    sector_size: int = 512
    # for views of stores that are far
    block_dir: Path | None = None  # of the cache on disk; None: `blocks` in `cache_dir`
    cache_bytes: int = 0  # bound of the cache on disk; 0: none
    memory_bytes: int = 0  # of decoded chunks, in a process; 0: as for a store that is near
    ahead_bytes: int = 0  # how far a stream is read ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdSource:
    """An image that somebody else serves over NBD, read-only: a QEMU that exports its own disk."""

    uri: str
    size_bytes: int
    sector_size: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RbdSource:
    """A snapshot of an image in a Ceph cluster: an ordinary one, or the only one of a group.

    `cluster`, `pool` and `image` are ids; `name` is POOL/IMAGE as it was called. The user's key is
    in the keyring that `conf` leads to.
    """

    cluster: str
    pool: int
    image: str
    name: str
    conf: Path
    user: str
    size_bytes: int
    namespace: str = ""
    snapshot: str | None = None
    group: str | None = None
    sector_size: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeSource:
    """Where a writable view was migrated to: read and written in place, without an overlay.

    `place` is the path of a raw file or a block device, which may be longer, or an NBD URI.
    """

    place: str
    size_bytes: int
    sector_size: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class VmfsSource:
    """A VM's disk on a LUN with a VMFS: `path` is its descriptor there, `lun` the source of the
    LUN, as JSON (`offload.sources`)."""

    lun: str
    path: str
    size_bytes: int
    sector_size: int = 512


Source = RawSource | Qcow2Source | BackupSource | NbdSource | RbdSource | HomeSource | VmfsSource


class ViewState(StrEnum):
    """The life of a TimeView in the catalog."""

    MOUNTED = "mounted"
    CLOSING = "closing"
    KEPT = "kept"  # not served, by wish: what was written to it stays


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """Where a view is presented, and to whom. What is empty is filled in from the configuration
    when the view is mounted; the catalog keeps what came of it, never a secret."""

    transport: str = ""  # unix | tcp
    address: str = ""  # tcp: the address of the portal
    port: int | None = None  # tcp; None: the target's choice
    initiators: tuple[str, ...] = ()  # iSCSI: the IQNs that may log in
    allow: tuple[str, ...] = ()  # NBD over TCP: addresses and networks whose clients are served
    tls: str = ""  # NBD over TCP: off | certificates | psk
    insecure_network: bool = False  # iSCSI outside loopback without a named storage network


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A TimeView: an image that a target presents to clients.

    `server` is the target's own record of what serves it (pid, start time, files), strings only.
    """

    id: ViewId
    name: str
    origin: str  # timemark:ID/volume or backup:ID/volume, always in full; once migrated home:PLACE
    target: str
    uri: str
    writable: bool
    size_bytes: int
    sector_size: int
    created_at: datetime
    source: Source
    state: ViewState = ViewState.MOUNTED
    server: Mapping[str, str] = field(default_factory=dict)
    exposure: Exposure = field(default_factory=Exposure)
    overlay_limit_bytes: int = 0  # how large what is written may grow; 0 without an overlay

    @property
    def vmdk(self) -> str:
        """The disk on the volume's VMFS that it shows, "" where it shows the volume."""
        return self.source.path if isinstance(self.source, VmfsSource) else ""

    @property
    def on_overlay(self) -> bool:
        """Whether what is written goes to an overlay: into its place once it is migrated."""
        return self.writable and not isinstance(self.source, HomeSource)


class ConnectionKind(StrEnum):
    """How a connected view became a local block device."""

    NBD = "nbd"  # the kernel's NBD client
    ISCSI = "iscsi"  # open-iscsi


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A view that is attached as a block device of this machine."""

    id: ConnectionId
    name: str  # the device is also /dev/offload/NAME
    view: str  # id of the view, "" where it is another instance's
    uri: str
    kind: ConnectionKind
    read_only: bool
    size_bytes: int
    sector_size: int
    created_at: datetime
    device: str = ""  # e.g. /dev/nbd3; another one after a reboot
    record: Mapping[str, str] = field(default_factory=dict)  # the driver's own, strings only


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One volume inside a backup."""

    volume: str
    size_bytes: int
    sector_size: int
    identity: str
    root: str  # hex; names the content, two nights without a change share it
    read_bytes: int = 0
    stored_bytes: int = 0
    mode: str = "full"  # full | incremental
    reason: str = ""  # why it is full, where an incremental was possible in principle


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """An immutable set of images of one group at one TimeMark, in a store."""

    id: BackupId
    store: str
    group: str
    created_at: datetime  # of the TimeMark: the point in time that it shows
    finished_at: datetime
    timemark: str
    consistency: Consistency
    instant: Instant
    images: tuple[ImageRecord, ...]
    parent: str | None = None
    host: str = ""
    alarms: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    vms: tuple[str, ...] = ()  # names of the VMs whose settings are in it

    def image(self, volume: str) -> ImageRecord | None:
        """The image of one volume, or None."""
        return next((i for i in self.images if i.volume == volume), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalHold:
    """A backup that stays, whatever the rules say, until somebody releases it."""

    backup: BackupId
    placed_at: datetime
    host: str  # on which it was placed
    reason: str = ""
