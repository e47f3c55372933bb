"""Sources as flat records of strings: for the catalog, the journal and the server plugins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from offload.errors import UsageError
from offload.model import (
    BackupSource,
    HomeSource,
    NbdSource,
    Qcow2Source,
    RawSource,
    RbdSource,
    Source,
    VmfsSource,
)

_KINDS: dict[str, type[Source]] = {
    "raw": RawSource,
    "qcow2": Qcow2Source,
    "backup": BackupSource,
    "nbd": NbdSource,
    "rbd": RbdSource,
    "home": HomeSource,
    "vmfs": VmfsSource,
}
_NAMES = {made: kind for kind, made in _KINDS.items()}


def source_to_dict(source: Source) -> dict[str, str]:
    """All fields as strings, and `kind`. A field that is None is left out."""
    record = {"kind": _NAMES[type(source)]}
    for entry in fields(source):
        value = getattr(source, entry.name)
        if value is not None:
            record[entry.name] = str(value)
    return record


def source_from_dict(record: Mapping[str, str]) -> Source:
    """The inverse of `source_to_dict`. Raises UsageError (`bad-source`) for anything else."""
    made = _KINDS.get(record.get("kind", ""))
    if made is None:
        raise UsageError(
            f"unknown kind of source '{record.get('kind', '')}'",
            code="bad-source",
            hint="the record is damaged, or of a newer version",
        )
    try:
        values = {
            entry.name: _value(str(entry.type), record[entry.name])
            for entry in fields(made)
            if entry.name in record
        }
        return made(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a damaged source record: {error}", code="bad-source") from error


def lun_of(source: VmfsSource) -> Source:
    """The source of the LUN that the disk lies on. Raises UsageError (`bad-source`)."""
    try:
        record = json.loads(source.lun)
    except ValueError as error:
        raise UsageError(f"a damaged source record: {error}", code="bad-source") from error
    return source_from_dict(record)


def on_lun(source: Source, path: str, size_bytes: int) -> VmfsSource:
    """A disk on the LUN of a source; the inverse of `lun_of`."""
    record = json.dumps(source_to_dict(source), separators=(",", ":"), sort_keys=True)
    return VmfsSource(lun=record, path=path, size_bytes=size_bytes)


def _value(annotation: str, text: str) -> Any:
    """One field back from its string. Annotations of model.py are strings, as all of its are."""
    match annotation:
        case "int":
            return int(text)
        case "Path" | "Path | None":
            return Path(text)
        case _:
            return text
