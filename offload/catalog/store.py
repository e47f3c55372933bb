"""The catalog: what is known about TimeMarks, views and backups.

Every method is one transaction, durable when it returns. Deletes are idempotent. Several processes
and threads may use one catalog at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection as Database
from sqlalchemy import (
    Engine,
    Select,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError as ConstraintError

from offload.catalog import rows, tables
from offload.catalog.rows import ParentLink, Row, Verification
from offload.catalog.schema import corrupt, open_engine, translated, writing
from offload.errors import BusyError, NotFoundError, OffloadError
from offload.ids import match_prefix
from offload.inventory import Inventory, InventoryChange, by_kind
from offload.island import Island
from offload.model import Backup, BackupId, Connection, LegalHold, TimeMark, View

__all__ = ["Catalog", "ParentLink", "Verification"]

_Value = TypeVar("_Value")


class Catalog:
    """An open catalog. Made by `Catalog.open`; `close` it.

    Every method may raise IntegrityError (`catalog-corrupt`), BusyError (`catalog-busy`) and
    UnavailableError (`catalog-unavailable`, `no-space`).
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine
        self._writing = writing(engine)

    @classmethod
    def open(cls, path: Path) -> Catalog:
        """Open the database at `path`; make it (0600) if missing; bring its schema up to date.

        Raises UnavailableError (`catalog-newer`) for one that a later version wrote.
        """
        return cls(path, open_engine(path))

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._engine.dispose()

    # TimeMarks

    def add_timemark(self, timemark: TimeMark) -> None:
        """Record a TimeMark. BusyError (`timemark-exists`) if its id is taken."""
        with self._write() as db, _taken("timemark", timemark.id):
            db.execute(insert(tables.timemarks), rows.timemark_row(timemark))

    def timemark(self, prefix: str) -> TimeMark:
        """The one whose id starts with `prefix`; NotFoundError for none and for several."""
        return self._by_prefix("timemark", tables.timemarks, prefix, rows.timemark_of)

    def timemarks(self, group: str | None = None) -> list[TimeMark]:
        """All, or those of one group; the newest last."""
        table = tables.timemarks
        query = select(table).order_by(table.c.created_at, table.c.id)
        if group is not None:
            query = query.where(table.c.group_name == group)
        return self._all(query, rows.timemark_of)

    def delete_timemark(self, timemark_id: str) -> None:
        """Forget a TimeMark and the parent links to it."""
        self._delete(tables.timemarks, timemark_id)

    # views

    def add_view(self, view: View) -> None:
        """Record a view. BusyError (`view-exists`) if its name or id is taken."""
        with self._write() as db, _taken("view", view.name):
            db.execute(insert(tables.views), rows.view_row(view))

    def update_view(self, view: View) -> None:
        """Replace the record of a view; NotFoundError (`unknown-view`) if it is not there."""
        table = tables.views
        with self._write() as db, _taken("view", view.name):
            done = db.execute(update(table).where(table.c.id == view.id), rows.view_row(view))
            if done.rowcount == 0:
                raise NotFoundError(
                    f"no view '{view.id}'", code="unknown-view", hint="see: offload views"
                )

    def delete_view(self, view_id: str) -> None:
        """Forget a view."""
        self._delete(tables.views, view_id)

    def view(self, name_or_prefix: str) -> View:
        """The view of this name, else the one whose id starts with it; NotFoundError."""
        found = self._all(
            select(tables.views).where(tables.views.c.name == name_or_prefix), rows.view_of
        )
        if found:
            return found[0]
        try:
            return self._by_prefix("view", tables.views, name_or_prefix, rows.view_of)
        except NotFoundError as error:
            if error.code == "unknown-view":
                error.hint = "list what there is with: offload views"
            raise

    def views(self) -> list[View]:
        """All, the newest last."""
        table = tables.views
        return self._all(select(table).order_by(table.c.created_at, table.c.id), rows.view_of)

    # connections

    def add_connection(self, connection: Connection) -> None:
        """Record a connection. BusyError (`connection-exists`) if its name or id is taken."""
        with self._write() as db, _taken("connection", connection.name):
            db.execute(insert(tables.connections), rows.connection_row(connection))

    def update_connection(self, connection: Connection) -> None:
        """Replace the record of a connection; NotFoundError (`unknown-connection`)."""
        table = tables.connections
        with self._write() as db, _taken("connection", connection.name):
            done = db.execute(
                update(table).where(table.c.id == connection.id), rows.connection_row(connection)
            )
            if not done.rowcount:
                raise NotFoundError(
                    f"no connection '{connection.id}'",
                    code="unknown-connection",
                    hint="see: offload connections",
                )

    def delete_connection(self, connection_id: str) -> None:
        """Forget a connection."""
        self._delete(tables.connections, connection_id)

    def connections(self) -> list[Connection]:
        """All, the oldest first."""
        table = tables.connections
        return self._all(select(table).order_by(table.c.created_at, table.c.id), rows.connection_of)

    def views_of_group(self, group: str) -> list[View]:
        """The views that mounting the group by its name made; the newest last.

        Not those of a TimeMark that somebody took, or of a backup: whoever mounted these ends them.
        """
        made = {f"timemark:{m.id}" for m in self.timemarks(group) if m.purpose == "mount"}
        return [view for view in self.views() if view.origin.partition("/")[0] in made]

    # islands

    def add_island(self, island: Island) -> None:
        """Record an island. BusyError (`island-exists`) if its name or id is taken."""
        with self._write() as db, _taken("island", island.name):
            db.execute(insert(tables.islands), rows.island_row(island))

    def update_island(self, island: Island) -> None:
        """Replace the record of an island; NotFoundError (`unknown-island`)."""
        table = tables.islands
        with self._write() as db, _taken("island", island.name):
            done = db.execute(update(table).where(table.c.id == island.id), rows.island_row(island))
            if done.rowcount == 0:
                raise NotFoundError(
                    f"no island '{island.id}'",
                    code="unknown-island",
                    hint="see: offload placeholder list",
                )

    def delete_island(self, island_id: str) -> None:
        """Forget an island."""
        self._delete(tables.islands, island_id)

    def islands(self) -> list[Island]:
        """All, the newest last."""
        table = tables.islands
        return self._all(select(table).order_by(table.c.created_at, table.c.id), rows.island_of)

    # inventories

    def set_inventory(self, inventory: Inventory) -> None:
        """What a hypervisor has now, in the place of what it had."""
        entries = inventory.entries
        table, name = tables.inventories, inventory.hypervisor
        with self._write() as db:
            db.execute(delete(table).where(table.c.hypervisor == name))  # with its entries
            fields = {"taken_at": inventory.taken_at, "tags_problem": inventory.tags_problem}
            db.execute(insert(table), {"hypervisor": name, **fields})
            if entries:
                db.execute(
                    insert(tables.inventory_entries),
                    [rows.inventory_row(name, entry) for entry in entries],
                )

    def change_inventory(self, hypervisor: str, change: InventoryChange) -> None:
        """Bring an inventory up to date; NotFoundError (`unknown-inventory`) if there is none."""
        table, head = tables.inventory_entries, tables.inventories
        entries = change.entries
        old = {*change.gone, *(entry.id for entry in entries)}
        with self._write() as db:
            newer = {"taken_at": change.at, "tags_problem": change.tags_problem}
            known = update(head).where(head.c.hypervisor == hypervisor)
            if db.execute(known, newer).rowcount == 0:
                raise NotFoundError(f"no inventory of {hypervisor}", code="unknown-inventory")
            if old:
                at = (table.c.hypervisor == hypervisor, table.c.id == bindparam("old"))
                db.execute(delete(table).where(*at), [{"old": moref} for moref in sorted(old)])
            if entries:
                db.execute(
                    insert(table), [rows.inventory_row(hypervisor, entry) for entry in entries]
                )

    def inventory(self, hypervisor: str) -> Inventory | None:
        """What a hypervisor had when it was last asked, by name; None if it never was."""
        head, table = tables.inventories, tables.inventory_entries
        heads = self._all(select(head).where(head.c.hypervisor == hypervisor), dict)
        query = select(table).where(table.c.hypervisor == hypervisor)
        found = self._all(query.order_by(table.c.name, table.c.id), rows.inventory_entry_of)
        if not heads:
            return None
        return Inventory(
            hypervisor=hypervisor,
            taken_at=heads[0]["taken_at"],
            tags_problem=heads[0]["tags_problem"],
            **by_kind(found),
        )

    # backups

    def add_backup(self, backup: Backup) -> None:
        """Record a backup, or replace the record that has its id."""
        with self._write() as db:
            _upsert_backup(db, backup)

    def backup(self, prefix: str) -> Backup:
        """The one whose id starts with `prefix`; NotFoundError for none and for several."""
        return self._by_prefix("backup", tables.backups, prefix, rows.backup_of)

    def backups(self, store: str | None = None, group: str | None = None) -> list[Backup]:
        """All, or those of a store, a group, or both; the oldest point in time first."""
        table = tables.backups
        query = select(table).order_by(table.c.created_at, table.c.finished_at, table.c.id)
        if store is not None:
            query = query.where(table.c.store == store)
        if group is not None:
            query = query.where(table.c.group_name == group)
        return self._all(query, rows.backup_of)

    def delete_backup(self, backup_id: str) -> None:
        """Forget a backup, its verifications, and the parent links to it."""
        self._delete(tables.backups, backup_id)

    def replace_backups(self, store: str, backups: Sequence[Backup]) -> None:
        """Make `backups` all that is known of a store, at once.

        Those that stay keep their verifications and parent links.
        """
        table = tables.backups
        kept = {backup.id for backup in backups}
        with self._write() as db:
            known = db.execute(select(table.c.id).where(table.c.store == store)).scalars().all()
            gone = [{"gone": i} for i in known if i not in kept]
            if gone:
                db.execute(delete(table).where(table.c.id == bindparam("gone")), gone)
            for backup in backups:
                _upsert_backup(db, backup)

    # parents of incrementals

    def set_parent(self, store: str, volume: str, timemark_id: str, backup_id: str) -> None:
        """Note what the next incremental of `volume` to `store` is compared with.

        Replaces an earlier link. NotFoundError (`unknown-parent`) if the TimeMark or the backup is
        not in the catalog.
        """
        table = tables.parents
        with self._write() as db:
            db.execute(delete(table).where(table.c.store == store, table.c.volume == volume))
            try:
                db.execute(
                    insert(table),
                    {
                        "store": store,
                        "volume": volume,
                        "timemark": timemark_id,
                        "backup": backup_id,
                    },
                )
            except ConstraintError as error:
                raise NotFoundError(
                    f"no TimeMark '{timemark_id}' or no backup '{backup_id}' in the catalog",
                    code="unknown-parent",
                    hint="record both before the link between them",
                ) from error

    def parent(self, store: str, volume: str) -> ParentLink | None:
        """The link of one volume, or None."""
        table = tables.parents
        query = select(table).where(table.c.store == store, table.c.volume == volume)
        return next(iter(self._all(query, _link)), None)

    def parents(self) -> list[ParentLink]:
        """All links, by store and volume."""
        table = tables.parents
        return self._all(select(table).order_by(table.c.store, table.c.volume), _link)

    def drop_parents(self, timemark_id: str) -> None:
        """Forget all links to a TimeMark. Idempotent."""
        table = tables.parents
        with self._write() as db:
            db.execute(delete(table).where(table.c.timemark == timemark_id))

    # legal holds

    def set_holds(self, store: str, holds: Sequence[LegalHold]) -> None:
        """Make `holds` all that is known of a store's legal holds, at once.

        Those on backups that are not in the catalog are left out.
        """
        table, backups = tables.legal_holds, tables.backups
        with self._write() as db:
            mine = set(db.execute(select(backups.c.id).where(backups.c.store == store)).scalars())
            db.execute(
                delete(table).where(
                    table.c.backup.in_(select(backups.c.id).where(backups.c.store == store))
                )
            )
            for hold in holds:
                if hold.backup in mine:
                    db.execute(insert(table), rows.hold_row(hold))

    def drop_hold(self, backup_id: str) -> None:
        """Forget the legal hold on a backup."""
        with self._write() as db:
            db.execute(delete(tables.legal_holds).where(tables.legal_holds.c.backup == backup_id))

    def holds(self) -> dict[BackupId, LegalHold]:
        """All legal holds that are known, by backup."""
        found = self._all(select(tables.legal_holds), rows.hold_of)
        return {hold.backup: hold for hold in found}

    # verifications

    def note_verified(self, backup_id: str, at: datetime, how: str, problems: int) -> None:
        """Note that a backup was read and checked, and how many problems that showed.

        `how`: what was read, for people. NotFoundError (`unknown-backup`).
        """
        with self._write() as db:
            try:
                db.execute(
                    insert(tables.verifications),
                    {"backup": backup_id, "at": at, "how": how, "problems": problems},
                )
            except ConstraintError as error:
                raise NotFoundError(
                    f"no backup '{backup_id}' in the catalog",
                    code="unknown-backup",
                    hint="list what there is with: offload backup list",
                ) from error

    def last_verified(self, backup_id: str) -> Verification | None:
        """The latest verification of a backup, or None."""
        table = tables.verifications
        query = (
            select(table.c.backup, table.c.at, table.c.how, table.c.problems)
            .where(table.c.backup == backup_id)
            .order_by(table.c.at.desc(), table.c.id.desc())
            .limit(1)
        )
        return next(iter(self._all(query, _verification)), None)

    def verifications(self) -> dict[str, Verification]:
        """The latest verification of each backup that has one."""
        table = tables.verifications
        newest = select(func.max(table.c.id)).group_by(table.c.backup)
        query = select(table.c.backup, table.c.at, table.c.how, table.c.problems).where(
            table.c.id.in_(newest)
        )
        return {found.backup: found for found in self._all(query, _verification)}

    @contextmanager
    def _write(self) -> Iterator[Database]:
        with translated(self.path), self._writing.begin() as db:
            yield db

    def _all(
        self, query: Select[tuple[object, ...]], made: Callable[[Row], _Value]
    ) -> list[_Value]:
        with translated(self.path), self._engine.connect() as db:
            found = [dict(row) for row in db.execute(query).mappings()]
        try:
            return [made(row) for row in found]
        except (OffloadError, LookupError, TypeError, ValueError) as error:
            raise corrupt(self.path, f"a row that cannot be read ({error})") from error

    def _by_prefix(
        self, kind: str, table: Table, prefix: str, made: Callable[[Row], _Value]
    ) -> _Value:
        with translated(self.path), self._engine.connect() as db:
            ids = db.execute(
                select(table.c.id).where(table.c.id.startswith(prefix, autoescape=True))
            )
            wanted = match_prefix(kind, prefix, ids.scalars())
        found = self._all(select(table).where(table.c.id == wanted), made)
        if not found:  # deleted by another process between the two statements
            raise NotFoundError(f"no {kind} '{prefix}'", code=f"unknown-{kind}")
        return found[0]

    def _delete(self, table: Table, wanted: str) -> None:
        with self._write() as db:
            db.execute(delete(table).where(table.c.id == wanted))


def _upsert_backup(db: Database, backup: Backup) -> None:
    """Never delete and insert: that would take parent links and verifications along."""
    table = tables.backups
    row = rows.backup_row(backup)
    if db.execute(update(table).where(table.c.id == backup.id), row).rowcount == 0:
        db.execute(insert(table), row)


def _link(row: Row) -> ParentLink:
    return ParentLink(**row)


def _verification(row: Row) -> Verification:
    return Verification(**row)


@contextmanager
def _taken(kind: str, name: str) -> Iterator[None]:
    try:
        yield
    except ConstraintError as error:
        raise BusyError(
            f"there is {'an' if kind == 'island' else 'a'} {kind} '{name}' already",
            code=f"{kind}-exists",
            hint="choose another name" if kind == "view" else "",
        ) from error
