"""The catalog: what goes in comes out, and nothing else."""

from __future__ import annotations

import multiprocessing
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.catalog import schema
from offload.catalog.store import Catalog, ParentLink
from offload.errors import BusyError, IntegrityError, NotFoundError, UnavailableError
from offload.ids import new_id
from offload.model import (
    Backup,
    BackupId,
    BackupSource,
    Connection,
    ConnectionId,
    ConnectionKind,
    Consistency,
    ImageRecord,
    Instant,
    Qcow2Source,
    QuiesceReport,
    RawSource,
    Snapshot,
    Source,
    TimeMark,
    TimeMarkId,
    View,
    ViewId,
    ViewState,
)

NOON = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog.open(tmp_path / "catalog.db")
    yield opened
    opened.close()


def a_timemark(mark_id: str = "mark1", *, group: str = "shop", at: datetime = NOON) -> TimeMark:
    return TimeMark(
        id=TimeMarkId(mark_id),
        group=group,
        created_at=at,
        snapshots=(
            Snapshot(
                volume="db",
                provider="reflink",
                ref={"path": "/pool/.offload/x"},
                size_bytes=1 << 40,
                sector_size=4096,
                identity="ino:1",
            ),
        ),
        consistency=Consistency.FILESYSTEM,
        instant=Instant.HELD,
        freeze_ms=12.5,
    )


def a_backup(
    backup_id: str = "back1", *, store: str = "main", group: str = "shop", at: datetime = NOON
) -> Backup:
    return Backup(
        id=BackupId(backup_id),
        store=store,
        group=group,
        created_at=at,
        finished_at=at + timedelta(minutes=3),
        timemark="mark1",
        consistency=Consistency.CRASH,
        instant=Instant.ONE,
        images=(
            ImageRecord(volume="db", size_bytes=5, sector_size=512, identity="i", root="00" * 32),
        ),
    )


def a_view(view_id: str = "view1", name: str = "shop-db") -> View:
    return View(
        id=ViewId(view_id),
        name=name,
        origin="timemark:mark1/db",
        target="nbd",
        uri="nbd+unix:///?socket=/run/x",
        writable=False,
        size_bytes=4096,
        sector_size=512,
        created_at=NOON,
        source=RawSource(path=Path("/pool/x"), size_bytes=4096),
        server={"pid": "12"},
    )


_text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
_bytes = st.integers(0, 2**62)
_sectors = st.sampled_from([512, 4096])
_times = st.datetimes(
    datetime(1990, 1, 1),  # noqa: DTZ001 - the zone comes from the next argument
    datetime(2100, 1, 1),  # noqa: DTZ001
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=-9)), timezone(timedelta(hours=5.5))]),
)
_path = st.builds(lambda name: Path("/") / "d" / name.replace("/", "_"), _text)
_refs = st.dictionaries(_text, _text, max_size=4)
_tuples = st.lists(_text, max_size=3).map(tuple)
_ms = st.floats(0, 1e9, allow_nan=False)

_snapshots = st.builds(
    Snapshot, volume=_text, provider=_text, ref=_refs, size_bytes=_bytes, sector_size=_sectors,
    identity=_text,
)  # fmt: skip
_reports = st.builds(
    QuiesceReport, name=_text, kind=_text, volumes=_tuples, frozen=st.booleans(),
    consistency=st.sampled_from(Consistency), freeze_ms=_ms, held_ms=_ms, detail=_text,
)  # fmt: skip
_timemarks = st.builds(
    TimeMark, id=st.builds(new_id).map(TimeMarkId), group=_text, created_at=_times,
    snapshots=st.lists(_snapshots, max_size=3).map(tuple),
    consistency=st.sampled_from(Consistency), instant=st.sampled_from(Instant), freeze_ms=_ms,
    purpose=_text, keep=st.booleans(), reports=st.lists(_reports, max_size=3).map(tuple),
    warnings=_tuples,
)  # fmt: skip
_sources: st.SearchStrategy[Source] = st.one_of(
    st.builds(RawSource, path=_path, size_bytes=_bytes, sector_size=_sectors),
    st.builds(Qcow2Source, path=_path, size_bytes=_bytes, snapshot=st.none() | _text),
    st.builds(
        BackupSource,
        store=_text,
        backup=_text,
        volume=_text,
        size_bytes=_bytes,
        cache_dir=_path,
    ),
)
_views = st.builds(
    View, id=st.builds(new_id).map(ViewId), name=st.builds(new_id), origin=_text, target=_text,
    uri=_text, writable=st.booleans(), size_bytes=_bytes, sector_size=_sectors, created_at=_times,
    source=_sources, state=st.sampled_from(ViewState), server=_refs,
)  # fmt: skip
_images = st.builds(
    ImageRecord, volume=_text, size_bytes=_bytes, sector_size=_sectors, identity=_text, root=_text,
    read_bytes=_bytes, stored_bytes=_bytes, mode=_text, reason=_text,
)  # fmt: skip
_backups = st.builds(
    Backup, id=st.builds(new_id).map(BackupId), store=_text, group=_text, created_at=_times,
    finished_at=_times, timemark=_text, consistency=st.sampled_from(Consistency),
    instant=st.sampled_from(Instant), images=st.lists(_images, max_size=3).map(tuple),
    parent=st.none() | _text, host=_text, alarms=_tuples,
)  # fmt: skip

_one_catalog = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_one_catalog
@given(timemark=_timemarks)
def test_timemark_any_value_comes_back_equal(catalog: Catalog, timemark: TimeMark) -> None:
    catalog.add_timemark(timemark)
    back = catalog.timemark(timemark.id)
    assert back == timemark
    assert back.created_at.tzinfo is UTC


@_one_catalog
@given(view=_views)
def test_view_any_value_comes_back_equal(catalog: Catalog, view: View) -> None:
    catalog.add_view(view)
    assert catalog.view(view.name) == view
    assert catalog.view(view.id) == view


@_one_catalog
@given(backup=_backups)
def test_backup_any_value_comes_back_equal(catalog: Catalog, backup: Backup) -> None:
    catalog.add_backup(backup)
    assert catalog.backup(backup.id) == backup


def test_timemark_time_without_zone_is_refused(catalog: Catalog) -> None:
    naive = replace(a_timemark(), created_at=datetime(2026, 1, 1))  # noqa: DTZ001 - the point
    with pytest.raises(Exception, match="without a zone"):
        catalog.add_timemark(naive)
    assert catalog.timemarks() == []


def test_timemarks_of_a_group_newest_last(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark("new", at=NOON + timedelta(days=1)))
    catalog.add_timemark(a_timemark("old"))
    catalog.add_timemark(a_timemark("other", group="web", at=NOON + timedelta(hours=1)))
    assert [t.id for t in catalog.timemarks("shop")] == ["old", "new"]
    assert [t.id for t in catalog.timemarks()] == ["old", "other", "new"]


def test_timemark_prefix_ambiguous_names_both(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark("mark1"))
    catalog.add_timemark(a_timemark("mark2"))
    assert catalog.timemark("mark1").id == "mark1"
    with pytest.raises(NotFoundError, match="mark1, mark2") as caught:
        catalog.timemark("mar")
    assert caught.value.code == "ambiguous-timemark"


@pytest.mark.parametrize("prefix", ["", "%", "_ark1", "MARK1", "zzz"])
def test_timemark_prefix_of_none_is_not_found(catalog: Catalog, prefix: str) -> None:
    catalog.add_timemark(a_timemark("mark1"))
    with pytest.raises(NotFoundError) as caught:
        catalog.timemark(prefix)
    assert caught.value.code == "unknown-timemark"


def test_timemark_same_id_twice_is_refused(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark())
    with pytest.raises(BusyError) as caught:
        catalog.add_timemark(a_timemark())
    assert caught.value.code == "timemark-exists"


def test_delete_twice_is_success(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark())
    catalog.add_view(a_view())
    catalog.add_backup(a_backup())
    for _ in range(2):
        catalog.delete_timemark("mark1")
        catalog.delete_view("view1")
        catalog.delete_backup("back1")
    assert (catalog.timemarks(), catalog.views(), catalog.backups()) == ([], [], [])


def test_view_name_taken_is_refused(catalog: Catalog) -> None:
    catalog.add_view(a_view("view1", "same"))
    with pytest.raises(BusyError) as caught:
        catalog.add_view(a_view("view2", "same"))
    assert caught.value.code == "view-exists"
    assert [v.id for v in catalog.views()] == ["view1"]


def test_view_name_wins_over_id_prefix_of_another(catalog: Catalog) -> None:
    catalog.add_view(a_view("abc123", "first"))
    catalog.add_view(a_view("zzz999", "abc"))
    assert catalog.view("abc").id == "zzz999"
    assert catalog.view("abc1").id == "abc123"


def test_view_unknown_hint_names_the_command_that_lists(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError) as caught:
        catalog.view("nope")
    assert caught.value.hint.endswith("offload views")


def test_views_of_group_are_those_that_mounting_it_made(catalog: Catalog) -> None:
    for mark, group, purpose in (
        ("mark1", "shop", "mount"), ("mark2", "shop", "user"), ("mark3", "web", "mount"),
    ):  # fmt: skip
        catalog.add_timemark(replace(a_timemark(mark, group=group), purpose=purpose))
        catalog.add_view(replace(a_view(f"view{mark}", f"n{mark}"), origin=f"timemark:{mark}/db"))
    catalog.add_backup(a_backup("back1"))
    catalog.add_view(replace(a_view("viewb", "nb"), origin="backup:back1/db"))
    assert [view.name for view in catalog.views_of_group("shop")] == ["nmark1"]
    assert catalog.views_of_group("nosuch") == []


def test_update_view_changes_state_and_server(catalog: Catalog) -> None:
    catalog.add_view(a_view())
    changed = replace(a_view(), state=ViewState.CLOSING, server={"pid": "99"})
    catalog.update_view(changed)
    assert catalog.views() == [changed]
    with pytest.raises(NotFoundError):
        catalog.update_view(a_view("other", "other"))


def a_connection(connection_id: str = "conn1", name: str = "inspect") -> Connection:
    return Connection(
        id=ConnectionId(connection_id),
        name=name,
        view="view1",
        uri="nbd+unix:///?socket=/run/offload/nbd.sock",
        kind=ConnectionKind.NBD,
        read_only=True,
        size_bytes=1 << 40,
        sector_size=4096,
        created_at=NOON,
        device="/dev/nbd1000",
        record={"identifier": "offload-x"},
    )


@_one_catalog
@given(
    st.builds(
        Connection,
        id=st.builds(new_id).map(ConnectionId),
        name=st.builds(new_id),
        view=_text,
        uri=_text,
        kind=st.sampled_from(ConnectionKind),
        read_only=st.booleans(),
        size_bytes=_bytes,
        sector_size=_sectors,
        created_at=_times,
        device=_text,
        record=_refs,
    )
)
def test_connection_any_value_comes_back_equal(catalog: Catalog, connection: Connection) -> None:
    catalog.add_connection(connection)
    assert connection in catalog.connections()
    catalog.delete_connection(connection.id)
    assert connection not in catalog.connections()


def test_connections_oldest_first(catalog: Catalog) -> None:
    catalog.add_connection(a_connection("conn2", "two"))
    older = replace(a_connection("conn1", "one"), created_at=NOON - timedelta(days=1))
    catalog.add_connection(older)
    assert [connection.name for connection in catalog.connections()] == ["one", "two"]


def test_connection_name_or_id_taken_is_refused(catalog: Catalog) -> None:
    catalog.add_connection(a_connection("conn1", "same"))
    for other in (a_connection("conn2", "same"), a_connection("conn1", "other")):
        with pytest.raises(BusyError) as caught:
            catalog.add_connection(other)
        assert caught.value.code == "connection-exists"
    assert [connection.id for connection in catalog.connections()] == ["conn1"]


def test_update_connection_changes_its_device(catalog: Catalog) -> None:
    catalog.add_connection(a_connection())
    changed = replace(a_connection(), device="/dev/nbd1001", record={"identifier": "offload-y"})
    catalog.update_connection(changed)
    assert catalog.connections() == [changed]
    with pytest.raises(NotFoundError) as caught:
        catalog.update_connection(a_connection("other", "other"))
    assert caught.value.code == "unknown-connection"
    assert caught.value.hint.endswith("offload connections")


def test_delete_connection_twice_is_success_and_leaves_others(catalog: Catalog) -> None:
    catalog.add_connection(a_connection("conn1", "one"))
    catalog.add_connection(a_connection("conn2", "two"))
    for _ in range(2):
        catalog.delete_connection("conn1")
    assert [connection.name for connection in catalog.connections()] == ["two"]


def test_backups_filters_oldest_first(catalog: Catalog) -> None:
    catalog.add_backup(a_backup("b2", at=NOON + timedelta(days=1)))
    catalog.add_backup(a_backup("b1"))
    catalog.add_backup(a_backup("b3", store="other"))
    catalog.add_backup(a_backup("b4", group="web"))
    assert [b.id for b in catalog.backups(store="main", group="shop")] == ["b1", "b2"]
    assert [b.id for b in catalog.backups(store="other")] == ["b3"]
    assert len(catalog.backups()) == 4


def test_replace_backups_keeps_other_stores_and_what_hangs_on_those_that_stay(
    catalog: Catalog,
) -> None:
    catalog.add_timemark(a_timemark())
    for name, store in (("stays", "main"), ("goes", "main"), ("else", "other")):
        catalog.add_backup(a_backup(name, store=store))
    catalog.set_parent("main", "db", "mark1", "stays")
    catalog.note_verified("stays", NOON, "all", 0)
    catalog.note_verified("goes", NOON, "all", 0)
    changed = replace(a_backup("stays"), alarms=("noticed",))
    catalog.replace_backups("main", [changed, a_backup("fresh")])
    assert {b.id for b in catalog.backups(store="main")} == {"stays", "fresh"}
    assert catalog.backup("stays") == changed
    assert [b.id for b in catalog.backups(store="other")] == ["else"]
    assert catalog.parent("main", "db") is not None
    assert catalog.last_verified("stays") is not None
    assert catalog.last_verified("goes") is None


def test_parent_link_goes_with_its_backup_and_with_its_timemark(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark("mark1"))
    catalog.add_timemark(a_timemark("mark2"))
    catalog.add_backup(a_backup("back1"))
    catalog.add_backup(a_backup("back2", store="other"))
    catalog.set_parent("main", "db", "mark1", "back1")
    catalog.set_parent("main", "db", "mark2", "back1")  # replaces
    catalog.set_parent("other", "db", "mark1", "back2")
    first = ParentLink(store="main", volume="db", timemark="mark2", backup="back1")
    assert catalog.parent("main", "db") == first
    assert len(catalog.parents()) == 2
    catalog.delete_backup("back1")
    assert [link.store for link in catalog.parents()] == ["other"]
    catalog.delete_timemark("mark1")
    assert catalog.parents() == []


def test_drop_parents_forgets_only_links_to_that_timemark(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark("mark1"))
    catalog.add_timemark(a_timemark("mark2"))
    catalog.add_backup(a_backup())
    catalog.set_parent("main", "db", "mark1", "back1")
    catalog.set_parent("main", "web", "mark2", "back1")
    catalog.drop_parents("mark1")
    catalog.drop_parents("mark1")
    assert [link.volume for link in catalog.parents()] == ["web"]


def test_set_parent_of_unknown_backup_is_refused_and_keeps_the_old_link(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark())
    catalog.add_backup(a_backup())
    catalog.set_parent("main", "db", "mark1", "back1")
    with pytest.raises(NotFoundError) as caught:
        catalog.set_parent("main", "db", "mark1", "nope")
    assert caught.value.code == "unknown-parent"
    link = catalog.parent("main", "db")
    assert link is not None
    assert link.backup == "back1"


def test_last_verified_is_the_latest(catalog: Catalog) -> None:
    catalog.add_backup(a_backup())
    assert catalog.last_verified("back1") is None
    catalog.note_verified("back1", NOON + timedelta(days=1), "5%", 2)
    catalog.note_verified("back1", NOON, "all", 0)
    last = catalog.last_verified("back1")
    assert last is not None
    assert (last.how, last.problems, last.at) == ("5%", 2, NOON + timedelta(days=1))
    with pytest.raises(NotFoundError):
        catalog.note_verified("nope", NOON, "all", 0)


def test_open_makes_a_private_durable_database(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    Catalog.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    opened = Catalog.open(path)
    with opened._engine.connect() as db:
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL, sqlite.org/pragma
        assert db.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert db.exec_driver_sql("PRAGMA busy_timeout").scalar() == 10_000
    opened.close()


@pytest.mark.parametrize(("at", "end"), [(0, 4096), (4096, None), (100, 4096)])
def test_open_or_read_damaged_file_says_how_to_rebuild(
    tmp_path: Path, at: int, end: int | None
) -> None:
    path = tmp_path / "catalog.db"
    opened = Catalog.open(path)
    opened.add_timemark(a_timemark())
    opened.close()
    raw = bytearray(path.read_bytes())
    raw[at:end] = b"\xa5" * len(raw[at:end])
    path.write_bytes(raw)
    with pytest.raises(IntegrityError) as caught:
        _read_everything(path)
    assert caught.value.code == "catalog-corrupt"
    assert "--rebuild-catalog" in caught.value.hint


def _read_everything(path: Path) -> None:
    opened = Catalog.open(path)
    try:
        opened.timemarks()
        opened.views()
        opened.backups()
    finally:
        opened.close()


def test_read_row_of_unknown_shape_is_integrity_error(catalog: Catalog) -> None:
    catalog.add_timemark(a_timemark())
    with sqlite3.connect(catalog.path) as raw:
        raw.execute("UPDATE timemarks SET consistency = 'perfect'")
    with pytest.raises(IntegrityError, match="perfect"):
        catalog.timemarks()


def test_open_state_folder_missing_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="No such file"):
        Catalog.open(tmp_path / "gone" / "catalog.db")


def test_write_while_another_process_holds_the_lock_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_BUSY_TIMEOUT_S", 0.05)
    opened = Catalog.open(tmp_path / "catalog.db")
    other = sqlite3.connect(opened.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(BusyError) as caught:
            opened.add_timemark(a_timemark())
        assert opened.timemarks() == []  # readers go on
    finally:
        other.close()
    assert caught.value.code == "catalog-busy"
    opened.add_timemark(a_timemark())
    opened.close()


def _open_and_add(path: Path, name: str, gate: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    opened = Catalog.open(path)
    for number in range(10):
        opened.add_timemark(a_timemark(f"{name}{number}"))
    opened.close()


def test_open_first_time_by_several_processes_at_once_is_safe(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    path = tmp_path / "catalog.db"
    workers = [context.Process(target=_open_and_add, args=(path, n, gate)) for n in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    opened = Catalog.open(path)
    assert len(opened.timemarks()) == 30
    opened.close()
