"""Any block device or file given as it is, read-only: no snapshot is made.

The image is only as still as its writers: right for a snapshot that the array or an administrator
made and presented, for a template, for a device whose writers are held as long as it is read. Plans
never call it one instant (`Instant.NONE`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offload.blockdev import device_identity, device_sector_size, device_size, image_sector_size
from offload.errors import ConfigError, NotFoundError, PrivilegeError, UnavailableError
from offload.extents import Ranges
from offload.filesystem import file_identity
from offload.model import Instant, RawSource, Snapshot, Volume
from offload.snapshot import Plan, VolumeState


class DeviceProvider:
    """The volume itself as its own snapshot: `ref` is `{path}`, deleting it does nothing."""

    name = "device"

    def __init__(self, instance: str) -> None:
        self._instance = instance  # nothing is made, so nothing bears its name

    def inspect(self, volume: Volume) -> VolumeState:
        """Size, sector size and identity; it uses no pool.

        Raises NotFoundError (`volume-missing`), PrivilegeError, UnavailableError
        (`not-a-device`), ConfigError (`sector-size`).
        """
        with _open(volume) as fd:
            try:
                return _look_at(volume, fd)
            except OSError as error:
                raise _unreadable(volume, error) from error

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """Never one instant."""
        return Plan(
            timemark=timemark,
            volumes=tuple(volumes),
            refs=tuple({"path": str(volume.path)} for volume in volumes),
            instant_alone=Instant.NONE,
            estimate_s=0.0,
        )

    def prepare(self, plan: Plan) -> None:
        """Write back what this machine holds of the devices, and forget what it has cached.

        Another host may have written to a shared LUN since this one read it, or the array may have
        put another snapshot behind it: cached pages would be answers from the past.
        """
        for volume in plan.volumes:
            with _open(volume) as fd:
                try:
                    os.fsync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                except OSError as error:
                    raise _unreadable(volume, error) from error

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """Describe the devices as they are now."""
        made = []
        for volume, ref in zip(plan.volumes, plan.refs, strict=True):
            state = self.inspect(volume)
            made.append(
                Snapshot(
                    volume=volume.name,
                    provider=self.name,
                    ref=ref,
                    size_bytes=state.size_bytes,
                    sector_size=state.sector_size,
                    identity=state.identity,
                )
            )
        return tuple(made)

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """Nothing was made, nothing is to be made durable."""

    def delete(self, ref: dict[str, str]) -> None:
        """Nothing was made: the device stays."""

    def exists(self, ref: dict[str, str]) -> bool:
        """Whether the device is there."""
        return Path(ref["path"]).exists()

    def source(self, snapshot: Snapshot) -> RawSource:
        """The device itself."""
        return RawSource(
            path=Path(snapshot.ref["path"]),
            size_bytes=snapshot.size_bytes,
            sector_size=snapshot.sector_size,
        )

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:  # noqa: ARG002
        """Unknown: there is one state only, the present."""
        return None

    def leftovers(self, volumes: Sequence[Volume]) -> list[dict[str, str]]:  # noqa: ARG002
        """None ever."""
        return []


@contextmanager
def _open(volume: Volume) -> Iterator[int]:
    try:
        fd = os.open(volume.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"volume {volume.name}: {volume.path} is not there",
            code="volume-missing",
            hint="is the device connected?",
        ) from error
    except PermissionError as error:
        raise PrivilegeError(
            f"volume {volume.name}: no permission to read {volume.path}",
            code="volume-permission",
            hint="run as root, or join the group that owns the device (often: disk)",
        ) from error
    except OSError as error:
        raise _unreadable(volume, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _look_at(volume: Volume, fd: int) -> VolumeState:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        size, sector_size = device_size(fd), device_sector_size(fd)
        identity, allocated = device_identity(fd), size
        if volume.sector_size not in {None, sector_size}:
            raise ConfigError(
                f"volume {volume.name}: {volume.path} has sectors of {sector_size} bytes,"
                f" not {volume.sector_size}",
                code="sector-size",
                hint=f"remove sector_size from [volumes.{volume.name}]: the device tells it",
            )
    elif stat.S_ISREG(status.st_mode):
        size, sector_size = status.st_size, volume.sector_size or image_sector_size(fd)
        identity, allocated = file_identity(fd), status.st_blocks * 512
    else:
        raise UnavailableError(
            f"volume {volume.name}: {volume.path} is neither a block device nor a file",
            code="not-a-device",
        )
    if size == 0:
        raise UnavailableError(
            f"volume {volume.name}: {volume.path} has no size", code="volume-empty"
        )
    return VolumeState(
        size_bytes=size,
        sector_size=sector_size,
        identity=identity,
        allocated_bytes=allocated,
        extents=0,
        estimate_s=0.0,
        pool="",
        pool_size_bytes=0,
        pool_free_bytes=0,
        needed_bytes=0,
    )


def _unreadable(volume: Volume, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"volume {volume.name}: cannot read {volume.path}: {error.strerror}",
        code="volume-unreadable",
        hint="look at the kernel log of this machine: dmesg",
    )
