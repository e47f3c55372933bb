"""What changed between two thin snapshots: `thin_delta` over a snapshot of the pool's metadata.

A pool has one metadata snapshot at a time, whoever asks for it. Ours are taken under a lock of this
host, and the pool bears a tag as long as there is one, from before it is made to after it is
released:

| lock free, and | is | so |
| --- | --- | --- |
| tag, metadata snapshot | left by a process of ours that is dead | released |
| tag, none | died before it was made, or after it was released | the tag goes |
| no tag, metadata snapshot | somebody else's | never touched; what changed is unknown |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload import devicemapper, filelock, run
from offload.devicemapper import SECTOR_BYTES
from offload.errors import BusyError, IntegrityError, OffloadError, UnavailableError
from offload.extents import Ranges, normalize
from offload.journal import step
from offload.snapshots import lvmthin_lvm as lvm
from offload.snapshots import lvmthin_pool

log = logging.getLogger(__name__)

TAG = "offload.metadata-snapshot"
PACKAGE = "thin-provisioning-tools"
_LOCKS = Path("/run/lock/lvm")  # of LVM's own locks: root's alone
_SYS_BLOCK = Path("/sys/dev/block")
_DELTA_S = 3600.0
_TAG_CONFIG = "backup { backup = 0 archive = 0 }"  # the tag goes again at once

# thin_delta(8): <superblock … data_block_size="SECTORS" …>, then <same/>, <different/>,
# <left_only/> (mapped in the first alone: discarded since) and <right_only/>, in blocks
_BLOCK_SIZE = re.compile(r'<superblock [^>]*\bdata_block_size="(\d+)"')
_RANGE = re.compile(r'<(different|left_only|right_only) begin="(\d+)" length="(\d+)"/>')


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A thin pool, as LVM's commands and as device-mapper name it."""

    full_name: str
    dm_uuid: str


def changed(pool: Pool, older: int, newer: int, size_bytes: int) -> Ranges | None:
    """The ranges in which two thin devices (by their ids) do not share their blocks.

    None, with a line in the log, while somebody else has the pool's metadata snapshot, and where
    `thin_delta` is missing or fails.
    """
    program = run.find_program("thin_delta")
    if program is None:
        _warn(pool, f"thin_delta is not installed: apt-get install {PACKAGE}")
        return None
    try:
        with _metadata_snapshot(pool):
            argv = [program, "--metadata-snap", "--snap1", str(older), "--snap2", str(newer)]
            done = run.run([*argv, str(_metadata_of(pool))], timeout_s=_DELTA_S)
    except (_TakenError, run.ProgramError) as error:
        _warn(pool, error.message)
        return None
    return parse(done.stdout, size_bytes)


def _warn(pool: Pool, why: str) -> None:
    log.warning("what changed in the thin pool %s is unknown: %s", pool.full_name, why)


def parse(said: str, size_bytes: int) -> Ranges:
    """The ranges that thin_delta names as not shared, inside `[0, size_bytes)`.

    Raises IntegrityError (`thin-delta`) for what is not its whole output.
    """
    block = _BLOCK_SIZE.search(said)
    if block is None or not said.rstrip().endswith("</superblock>"):
        raise IntegrityError("thin_delta's output is not whole", code="thin-delta")
    unit = int(block[1]) * SECTOR_BYTES
    found = ((int(begin) * unit, int(count) * unit) for _, begin, count in _RANGE.findall(said))
    return normalize((start, min(start + length, size_bytes)) for start, length in found)


def release(pool: Pool) -> None:
    """Release the metadata snapshot that a dead process of ours left. Idempotent."""
    with _lock(pool):
        _take_back(pool)


class _TakenError(BusyError):
    """Somebody else has the metadata snapshot."""


@contextmanager
def _metadata_snapshot(pool: Pool) -> Iterator[None]:
    with _lock(pool):
        _take_back(pool)
        if _held(pool):
            raise _taken(pool)
        _change_tag(pool, "--addtag")
        step("lvmthin.metadata.tagged")
        try:
            _reserve(pool)
            step("lvmthin.metadata.reserved")
            yield
        except BaseException as failure:
            try:
                _take_back(pool)
            except OffloadError as error:
                failure.add_note(error.message)
            raise
        _take_back(pool)
        step("lvmthin.metadata.released")


def _reserve(pool: Pool) -> None:
    try:
        devicemapper.message(pool.dm_uuid, "reserve_metadata_snap")
    except BusyError as error:
        # taken since we looked: the tag must go before anybody thinks that it is ours
        _change_tag(pool, "--deltag")
        raise _taken(pool) from error


def _take_back(pool: Pool) -> None:
    """With the lock held: the tag says that the metadata snapshot is ours."""
    found = lvm.look_up([pool.full_name]).get(pool.full_name)
    if found is None or TAG not in found.tags:
        return
    if _held(pool):
        devicemapper.message(pool.dm_uuid, "release_metadata_snap")
    _change_tag(pool, "--deltag")


def _held(pool: Pool) -> bool:
    return lvmthin_pool.look_at(pool.full_name, pool.dm_uuid).held_root is not None


def _change_tag(pool: Pool, how: str) -> None:
    argv = ["lvchange", "--quiet", "--config", _TAG_CONFIG, how, TAG, pool.full_name]
    lvm.command(argv, about=pool.full_name)


def _taken(pool: Pool) -> _TakenError:
    return _TakenError(
        f"another program holds the metadata snapshot of the thin pool {pool.full_name}",
        code="metadata-snapshot-taken",
        hint="it is released with: dmsetup message VG-POOL-tpool 0 release_metadata_snap",
    )


@contextmanager
def _lock(pool: Pool) -> Iterator[None]:
    path = _LOCKS / f"offload.{pool.dm_uuid}"
    with ExitStack() as stack:
        try:
            _LOCKS.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(filelock.alone(path))
        except OSError as error:
            raise UnavailableError(
                f"cannot lock {path}: {error.strerror}", code="lock-unusable"
            ) from error
        yield


def _metadata_of(pool: Pool) -> Path:
    """The device to read the metadata from; the kernel's own name, which needs no udev."""
    major, minor = lvmthin_pool.metadata_device(pool.dm_uuid)
    return Path("/dev") / (_SYS_BLOCK / f"{major}:{minor}").resolve().name
