"""PostgreSQL under writers: what follows from an image, and how little has to be redone."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from offload import run
from offload.configs.quiesce import PostgresqlApplication
from offload.errors import ConfigError, UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers.postgresql import PostgresqlPart
from offload.quiescers.vm import VmQuiescer
from offload.testing.certificates import make_authority, write_server
from offload.testing.daemon import give, open_folder, run_as, stopped
from offload.testing.instances import free_port, make_instance
from offload.testing.pools import loop_pool
from offload.testing.postgres import (
    USER,
    RunningPostgres,
    make_cluster,
    program,
    running_postgres,
)

SECRET = "pass-that-nobody-may-see"
ROLES = (
    f"CREATE ROLE offload LOGIN PASSWORD '{SECRET}' IN ROLE pg_checkpoint",
    f"CREATE ROLE plain LOGIN PASSWORD '{SECRET}'",
    f"CREATE ROLE heir LOGIN NOINHERIT PASSWORD '{SECRET}' IN ROLE pg_checkpoint",
    "CREATE DATABASE shop",
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with open_folder() as made:
        yield made


@pytest.fixture(scope="module")
def authority(folder: Path) -> Path:
    """A folder with a server's certificate for loopback, and its authority."""
    tls = folder / "tls"
    write_server(tls, make_authority())
    for path in (tls, *tls.iterdir()):
        give(path, USER)
    return tls


@pytest.fixture(scope="module")
def template(folder: Path) -> Path:
    """A data folder, freshly made."""
    make_cluster(folder / "template")
    return folder / "template"


def copy_of(data: Path, to: Path) -> Path:
    run.run(["cp", "-a", str(data), str(to)])
    return to


@pytest.fixture(scope="module")
def shared(folder: Path, authority: Path, template: Path) -> Iterator[RunningPostgres]:
    """A server for tests that leave it as it was."""
    tls = {
        "ssl": "on",
        "ssl_cert_file": str(authority / "server-cert.pem"),
        "ssl_key_file": str(authority / "server-key.pem"),
    }
    data = copy_of(template, folder / "shared")
    with running_postgres(data, folder / "r", tls) as server:
        for statement in ROLES:
            server.execute(statement)
        yield server


@pytest.fixture
def own(folder: Path, template: Path) -> Iterator[RunningPostgres]:
    """A server that a test may stop."""
    data = copy_of(template, folder / "own")
    with running_postgres(data, folder / "o") as server:
        yield server
    shutil.rmtree(data)


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return make_instance(tmp_path / "i")


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


Make = Callable[..., PostgresqlPart]


@pytest.fixture
def make(instance: Instance) -> Iterator[Make]:
    """Parts that are closed at the end."""
    with ExitStack() as stack:

        def build(server: RunningPostgres, **more: Any) -> PostgresqlPart:
            wanted = {"kind": "postgresql", "host": str(server.run_dir), "user": USER}
            entry = PostgresqlApplication.model_validate({**wanted, "port": server.port, **more})
            made = PostgresqlPart("shop", entry, instance)
            stack.callback(made.close)
            return made

        yield build


def arm_and_freeze(part: PostgresqlPart, within_s: float = 30.0) -> Consistency:
    part.check()
    part.arm(within_s)
    return part.freeze(time.monotonic() + within_s)


class Writer:
    """Commits one row after the other, and dirties many pages; `last` was acknowledged."""

    def __init__(self, server: RunningPostgres) -> None:
        self.last = -1
        self._stop = False
        server.execute("CREATE TABLE IF NOT EXISTS t (i int PRIMARY KEY, pad text)")
        server.execute("TRUNCATE t")
        self._connection = server.connect()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(psycopg.Error):
            while not self._stop:
                self._connection.execute(
                    "INSERT INTO t VALUES (%s, repeat('x', 2000))", [self.last + 1]
                )
                self.last += 1

    def reach(self, count: int, within_s: float = 60.0) -> None:
        until = time.monotonic() + within_s
        while self.last < count:
            assert time.monotonic() < until
            time.sleep(0.01)

    def end(self) -> None:
        self._stop = True
        self._thread.join()
        self._connection.close()


@pytest.fixture
def write() -> Iterator[Callable[[RunningPostgres], Writer]]:
    with ExitStack() as stack:

        def begin(server: RunningPostgres) -> Writer:
            made = Writer(server)
            stack.callback(made.end)
            made.reach(20)
            return made

        yield begin


def redone_from(log: Path) -> int:
    """Where in the log of changes recovery began, as its own log says."""
    begin = re.search(r"redo starts at ([0-9A-F]+)/([0-9A-F]+)", log.read_text())
    assert begin is not None
    return (int(begin[1], 16) << 32) + int(begin[2], 16)


def written_to(server: RunningPostgres) -> int:
    """How far the log of changes is written."""
    ((place,),) = server.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint")
    return int(place)


@pytest.mark.needs_root
def test_postgresql_image_of_a_frozen_disk_has_the_acknowledged_rows_and_little_redo(
    folder: Path, make: Make, write: Callable[[RunningPostgres], Writer]
) -> None:
    """The order of a TimeMark: CHECKPOINT, freeze, image, thaw; beside it an image without."""
    with loop_pool(folder / "pool", "ext4", size_bytes=400 << 20) as disk:
        with running_postgres(disk / "data", folder / "p") as server:
            server.execute("CREATE EXTENSION amcheck")
            writer, part = write(server), make(server)
            part.check()
            part.arm(30)
            early = written_to(server)
            writer.reach(800)
            crash_copy, _ = image_under_freeze(disk, folder / "crash", writer)
            late = written_to(server)
            assert part.freeze(time.monotonic() + 30) is Consistency.APPLICATION
            image, (before, after) = image_under_freeze(disk, folder / "application", writer)
            assert part.still_frozen()
            part.thaw()
            assert part.unbroken
            writer.end()
        assert part.what == ("postgres",)
        with recovered(crash_copy, folder / "c") as server:
            assert redone_from(server.log) < early
        with recovered(image, folder / "a") as server:
            assert redone_from(server.log) >= late  # all is of after the CHECKPOINT
            rows = [i for (i,) in server.execute("SELECT i FROM t ORDER BY i")]
            place = ["-h", str(server.run_dir), "-p", str(server.port)]
            run_as(USER, [program("pg_amcheck"), *place, "--heapallindexed", "--all"])
        assert before <= max(rows) <= after
        assert rows == list(range(max(rows) + 1))


def image_under_freeze(disk: Path, to: Path, writer: Writer) -> tuple[Path, tuple[int, int]]:
    """A copy of the data, and the last acknowledged row before and the last possible one after."""
    run.run(["fsfreeze", "--freeze", str(disk)])
    try:
        before = writer.last
        copy_of(disk / "data", to)
        after = writer.last + 1  # one may be written and not be acknowledged
    finally:
        run.run(["fsfreeze", "--unfreeze", str(disk)])
    return to, (before, after)


@contextmanager
def recovered(data: Path, run_dir: Path) -> Iterator[RunningPostgres]:
    """A server on an image, which is removed then."""
    (data / "postmaster.pid").unlink()
    try:
        with running_postgres(data, run_dir) as server:
            yield server
    finally:
        shutil.rmtree(data)


def test_postgresql_report_names_version_checkpoint_and_redo(
    shared: RunningPostgres, make: Make
) -> None:
    part = make(shared)
    arm_and_freeze(part)
    assert part.what == ("postgres", "shop")
    assert re.search(
        r"^PostgreSQL \d+\.\d+; CHECKPOINT in \d+ ms \(before it one of \d+ ms\), "
        r"redo from [0-9A-F]+/[0-9A-F]+, \d+ bytes of WAL since$",
        part.output,
    )
    ((lsn,),) = shared.execute("SELECT redo_lsn::text FROM pg_control_checkpoint()")
    assert f"redo from {lsn}," in part.output


def test_postgresql_checkpoint_is_after_the_one_of_arm(shared: RunningPostgres, make: Make) -> None:
    def last() -> str:
        ((lsn,),) = shared.execute("SELECT checkpoint_lsn::text FROM pg_control_checkpoint()")
        return str(lsn)

    part = make(shared)
    part.check()
    at_check = last()
    part.arm(30)
    at_arm = last()
    part.freeze(time.monotonic() + 30)
    assert len({at_check, at_arm, last()}) == 3


def test_postgresql_holds_nobody(
    own: RunningPostgres, make: Make, write: Callable[[RunningPostgres], Writer]
) -> None:
    writer, part = write(own), make(own)
    arm_and_freeze(part)
    writer.reach(writer.last + 20)
    assert part.undos() == []
    own.kill()
    assert part.still_frozen()
    part.thaw()
    part.close()


def test_postgresql_in_a_vm_has_held_nobody_for_no_time(
    shared: RunningPostgres, make: Make
) -> None:
    vm = VmQuiescer(
        "shop",
        volumes=(),
        least=Consistency.APPLICATION,
        applications=[make(shared)],
        freezer=None,
    )
    vm.check()
    vm.arm(30)
    vm.hold(time.monotonic() + 30)
    vm.thaw()
    (part,) = vm.parts
    assert (part.ok, part.unbroken, part.held_ms) == (True, True, 0.0)
    assert part.freeze_ms > 0
    vm.close()


def test_postgresql_role_with_pg_checkpoint_is_enough(
    shared: RunningPostgres, make: Make, password: Path
) -> None:
    part = make(shared, host="127.0.0.1", user="offload", password_file=password)
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert "redo from" in part.output


@pytest.mark.parametrize("user", ["plain", "heir"])
def test_postgresql_role_that_may_not_checkpoint_is_refused(
    shared: RunningPostgres, make: Make, password: Path, user: str
) -> None:
    with pytest.raises(UnavailableError) as caught:
        make(shared, host="127.0.0.1", user=user, password_file=password).check()
    assert caught.value.code == "application-refused"
    assert f"GRANT pg_checkpoint TO {user}" in caught.value.hint


def test_postgresql_wrong_password_is_told_and_shown_nowhere(
    shared: RunningPostgres, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong-and-secret")
    wrong.chmod(0o600)
    part = make(shared, host="127.0.0.1", user="offload", password_file=wrong)
    with pytest.raises(UnavailableError) as caught:
        part.check()
    assert caught.value.code == "application-unreachable"
    assert "password authentication failed" in caught.value.message
    shown = repr(caught.value.__cause__) + caught.value.message + part.output + caplog.text
    assert "wrong-and-secret" not in shown
    assert "wrong-and-secret" not in shared.log.read_text()


def test_postgresql_password_that_others_may_read_is_refused(
    shared: RunningPostgres, make: Make, password: Path
) -> None:
    password.chmod(0o640)
    with pytest.raises(ConfigError) as caught:
        make(shared, host="127.0.0.1", user="offload", password_file=password).check()
    assert caught.value.code == "secret-unsafe"


def test_postgresql_nobody_listening_is_told(shared: RunningPostgres, make: Make) -> None:
    for where in ({"host": "127.0.0.1", "port": free_port()}, {"host": "/nowhere"}):
        with pytest.raises(UnavailableError) as caught:
            make(shared, **where).check()
        assert caught.value.code == "application-unreachable"


def test_postgresql_without_fsync_is_refused(folder: Path, template: Path, make: Make) -> None:
    data = copy_of(template, folder / "nosync")
    with (
        running_postgres(data, folder / "n", {"fsync": "off"}) as server,
        pytest.raises(UnavailableError) as caught,
    ):
        make(server).check()
    assert caught.value.code == "not-durable"
    assert "fsync=off" in caught.value.message


def test_postgresql_what_may_surprise_is_in_the_report(
    folder: Path, template: Path, make: Make
) -> None:
    """A standby that commits asynchronously."""
    data = copy_of(template, folder / "standby")
    (data / "standby.signal").touch()
    give(data / "standby.signal", USER)
    # not fewer connections than the cluster was made with
    settings = {"synchronous_commit": "off", "max_connections": "100"}
    with running_postgres(data, folder / "s", settings) as server:
        part = make(server)
        assert arm_and_freeze(part) is Consistency.APPLICATION
    assert "a standby" in part.output
    assert "synchronous_commit=off" in part.output
    assert "redo from" in part.output


@pytest.mark.parametrize("phase", ["check", "arm", "freeze"])
def test_postgresql_server_that_hangs_is_left_in_time(
    own: RunningPostgres, make: Make, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr("offload.quiescers.postgresql._CONNECT_S", 2)
    part = make(own, timeout_s=1)
    if phase == "freeze":
        part.check()
        part.arm(30)
    backends = own.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'offload'")
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(stopped(own.process.pid))
        for (pid,) in backends:
            stack.enter_context(stopped(pid))
        with pytest.raises(UnavailableError) as caught:
            part.check() if phase == "check" else (
                part.arm(30) if phase == "arm" else part.freeze(began + 30)
            )
        assert time.monotonic() - began < 15
    expected = "freeze-late" if phase == "freeze" else "application-unreachable"
    assert caught.value.code == expected


def test_postgresql_deadline_before_the_checkpoint_fails(own: RunningPostgres, make: Make) -> None:
    part = make(own)
    part.check()
    part.arm(30)
    with pytest.raises(UnavailableError) as caught:
        part.freeze(time.monotonic())
    assert caught.value.code == "freeze-late"


def test_postgresql_server_gone_before_the_freeze_fails(own: RunningPostgres, make: Make) -> None:
    part = make(own)
    part.check()
    part.arm(30)
    own.kill()
    with pytest.raises(UnavailableError) as caught:
        part.freeze(time.monotonic() + 30)
    assert caught.value.code == "freeze-failed"
    assert part.what == ()


def test_postgresql_tls_is_verified(
    shared: RunningPostgres, make: Make, password: Path, authority: Path, tmp_path: Path
) -> None:
    account = {"host": "127.0.0.1", "user": "offload", "password_file": password}
    good = make(shared, **account, sslmode="verify-full", sslrootcert=authority / "ca-cert.pem")
    assert arm_and_freeze(good) is Consistency.APPLICATION
    write_server(tmp_path / "other", make_authority("another"))
    for bad in ({"sslrootcert": tmp_path / "other/ca-cert.pem"}, {}):
        with pytest.raises(UnavailableError, match="certificate verify failed"):
            make(shared, **account, sslmode="verify-full", **bad).check()
    make(shared, **account, sslmode="require").check()


def test_postgresql_server_without_tls_is_refused_where_it_is_wanted(
    own: RunningPostgres, make: Make, password: Path
) -> None:
    with pytest.raises(UnavailableError, match="does not support SSL"):
        make(own, host="127.0.0.1", password_file=password, sslmode="require").check()
