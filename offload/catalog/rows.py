"""Values of `offload.model` as rows of the catalog, and back."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from offload.inventory import Datastore, Entry, HypervisorHost, InventoryVm
from offload.island import Island, IslandId, IslandState, Placeholder, Shown
from offload.machine import Machine, disk_from_dict, disk_to_dict
from offload.model import (
    Backup,
    BackupId,
    Connection,
    ConnectionId,
    ConnectionKind,
    Consistency,
    Exposure,
    HeldPart,
    ImageRecord,
    Instant,
    LegalHold,
    QuiesceReport,
    Snapshot,
    TimeMark,
    TimeMarkId,
    View,
    ViewId,
    ViewState,
)
from offload.sources import source_from_dict, source_to_dict

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentLink:
    """What the next incremental of `volume` to `store` is compared with, and the backup of it."""

    store: str
    volume: str
    timemark: str
    backup: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One reading of a backup from its store. `how`: `all`, or the sampled share, as `5%`."""

    backup: str
    at: datetime
    how: str
    problems: int


def timemark_row(timemark: TimeMark) -> Row:
    """A TimeMark as a row."""
    return {
        "id": timemark.id,
        "group_name": timemark.group,
        "created_at": timemark.created_at,
        "consistency": timemark.consistency.value,
        "instant": timemark.instant.value,
        "freeze_ms": timemark.freeze_ms,
        "purpose": timemark.purpose,
        "keep": timemark.keep,
        "snapshots": [{**asdict(s), "ref": dict(s.ref)} for s in timemark.snapshots],
        "skew_ms": timemark.skew_ms,
        "reports": [_report_fields(report) for report in timemark.reports],
        "warnings": list(timemark.warnings),
        "machines": [machine.to_dict() for machine in timemark.machines],
    }


def timemark_of(row: Row) -> TimeMark:
    """The inverse of `timemark_row`."""
    return TimeMark(
        id=TimeMarkId(row["id"]),
        group=row["group_name"],
        created_at=row["created_at"],
        snapshots=tuple(Snapshot(**fields) for fields in row["snapshots"]),
        consistency=Consistency(row["consistency"]),
        instant=Instant(row["instant"]),
        freeze_ms=row["freeze_ms"],
        skew_ms=row["skew_ms"],
        purpose=row["purpose"],
        keep=row["keep"],
        reports=tuple(_report(fields) for fields in row["reports"]),
        warnings=tuple(row["warnings"]),
        machines=tuple(Machine.from_dict(fields) for fields in row["machines"]),
    )


def _report_fields(report: QuiesceReport) -> Row:
    """JSON has no times."""
    fields = asdict(report)
    for timed, key in [(fields, "image_at"), *((part, "at") for part in fields["parts"])]:
        timed[key] = timed[key] and timed[key].isoformat()
    return fields


def _report(fields: Row) -> QuiesceReport:
    """Of version 2 and before they have neither parts nor times."""
    typed = {
        "volumes": tuple(fields["volumes"]),
        "consistency": Consistency(fields["consistency"]),
        "parts": tuple(_part(part) for part in fields.get("parts", ())),
        "image_at": _time(fields.get("image_at")),
    }
    return QuiesceReport(**{**fields, **typed})


def _part(fields: Row) -> HeldPart:
    return HeldPart(**{**fields, "what": tuple(fields["what"]), "at": _time(fields["at"])})


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def view_row(view: View) -> Row:
    """A view as a row."""
    return {
        "id": view.id,
        "name": view.name,
        "origin": view.origin,
        "target": view.target,
        "uri": view.uri,
        "writable": view.writable,
        "size_bytes": view.size_bytes,
        "sector_size": view.sector_size,
        "created_at": view.created_at,
        "source": source_to_dict(view.source),
        "state": view.state.value,
        "server": dict(view.server),
        "exposure": asdict(view.exposure),
        "overlay_limit_bytes": view.overlay_limit_bytes,
    }


def view_of(row: Row) -> View:
    """The inverse of `view_row`."""
    typed = {
        "id": ViewId(row["id"]),
        "source": source_from_dict(row["source"]),
        "state": ViewState(row["state"]),
        "exposure": _exposure(row["exposure"]),
    }
    return View(**{**row, **typed})


def _exposure(fields: Row) -> Exposure:
    lists = {name: tuple(fields[name]) for name in ("initiators", "allow")}
    return Exposure(**{**fields, **lists})


def connection_row(connection: Connection) -> Row:
    """A connection as a row."""
    return {
        **{f.name: getattr(connection, f.name) for f in dataclasses.fields(connection)},
        "kind": connection.kind.value,
        "record": dict(connection.record),
    }


def connection_of(row: Row) -> Connection:
    """The inverse of `connection_row`."""
    typed = {"id": ConnectionId(row["id"]), "kind": ConnectionKind(row["kind"])}
    return Connection(**{**row, **typed})


def island_row(island: Island) -> Row:
    """An island as a row."""
    return {
        "id": island.id,
        "name": island.name,
        "host": island.host,
        "group_name": island.group,
        "origin": island.origin,
        "created_at": island.created_at,
        "views": list(island.views),
        "placeholders": [_placeholder_fields(entry) for entry in island.placeholders],
        "state": island.state.value,
        "record": dict(island.record),
    }


def island_of(row: Row) -> Island:
    """The inverse of `island_row`."""
    return Island(
        id=IslandId(row["id"]),
        name=row["name"],
        host=row["host"],
        group=row["group_name"],
        origin=row["origin"],
        created_at=row["created_at"],
        views=tuple(row["views"]),
        placeholders=tuple(_placeholder(fields) for fields in row["placeholders"]),
        state=IslandState(row["state"]),
        record=row["record"],
    )


def _placeholder_fields(placeholder: Placeholder) -> Row:
    """JSON has no times."""
    return {
        **{f.name: getattr(placeholder, f.name) for f in dataclasses.fields(placeholder)},
        "at": placeholder.at.isoformat(),
        "shown": placeholder.shown.value,
        "disks": [disk_to_dict(disk) for disk in placeholder.disks],
        "notes": list(placeholder.notes),
        "record": dict(placeholder.record),
    }


def _placeholder(fields: Row) -> Placeholder:
    typed = {
        "at": datetime.fromisoformat(fields["at"]),
        "shown": Shown(fields["shown"]),
        "disks": tuple(disk_from_dict(disk) for disk in fields["disks"]),
        "notes": tuple(fields["notes"]),
    }
    return Placeholder(**{**fields, **typed})


INVENTORY_KINDS: dict[str, Any] = {
    "vm": InventoryVm, "datastore": Datastore, "host": HypervisorHost,
}  # fmt: skip


def inventory_row(hypervisor: str, entry: Entry) -> Row:
    """An entry of an inventory as a row."""
    fields = {name: getattr(entry, name) for name in type(entry).__slots__}
    if isinstance(entry, InventoryVm):
        fields["disks"] = [disk_to_dict(disk) for disk in entry.disks]
    (kind,) = (kind for kind, of in INVENTORY_KINDS.items() if isinstance(entry, of))
    named = {"hypervisor": hypervisor, "kind": kind, "id": entry.id, "name": entry.name}
    return {**named, "entry": fields}


def inventory_entry_of(row: Row) -> Entry:
    """The inverse of `inventory_row`."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in row["entry"].items()}
    if "disks" in fields:
        fields["disks"] = tuple(disk_from_dict(disk) for disk in fields["disks"])
    entry: Entry = INVENTORY_KINDS[row["kind"]](**fields)
    return entry


def hold_row(hold: LegalHold) -> Row:
    """A legal hold as a row."""
    return dataclasses.asdict(hold)


def hold_of(row: Row) -> LegalHold:
    """The inverse of `hold_row`."""
    return LegalHold(**{**row, "backup": BackupId(row["backup"])})


def backup_row(backup: Backup) -> Row:
    """A backup as a row."""
    return {
        "id": backup.id,
        "store": backup.store,
        "group_name": backup.group,
        "created_at": backup.created_at,
        "finished_at": backup.finished_at,
        "timemark": backup.timemark,
        "consistency": backup.consistency.value,
        "instant": backup.instant.value,
        "images": [asdict(image) for image in backup.images],
        "parent": backup.parent,
        "host": backup.host,
        "alarms": list(backup.alarms),
        "tags": list(backup.tags),
        "vms": list(backup.vms),
    }


def backup_of(row: Row) -> Backup:
    """The inverse of `backup_row`."""
    return Backup(
        id=BackupId(row["id"]),
        store=row["store"],
        group=row["group_name"],
        created_at=row["created_at"],
        finished_at=row["finished_at"],
        timemark=row["timemark"],
        consistency=Consistency(row["consistency"]),
        instant=Instant(row["instant"]),
        images=tuple(ImageRecord(**fields) for fields in row["images"]),
        parent=row["parent"],
        host=row["host"],
        alarms=tuple(row["alarms"]),
        tags=tuple(row["tags"]),
        vms=tuple(row["vms"]),
    )
