"""Legal holds: backups that neither rules nor commands delete until somebody releases them.

The store says what is held; the catalog's copy is for lists. A hold is placed, then it is looked
for who may be deleting the backup; a deletion says that it begins, then looks for a hold
(`offload/engine/deletions.py`). Whoever has begun is waited for: either the backup goes, or the
hold was seen. So a hold that was reported is good. Who does not end in time makes it an error, and
the hold stays.

A hold that is there may be another's unfinished one; whoever finds it tells his user that the
backup is held. So no recovery takes a hold from a backup that there is: a placing or a release that
was killed leaves what it left, and is done again by whoever wants it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

from offload import compose
from offload.catalog.store import Catalog
from offload.engine.deletions import deletions_of
from offload.engine.fences import was_given_up
from offload.engine.repository import Repository
from offload.errors import BusyError, NotFoundError, OffloadError
from offload.format import layout
from offload.format.legalhold import decode_hold, encode_hold
from offload.instance import Instance
from offload.journal import Operation, step
from offload.model import Backup, BackupId, LegalHold
from offload.services import stores
from offload.services.context import Context

log = logging.getLogger(__name__)

WAIT_S = 30.0  # for a deletion that has begun: it is three requests from its end, unless it is dead
_PAUSE_S = 0.2


def held(repository: Repository) -> dict[BackupId, LegalHold]:
    """The legal holds of a store, by backup. The name alone counts: one whose content cannot be
    read holds too."""
    found = {}
    for name in repository.store.list(layout.HOLDS):
        backup = BackupId(name.removeprefix(layout.HOLDS))
        try:
            found[backup] = decode_hold(name, repository.store.get(name), repository.keys)
        except NotFoundError:
            continue  # released a moment ago
        except OffloadError as error:
            log.warning("%s; its backup counts as held", error.message)
            found[backup] = LegalHold(
                backup=backup, placed_at=repository.store.now(), host="", reason=error.message
            )
    return found


def note(ctx: Context, store: str, repository: Repository) -> dict[BackupId, LegalHold]:
    """The same, and the catalog learns of it."""
    found = held(repository)
    ctx.catalog.set_holds(store, list(found.values()))
    return found


def refuse_held(repository: Repository, backups: Sequence[Backup]) -> None:
    """BusyError (`backup-held`) if there is a legal hold on one of the backups."""
    for backup in backups:
        if repository.store.exists(layout.hold_name(backup.id)):
            raise held_error(backup.id)


def held_error(backup: str) -> BusyError:
    """What a deletion says."""
    return BusyError(
        f"there is a legal hold on backup {backup}",
        code="backup-held",
        hint=f"see: offload backup show {backup}; end it with: offload backup release {backup}",
    )


def hold(ctx: Context, prefixes: Sequence[str], reason: str = "") -> list[LegalHold]:
    """Place a hold on each backup; one that is held already keeps its first reason.

    NotFoundError (`unknown-backup`) where the store has a backup no longer. BusyError
    (`hold-unsure`) where somebody who may be deleting it does not end: the hold stays.
    """
    placed: list[LegalHold] = []

    def one(op: Operation, repository: Repository, backup: Backup, number: int) -> None:
        name = layout.hold_name(backup.id)
        if not repository.store.exists(name):
            made = LegalHold(
                backup=backup.id,
                placed_at=repository.store.now(),
                host=os.uname().nodename,
                reason=reason,
            )
            op.intend(f"hold-{number}", "release-hold", _args(ctx, backup))
            repository.store.put(name, [encode_hold(name, made, repository.keys)])
            step("hold.placed")
            op.done(f"hold-{number}")
        _confirm(repository, backup)
        found = note(ctx, backup.store, repository).get(backup.id)
        if found is None:
            raise NotFoundError(
                f"the hold on backup {backup.id} was released by another command meanwhile",
                code="not-held",
                hint="see: offload backup list",
            )
        placed.append(found)

    _each(ctx, "backup-hold", prefixes, one)
    return placed


def _confirm(repository: Repository, backup: Backup) -> None:
    """See that nobody takes the backup away who has not looked for the hold; see `hold`."""
    store = repository.store
    for _ in _attempts():
        found = [f"it is being deleted by {d}" for d in deletions_of(repository, backup.id)]
        # after the notes: they stay until the manifest is gone
        manifest = store.exists(layout.manifest_name(backup.id))
        if not manifest or store.exists(layout.void_name(backup.id)):
            store.delete(layout.hold_name(backup.id))
            raise NotFoundError(
                f"backup {backup.id} is in store {backup.store} no longer: nothing is held",
                code="unknown-backup",
                hint="see what is there with: offload backup list",
            )
        if was_given_up(store, backup.id):
            found.append("a prune has given up who wrote it")
        if not found:
            return
    raise BusyError(
        f"the hold on backup {backup.id} is placed and stays, but may be too late: "
        f"{'; '.join(found)}",
        code="hold-unsure",
        hint="let that end, or end it on its machine with: offload recover; then hold the backup "
        "again. If the machine is gone for good, nothing is left that could delete the backup",
    )


def _attempts() -> Iterator[None]:
    """Until WAIT_S is over."""
    end = time.monotonic() + WAIT_S
    while True:
        yield
        if time.monotonic() >= end:
            return
        time.sleep(_PAUSE_S)


def release(ctx: Context, prefixes: Sequence[str]) -> list[Backup]:
    """End the holds on the backups. NotFoundError (`not-held`) for one that has none."""
    ended: list[Backup] = []

    def one(op: Operation, repository: Repository, backup: Backup, number: int) -> None:
        if not repository.store.exists(layout.hold_name(backup.id)):
            raise NotFoundError(
                f"there is no legal hold on backup {backup.id}",
                code="not-held",
                hint="see: offload backup list",
            )
        op.intend(f"release-{number}", "release-hold", _args(ctx, backup))
        repository.store.delete(layout.hold_name(backup.id))
        step("hold.released")
        ctx.catalog.drop_hold(backup.id)
        op.done(f"release-{number}")
        ended.append(backup)

    _each(ctx, "backup-release", prefixes, one)
    return ended


def _each(
    ctx: Context,
    kind: str,
    prefixes: Sequence[str],
    job: Callable[[Operation, Repository, Backup, int], None],
) -> None:
    """Run the job for every backup, each in its store, in one operation."""
    chosen = [ctx.catalog.backup(p.removeprefix("backup:")) for p in dict.fromkeys(prefixes)]
    with ExitStack() as stack:
        op = stack.enter_context(ctx.journal.operation(kind, " ".join(prefixes)))
        opened = {
            name: stack.enter_context(stores.opened(ctx, name, exclusive=False))
            for name in sorted({backup.store for backup in chosen})
        }
        for number, backup in enumerate(chosen, 1):
            job(op, opened[backup.store], backup, number)


def _args(ctx: Context, backup: Backup) -> dict[str, str]:
    spec = stores.spec_of(ctx, backup.store).text()
    return {"store": spec, "name": backup.store, "backup": backup.id}


def undo_hold(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:
    """A placing or a release that did not come to its end: what the store shows counts, and the
    catalog learns of it. A hold on a backup that is not there goes."""
    store, ident = compose.open_store(args["store"]), args["backup"]
    with closing(Repository.open(store, instance.cache_dir)) as repository:
        if not store.exists(layout.manifest_name(ident)):
            store.delete(layout.hold_name(ident))
        if not store.exists(layout.hold_name(ident)):
            catalog.drop_hold(ident)
        elif "name" in args:
            catalog.set_holds(args["name"], list(held(repository).values()))
