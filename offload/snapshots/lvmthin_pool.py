"""A thin pool as the kernel has it: space, mode, transaction, which thin devices it knows."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from offload import devicemapper
from offload.devicemapper import SECTOR_BYTES
from offload.errors import UnavailableError

_METADATA_BLOCK = 4096  # bytes: THIN_METADATA_BLOCK_SIZE, drivers/md/dm-thin-metadata.h

# thin-provisioning.rst: <transaction id> <used>/<total metadata blocks> <used>/<total data blocks>
# <held metadata root> <mode> [no_]discard_passdown <what when full> <needs_check|-> …
_STATUS = re.compile(
    r"(?P<transaction>\d+) (?P<metadata_used>\d+)/(?P<metadata_total>\d+) "
    r"(?P<data_used>\d+)/(?P<data_total>\d+) (?P<held>\d+|-) (?P<mode>\w+) (?P<rest>.*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """Sizes in bytes. `held_root`: the block of its metadata snapshot, or None."""

    name: str
    transaction_id: int
    size_bytes: int
    free_bytes: int
    metadata_size_bytes: int
    metadata_free_bytes: int
    held_root: int | None
    mode: str
    needs_check: bool

    @property
    def out_of_data(self) -> bool:
        """Whether writes wait for space, or fail."""
        return self.mode == "out_of_data_space"


def look_at(name: str, dm_uuid: str) -> PoolStatus:
    """The state of an active pool. One that is out of data is looked at all the same: room can be
    made. Raises UnavailableError (`pool-inactive`, `pool-failed`)."""
    targets, tables = devicemapper.status(dm_uuid), devicemapper.table(dm_uuid)
    if not targets or not tables:
        raise UnavailableError(
            f"the thin pool {name} is not active",
            code="pool-inactive",
            hint=f"activate it: lvchange -ay {name}",
        )
    found = _STATUS.match(targets[0].text)
    if targets[0].kind != "thin-pool" or found is None:
        raise UnavailableError(
            f"the thin pool {name} has failed: {targets[0].text.strip()}",
            code="pool-failed",
            hint=f"look at the kernel log (dmesg); then: lvconvert --repair {name}",
        )
    block = block_bytes(dm_uuid)
    data_total, metadata_total = int(found["data_total"]), int(found["metadata_total"])
    return PoolStatus(
        name=name,
        transaction_id=int(found["transaction"]),
        size_bytes=data_total * block,
        free_bytes=(data_total - int(found["data_used"])) * block,
        metadata_size_bytes=metadata_total * _METADATA_BLOCK,
        metadata_free_bytes=(metadata_total - int(found["metadata_used"])) * _METADATA_BLOCK,
        held_root=None if found["held"] == "-" else int(found["held"]),
        mode=found["mode"],
        needs_check="needs_check" in found["rest"].split(),
    )


def check_healthy(pool: PoolStatus) -> None:
    """Raises UnavailableError (`pool-needs-check`, `pool-read-only`)."""
    if pool.needs_check:
        raise UnavailableError(
            f"the metadata of the thin pool {pool.name} needs a check",
            code="pool-needs-check",
            hint=f"stop what uses it, deactivate it, then: lvconvert --repair {pool.name}",
        )
    if pool.mode == "ro":
        raise UnavailableError(
            f"the thin pool {pool.name} is read-only: its metadata is full, or was damaged",
            code="pool-read-only",
            hint=f"look at the kernel log (dmesg); lvextend --poolmetadatasize +1G {pool.name}, "
            f"or lvconvert --repair {pool.name}",
        )


def check_writable(pool: PoolStatus) -> None:
    """Also refuse a pool whose space is used up. Raises UnavailableError (`pool-out-of-data`)."""
    check_healthy(pool)
    if pool.out_of_data:
        raise UnavailableError(
            f"the thin pool {pool.name} is out of space: production writes to it wait or fail",
            code="pool-out-of-data",
            hint=f"extend it at once: lvextend -L +10G {pool.name}; or delete TimeMarks",
        )


def block_bytes(dm_uuid: str) -> int:
    """The size of a pool's data blocks."""
    # <metadata device> <data device> <data block size in sectors> …
    return int(devicemapper.table(dm_uuid)[0].text.split()[2]) * SECTOR_BYTES


def metadata_device(dm_uuid: str) -> tuple[int, int]:
    """The number of the device that holds a pool's metadata."""
    major, _, minor = devicemapper.table(dm_uuid)[0].text.split()[0].partition(":")
    return int(major), int(minor)


def knows(dm_uuid: str, thin_id: int, size_bytes: int, probe: str) -> bool:
    """Whether the pool has a thin device of this id: it is opened as a device named `probe`, which
    goes at once."""
    pool = devicemapper.find(dm_uuid)
    if pool is None:
        return False
    major, minor = pool.number
    target = devicemapper.Target(
        kind="thin", start=0, length=size_bytes // SECTOR_BYTES, text=f"{major}:{minor} {thin_id}"
    )
    return devicemapper.loads(probe, target)


def probe_name(vg: str, name: str) -> str:
    """The device-mapper name under which a snapshot is probed: known to who cleans up after a
    process that died while it did so."""
    return "offload-probe-" + hashlib.sha256(f"{vg}/{name}".encode()).hexdigest()[:32]


def mapped_bytes(dm_uuid: str) -> int | None:
    """What an active thin device takes in its pool, or None."""
    targets = devicemapper.status(dm_uuid)
    if not targets or targets[0].kind != "thin":
        return None
    sectors = targets[0].text.split()[0]  # <mapped sectors> <highest mapped sector>, or "Fail"
    return int(sectors) * SECTOR_BYTES if sectors.isdigit() else None
