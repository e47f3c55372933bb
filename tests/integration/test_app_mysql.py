"""MariaDB held under writers: commits wait, and images have what was acknowledged.

MySQL's own path, FLUSH TABLES WITH READ LOCK, runs here against MariaDB too.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pymysql
import pytest

from offload import run
from offload.configs.quiesce import MysqlApplication
from offload.errors import ConfigError, UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers import mysql
from offload.quiescers.mysql import MysqlPart
from offload.testing.certificates import make_authority, write_server
from offload.testing.daemon import give, open_folder, stopped
from offload.testing.instances import free_port, make_instance
from offload.testing.mariadb import USER, RunningMariadb, make_database, running_mariadb

ROOT = Path(__file__).parents[2]
SECRET = "pass-that-nobody-may-see"

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from offload.configs.quiesce import MysqlApplication
from offload.quiescers.mysql import MysqlPart
from offload.testing.instances import make_instance
entry = MysqlApplication.model_validate_json(sys.argv[3])
part = MysqlPart("shop", entry, make_instance(Path(sys.argv[2])))
part.arm(float(sys.argv[4]))
part.freeze(time.monotonic() + float(sys.argv[4]))
print("held", flush=True)
time.sleep(60)
"""


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
    make_database(folder / "template")
    return folder / "template"


@pytest.fixture(scope="module")
def shared(folder: Path, authority: Path, template: Path) -> Iterator[RunningMariadb]:
    """A server for tests that leave it as it was."""
    tls = {
        "ssl-ca": str(authority / "ca-cert.pem"),
        "ssl-cert": str(authority / "server-cert.pem"),
        "ssl-key": str(authority / "server-key.pem"),
    }
    copy_of(template, folder / "shared")
    with running_mariadb(folder / "shared", folder / "r", tls) as server:
        prepare(server)
        yield server


@pytest.fixture
def own(folder: Path, template: Path) -> Iterator[RunningMariadb]:
    """A server that a test may kill."""
    data = copy_of(template, folder / "own")
    with running_mariadb(data, folder / "o") as server:
        prepare(server)
        yield server
    shutil.rmtree(data)


def copy_of(data: Path, to: Path) -> Path:
    run.run(["cp", "-a", "--reflink=auto", str(data), str(to)])
    return to


def prepare(server: RunningMariadb) -> None:
    for statement in (
        "CREATE DATABASE shop",
        "CREATE TABLE shop.t (i INT PRIMARY KEY) ENGINE=InnoDB",
        "CREATE TABLE shop.a (i INT PRIMARY KEY) ENGINE=Aria",
        f"CREATE USER offload@'127.0.0.1' IDENTIFIED BY '{SECRET}'",
        "GRANT RELOAD ON *.* TO offload@'127.0.0.1'",
        f"CREATE USER plain@'127.0.0.1' IDENTIFIED BY '{SECRET}'",
        "CREATE ROLE backup",
        "GRANT RELOAD, BINLOG MONITOR ON *.* TO backup",
        f"CREATE USER member@'127.0.0.1' IDENTIFIED BY '{SECRET}'",
        "GRANT backup TO member@'127.0.0.1'",
        "SET DEFAULT ROLE backup FOR member@'127.0.0.1'",
    ):
        server.execute(statement)


class Writer:
    """Commits one row after the other; `last` was acknowledged."""

    def __init__(self, server: RunningMariadb, table: str = "t") -> None:
        self.last = -1
        self._stop = False
        self._server = server
        self._connection = server.connect()
        self._table = table
        with self._connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM shop.{table}")  # noqa: S608
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(pymysql.MySQLError), self._connection.cursor() as cursor:
            while not self._stop:
                cursor.execute(f"INSERT INTO shop.{self._table} VALUES ({self.last + 1})")  # noqa: S608
                self.last += 1

    def waits(self, within_s: float = 20.0) -> int:
        """Until the server says that it waits for the lock; returns the last acknowledged row."""
        waiting = (
            "SELECT id FROM information_schema.processlist WHERE state LIKE 'Waiting for %lock'"
        )
        until = time.monotonic() + within_s
        while not self._server.execute(waiting):
            assert time.monotonic() < until
            time.sleep(0.01)
        return self.last

    def goes_on(self, within_s: float = 20.0) -> bool:
        was, until = self.last, time.monotonic() + within_s
        while time.monotonic() < until:
            if self.last > was + 2:
                return True
            time.sleep(0.01)
        return False

    def end(self) -> None:
        self._stop = True
        self._thread.join()
        with contextlib.suppress(pymysql.MySQLError):
            self._connection.close()


Begin = Callable[..., Writer]


@pytest.fixture
def write() -> Iterator[Begin]:
    with ExitStack() as stack:

        def begin(server: RunningMariadb, table: str = "t") -> Writer:
            made = Writer(server, table)
            stack.callback(made.end)
            assert made.goes_on()
            return made

        yield begin


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return make_instance(tmp_path / "i")


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def entry_of(server: RunningMariadb, **more: Any) -> MysqlApplication:
    wanted = {"kind": "mysql", "host": str(server.socket), "port": server.port, "user": "root"}
    return MysqlApplication.model_validate({**wanted, **more})


Make = Callable[..., MysqlPart]


@pytest.fixture
def make(instance: Instance, write: Begin) -> Iterator[Make]:
    """Parts that are closed at the end, before the writers."""
    with ExitStack() as stack:

        def build(server: RunningMariadb, **more: Any) -> MysqlPart:
            made = MysqlPart("shop", entry_of(server, **more), instance)
            stack.callback(made.close)
            return made

        yield build


def arm_and_freeze(part: MysqlPart, within_s: float = 30.0) -> Consistency:
    part.check()
    part.arm(within_s)
    return part.freeze(time.monotonic() + within_s)


@pytest.fixture(params=["backup-stage", "read-lock"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of holding, on the same server."""
    if request.param == "read-lock":
        monkeypatch.setattr(mysql, "_BACKUP_STAGE_SINCE", (99, 0))
    return str(request.param)


CHECKPOINT_AGE = "SHOW GLOBAL STATUS LIKE 'Innodb_checkpoint_age'"


def test_mysql_innodb_has_little_to_redo_where_the_account_may_checkpoint(
    shared: RunningMariadb, make: Make
) -> None:
    """Root may; who may not is told what to grant, and holds all the same."""
    for number in range(2000, 2200):
        shared.execute(f"REPLACE INTO shop.t VALUES ({number})")  # noqa: S608
    ((_, before),) = shared.execute(CHECKPOINT_AGE)
    part = make(shared)
    part.check()
    part.arm(20)
    frozen_part(part)
    ((_, after),) = shared.execute(CHECKPOINT_AGE)
    part.thaw()
    assert int(after) < int(before) / 4
    assert "; checkpoint in " in part.output


def test_mysql_account_that_may_not_checkpoint_holds_and_says_so(
    shared: RunningMariadb, make: Make, password: Path
) -> None:
    part = make(shared, host="127.0.0.1", user="offload", password_file=password)
    part.check()
    part.arm(20)
    frozen_part(part)
    part.thaw()
    assert part.unbroken
    assert "no checkpoint (grant SUPER for a shorter redo)" in part.output


def frozen_part(part: MysqlPart) -> None:
    assert part.freeze(time.monotonic() + 20) is Consistency.APPLICATION


def test_mysql_held_under_a_writer_has_exactly_the_acknowledged_rows(
    own: RunningMariadb, make: Make, write: Begin, folder: Path, path: str
) -> None:
    writer, part = write(own), make(own)
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert part.what == ("shop",)
    assert ("BACKUP STAGE" in part.output) == (path == "backup-stage")
    acknowledged = writer.waits()
    assert not writer.goes_on(0.5)
    image = copy_of(own.data, folder / "image")
    assert part.still_frozen()
    part.thaw()
    part.thaw()
    assert part.unbroken
    assert writer.goes_on()
    try:
        with running_mariadb(image, folder / "im") as restored:
            rows = [i for (i,) in restored.execute("SELECT i FROM shop.t ORDER BY i")]
            assert rows == list(range(acknowledged + 1))
            checked = run.run(
                [
                    "mariadb-check",
                    "--no-defaults",
                    f"--socket={restored.socket}",
                    "--user=root",
                    "--all-databases",
                    "--extended",
                ]
            )
            assert "shop.t" in checked.stdout
            bad = [line for line in checked.stdout.splitlines() if not line.endswith(" OK")]
            assert bad == []
    finally:
        shutil.rmtree(image)


def test_mysql_commits_that_wait_in_memory_are_in_the_image(
    folder: Path, template: Path, make: Make, write: Begin
) -> None:
    """innodb_flush_log_at_trx_commit=0 acknowledges what is not even with the kernel."""
    data = copy_of(template, folder / "lazy")
    lazy = {"innodb-flush-log-at-trx-commit": "0", "sync-binlog": "0"}
    with running_mariadb(data, folder / "l", lazy) as server:
        prepare(server)
        writer, part = write(server), make(server)
        arm_and_freeze(part)
        acknowledged = writer.waits()
        image = copy_of(data, folder / "lazy-image")
        part.thaw()
        writer.end()
    assert "innodb_flush_log_at_trx_commit=0; sync_binlog=0" in part.output
    # without the binary log, from which a restart would take what InnoDB has not
    with running_mariadb(image, folder / "li", {"skip-log-bin": "1"}) as restored:
        assert restored.execute("SELECT max(i), count(*) FROM shop.t") == [
            (acknowledged, acknowledged + 1)
        ]


def test_mysql_commits_that_stay_in_memory_fail_the_hold(
    own: RunningMariadb, make: Make, write: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
    # a server that does not get to it: it writes for many reasons, so none can be kept from it
    behind = "SELECT 'Innodb_lsn_current', 2 UNION SELECT 'Innodb_lsn_flushed', 1"
    monkeypatch.setattr(mysql, "_LSN", behind)
    writer, part = write(own), make(own, timeout_s=1)
    with pytest.raises(UnavailableError) as caught:
        arm_and_freeze(part)
    assert caught.value.code == "not-durable"
    assert writer.goes_on()


@pytest.mark.parametrize("table", ["t", "a"])
def test_mysql_writer_of_each_engine_waits(
    shared: RunningMariadb, make: Make, write: Begin, table: str
) -> None:
    writer, part = write(shared, table), make(shared)
    arm_and_freeze(part)
    writer.waits()
    assert not writer.goes_on(0.3)
    part.thaw()
    assert writer.goes_on()


def test_mysql_binary_log_position_is_that_of_the_hold(
    shared: RunningMariadb, make: Make, write: Begin
) -> None:
    write(shared)
    part = make(shared)
    arm_and_freeze(part)
    ((file, position, *_),) = shared.execute("SHOW MASTER STATUS")
    ((gtid,),) = shared.execute("SELECT @@GLOBAL.gtid_binlog_pos")
    assert f"GTID {gtid}, binary log {file}:{position}" in part.output


def test_mysql_account_with_reload_alone_is_enough(
    shared: RunningMariadb, make: Make, password: Path
) -> None:
    part = make(shared, host="127.0.0.1", user="offload", password_file=password)
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert part.what[0].startswith("MariaDB ")  # it may see no database
    assert "GTID" in part.output


def test_mysql_privileges_of_a_default_role_count(
    shared: RunningMariadb, make: Make, password: Path
) -> None:
    part = make(shared, host="127.0.0.1", user="member", password_file=password)
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert "binary log binlog." in part.output


def test_mysql_account_without_reload_is_refused(
    shared: RunningMariadb, make: Make, password: Path
) -> None:
    with pytest.raises(UnavailableError) as caught:
        make(shared, host="127.0.0.1", user="plain", password_file=password).check()
    assert caught.value.code == "application-refused"
    assert "GRANT RELOAD" in caught.value.hint


def test_mysql_wrong_password_is_told_and_shown_nowhere(
    shared: RunningMariadb, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong-and-secret")
    wrong.chmod(0o600)
    part = make(shared, host="127.0.0.1", user="offload", password_file=wrong)
    with pytest.raises(UnavailableError) as caught:
        part.check()
    assert caught.value.code == "application-unreachable"
    assert "Access denied" in caught.value.message
    shown = repr(caught.value.__cause__) + caught.value.message + part.output + caplog.text
    assert "wrong-and-secret" not in shown
    assert "wrong-and-secret" not in shared.log.read_text(errors="replace")


def test_mysql_password_that_others_may_read_is_refused(
    shared: RunningMariadb, make: Make, password: Path
) -> None:
    password.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        make(shared, host="127.0.0.1", user="offload", password_file=password).check()
    assert caught.value.code == "secret-unsafe"


def test_mysql_nobody_listening_is_told(shared: RunningMariadb, make: Make) -> None:
    for where in ({"host": "127.0.0.1", "port": free_port()}, {"host": "/nowhere/sock"}):
        with pytest.raises(UnavailableError) as caught:
            make(shared, **where).check()
        assert caught.value.code == "application-unreachable"


def test_mysql_long_transaction_that_writes_does_not_keep_the_lock_away(
    shared: RunningMariadb, make: Make
) -> None:
    """Only its commit would wait: it is not in the image."""
    with shared.connect(autocommit=False) as other, other.cursor() as cursor:
        cursor.execute("INSERT INTO shop.t VALUES (-1)")
        part = make(shared, timeout_s=5)
        arm_and_freeze(part)
        part.thaw()
        other.rollback()


def test_mysql_lock_that_cannot_be_got_in_time_fails_and_holds_nothing(
    shared: RunningMariadb, make: Make, write: Begin, path: str
) -> None:
    with shared.connect() as other, other.cursor() as cursor:
        # what each way waits for: another backup, a writer of a table without transactions
        cursor.execute(
            "BACKUP STAGE START" if path == "backup-stage" else "LOCK TABLES shop.a WRITE"
        )
        part = make(shared, timeout_s=1)
        with pytest.raises(UnavailableError) as caught:
            arm_and_freeze(part)
        assert caught.value.code in ("freeze-late", "freeze-failed")
        cursor.execute("BACKUP STAGE END" if path == "backup-stage" else "UNLOCK TABLES")
    assert part.what == ()
    write(shared)


def test_mysql_server_killed_while_held_breaks_the_hold(own: RunningMariadb, make: Make) -> None:
    part = make(own)
    arm_and_freeze(part)
    own.kill()
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert "not held all the time" in part.output


def test_mysql_session_killed_by_somebody_breaks_the_hold(
    shared: RunningMariadb, make: Make, write: Begin, path: str
) -> None:
    writer, part = write(shared), make(shared)
    arm_and_freeze(part)
    ((session,),) = shared.execute(
        "SELECT id FROM information_schema.processlist WHERE command = 'Sleep' "
        "AND id = (SELECT max(id) FROM information_schema.processlist WHERE command = 'Sleep')"
    )
    shared.execute(f"KILL {session}")
    assert writer.goes_on()
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken


def test_mysql_server_ends_the_hold_of_a_director_that_hangs(
    shared: RunningMariadb, write: Begin, tmp_path: Path
) -> None:
    writer = write(shared)
    process = director(shared, tmp_path, 2)
    try:
        process.send_signal(signal.SIGSTOP)
        writer.waits()
        assert not writer.goes_on(0.3)
        assert writer.goes_on()
    finally:
        process.send_signal(signal.SIGCONT)
        run.terminate(process)


def test_mysql_wait_timeout_passed_breaks_the_hold(
    shared: RunningMariadb, make: Make, write: Begin
) -> None:
    writer, part = write(shared), make(shared)
    arm_and_freeze(part, 1.0)
    writer.waits()
    assert writer.goes_on()
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken


def test_mysql_director_killed_lets_commits_go_on(
    shared: RunningMariadb, write: Begin, tmp_path: Path
) -> None:
    writer = write(shared)
    process = director(shared, tmp_path, 60)
    try:
        writer.waits()
        assert not writer.goes_on(0.3)
    finally:
        process.kill()
        process.wait()
    assert writer.goes_on()


def director(server: RunningMariadb, folder: Path, deadline_s: float) -> Any:
    entry = entry_of(server).model_dump_json()
    argv = [sys.executable, "-c", HOLDER, str(ROOT), str(folder / "d"), entry, str(deadline_s)]
    process = run.spawn(argv, stderr=None)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_mysql_server_that_hangs_is_left_in_time(own: RunningMariadb, make: Make) -> None:
    part = make(own, timeout_s=1)
    part.check()
    part.arm(30)
    with stopped(own.process.pid), pytest.raises(UnavailableError) as caught:
        part.freeze(time.monotonic() + 30)
    assert caught.value.code == "freeze-late"


def test_mysql_server_that_hangs_at_the_thaw_is_told(
    own: RunningMariadb, make: Make, write: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql, "_THAW_S", 0.5)
    writer, part = write(own), make(own)
    arm_and_freeze(part)
    with stopped(own.process.pid):
        assert part.still_frozen()  # as far as can be known
        with pytest.raises(UnavailableError) as caught:
            part.thaw()
    assert caught.value.code == "thaw-failed"
    assert not part.unbroken
    assert writer.goes_on()  # the session has ended


def test_mysql_server_gone_before_the_freeze_fails(own: RunningMariadb, make: Make) -> None:
    part = make(own)
    part.check()
    part.arm(30)
    own.kill()
    with pytest.raises(UnavailableError) as caught:
        part.freeze(time.monotonic() + 30)
    assert caught.value.code == "freeze-failed"
    part.thaw()


def test_mysql_tls_is_verified(
    shared: RunningMariadb, make: Make, password: Path, authority: Path, tmp_path: Path
) -> None:
    account = {"host": "127.0.0.1", "user": "offload", "password_file": password}
    good = make(shared, **account, tls="verify", ca_file=authority / "ca-cert.pem")
    assert arm_and_freeze(good) is Consistency.APPLICATION
    assert good.still_frozen()
    good.thaw()
    assert good.unbroken
    write_server(tmp_path / "other", make_authority("another"))
    bad = make(shared, **account, tls="verify", ca_file=tmp_path / "other/ca-cert.pem")
    with pytest.raises(UnavailableError, match="certificate verify failed"):
        bad.check()
    with pytest.raises(UnavailableError, match="certificate verify failed"):
        make(shared, **account, tls="verify").check()
    make(shared, **account, tls="require").check()


def test_mysql_server_without_tls_gets_no_password(
    own: RunningMariadb, make: Make, password: Path
) -> None:
    account = {"host": "127.0.0.1", "user": "offload", "password_file": password}
    make(own, **account).check()
    with pytest.raises(UnavailableError, match="SSL"):
        make(own, **account, tls="require").check()
