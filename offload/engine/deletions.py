"""Deleting backups beside whoever places legal holds.

A backup goes with its manifest. Before that a sealed object `deleted/BACKUP/DELETION` says so, and
only then a hold is looked for; who places a hold looks for such notes afterwards, so that whichever
of the two comes second sees the other. A note is taken away by its own deletion alone, when that
has found a hold: nobody else knows whether it is about to delete.

Once the manifest is gone the note tells other hosts, whose catalogs know the backup, a deletion
from a loss. It stays for a year. See docs/design/store-protocol.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from offload.engine.repository import Repository
from offload.errors import (
    BusyError,
    IntegrityError,
    NotFoundError,
    PolicyError,
    PrivilegeError,
)
from offload.format import layout
from offload.journal import step
from offload.store import Store

KEPT = timedelta(days=365)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """A note. `host` and `at` (its clock, ISO) are empty where it cannot be read."""

    name: str
    host: str = ""
    at: str = ""

    def __str__(self) -> str:
        """For messages: who it is."""
        return f"{self.host}, since {self.at[:16]}Z" if self.host else self.name


def take_away(repository: Repository, backup: str, deletion: str) -> bool:
    """Delete a manifest; False, and all is as it was, where there is a legal hold on the backup.

    Idempotent: after a crash, or a request without an answer, the same deletion is begun again.
    """
    store = repository.store
    note = layout.deletion_name(backup, deletion)
    if not store.exists(note):
        store.delete(note)  # who may not delete is told before he says that he will
        with contextlib.suppress(BusyError):
            repository.put_sealed(note, _content(backup))
    step("deletion.noted")
    manifest = layout.manifest_name(backup)
    if store.exists(layout.hold_name(backup)) and store.exists(manifest):
        store.delete(note)
        return False
    try:
        store.delete(manifest)
    except (PolicyError, PrivilegeError):  # refused: it was not done, and will not be
        with contextlib.suppress(PrivilegeError):
            store.delete(note)
        raise
    step("deletion.done")
    return True


def _content(backup: str) -> dict[str, object]:
    return {
        "format": "offload-deletion",
        "version": 1,
        "backup": backup,
        "host": os.uname().nodename,
        "at": datetime.now(UTC).isoformat(),
    }


def deletions_of(repository: Repository, backup: str) -> list[Deletion]:
    """The notes on one backup: as long as its manifest is there, deletions that have not ended.
    One that cannot be read is one, too."""
    found = []
    for name in list(repository.store.list(layout.deletions_folder(backup))):
        try:
            value = repository.get_sealed(name)
            found.append(Deletion(name=name, host=str(value["host"]), at=str(value["at"])))
        except NotFoundError:
            continue  # taken away a moment ago
        except (IntegrityError, KeyError):
            found.append(Deletion(name=name))
    return found


def deleted_of(repository: Repository, backups: Iterable[str]) -> set[str]:
    """Those of the backups, whose manifests are gone, that were deleted. A note that is damaged or
    forged says nothing."""
    return {
        backup
        for backup in backups
        if any(
            repository.attests(name, "backup", backup)
            for name in repository.store.list(layout.deletions_folder(backup))
        )
    }


def sweep_deletions(store: Store, now: datetime) -> None:
    """Remove the notes that everybody has had a year to read. Those of deletions that have not
    ended stay: whether a hold is good must not depend on a clock."""
    for info in list(store.infos(layout.DELETED)):
        backup = info.name.removeprefix(layout.DELETED).partition("/")[0]
        if now - info.modified > KEPT and not store.exists(layout.manifest_name(backup)):
            store.delete(info.name)
