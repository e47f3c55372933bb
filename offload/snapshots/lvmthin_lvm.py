"""LVM's own commands, as the lvmthin provider uses them: rows of `lvs`, and errors in our words.

`lvs` waits for a command that is changing the volume group (LVM locks it), so that a row is never
of something half done by a process that still lives.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from offload import devicemapper, run
from offload.errors import (
    BusyError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)

THIN = "thin"
THIN_POOL = "thin-pool"
PACKAGE = "lvm2"
# A command is never cut short without need: one that is killed may leave a volume suspended.
_PATIENCE_S = 300.0
# Its warnings about leaked descriptors and its locale would only add noise to what it says.
_ENV = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
# What it says of things that are not there.
_ABSENT = re.compile(
    r'Failed to find logical volume "|Volume group ".*" not found|Cannot process volume group '
)
_FIELDS = (
    "vg_name", "vg_uuid", "lv_name", "lv_uuid", "lv_size", "segtype", "pool_lv", "pool_lv_uuid",
    "thin_id", "transaction_id", "origin", "lv_tags",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalVolume:
    """One row of `lvs`. Of a snapshot `transaction_id` is the pool's when it was made."""

    vg: str
    vg_uuid: str
    name: str
    uuid: str
    size_bytes: int
    kind: str
    pool: str
    pool_uuid: str
    thin_id: int | None
    transaction_id: int | None
    origin: str
    tags: tuple[str, ...]

    @property
    def full_name(self) -> str:
        """As LVM's commands take it."""
        return f"{self.vg}/{self.name}"

    @property
    def dm_uuid(self) -> str:
        """Of its device, where it is active."""
        return _dm_uuid(self.vg_uuid, self.uuid)

    @property
    def pool_name(self) -> str:
        """Its pool, as LVM's commands take it."""
        return f"{self.vg}/{self.pool}"

    @property
    def pool_dm_uuid(self) -> str:
        """Of the device that is the thin pool (LVM lays a second one over it)."""
        return f"{_dm_uuid(self.vg_uuid, self.pool_uuid)}-tpool"


def check_machine() -> None:
    """Raises PrivilegeError (`needs-root`), UnavailableError (`program-missing`,
    `no-device-mapper`)."""
    if os.geteuid() != 0:
        raise PrivilegeError("LVM needs root", code="needs-root", hint="run as root")
    run.require_program("lvs", PACKAGE)
    if not devicemapper.available():
        raise UnavailableError(
            "this kernel has no device-mapper",
            code="no-device-mapper",
            hint="load it: modprobe dm-thin-pool; then activate the volume group: vgchange -ay VG",
        )


def look_up(names: Iterable[str]) -> dict[str, LogicalVolume]:
    """Those of these logical volumes (VG/LV) that there are, by their full names."""
    wanted = sorted(set(names))
    return {row.full_name: row for row in _rows(wanted)} if wanted else {}


def tagged(vg: str, tag: str) -> list[LogicalVolume]:
    """All logical volumes of a volume group that bear a tag; none where there is no such group."""
    return _rows(["--select", f'lv_tags="{tag}"', vg])


def command(argv: Sequence[str], *, about: str) -> None:
    """Run a command of LVM that changes something; `about`: the logical volume, for the error.

    Raises BusyError (`snapshot-in-use`, `snapshot-exists`,
    `volume-frozen`), NotFoundError (`volume-missing`),
    UnavailableError (`no-space`, `pool-out-of-step`,
    `lvm-failed`).
    """
    program = run.require_program(argv[0], PACKAGE)
    try:
        run.run([program, *argv[1:]], timeout_s=_PATIENCE_S, env=_ENV)
    except run.ProgramError as error:
        raise _explained(error, about) from error


def _rows(what: Sequence[str]) -> list[LogicalVolume]:
    argv = [
        run.require_program("lvs", PACKAGE), "--all", "--reportformat", "json",
        "--units", "b", "--nosuffix", "--options", ",".join(_FIELDS), *what,
    ]  # fmt: skip
    done = run.run(argv, timeout_s=_PATIENCE_S, env=_ENV, check=False)
    # it fails where one of several is missing, and names the others all the same
    if done.status != 0 and not _only_missing(done.stderr):
        failed = run.ProgramError(argv, done.status, done.seconds, done.stderr)
        raise _explained(failed, " ".join(what))
    try:
        report = json.loads(done.stdout or '{"report": []}')
        return [_parsed(row) for part in report["report"] for row in part["lv"]]
    except (ValueError, KeyError) as error:
        raise IntegrityError(f"lvs gave no rows that can be read: {error}") from error


def _parsed(row: Mapping[str, str]) -> LogicalVolume:
    return LogicalVolume(
        vg=row["vg_name"],
        vg_uuid=row["vg_uuid"],
        name=row["lv_name"].strip("[]"),  # LVM shows hidden ones in brackets
        uuid=row["lv_uuid"],
        size_bytes=int(row["lv_size"]),
        kind=row["segtype"],
        pool=row["pool_lv"].strip("[]"),
        pool_uuid=row["pool_lv_uuid"],
        thin_id=_number(row["thin_id"]),
        transaction_id=_number(row["transaction_id"]),
        origin=row["origin"].strip("[]"),
        tags=tuple(tag for tag in row["lv_tags"].split(",") if tag),
    )


def _number(text: str) -> int | None:
    return int(text) if text else None


def _dm_uuid(vg_uuid: str, lv_uuid: str) -> str:
    return f"LVM-{vg_uuid.replace('-', '')}{lv_uuid.replace('-', '')}"


def _only_missing(said: str) -> bool:
    """Whether all that went wrong is that something is not there."""
    lines = [line.strip() for line in said.splitlines()]
    failures = [line for line in lines if line and not line.startswith("WARNING")]
    return bool(failures) and all(_ABSENT.match(line) for line in failures)


def _explained(error: run.ProgramError, about: str) -> OffloadError:
    """What LVM said, in our words."""
    said = error.stderr
    if "Failed to suspend thin snapshot origin" in said:
        return BusyError(
            f"{about} cannot be made: its origin cannot be suspended",
            code="volume-frozen",
            hint="is its file system frozen on this host? LVM freezes it itself; see: dmesg",
        )
    if " in use" in said or "is used by another device" in said:
        return BusyError(
            f"the logical volume {about} is in use",
            code="snapshot-in-use",
            hint="end what has it open (lsof, dmsetup info), then try again",
        )
    if "unexpected transaction id" in said:
        return UnavailableError(
            f"LVM's metadata and the thin pool of {about} are out of step",
            code="pool-out-of-step",
            hint="first: offload recover; else see lvmthin(7), 'Metadata check and repair'",
        )
    if "already exists" in said:
        return BusyError(f"the logical volume {about} exists already", code="snapshot-exists")
    if "not found" in said or "Failed to find" in said:
        return NotFoundError(f"the logical volume {about} is not there", code="volume-missing")
    if "free space" in said or "threshold" in said or "out of" in said:
        return UnavailableError(
            f"no space for {about}: {_last_line(said)}",
            code="no-space",
            hint="delete TimeMarks, or extend the thin pool (lvextend; its metadata too)",
        )
    return UnavailableError(
        f"LVM failed on {about}: {_last_line(said)}",
        code="lvm-failed",
        hint="look at it with: lvs -a; and at the kernel log: dmesg",
    )


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("WARNING")] or lines
    return "; ".join(lines[-2:]) or "it said nothing"
