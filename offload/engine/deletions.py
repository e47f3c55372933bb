"""Which backups were deleted on purpose: so that another host, whose catalog knows one that the
store no longer has, can tell a deletion from a loss.

A sealed object `deleted/ID`, put once the manifest is gone; it stays for a year.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from offload.engine.repository import Repository
from offload.errors import BusyError
from offload.format import layout
from offload.store import Store

KEPT = timedelta(days=365)


def note_deleted(repository: Repository, backup: str) -> None:
    """Say that the backup was deleted. Idempotent."""
    with contextlib.suppress(BusyError):
        repository.put_sealed(
            layout.deletion_name(backup),
            {
                "format": "offload-deletion",
                "version": 1,
                "backup": backup,
                "host": os.uname().nodename,
                "at": datetime.now(UTC).isoformat(),
            },
        )


def deleted_of(repository: Repository, backups: Iterable[str]) -> set[str]:
    """Those of the backups that were deleted. A note that is damaged or forged says nothing."""
    return {b for b in backups if repository.attests(layout.deletion_name(b), "backup", b)}


def sweep_deletions(store: Store, now: datetime) -> None:
    """Remove the notes that everybody has had a year to read."""
    for info in list(store.infos(layout.DELETED)):
        if now - info.modified > KEPT:
            store.delete(info.name)
