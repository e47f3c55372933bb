"""Real PostgreSQL servers: a data folder of their own, a unix socket and a port of 127.0.0.1.

Who comes over the socket is trusted, over TCP there are passwords (SCRAM). As root the server runs
as the user `postgres`, who must be able to reach the folders. Needs the Debian package
`postgresql`.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from offload.errors import UnavailableError
from offload.testing.daemon import Daemon, give, run_as, running
from offload.testing.instances import free_port

USER = "postgres"  # of the system, and the superuser of the database
_PLACES = "/usr/lib/postgresql"
_SETTINGS = {
    "shared_buffers": "16MB",
    "max_connections": "40",
    "huge_pages": "off",
    "dynamic_shared_memory_type": "mmap",
    "listen_addresses": "127.0.0.1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningPostgres:
    """A server. `password` is the superuser's, over TCP; `run_dir` is the socket's folder."""

    data: Path
    run_dir: Path
    port: int
    log: Path
    password: str
    process: subprocess.Popen[bytes]

    def connect(self, **more: Any) -> psycopg.Connection[Any]:
        """As the superuser over the socket, each statement its own transaction."""
        wanted = {"host": str(self.run_dir), "port": self.port, "user": USER, "dbname": "postgres"}
        return psycopg.connect(**{**wanted, **more}, autocommit=True)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """The rows of one statement, in a connection of its own."""
        with self.connect() as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

    def kill(self) -> None:
        """As a crash: SIGQUIT, without a checkpoint."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()


def program(name: str) -> str:
    """The path of one of the newest server's programs (initdb, pg_ctl, pg_amcheck …)."""
    found = sorted(Path(_PLACES).glob(f"*/bin/{name}"), key=lambda p: int(p.parts[-3]))
    if not found:
        raise UnavailableError(
            f"the program {name} is not installed",
            code="program-missing",
            hint="install it: apt-get install postgresql",
        )
    return str(found[-1])


def make_cluster(data: Path) -> None:
    """initdb, with checksums of pages. `data` is made, or is empty. The superuser's password goes
    to `data`/superuser.password."""
    data.mkdir(mode=0o700, exist_ok=True)
    give(data, USER)
    password = data.with_name(f".{data.name}.password")
    password.write_text(secrets.token_hex(16))
    password.chmod(0o600)
    give(password, USER)
    initdb = [program("initdb"), "-D", str(data), "-U", USER, "-k", "-E", "UTF8"]
    initdb += ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}"]
    run_as(USER, initdb)
    password.rename(data / "superuser.password")


@contextmanager
def running_postgres(
    data: Path, run_dir: Path, settings: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[RunningPostgres]:
    """A server on `data`, which is made if it is not there; an existing one recovers by itself,
    if it must. `run_dir` is made: a short path. `settings` as in postgresql.conf."""
    if not (data / "PG_VERSION").exists():
        make_cluster(data)
    run_dir.mkdir(exist_ok=True)
    give(run_dir, USER)
    log = run_dir / "server.log"
    port = port or free_port()
    wanted = {**_SETTINGS, **(settings or {})}
    argv = [program("postgres"), "-D", str(data), "-p", str(port), "-k", str(run_dir)]
    for name, value in wanted.items():
        argv += ["-c", f"{name}={value}"]

    def answers() -> bool:
        try:
            psycopg.connect(
                host=str(run_dir), port=port, user=USER, dbname="postgres", connect_timeout=10
            ).close()
        except psycopg.OperationalError:
            return False
        return True

    with running(Daemon(argv=argv, log=log, user=USER, end_with=signal.SIGINT), answers) as process:
        yield RunningPostgres(
            data=data,
            run_dir=run_dir,
            port=port,
            log=log,
            password=(data / "superuser.password").read_text(),
            process=process,
        )
