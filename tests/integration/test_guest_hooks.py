"""The freeze hooks for guests: their dispatcher, and the databases that they hold, on this host.

Nothing is frozen here: the dispatcher and its hooks are what runs around a freeze. The `deadman`,
which thaws, runs in guests only.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pymysql
import pytest

from offload import run
from offload.errors import BusyError, NotFoundError
from offload.quiescers.hook_report import HookReport, number_of, parse
from offload.services import guest_hooks
from offload.testing.mariadb import running_mariadb
from offload.testing.postgres import running_postgres


@dataclass
class Hooks:
    """The hooks, installed in a folder with settings of its own."""

    folder: Path

    def add(self, name: str, script: str) -> None:
        path = self.folder / guest_hooks.HOOKS / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def set(self, **settings: object) -> None:
        with (self.folder / guest_hooks.SETTINGS).open("a") as file:
            file.writelines(f"{key}='{value}'\n" for key, value in settings.items())

    def run(self, phase: str) -> int:
        """The status of the dispatcher."""
        program = str(self.folder / guest_hooks.DISPATCHER)
        return run.run([program, phase], check=False, timeout_s=60).status

    @property
    def text(self) -> str:
        return (self.folder / "state" / "report").read_text()

    @property
    def report(self) -> HookReport:
        return parse(self.text)

    def held(self) -> bool:
        return self.report.held_applications


Install = Callable[..., Hooks]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: unix sockets lie in it. For all users: servers run as their own."""
    made = Path(tempfile.mkdtemp(prefix="ofh-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def install(folder: Path) -> Iterator[Install]:
    made: list[Hooks] = []

    def do(*names: str) -> Hooks:
        guest_hooks.write(folder / "qemu", names or ("sqlite",))
        hooks = Hooks(folder / "qemu")
        if not names:
            shutil.rmtree(hooks.folder / guest_hooks.HOOKS)
        hooks.set(STATE=hooks.folder / "state")
        made.append(hooks)
        return hooks

    yield do
    for hooks in made:
        hooks.run("thaw")  # no session of a failed test stays


def wait_for(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_hooks_are_clean_for_shellcheck() -> None:
    source = Path(guest_hooks._SOURCE)
    scripts = [source / guest_hooks.DISPATCHER, source / "offload-hold"]
    scripts += [source / guest_hooks.HOOKS / name for name in guest_hooks.names()]
    for script in scripts:
        options = ["--shell=sh", "--severity=warning"]
        done = run.run(["shellcheck", *options, str(script)], check=False)
        assert done.status == 0, done.stdout


# -- the dispatcher --------------------------------------------------------------------------------


def test_dispatcher_runs_in_order_and_back_and_reports(install: Install) -> None:
    hooks = install()
    trace = hooks.folder / "trace"
    for name in ("b", "a", "c"):
        hooks.add(name, f"echo {name} $1 >>{trace}; echo I am {name}")
    hooks.add("not one.sample", f"echo wrong >>{trace}")
    assert hooks.run("freeze") == 0
    first = number_of(hooks.text)
    assert hooks.run("thaw") == 0
    steps = ["a freeze", "b freeze", "c freeze", "c thaw", "b thaw", "a thaw"]
    assert trace.read_text().splitlines() == steps
    report = hooks.report
    assert list(report.hooks) == ["a", "b", "c"]
    assert report.complete
    assert not report.held_applications, "none has said that it holds one"
    assert report.lines()[0] == "hook a: I am a; I am a"
    assert hooks.run("freeze") == 0
    assert number_of(hooks.text) != first


def test_dispatcher_hook_that_fails_takes_back_those_before_and_runs_none_after(
    install: Install,
) -> None:
    hooks = install()
    trace = hooks.folder / "trace"
    hooks.add("a", f"echo a $1 >>{trace}")
    hooks.add("b", f"echo b $1 >>{trace}; echo no room; [ $1 = thaw ]")
    hooks.add("c", f"echo c $1 >>{trace}")
    assert hooks.run("freeze") == 1
    assert trace.read_text().splitlines() == ["a freeze", "b freeze", "b thaw", "a thaw"]
    assert "hook b: no room; no room (freeze ended with status 1)" in hooks.report.lines()
    assert hooks.run("thaw") == 0
    assert len(trace.read_text().splitlines()) == 4, "nothing is due any more"


def test_dispatcher_hook_that_hangs_is_ended_and_fails(install: Install) -> None:
    hooks = install()
    hooks.set(LIMIT_S=1)
    hooks.add("a", "[ $1 = thaw ] || sleep 60")
    began = time.monotonic()
    assert hooks.run("freeze") == 1
    assert time.monotonic() - began < 30
    assert "it took longer than 1 s" in hooks.report.lines()[0]


def test_dispatcher_thaw_that_never_came_is_done_before_the_next_freeze(install: Install) -> None:
    hooks = install()
    trace = hooks.folder / "trace"
    hooks.add("a", f"echo $1 >>{trace}")
    hooks.run("freeze")
    hooks.run("freeze")
    assert trace.read_text().split() == ["freeze", "thaw", "freeze"]


# -- writing them ----------------------------------------------------------------------------------


def test_write_again_renews_the_hooks_and_keeps_the_settings(install: Install) -> None:
    hooks = install("mysql")
    path = hooks.folder / guest_hooks.HOOKS / "mysql"
    path.write_text(path.read_text() + "# of an earlier version\n")
    before = (hooks.folder / guest_hooks.SETTINGS).read_text()
    written = guest_hooks.write(hooks.folder)
    assert "earlier version" not in path.read_text()
    assert (hooks.folder / guest_hooks.SETTINGS).read_text() == before
    assert written.kept == (hooks.folder / guest_hooks.SETTINGS,)
    assert path in written.files


def test_write_refuses_what_is_somebody_else_s_and_unknown_names(folder: Path) -> None:
    (folder / guest_hooks.HOOKS).mkdir()
    (folder / guest_hooks.HOOKS / "mysql").write_text("#!/bin/sh\n# the administrator's own\n")
    with pytest.raises(BusyError, match="mysql exists") as caught:
        guest_hooks.write(folder)
    assert caught.value.code == "not-ours"
    assert not (folder / guest_hooks.DISPATCHER).exists()
    with pytest.raises(NotFoundError, match="there is no hook oracle"):
        guest_hooks.write(folder, ("oracle",))


# -- SQLite ----------------------------------------------------------------------------------------


@pytest.fixture
def database(folder: Path) -> Path:
    path = folder / "shop.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE t (n)")
        db.commit()
    return path


def writable(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database, timeout=0)) as db:
        try:
            db.execute("INSERT INTO t VALUES (1)")
            db.commit()
        except sqlite3.OperationalError:
            return False
    return True


def test_sqlite_hook_holds_the_writers_from_freeze_to_thaw(
    install: Install, database: Path
) -> None:
    hooks = install("sqlite")
    hooks.set(SQLITE_DATABASES=f"\n{database}\n")
    assert hooks.run("freeze") == 0
    assert not writable(database)
    assert hooks.run("thaw") == 0
    assert writable(database)
    assert hooks.held()
    assert f"{database}: held" in hooks.report.lines()[0]


def test_sqlite_hook_without_python_does_the_same(
    install: Install, database: Path, folder: Path
) -> None:
    """With the program sqlite3, on a PATH where there is no python3."""
    hooks = install("sqlite")
    only = folder / "bin"
    only.mkdir()
    for place in ("/usr/bin", "/bin"):
        for path in Path(place).iterdir():
            if not path.name.startswith("python") and not (only / path.name).exists():
                (only / path.name).symlink_to(path)
    hooks.set(SQLITE_DATABASES=database, PATH=only)
    assert hooks.run("freeze") == 0, hooks.text
    assert not writable(database)
    assert hooks.run("thaw") == 0
    assert writable(database)
    assert hooks.held(), hooks.text


def test_sqlite_hook_database_in_use_fails_the_freeze_in_time(
    install: Install, database: Path
) -> None:
    hooks = install("sqlite")
    hooks.set(SQLITE_DATABASES=database, SQLITE_WAIT_S=1)
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert hooks.run("freeze") == 1
    assert "database is locked" in hooks.text
    assert writable(database)


def test_sqlite_hook_lets_go_by_itself_and_says_so_at_the_thaw(
    install: Install, database: Path
) -> None:
    hooks = install("sqlite")
    hooks.set(SQLITE_DATABASES=database, HOLD_S=1)
    assert hooks.run("freeze") == 0
    wait_for(lambda: writable(database))
    assert hooks.run("thaw") == 0
    assert not hooks.held()
    assert "it had not held until then" in hooks.report.lines()[0]


# -- servers ---------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_mysql_hook_holds_commits_from_freeze_to_thaw(install: Install, folder: Path) -> None:
    hooks = install("mysql")
    with running_mariadb(folder / "data", folder / "my") as server:
        settings = folder / "my.cnf"
        settings.write_text(f"[client]\nuser=root\nsocket={server.socket}\n")
        hooks.set(MYSQL_DEFAULTS_FILE=settings, MYSQL_WAIT_S=2)
        server.execute("CREATE DATABASE shop")
        server.execute("CREATE TABLE shop.t (n INT) ENGINE=InnoDB")
        server.execute("CREATE TABLE shop.old (n INT) ENGINE=MyISAM")

        def late() -> bool:
            link = server.connect(read_timeout=1)
            try:
                link.cursor().execute("INSERT INTO shop.t VALUES (1)")
            except pymysql.OperationalError:
                return True
            finally:
                link.close()
            return False

        assert not late()
        assert hooks.run("freeze") == 0, hooks.text
        assert late()
        assert hooks.run("thaw") == 0
        wait_for(lambda: not late())
        assert hooks.held(), hooks.text

        assert hooks.run("freeze") == 0
        (session,) = server.execute(
            "SELECT id FROM information_schema.processlist WHERE user='root' AND command='Sleep'"
        )
        server.execute(f"KILL {session[0]}")
        assert hooks.run("thaw") == 0
        assert not hooks.held()
        assert "the hold had ended" in hooks.text

        with server.connect() as link, link.cursor() as cursor:
            cursor.execute("LOCK TABLES shop.old WRITE")
            assert hooks.run("freeze") == 1, "it does not wait for ever"
        assert "Lock wait timeout" in hooks.text
        assert not late()
    assert hooks.run("freeze") == 0
    assert "no server answers" in hooks.text


@pytest.mark.needs_root
def test_postgresql_hook_makes_a_checkpoint(install: Install, folder: Path) -> None:
    hooks = install("postgresql")
    with running_postgres(folder / "data", folder / "pg") as server:
        hooks.set(POSTGRESQL_SOCKETS=server.run_dir)
        server.execute("CREATE TABLE t AS SELECT generate_series(1, 1000)")
        query = "SELECT redo_lsn FROM pg_control_checkpoint()"
        before = server.execute(query)
        assert hooks.run("freeze") == 0, hooks.text
        assert server.execute(query) != before
        assert hooks.run("thaw") == 0
        assert hooks.held(), hooks.text
        server.process.kill()  # its socket stays
        server.process.wait()
        assert hooks.run("freeze") == 0
        assert "no server behind" in hooks.text
        assert not hooks.held()


@pytest.mark.needs_root
def test_postgresql_hook_that_may_not_log_in_fails_the_freeze(
    install: Install, folder: Path
) -> None:
    hooks = install("postgresql")
    with running_postgres(folder / "data", folder / "pg") as server:
        hooks.set(POSTGRESQL_SOCKETS=server.run_dir, POSTGRESQL_USER="nobody")
        assert hooks.run("freeze") == 1
    assert 'role "nobody" does not exist' in hooks.text
