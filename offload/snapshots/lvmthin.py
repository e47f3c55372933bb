"""Snapshots of thin logical volumes, by LVM's own `lvcreate`.

One `lvcreate` is one instant of its volume: LVM suspends it, and freezes a file system that is
mounted from it on this host. Several are made one after another, so that a group is one instant
only while its writers are held. Each new thin device is looked for in the kernel: `lvcreate` can
end with status 0 and have made none.

Snapshots are read-only and skipped by activation: they become devices when they are read, and stay
that until they are deleted or the machine boots again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from offload import devicemapper, mountinfo, run
from offload.blockdev import device_sector_size
from offload.errors import BusyError, ConfigError, NotFoundError, OffloadError, UnavailableError
from offload.extents import Ranges
from offload.journal import step
from offload.model import Consistency, Instant, RawSource, Snapshot, Volume
from offload.mountinfo import MountPoint
from offload.snapshot import Plan, VolumeState
from offload.snapshots import lvmthin_delta as delta
from offload.snapshots import lvmthin_lvm as lvm
from offload.snapshots import lvmthin_mend, lvmthin_names, lvmthin_pool, lvmthin_udev
from offload.snapshots.lvmthin_lvm import LogicalVolume

log = logging.getLogger(__name__)

_LVCREATE_S = 0.3  # measured: 0.1 to 0.3 s
_FLUSH_S = 300.0
# Nothing slow while writers are held: the copy of the metadata in /etc/lvm is made in `settle`, and
# dmeventd goes on watching the pool (`monitoring = 0` would end that). Snapshots that come and go
# would also fill /etc/lvm/archive.
_NO_COPIES = "backup { backup = 0 archive = 0 }"
_NO_ARCHIVE = "backup { archive = 0 }"
# File systems that the kernel freezes when the device under them is suspended (freeze_bdev in
# fs/super.c and block/bdev.c: it finds them by their one device, which btrfs does not have)
_FROZEN_WITH_DEVICE = frozenset({"ext2", "ext3", "ext4", "xfs"})

Ref = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """A volume as it is now: its row, its device."""

    volume: Volume
    row: LogicalVolume
    number: tuple[int, int]
    sector_size: int

    @property
    def identity(self) -> str:
        """Changes when the volume is made anew, moved to another pool, or rolled back by a merge
        (which gives it another thin device)."""
        return f"lvm:{self.row.uuid}:{self.row.pool_uuid}:{self.row.thin_id}"


class LvmThinProvider:
    """`lvcreate --snapshot` as `VG/offload.INSTANCE.TIMEMARK.VOLUME`, tagged `offload.INSTANCE`."""

    name = "lvmthin"

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._tag = lvmthin_names.tag_of(instance)

    # -- looking -------------------------------------------------------------------------------

    def inspect(self, volume: Volume) -> VolumeState:
        """Look at a volume and its pool. A pool that is out of data space has no free space.

        Raises NotFoundError (`volume-missing`), UnavailableError (`not-a-thin-volume`,
        `volume-inactive`, `program-missing`, `no-device-mapper`, `pool-inactive`, `pool-failed`,
        `pool-needs-check`, `pool-read-only`), BusyError (`volume-suspended`), ConfigError
        (`sector-size`), PrivilegeError.
        """
        (origin,) = _look_at_all([volume])
        row = origin.row
        pool = lvmthin_pool.look_at(row.pool_name, row.pool_dm_uuid)
        lvmthin_pool.check_healthy(pool)
        mapped = lvmthin_pool.mapped_bytes(row.dm_uuid)
        return VolumeState(
            size_bytes=row.size_bytes,
            sector_size=origin.sector_size,
            identity=origin.identity,
            allocated_bytes=row.size_bytes if mapped is None else mapped,
            extents=0,
            estimate_s=_LVCREATE_S,
            pool=pool.name,
            pool_size_bytes=pool.size_bytes,
            pool_free_bytes=pool.free_bytes,
            needed_bytes=0,  # blocks are shared until they are written to
            metadata_size_bytes=pool.metadata_size_bytes,
            metadata_free_bytes=pool.metadata_free_bytes,
            freezes_itself=_reached([origin]) != (Consistency.CRASH,),
        )

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """One instant of a single volume. A file system that is mounted here is frozen by the
        snapshot itself, so that it is consistent without a quiescer."""
        return Plan(
            timemark=timemark,
            volumes=tuple(volumes),
            refs=tuple(lvmthin_names.ref_of(v, self._instance, timemark) for v in volumes),
            instant_alone=Instant.ONE if len(volumes) == 1 else Instant.NONE,
            estimate_s=_LVCREATE_S * len(volumes),
            consistency=_reached(_look_at_all(volumes)),
        )

    # -- making --------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Write back what this machine holds of the volumes, so that they are suspended for a
        moment only. Raises UnavailableError (`pool-out-of-data`, `pool-out-of-step`)."""
        origins = _look_at_all(plan.volumes)
        _check_pools(origins)
        here = mountinfo.mounts()
        for origin in origins:
            for mount in _mounts_of(origin, here):
                run.run(["sync", "--file-system", str(mount.point)], timeout_s=_FLUSH_S)
            with _open(origin.volume) as fd:
                os.fsync(fd)

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """`lvcreate` of each volume, then a look at all of them, in LVM and in the kernel."""
        begun: list[Ref] = []
        try:
            for number, (volume, ref) in enumerate(zip(plan.volumes, plan.refs, strict=True), 1):
                begun.append(ref)
                self._create(volume, ref)
                step(f"lvmthin.snapshot.{number}")
            return self._records(plan)
        except BaseException as failure:
            for ref in reversed(begun):
                try:
                    self.delete(ref)
                except OffloadError as error:
                    failure.add_note(error.message)
            raise

    def _create(self, volume: Volume, ref: Ref) -> None:
        vg, name = lvmthin_names.own(ref, self._instance)
        _, origin = lvmthin_names.place_of(volume)
        # or LVM would say that it has made a snapshot, and would not have
        _check_running(volume, devicemapper.find_named(lvmthin_names.mapper_name(vg, origin)))
        argv = [
            "lvcreate", "--quiet", "--config", _NO_COPIES, "--noudevsync", "--ignoremonitoring",
            "--snapshot", "--permission", "r", "--setactivationskip", "y",
            "--addtag", self._tag, "--name", name, f"{vg}/{origin}",
        ]  # fmt: skip
        lvm.command(argv, about=f"{vg}/{name}")

    def _records(self, plan: Plan) -> tuple[Snapshot, ...]:
        names = [_full_name(ref) for ref in plan.refs]
        rows = lvm.look_up([*names, *map(_place, plan.volumes)])
        origins = _origins(plan.volumes, rows)
        for name, origin in zip(names, origins, strict=True):
            _check_made(name, rows.get(name), origin)
        reached = _reached(origins)
        if any(a.rank < b.rank for a, b in zip(reached, plan.consistency, strict=True)):
            raise UnavailableError(
                "a file system was unmounted while the snapshots were made: LVM froze nothing",
                code="file-system-gone",
                hint="try again",
            )
        return tuple(
            Snapshot(
                volume=origin.volume.name,
                provider=self.name,
                ref=ref,
                size_bytes=rows[name].size_bytes,
                sector_size=origin.sector_size,
                identity=origin.identity,
            )
            for name, ref, origin in zip(names, plan.refs, origins, strict=True)
        )

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """The copy of the volume groups' metadata in /etc/lvm, which `lvcreate` left out. What LVM
        and the pool know of the snapshots is durable already."""
        for vg in dict.fromkeys(snapshot.ref["vg"] for snapshot in snapshots):
            try:
                lvm.command(["vgcfgbackup", "--quiet", vg], about=vg)
            except UnavailableError as error:
                log.warning("no fresh copy of LVM's metadata in /etc/lvm: %s", error.message)

    # -- unmaking ------------------------------------------------------------------------------

    def delete(self, ref: Ref) -> None:
        """Delete a snapshot, whole or half made, and put right what an `lvcreate` that was killed
        left of it. Idempotent.

        Raises PolicyError (`foreign-snapshot`), BusyError (`snapshot-in-use`), UnavailableError.
        """
        vg, name = lvmthin_names.own(ref, self._instance)
        lvm.check_machine()
        lvmthin_mend.wait_for_lvcreate(name)
        devicemapper.remove(lvmthin_pool.probe_name(vg, name))
        found = self._find(ref)
        if found is None:
            return
        lvmthin_mend.mend(found)
        try:
            lvm.command(
                ["lvremove", "--quiet", "--yes", "--config", _NO_ARCHIVE, found.full_name],
                about=found.full_name,
            )
        except NotFoundError:
            return  # another process was faster

    def exists(self, ref: Ref) -> bool:
        """Whether the snapshot is there."""
        lvm.check_machine()
        return self._find(ref) is not None

    def leftovers(self, volumes: Sequence[Volume]) -> list[Ref]:
        """Refs of all snapshots of this instance in the volume groups of these volumes."""
        lvm.check_machine()
        groups = dict.fromkeys(lvmthin_names.place_of(volume)[0] for volume in volumes)
        start = f"{self._tag}."
        return [
            {"vg": row.vg, "lv": row.name}
            for vg in groups
            for row in lvm.tagged(vg, self._tag)
            if row.name.startswith(start)
        ]

    def _find(self, ref: Mapping[str, str]) -> LogicalVolume | None:
        """The snapshot's row; PolicyError (`foreign-snapshot`) if it lacks our tag."""
        vg, name = lvmthin_names.own(ref, self._instance)
        found = lvm.look_up([f"{vg}/{name}"]).get(f"{vg}/{name}")
        if found is not None and self._tag not in found.tags:
            raise lvmthin_names.foreign(found.full_name, self._instance)
        return found

    # -- reading -------------------------------------------------------------------------------

    def source(self, snapshot: Snapshot) -> RawSource:
        """The snapshot's device; it is activated if it is not.

        Raises NotFoundError (`snapshot-missing`), UnavailableError.
        """
        found = self._get(snapshot)
        if devicemapper.find(found.dm_uuid) is None:
            lvmthin_udev.ensure_rule()
            lvm.command(
                ["lvchange", "--quiet", "--activate", "y", "--ignoreactivationskip",
                 found.full_name],
                about=found.full_name,
            )  # fmt: skip
        return RawSource(
            path=lvmthin_names.device_of(found.vg, found.name),
            size_bytes=snapshot.size_bytes,
            sector_size=snapshot.sector_size,
        )

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        """What the two do not share, by `thin_delta`; discarded ranges are named too.

        None for another or a resized volume, and where the pool's metadata snapshot is not to be
        had. Raises NotFoundError (`snapshot-missing`).
        """
        if older.identity != newer.identity or older.size_bytes != newer.size_bytes:
            return None
        before, after = self._get(older), self._get(newer)
        if before.pool_uuid != after.pool_uuid or before.thin_id is None or after.thin_id is None:
            return None
        if before.thin_id == after.thin_id:
            return []
        return delta.changed(_pool_of(after), before.thin_id, after.thin_id, newer.size_bytes)

    def changed_undo(self, newer: Snapshot) -> dict[str, str]:
        """Which pool `changed` takes the metadata snapshot of."""
        pool = _pool_of(self._get(newer))
        return {"pool": pool.full_name, "dm_uuid": pool.dm_uuid}

    def release_changed(self, args: Mapping[str, str]) -> None:
        """Release the metadata snapshot that a dead `changed` left. Idempotent."""
        lvm.check_machine()
        delta.release(delta.Pool(full_name=args["pool"], dm_uuid=args["dm_uuid"]))

    def _get(self, snapshot: Snapshot) -> LogicalVolume:
        lvm.check_machine()
        found = self._find(snapshot.ref)
        if found is None:
            raise NotFoundError(
                f"the snapshot {_full_name(snapshot.ref)} is gone",
                code="snapshot-missing",
                hint="delete its TimeMark",
            )
        return found


def _pool_of(row: LogicalVolume) -> delta.Pool:
    return delta.Pool(full_name=row.pool_name, dm_uuid=row.pool_dm_uuid)


def _full_name(ref: Mapping[str, str]) -> str:
    return f"{ref['vg']}/{ref['lv']}"


def _place(volume: Volume) -> str:
    return "/".join(lvmthin_names.place_of(volume))


def _look_at_all(volumes: Sequence[Volume]) -> list[_Origin]:
    lvm.check_machine()
    return _origins(volumes, lvm.look_up(map(_place, volumes)))


def _origins(volumes: Sequence[Volume], rows: Mapping[str, LogicalVolume]) -> list[_Origin]:
    return [_origin(volume, rows.get(_place(volume))) for volume in volumes]


def _origin(volume: Volume, row: LogicalVolume | None) -> _Origin:
    if row is None:
        raise NotFoundError(
            f"volume {volume.name}: {volume.path} is not there",
            code="volume-missing",
            hint="is its volume group connected? see: lvs",
        )
    if row.kind != lvm.THIN:
        raise lvmthin_names.not_thin(volume)
    device = devicemapper.find(row.dm_uuid)
    if device is None:
        raise UnavailableError(
            f"volume {volume.name}: {row.full_name} is not active",
            code="volume-inactive",
            hint=f"activate it: lvchange --activate y {row.full_name}",
        )
    _check_running(volume, device)  # whoever reads it would wait, we too
    with _open(volume) as fd:
        sector_size = device_sector_size(fd)
    if volume.sector_size not in {None, sector_size}:
        raise ConfigError(
            f"volume {volume.name}: {volume.path} has sectors of {sector_size} bytes,"
            f" not {volume.sector_size}",
            code="sector-size",
            hint=f"remove sector_size from [volumes.{volume.name}]: the device tells it",
        )
    return _Origin(volume=volume, row=row, number=device.number, sector_size=sector_size)


def _check_running(volume: Volume, device: devicemapper.Device | None) -> None:
    if device is not None and device.suspended:
        raise BusyError(
            f"volume {volume.name}: {volume.path} is suspended: its writers stand still",
            code="volume-suspended",
            hint=f"first: offload recover; else find out by whom, or: dmsetup resume {device.name}",
        )


def _check_pools(origins: Sequence[_Origin]) -> None:
    """That a snapshot can be made in each pool, and that the last one was."""
    pools = {origin.row.pool_name: origin.row.pool_dm_uuid for origin in origins}
    rows = lvm.look_up(pools)
    for name, dm_uuid in pools.items():
        pool = lvmthin_pool.look_at(name, dm_uuid)
        lvmthin_pool.check_writable(pool)
        known = rows[name].transaction_id if name in rows else None
        if known != pool.transaction_id:
            raise UnavailableError(
                f"the thin pool {name} is out of step: its transaction is {pool.transaction_id} "
                f"in the kernel and {known} in LVM's metadata",
                code="pool-out-of-step",
                hint="first: offload recover; else see lvmthin(7), 'Metadata check and repair'",
            )


def _check_made(name: str, made: LogicalVolume | None, origin: _Origin) -> None:
    """That the pool has the thin device that LVM's metadata names, and has counted it."""
    if made is None or made.thin_id is None or made.transaction_id is None:
        raise _not_made(name, "LVM has no such volume")
    if made.origin != origin.row.name:
        raise _not_made(name, f"it is of {made.origin or 'nothing'}")
    pool = lvmthin_pool.look_at(made.pool_name, made.pool_dm_uuid)
    if pool.transaction_id <= made.transaction_id:
        raise _not_made(name, "the pool was not told of it")
    probe = lvmthin_pool.probe_name(made.vg, made.name)
    if not lvmthin_pool.knows(made.pool_dm_uuid, made.thin_id, made.size_bytes, probe):
        raise _not_made(name, "the kernel does not know it")


def _not_made(name: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"lvcreate said that it made {name}, but {why}",
        code="snapshot-not-made",
        hint="was its origin suspended by something else? see: dmsetup info",
    )


def _reached(origins: Sequence[_Origin]) -> tuple[Consistency, ...]:
    """What snapshots of them reach by themselves."""
    table = mountinfo.mounts_everywhere()
    return tuple(
        Consistency.FILESYSTEM if _mounts_of(origin, table) else Consistency.CRASH
        for origin in origins
    )


def _mounts_of(origin: _Origin, table: Sequence[MountPoint]) -> list[MountPoint]:
    """Writable file systems that lie on this very device and that the kernel freezes with it."""
    return [
        mount
        for mount in table
        if mount.device == origin.number
        and mount.kind in _FROZEN_WITH_DEVICE
        and not mount.read_only
    ]


@contextmanager
def _open(volume: Volume) -> Iterator[int]:
    """The volume's device; errors of it are ours."""
    try:
        fd = os.open(volume.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise UnavailableError(
            f"volume {volume.name}: cannot read {volume.path}: {error.strerror}",
            code="volume-unreadable",
            hint="look at the kernel log of this machine: dmesg",
        ) from error
