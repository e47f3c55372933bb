"""What is known of an island before anything of it is made: enough to find it and take it down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from offload import iscsi
from offload.hypervisor import IslandRequest, IslandView
from offload.instance import Instance
from offload.vsphere import MARK

__all__ = ["MARK", "Record", "RecordedLun", "record_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedLun:
    """A view as the backup host gets it. `names`: what the host may call it (`naa.…`)."""

    view: str
    volume: str
    iqn: str
    address: str
    port: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Strings and numbers only: it goes through the journal and the catalog."""

    island: str
    instance: str
    host: str  # its name in vSphere
    adapter: str  # e.g. vmhba64
    folder: str  # of the placeholders
    luns: tuple[RecordedLun, ...]

    @property
    def mark(self) -> str:
        """By which placeholders of this island are known, without any catalog."""
        return f"{self.instance}/{self.island}"

    @property
    def names(self) -> frozenset[str]:
        """Canonical names of all LUNs."""
        return frozenset(name for lun in self.luns for name in lun.names)

    @property
    def iqns(self) -> frozenset[str]:
        """Of all targets."""
        return frozenset(lun.iqn for lun in self.luns)

    def lun(self, name: str) -> RecordedLun | None:
        """By a canonical name."""
        return next((lun for lun in self.luns if name in lun.names), None)

    def to_strings(self) -> dict[str, str]:
        """As `BackupHost.plan` gives it."""
        luns = [{**asdict(lun), "names": list(lun.names)} for lun in self.luns]
        return {
            "island": self.island,
            "instance": self.instance,
            "host": self.host,
            "adapter": self.adapter,
            "folder": self.folder,
            "luns": json.dumps(luns),
        }

    @classmethod
    def from_strings(cls, record: Mapping[str, str]) -> Record:
        """The inverse."""
        luns = [
            RecordedLun(**{**fields, "names": tuple(fields["names"])})
            for fields in json.loads(record["luns"])
        ]
        known = {key: record[key] for key in ("island", "instance", "host", "adapter", "folder")}
        return cls(**known, luns=tuple(luns))


def record_of(
    request: IslandRequest, instance: Instance, *, host: str, adapter: str, folder: str
) -> Record:
    """Made of the request alone: nothing is asked."""
    return Record(
        island=request.id,
        instance=instance.id,
        host=host,
        adapter=adapter,
        folder=folder,
        luns=tuple(_lun(found) for found in request.views),
    )


def _lun(found: IslandView) -> RecordedLun:
    """A view's URI is `iscsi://ADDRESS:PORT/IQN/LUN`."""
    where = urlsplit(found.view.uri)
    return RecordedLun(
        view=found.view.id,
        volume=found.volume,
        iqn=where.path.strip("/").rpartition("/")[0],
        address=where.hostname or "",
        port=where.port or 3260,
        names=iscsi.canonical_names(found.view.target, found.view.id),
    )
