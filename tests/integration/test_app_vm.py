"""A VM's applications and file system together: real databases on a volume in a reflink pool."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload import run
from offload.errors import OffloadError
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.model import Consistency, TimeMark
from offload.services import director
from offload.services.context import Context, open_context
from offload.services.director import CreateOptions
from offload.testing.daemon import open_folder
from offload.testing.mariadb import RunningMariadb, running_mariadb
from offload.testing.pools import mounted
from offload.testing.warm import warm_python

pytestmark = pytest.mark.needs_root

WRONG = "wrong-and-secret"
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[volumes.db]
provider = "reflink"
path = "{pool}/db.raw"
[groups.shop]
volumes = ["db"]
deadline_s = 30
[vms.shop]
volumes = ["db"]
freeze = {{ kind = "local", mounts = ["{disk}"] }}
[[vms.shop.applications]]
kind = "script"
name = "queue"
command = ["{folder}/queue"]
[[vms.shop.applications]]
kind = "mysql"
host = "{host}"
port = {port}
user = "{user}"
{password}
[[vms.shop.applications]]
kind = "sqlite"
path = "{disk}/shop.db"
"""


@dataclass(frozen=True)
class Site:
    """A volume in a pool with reflinks, its file system mounted, databases on it."""

    folder: Path
    pool: Path
    disk: Path
    server: RunningMariadb

    @contextmanager
    def open(self, *, wrong_password: bool = False) -> Iterator[Context]:
        place = {"host": str(self.server.socket), "user": "root", "password": ""}
        if wrong_password:
            secret = self.folder / "secret"
            secret.write_text(WRONG)
            secret.chmod(0o600)
            line = f'password_file = "{secret}"'
            place = {"host": "127.0.0.1", "user": "offload", "password": line}
        path = self.folder / "offload.toml"
        values = {"folder": self.folder, "pool": self.pool, "disk": self.disk}
        path.write_text(CONFIG.format(**values, **place, port=self.server.port))
        path.chmod(0o600)
        with open_context(path) as ctx:
            yield ctx

    def script(self) -> str:
        log = self.folder / "queue.log"
        return log.read_text() if log.exists() else ""


@pytest.fixture
def site(xfs_pool: Path, tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        folder = stack.enter_context(open_folder())
        volume, disk = xfs_pool / "db.raw", folder / "disk"
        run.run(["truncate", "-s", "400M", str(volume)])
        run.run(["mkfs.ext4", "-q", str(volume)])
        disk.mkdir()
        stack.enter_context(mounted(volume, disk))
        server = stack.enter_context(running_mariadb(disk / "mysql", folder / "m"))
        server.execute("CREATE DATABASE shop")
        server.execute("CREATE TABLE shop.t (i INT PRIMARY KEY)")
        server.execute("CREATE USER offload@'127.0.0.1' IDENTIFIED BY 'right'")
        server.execute("GRANT RELOAD ON *.* TO offload@'127.0.0.1'")
        with sqlite3.connect(disk / "shop.db") as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE t (i INTEGER PRIMARY KEY)")
        db.close()
        script = tmp_path / "queue"
        script.write_text('#!/bin/sh\necho "$1" >>"${0%/*}/queue.log"\n')
        script.chmod(0o755)
        yield Site(tmp_path, xfs_pool, disk, server)


class Writers:
    """Count into MariaDB and into SQLite; the lists have the last acknowledged of each."""

    def __init__(self, site: Site) -> None:
        self.last = {"mysql": -1, "sqlite": -1}
        self._site = site
        self._stop = False
        self._threads = [threading.Thread(target=work) for work in (self._mysql, self._sqlite)]
        for thread in self._threads:
            thread.start()

    def _mysql(self) -> None:
        with self._site.server.connect() as connection, connection.cursor() as cursor:
            while not self._stop:
                cursor.execute("INSERT INTO shop.t VALUES (%s)", [self.last["mysql"] + 1])
                self.last["mysql"] += 1

    def _sqlite(self) -> None:
        db = sqlite3.connect(self._site.disk / "shop.db", isolation_level=None, timeout=60)
        while not self._stop:
            db.execute("INSERT INTO t VALUES (?)", [self.last["sqlite"] + 1])
            self.last["sqlite"] += 1
        db.close()

    def reach(self, more: int, within_s: float = 60.0) -> dict[str, int]:
        """Wait until each has written `more`; returns where they are."""
        wanted = {name: last + more for name, last in self.last.items()}
        until = time.monotonic() + within_s
        while any(self.last[name] < wanted[name] for name in wanted):
            assert time.monotonic() < until
            time.sleep(0.01)
        return dict(self.last)

    def end(self) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()


@contextmanager
def writing(site: Site) -> Iterator[Writers]:
    made = Writers(site)
    try:
        made.reach(10)
        yield made
    finally:
        run.run(["fsfreeze", "--unfreeze", str(site.disk)], check=False)
        made.end()


def report_of(mark: TimeMark) -> tuple[Consistency, dict[str, bool]]:
    (report,) = mark.reports
    return report.consistency, {part.kind: part.ok and part.unbroken for part in report.parts}


def test_timemark_of_a_vm_with_databases_has_all_that_was_acknowledged(
    site: Site, tmp_path: Path
) -> None:
    wanted = CreateOptions(consistency=Consistency.APPLICATION)
    with site.open() as ctx, writing(site) as writers:
        before = writers.reach(10)
        mark = director.create(ctx, "shop", wanted)
        after = dict(writers.last)
        writers.reach(10)
    assert report_of(mark) == (
        Consistency.APPLICATION,
        {"script": True, "mysql": True, "sqlite": True, "local": True},
    )
    assert site.script().split() == ["check", "freeze", "thaw"]
    (clone,) = site.pool.glob(".offload/**/*.raw")
    assert run.run(["e2fsck", "-fn", str(clone)], check=False).status == 0
    copy, point = tmp_path / "copy.raw", site.server.socket.parent / "image"
    shutil.copy(clone, copy)
    point.mkdir()
    with mounted(copy, point):
        with running_mariadb(point / "mysql", site.server.socket.parent / "i") as restored:
            rows = [i for (i,) in restored.execute("SELECT i FROM shop.t ORDER BY i")]
        assert rows == list(range(len(rows)))
        assert before["mysql"] <= rows[-1] <= after["mysql"] + 1
        with contextlib.closing(sqlite3.connect(point / "shop.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            rows = [i for (i,) in db.execute("SELECT i FROM t ORDER BY i")]
        assert rows == list(range(len(rows)))
        assert before["sqlite"] <= rows[-1] <= after["sqlite"] + 1


def test_application_that_refuses_us_lowers_the_vm_and_its_password_is_nowhere(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    with site.open(wrong_password=True) as ctx, writing(site) as writers:
        mark = director.create(ctx, "shop", CreateOptions(consistency=Consistency.FILESYSTEM))
        writers.reach(10)
    level, parts = report_of(mark)
    assert level is Consistency.FILESYSTEM
    assert parts["mysql"] is False
    assert any("Access denied" in warning for warning in mark.warnings)
    secret = site.folder / "secret"
    files = [path for path in site.folder.rglob("*") if path.is_file() and path != secret]
    assert [path for path in files if WRONG.encode() in path.read_bytes()] == []
    assert WRONG not in "".join(capfd.readouterr()) + str(mark)


def test_application_that_refuses_us_ends_the_timemark_where_it_is_asked_for(site: Site) -> None:
    wanted = CreateOptions(consistency=Consistency.APPLICATION)
    with site.open(wrong_password=True) as ctx, writing(site) as writers:
        with pytest.raises(OffloadError, match="Access denied") as caught:
            director.create(ctx, "shop", wanted)
        writers.reach(10)
        assert ctx.catalog.timemarks() == []
    assert WRONG not in caught.value.message
    assert "freeze" not in site.script()


def test_database_that_lets_go_while_held_is_not_called_consistent(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.snapshots.reflink import ReflinkProvider

    snapshot = ReflinkProvider.snapshot

    def let_go_first(provider: ReflinkProvider, plan: object) -> object:
        idle = "SELECT id FROM information_schema.processlist WHERE command = 'Sleep'"
        for (session,) in site.server.execute(idle):
            site.server.execute(f"KILL {session}")
        return snapshot(provider, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(ReflinkProvider, "snapshot", let_go_first)
    with site.open() as ctx:
        mark = director.create(ctx, "shop", CreateOptions(consistency=Consistency.FILESYSTEM))
    level, parts = report_of(mark)
    assert level is Consistency.FILESYSTEM
    assert parts == {"script": True, "mysql": False, "sqlite": True, "local": True}


def test_command_killed_at_each_step_leaves_no_application_held(site: Site) -> None:
    with site.open():
        pass  # the configuration is written, the instance made
    command = ("-m", "offload.cli", "--config", str(site.folder / "offload.toml"))
    create = (*command, "timemark", "create", "shop")
    python = warm_python()
    trace = site.folder / "trace"
    assert python.run(*create, env={TRACE_ENV: str(trace)}).status == 0
    steps = list(dict.fromkeys(trace.read_text().split()))
    steps = steps[steps.index("timemark.armed") : steps.index("timemark.settled")]
    assert {"timemark.frozen", "timemark.checked", "timemark.thawed"} <= set(steps)
    with writing(site) as writers:
        for step in steps:
            assert python.run(*create, env={CRASH_ENV: step}).status == -signal.SIGKILL
            writers.reach(3)
            assert python.run(*command, "recover").status == 0
            assert list((site.folder / "run").glob("*/holds/*")) == [], step
            phases = site.script().split()
            assert phases.count("freeze") == phases.count("thaw"), step
    with site.open() as ctx:
        assert len(ctx.catalog.timemarks()) == 1, "the traced one"
