"""Object lock as commands see it: what is locked, and whether a store can lock at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from offload.engine.repository import Repository
from offload.engine.retention_lock import ask
from offload.errors import PolicyError, UnavailableError
from offload.format import layout
from offload.ids import new_id
from offload.model import Backup, BackupId
from offload.objectlock import DAY_S, Locking, LockRules
from offload.store import Store

_PROOF_S = 60.0
_SECOND = timedelta(seconds=1)  # servers cut dates to it


def locked_backups(repository: Repository, backups: Iterable[Backup]) -> dict[BackupId, datetime]:
    """Those of the backups that are locked now, and until when."""
    store = repository.store
    if not isinstance(store, Locking):
        return {}
    names = {layout.manifest_name(b.id): b.id for b in backups}
    found = ask(store, store.originals(names).values())
    return {names[name]: until for name, until in found.items()}


def refuse_locked(repository: Repository, backups: Sequence[Backup]) -> None:
    """PolicyError (`backup-locked`) if one of the backups is locked."""
    for ident, until in locked_backups(repository, backups).items():
        raise PolicyError(
            f"backup {ident} is locked until {show(until)}: nobody can delete it before",
            code="backup-locked",
            hint="leave it to the keep rules: prune forgets it when its time has come",
        )


def show(until: datetime) -> str:
    """A date for the user, in the zone of this machine."""
    return f"{until.astimezone():%Y-%m-%d %H:%M}"


def prove(store: Store) -> None:
    """Lock an object for a minute and see that the store says so.

    PolicyError (`no-object-lock`, `lock-ignored`); nothing on a store without lock rules.
    """
    if not isinstance(store, Locking):
        return
    name = f"{layout.PROBES}{new_id()}"
    until = (store.clock() + timedelta(seconds=_PROOF_S)).replace(microsecond=0)
    store.put(f"{name}.plain", [b"no lock\n"])  # what fails now fails because of the lock
    store.delete(f"{name}.plain")
    try:
        store.put(name, [b"object lock\n"], retain_until=until)
    except UnavailableError as error:
        raise PolicyError(
            f"the bucket of the store {store.url} has no object lock: {error.message}",
            code="no-object-lock",
            hint="object lock is chosen when a bucket is made; make another one",
        ) from error
    found = ask(store, store.originals([name]).values()).get(name)
    if found is None or abs(found - until) > _SECOND:
        raise PolicyError(
            f"{store.url} takes dates of object lock and does not keep them: asked for {until}, "
            f"it says {found}",
            code="lock-ignored",
            hint="use a server that has object lock, or remove [lock] of the store",
        )
    store.delete(name)


def summary(store: Store) -> dict[str, str]:
    """What is configured, for `store show`."""
    rules = LockRules.of(store.spec)
    if rules is None:
        return {}
    backups, packs = rules.retain_s / DAY_S, 2 * rules.generation_s / DAY_S
    return {"locks": f"{rules.mode}, {backups:g} days; packs up to {packs:g} days longer"}
