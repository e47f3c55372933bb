"""The migrations make what the code expects."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, create_mock_engine

from offload.catalog import schema
from offload.catalog.store import Catalog
from offload.catalog.tables import metadata
from offload.errors import IntegrityError, UnavailableError


def test_head_equals_the_newest_script() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema._MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == schema.HEAD


def migrated(path: Path, revision: str) -> Engine:
    """A catalog that the migrations have made, up to one of them."""
    engine = create_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(schema._MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    return engine


def described(engine: Engine) -> dict[str, list[object]]:
    """Columns, keys and indexes of all tables, as SQLite tells them; not the defaults that some
    migrations give columns for the sake of older rows: the code names all columns."""
    found: dict[str, list[object]] = {}
    with engine.connect() as link:
        ask = link.exec_driver_sql
        tables = ask("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        for (table,) in tables.all():
            indexes = [tuple(row)[1:] for row in ask(f"PRAGMA index_list({table})").all()]
            found[table] = [
                *sorted(tuple(row)[1:4] for row in ask(f"PRAGMA table_info({table})").all()),
                *sorted(str(tuple(row)[2:]) for row in ask(f"PRAGMA foreign_key_list({table})")),
                *sorted(
                    ("" if name.startswith("sqlite_") else name, unique, *_columns(link, name))
                    for name, unique, *_ in indexes
                ),
            ]
    engine.dispose()
    return found


def _columns(link: Connection, index: str) -> list[str]:
    return [row[2] for row in link.exec_driver_sql(f"PRAGMA index_info({index})")]


def test_fresh_catalog_is_what_all_migrations_make(tmp_path: Path) -> None:
    fresh = described(schema.open_engine(tmp_path / "fresh.db"))
    assert described(migrated(tmp_path / "old.db", schema.HEAD)) == fresh
    assert {"views", "backups", "alembic_version"} <= fresh.keys()


def test_migrations_from_the_first_on_make_the_tables_of_the_code(tmp_path: Path) -> None:
    migrated(tmp_path / "catalog.db", "0001").dispose()
    engine = schema.open_engine(tmp_path / "catalog.db")
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), metadata)
        keys = connection.exec_driver_sql("PRAGMA foreign_key_list(parents)").all()
    engine.dispose()
    assert found == []
    assert {(key[2], key[3], key[6]) for key in keys} == {
        ("timemarks", "timemark", "CASCADE"),
        ("backups", "backup", "CASCADE"),
    }


def test_tables_have_ddl_for_postgresql() -> None:
    statements: list[str] = []
    engine = create_mock_engine(
        "postgresql+psycopg2://", lambda sql, *_a, **_k: statements.append(str(sql))
    )
    metadata.create_all(engine, checkfirst=False)
    assert sum("CREATE TABLE" in sql for sql in statements) == len(metadata.tables)


def test_open_fresh_or_up_to_date_database_imports_no_alembic(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    code = (
        "import sys; from pathlib import Path; from offload.catalog.store import Catalog\n"
        f"Catalog.open(Path({str(path)!r})).close()\n"
        * 2
        + "sys.exit('alembic' in sys.modules or 'sqlalchemy.orm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


def test_open_newer_schema_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    Catalog.open(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UnavailableError) as caught:
        Catalog.open(path)
    assert caught.value.code == "catalog-newer"
    assert "9999" in caught.value.message
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_open_database_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE views (x)")
    with pytest.raises(IntegrityError):
        Catalog.open(path)
    with sqlite3.connect(path) as raw:
        names = raw.execute("SELECT name FROM sqlite_master").fetchall()
    assert names == [("views",)]


def test_open_after_a_migration_that_failed_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog.db"
    migrated(path, "0001").dispose()

    def fails_late(config: Config, revision: str) -> None:
        config.attributes["connection"].exec_driver_sql("CREATE TABLE connections (x)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", fails_late)
        with pytest.raises(KeyboardInterrupt):
            Catalog.open(path)
    opened = Catalog.open(path)
    assert opened.connections() == []
    opened.close()


def test_wheel_holds_what_is_read_at_run_time(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    code = (
        "import os; from hatchling.builders.wheel import WheelBuilder\n"
        f"[print(x) for x in WheelBuilder({str(root)!r}).build(directory={str(tmp_path)!r})]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "offload/catalog/migrations/env.py" in names
    assert "offload/cli/offload.toml.example" in names
    assert "offload/catalog/migrations/versions/v0001_catalog.py" in names
