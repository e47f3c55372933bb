"""A production VM: the lab guest with two data disks, databases on them, and a load.

The disks are raw files in a reflink pool of this machine: volumes to take TimeMarks of. The guest
makes its file systems: ext4 with PostgreSQL and SQLite, XFS with MariaDB. Its database servers are
reached from here, over forwarded ports with passwords, as a backup proxy does it.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pymysql

from offload.errors import UnavailableError
from offload.run import run
from offload.testing import guest_agent, mariadb, postgres, production_writer
from offload.testing.lab.channel import RemoteCommand
from offload.testing.lab.guest import Guest
from offload.testing.mariadb import running_mariadb
from offload.testing.postgres import running_postgres
from offload.testing.production_load import (
    ACCOUNTS,
    TABLES,
    Login,
    connect_mariadb,
    connect_postgres,
)

EXT4, XFS = "ext4", "xfs"  # the volumes, by the file systems on them
POINTS = {EXT4: "/srv/ext4", XFS: "/srv/xfs"}
DATABASE = "shop"
BACKUP_USER = "offload"
_WRITER = "writer"
_POSTGRES_PORT, _MARIADB_PORT, _WRITER_PORT = 5432, 3306, 9000
_START_S = 180.0  # emulated, on a busy machine
# no checkpoint but those that are asked for: so it is known what a TimeMark's redo begins with
POSTGRES_SETTINGS = {
    "shared_buffers": "32MB",
    "checkpoint_timeout": "1h",
    "max_wal_size": "2GB",
    "dynamic_shared_memory_type": "mmap",
}
MARIADB_SETTINGS = {
    "innodb-buffer-pool-size": "48M",
    "innodb-log-file-size": "16M",
    "innodb-flush-log-at-trx-commit": "1",
    "log-bin": "binlog",
    "sync-binlog": "1",
    "server-id": "1",
    "skip-name-resolve": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainVm:
    """A running VM with the guest agent and `production_writer.py`."""

    guest: Guest
    folder: Path
    disks: dict[str, Path]  # volume → raw image
    agent: Path  # the socket of the guest agent's port
    writer_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductionVm(PlainVm):
    """With databases. `folder` has a password file for each server, of `BACKUP_USER`."""

    postgres: Login
    mariadb: Login

    def password_file(self, server: str) -> Path:
        """Of `BACKUP_USER` with `postgres` or `mariadb`."""
        return self.folder / f"{server}.password"

    def wal_position(self) -> int:
        """PostgreSQL's, in bytes: what is written from now on lies behind it."""
        with connect_postgres(self.postgres) as connection:
            row = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
        assert row is not None  # noqa: S101 - a SELECT without FROM has one row
        return int(row[0])


@contextmanager
def production_vm(
    folder: Path, pool: Path, *, memory_mib: int = 1536, disk_bytes: int = 1 << 30
) -> Iterator[ProductionVm]:
    """Booted, its databases answering. `folder` is a short path that other users can reach; the
    disks are made in `pool`."""
    passwords = {name: secrets.token_hex(16) for name in (_WRITER, BACKUP_USER)}
    for server in ("postgres", "mariadb"):
        path = folder / f"{server}.password"
        path.touch(mode=0o600)
        path.write_text(passwords[BACKUP_USER] + "\n")
    # not in `folder`: the guest has a /dev/shm of its own
    with tempfile.TemporaryDirectory(prefix="templates") as name:
        templates = Path(name)
        templates.chmod(0o755)
        _make_postgres(templates / "postgres", folder / "p", passwords)
        _make_mariadb(templates / "mariadb", folder / "m", passwords)
        with plain_vm(
            folder, pool, memory_mib=memory_mib, disk_bytes=disk_bytes, visible=[templates]
        ) as plain:
            servers = _start_databases(plain.guest, templates)
            vm = ProductionVm(
                guest=plain.guest,
                folder=folder,
                disks=plain.disks,
                agent=plain.agent,
                writer_port=plain.writer_port,
                postgres=_login(plain.guest.forward(_POSTGRES_PORT), passwords),
                mariadb=_login(plain.guest.forward(_MARIADB_PORT), passwords),
            )
            _wait(servers, "postgres", lambda: connect_postgres(vm.postgres).close())
            _wait(servers, "mariadb", lambda: connect_mariadb(vm.mariadb).close())
            yield vm


@contextmanager
def plain_vm(
    folder: Path,
    pool: Path,
    *,
    memory_mib: int = 320,
    disk_bytes: int = 320 << 20,
    visible: Sequence[Path] = (),
) -> Iterator[PlainVm]:
    """The same without databases. XFS needs 300 MiB."""
    disks = {volume: pool / f"{volume}.raw" for volume in POINTS}
    for path in disks.values():
        with path.open("xb") as out:
            out.truncate(disk_bytes)
    logs, agent = folder / "guest", folder / "agent.sock"
    logs.mkdir()
    with Guest(
        logs, memory_mib=memory_mib, visible=visible, ports={guest_agent.PORT: agent}
    ) as guest:
        _make_file_systems(guest, disks)
        guest_agent.start_agent(guest, agent)
        _start_writer(guest)
        yield PlainVm(
            guest=guest,
            folder=folder,
            disks=disks,
            agent=agent,
            writer_port=guest.forward(_WRITER_PORT),
        )


def _login(port: int, passwords: dict[str, str]) -> Login:
    return Login(port=port, user=_WRITER, password=passwords[_WRITER], database=DATABASE)


# -- made on this machine, which is quicker than the guest ---------------------------------------


def _make_postgres(data: Path, run_dir: Path, passwords: dict[str, str]) -> None:
    """A cluster with the tables, and users who may come over the guest's network."""
    postgres.make_cluster(data)
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.0.2.0/24 scram-sha-256\n")
    with running_postgres(data, run_dir, {"fsync": "off"}) as server:
        for user, password in passwords.items():
            server.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
        server.execute(f"GRANT pg_checkpoint TO {BACKUP_USER}")
        server.execute(f"CREATE DATABASE {DATABASE} OWNER {_WRITER}")
        with server.connect(dbname=DATABASE) as connection, connection.cursor() as cursor:
            _make_tables(cursor)
            cursor.execute(f"GRANT ALL ON account, ledger TO {_WRITER}".encode())
            cursor.execute("CREATE EXTENSION amcheck")


def _make_mariadb(data: Path, run_dir: Path, passwords: dict[str, str]) -> None:
    """The same for MariaDB."""
    mariadb.make_database(data)
    with running_mariadb(data, run_dir) as server:
        for user, password in passwords.items():
            server.execute(f"CREATE USER {user}@'%' IDENTIFIED BY '{password}'")
        server.execute(f"GRANT RELOAD, PROCESS, BINLOG MONITOR ON *.* TO {BACKUP_USER}@'%'")
        server.execute(f"CREATE DATABASE {DATABASE}")
        server.execute(f"GRANT ALL ON {DATABASE}.* TO {_WRITER}@'%'")
        with server.connect(database=DATABASE) as connection, connection.cursor() as cursor:
            _make_tables(cursor)
            connection.commit()


def _make_tables(cursor: Any) -> None:
    """Through either driver."""
    for statement in TABLES:
        cursor.execute(statement)
    accounts = [(number,) for number in range(1, ACCOUNTS + 1)]
    cursor.executemany("INSERT INTO account VALUES (%s, 0)", accounts)


# -- in the guest ----------------------------------------------------------------------------------


def _make_file_systems(guest: Guest, disks: dict[str, Path]) -> None:
    first, second = guest.attach(disks[EXT4]), guest.attach(disks[XFS])
    guest.shell(
        f"""
        mkfs.ext4 -q {first} & mkfs.xfs -q {second} & wait -n; wait -n
        mkdir -p {POINTS[EXT4]} {POINTS[XFS]}
        mount {first} {POINTS[EXT4]}; mount {second} {POINTS[XFS]}
        """,
        timeout_s=_START_S,
    )


def _start_writer(guest: Guest) -> None:
    argv = ["/usr/bin/python3", "-I", "-S", production_writer.__file__, guest.address]
    writer = guest.start([*argv, str(_WRITER_PORT), POINTS[EXT4], POINTS[XFS]])
    for line in writer.lines(time.monotonic() + _START_S):
        if line == "ready":
            return
    said = writer.stderr.decode(errors="replace")
    raise UnavailableError(f"the writer in the guest is not ready: {writer.failure}{said}")


def _start_databases(guest: Guest, templates: Path) -> dict[str, RemoteCommand]:
    guest.shell(
        f"""
        cp -a {templates}/postgres {POINTS[EXT4]} & cp -a {templates}/mariadb {POINTS[XFS]} &
        wait -n; wait -n; sync
        """,
        timeout_s=_START_S,
    )
    as_user = ["setpriv", "--init-groups", "--reuid"]
    one = [*as_user, postgres.USER, "--regid", postgres.USER, postgres.program("postgres")]
    one += ["-D", f"{POINTS[EXT4]}/postgres", "-k", "/tmp"]  # noqa: S108 - the guest's own
    one += ["-p", str(_POSTGRES_PORT), "-c", f"listen_addresses={guest.address}"]
    for name, value in POSTGRES_SETTINGS.items():
        one += ["-c", f"{name}={value}"]
    two = [*as_user, mariadb.USER, "--regid", mariadb.USER, "mariadbd", "--no-defaults"]
    two += [f"--datadir={POINTS[XFS]}/mariadb", "--socket=/tmp/mariadb.sock"]
    two += [f"--port={_MARIADB_PORT}", f"--bind-address={guest.address}"]
    two += [f"--{name}={value}" for name, value in MARIADB_SETTINGS.items()]
    return {"postgres": guest.start(one), "mariadb": guest.start(two)}


def _wait(servers: dict[str, RemoteCommand], name: str, connect: Callable[[], None]) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            connect()
        except (psycopg.OperationalError, pymysql.OperationalError) as error:
            server = servers[name]
            if server.ended or time.monotonic() > until:
                said = server.stderr.decode(errors="replace")[-2000:]
                raise UnavailableError(f"{name} in the guest does not answer: {said}") from error
            time.sleep(0.1)
        else:
            return


def reflink_copy(source: Path, target: Path) -> Path:
    """A writable copy that shares the blocks of an image, in the same pool."""
    run(["cp", "--reflink=always", "--no-preserve=mode", str(source), str(target)])
    return target
