"""Manifests: what a backup is. A backup exists when its manifest does: it is written last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from offload.errors import IntegrityError, UnavailableError
from offload.format.keys import Keys
from offload.format.layout import manifest_name
from offload.format.sealed import object_hash, seal_object, unseal_object
from offload.machine import Machine
from offload.model import Backup, BackupId, Consistency, ImageRecord, Instant

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A backup, and what else is needed to go on from the store alone."""

    backup: Backup
    group_config: Mapping[str, Any] = field(default_factory=dict)  # group and volumes, no secrets
    timemark: Mapping[str, Any] = field(default_factory=dict)  # its report
    previous: str | None = None  # hash of the newest manifest the writer saw: a chain
    software: str = ""
    copied_from: Mapping[str, str] | None = None  # {store, backup}: ids of what it is a copy of
    machines: tuple[Machine, ...] = ()  # the settings of its VMs


def encode_manifest(manifest: Manifest, keys: Keys) -> bytes:
    """The bytes of a manifest object."""
    b = manifest.backup
    return seal_object(
        manifest_name(b.id),
        {
            "format": "offload-manifest",
            "version": VERSION,
            "id": b.id,
            "group": b.group,
            "created_at": b.created_at.isoformat(),
            "finished_at": b.finished_at.isoformat(),
            "timemark": {**manifest.timemark, "id": b.timemark},
            "consistency": b.consistency.value,
            "instant": b.instant.value,
            "parent": b.parent,
            "host": b.host,
            "alarms": list(b.alarms),
            "tags": list(b.tags),
            "images": [_image_value(image) for image in b.images],
            "group_config": manifest.group_config,
            "file_index": None,
            "vm_settings": [machine.to_dict() for machine in manifest.machines] or None,
            "previous": manifest.previous,
            "software": manifest.software,
            "copied_from": None if manifest.copied_from is None else dict(manifest.copied_from),
        },
        keys,
    )


def _image_value(image: ImageRecord) -> dict[str, Any]:
    return {
        "volume": image.volume,
        "size_bytes": image.size_bytes,
        "sector_size": image.sector_size,
        "identity": image.identity,
        "root": image.root,
        "read_bytes": image.read_bytes,
        "stored_bytes": image.stored_bytes,
        "mode": image.mode,
        "reason": image.reason,
    }


def decode_manifest(name: str, raw: bytes, keys: Keys, store: str) -> Manifest:
    """The inverse; `store` is the name under which this store is configured here.

    IntegrityError if damaged or under the name of another, UnavailableError (`manifest-newer`) if
    of a newer version.
    """
    value = unseal_object(name, raw, keys)
    if value.get("version", 0) > VERSION:
        raise UnavailableError(
            f"{name} is of a newer version", code="manifest-newer", hint="use a newer offload"
        )
    try:
        backup = _backup(value, store)
        rest = (value["group_config"], value["timemark"], value["previous"], value["software"])
        origin = value.get("copied_from")
        machines = tuple(Machine.from_dict(m) for m in value.get("vm_settings") or ())
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"{name} lacks {error}", code="bad-manifest") from error
    if name.rpartition("/")[2] != backup.id:
        raise IntegrityError(
            f"{name} is the manifest of backup {backup.id}: it was copied or renamed",
            code="bad-manifest",
            hint="remove it, or give it its own name again",
        )
    group_config, timemark, previous, software = rest
    return Manifest(
        backup=backup,
        group_config=group_config,
        timemark=timemark,
        previous=previous,
        software=software,
        copied_from=origin if origin is None else {str(k): str(v) for k, v in origin.items()},
        machines=machines,
    )


def _backup(value: dict[str, Any], store: str) -> Backup:
    return Backup(
        id=BackupId(value["id"]),
        store=store,
        group=value["group"],
        created_at=datetime.fromisoformat(value["created_at"]),
        finished_at=datetime.fromisoformat(value["finished_at"]),
        timemark=value["timemark"]["id"],
        consistency=Consistency(value["consistency"]),
        instant=Instant(value["instant"]),
        images=tuple(ImageRecord(**image) for image in value["images"]),
        parent=value["parent"],
        host=value["host"],
        alarms=tuple(value["alarms"]),
        tags=tuple(value.get("tags", ())),
        vms=tuple(machine["name"] for machine in value.get("vm_settings") or ()),
    )


def manifest_hash(raw: bytes) -> str:
    """What the next manifest's `previous` names."""
    return object_hash(raw)
