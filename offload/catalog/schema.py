"""Opening the database of the catalog and bringing its schema up to date."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc

from offload.catalog.tables import metadata
from offload.errors import BusyError, IntegrityError, OffloadError, UnavailableError
from offload.filelock import alone

HEAD = "0005"  # the newest migration; a test compares it with the scripts

_BUSY_TIMEOUT_S = 10.0
_MIGRATIONS = Path(__file__).parent / "migrations"
_WRITE = "offload_write"
_VERSION_TABLE = """CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
)"""


def open_engine(path: Path) -> Engine:
    """The engine of the SQLite database at `path`, made (0600) if missing, schema up to date.

    Raises IntegrityError (`catalog-corrupt`), UnavailableError (`catalog-newer`,
    `catalog-unavailable`), BusyError (`catalog-busy`).
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UnavailableError(
            f"cannot open the catalog {path}: {error.strerror}", code="catalog-unavailable"
        ) from error
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": _BUSY_TIMEOUT_S}
    )
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    try:
        with translated(path):
            if _version(engine) != HEAD:
                _migrate(engine, path)
    except BaseException:
        engine.dispose()
        raise
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine, whose transactions take the write lock at once.

    A transaction that reads first and then writes would fail with "locked" at the write, without
    any waiting, when another process has written in between.
    """
    return engine.execution_options(**{_WRITE: True})


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGINs would leave DDL outside
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _on_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _version(engine: Engine) -> str | None:
    """The migration that the database is at; None for an empty one."""
    with engine.connect() as connection:
        try:
            row = connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
        except exc.OperationalError as error:
            if "no such table" not in str(error.orig):
                raise
            return None
    return None if row is None else str(row[0])


def _migrate(engine: Engine, path: Path) -> None:
    """Make the tables, or run the missing migrations, in one transaction, alone."""
    with alone(path.with_name(f"{path.name}.lock")):
        found = _version(engine)
        if found == HEAD:  # another process was faster
            return
        # The change to WAL ignores the busy timeout, so it belongs under this lock.
        with engine.connect() as connection:
            raw: Any = connection.connection.driver_connection
            connection.rollback()
            raw.execute("PRAGMA journal_mode=WAL")
        if found is None:
            _make(engine)
        else:
            _upgrade(engine, path, found)


def _make(engine: Engine) -> None:
    """The newest tables at once: what all migrations make, a test says so."""
    with writing(engine).begin() as connection:
        metadata.create_all(connection, checkfirst=False)  # fails where tables are
        connection.exec_driver_sql(_VERSION_TABLE)
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (HEAD,))


def _upgrade(engine: Engine, path: Path, found: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    try:
        ScriptDirectory.from_config(config).get_revision(found)
    except CommandError as error:
        raise UnavailableError(
            f"the catalog {path} is of a newer version of offload (schema {found})",
            code="catalog-newer",
            hint="use the version of offload that wrote it, or a newer one",
        ) from error
    with writing(engine).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Errors of the database, in the project's families."""
    try:
        yield
    except exc.DBAPIError as error:
        raise _translate(path, error) from error


def _translate(path: Path, error: exc.DBAPIError) -> OffloadError:
    # primary result codes: sqlite3.h; the driver gives extended ones, whose low byte is the primary
    code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BusyError(
            f"the catalog {path} is held by another process",
            code="catalog-busy",
            hint="try again when the other offload command has ended",
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        return corrupt(path, str(error.orig))
    return UnavailableError(
        f"cannot use the catalog {path}: {error.orig}",
        code="no-space" if code == sqlite3.SQLITE_FULL else "catalog-unavailable",
        hint="make room on its file system"
        if code == sqlite3.SQLITE_FULL
        else "check the state folder's owner, mode and disk",
    )


def corrupt(path: Path, why: str) -> IntegrityError:
    """The error for a catalog that is not what it must be."""
    return IntegrityError(
        f"the catalog {path} is damaged: {why}",
        code="catalog-corrupt",
        hint=f"move {path} away (with its -wal and -shm), then make it again from each store: "
        "offload store check NAME --rebuild-catalog",
    )
