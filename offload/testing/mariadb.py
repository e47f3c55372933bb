"""Real MariaDB servers: a data folder of their own, a unix socket and a port of 127.0.0.1.

`root` has no password over the socket; users for TCP are for tests to make. As root the server runs
as the user `mysql`, who must be able to reach the folders. Needs the Debian package
`mariadb-server`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymysql
from pymysql.connections import Connection
from pymysql.cursors import Cursor

from offload.run import require_program, run
from offload.testing.daemon import Daemon, give, run_as, running
from offload.testing.instances import free_port

USER = "mysql"  # of the system
_SETTINGS = {
    "innodb-buffer-pool-size": "32M",
    "innodb-log-file-size": "16M",
    "innodb-flush-log-at-trx-commit": "1",
    "bind-address": "127.0.0.1",
    "skip-name-resolve": "1",
    "server-id": "1",
    "log-bin": "binlog",
    "sync-binlog": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningMariadb:
    """A server."""

    data: Path
    socket: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    def connect(self, **more: Any) -> Connection[Cursor]:
        """As root over the socket, each statement its own transaction."""
        wanted: dict[str, Any] = {"unix_socket": str(self.socket), "user": "root"}
        return pymysql.connect(**{**wanted, "autocommit": True, **more})

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """The rows of one statement, in a connection of its own."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def kill(self) -> None:
        """As a crash."""
        self.process.kill()
        self.process.wait()


def make_database(data: Path) -> None:
    """mariadb-install-db, without test databases. `data` is made, or is empty."""
    data.mkdir(mode=0o700, exist_ok=True)
    give(data, USER)
    argv = [require_program("mariadb-install-db", "mariadb-server"), "--no-defaults"]
    # not beside others, who would take its temporary tables for leftovers of theirs
    argv += [f"--tmpdir={data}"]
    argv += [f"--datadir={data}", "--auth-root-authentication-method=normal"]
    argv += ["--skip-test-db", "--skip-name-resolve", "--innodb-log-file-size=16M"]
    run_as(USER, argv)
    run(["sync", "-f", str(data)])


@contextmanager
def running_mariadb(
    data: Path, run_dir: Path, settings: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[RunningMariadb]:
    """A server on `data`, which is made if it is not there; an existing one recovers by itself,
    if it must. `run_dir` is made: a short path. `settings` as in my.cnf."""
    if not (data / "mysql").exists():
        make_database(data)
    run_dir.mkdir(exist_ok=True)
    give(run_dir, USER)
    log, socket = run_dir / "server.log", run_dir / "mariadb.sock"
    port = port or free_port()
    argv = [require_program("mariadbd", "mariadb-server"), "--no-defaults"]
    argv += [f"--datadir={data}", f"--socket={socket}", f"--port={port}"]
    argv += [f"--pid-file={run_dir / 'mariadb.pid'}", f"--tmpdir={run_dir}"]
    argv += [f"--{name}={value}" for name, value in {**_SETTINGS, **(settings or {})}.items()]

    def answers() -> bool:
        try:
            pymysql.connect(unix_socket=str(socket), user="root", connect_timeout=10).close()
        except pymysql.OperationalError:
            return False
        return True

    with running(Daemon(argv=argv, log=log, user=USER), answers) as process:
        yield RunningMariadb(data=data, socket=socket, port=port, log=log, process=process)
