"""PostgreSQL: a CHECKPOINT right before the freeze, so that recovery has little to redo.

Nothing is held: the WAL is written before a commit is acknowledged, so a frozen file system has
all of it, and a start from the snapshot is what follows a power cut, with a short redo. There is no
backup label: a snapshot between pg_backup_start and pg_backup_stop, started with its label, waits
for a stop record that it does not have ("WAL ends before end of online backup").
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import psycopg

from offload.configs.quiesce import PostgresqlApplication
from offload.errors import UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers.database import (
    AUTHORITIES,
    cut_off,
    failed,
    on_this_machine,
    one_line,
    unreachable,
)
from offload.secret_file import read_secret

_CONNECT_S = 10
_GRANT_SINCE = 150000  # server_version_num: the role pg_checkpoint is of PostgreSQL 15
_FACTS = """
SELECT current_setting('server_version'), current_setting('server_version_num')::int,
    pg_is_in_recovery(), current_setting('fsync') = 'on',
    current_setting('synchronous_commit'), current_setting('data_checksums') = 'on', rolsuper
FROM pg_catalog.pg_roles WHERE rolname = current_user
"""
_MAY_CHECKPOINT = "SELECT pg_has_role(current_user, 'pg_checkpoint', 'USAGE')"
_DATABASES = (
    "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND NOT datistemplate ORDER BY 1"
)
_REDO = """
SELECT redo_lsn::text, pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery()
    THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END, redo_lsn)::bigint
FROM pg_control_checkpoint()
"""

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the server says of itself."""

    version: str
    standby: bool
    fsync: bool
    synchronous_commit: str
    checksums: bool
    may_checkpoint: bool


class PostgresqlPart:
    """One `kind = "postgresql"` entry."""

    kind = "postgresql"
    image_at = None
    holds_nothing = True
    unbroken = True  # nothing is held that could break

    def __init__(self, vm: str, entry: PostgresqlApplication, instance: Instance) -> None:  # noqa: ARG002
        self._entry = entry
        self.name = f"postgresql:{entry.user}@{entry.host}:{entry.port}"
        self._connection: Connection | None = None
        self._facts: _Facts | None = None
        self._first_ms = 0.0
        self._checkpoint = ""
        self.what: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ConfigError (the password's file), UnavailableError (`application-unreachable`,
        `application-refused`, `not-durable`)."""
        connection = self._connect()
        try:
            self._facts = self._look(connection)
        finally:
            connection.close()
        if not self._facts.may_checkpoint:
            raise UnavailableError(
                f"{self.name}: this role may not CHECKPOINT",
                code="application-refused",
                hint=f"GRANT pg_checkpoint TO {self._entry.user} (PostgreSQL 15 and later); "
                "before, only a superuser may",
            )
        if not self._facts.fsync:
            raise UnavailableError(
                f"{self.name} runs with fsync=off: what it acknowledges may not be on disk",
                code="not-durable",
                hint="turn fsync on, or accept a lower consistency for this VM",
            )

    def _connect(self) -> Connection:
        """Each statement its own transaction."""
        entry = self._entry
        secret = read_secret(entry.password_file, "password") if entry.password_file else None
        mode = entry.sslmode or ("disable" if on_this_machine(entry.host) else "verify-full")
        authorities = entry.sslrootcert
        if authorities is None and mode.startswith(
            "verify"
        ):  # with `require` libpq would verify too
            authorities = AUTHORITIES
        try:
            return psycopg.connect(
                host=entry.host,
                port=entry.port,
                user=entry.user,
                dbname=entry.database,
                password=secret.get_secret_value() if secret else None,
                sslmode=mode,
                sslrootcert=str(authorities) if authorities else None,
                gssencmode="disable",
                connect_timeout=_CONNECT_S,
                application_name="offload",
                autocommit=True,
            )
        except psycopg.Error as error:
            raise unreachable(
                self.name, error, "look at host, port, user, password_file and its pg_hba.conf"
            ) from error

    def _look(self, connection: Connection) -> _Facts:
        until = time.monotonic() + _CONNECT_S
        try:
            with cut_off(connection.fileno(), until):
                row = connection.execute(_FACTS).fetchone()
                if row is None:
                    raise UnavailableError(f"{self.name}: an unknown role", code="freeze-failed")
                version, number, standby, fsync, commit, checksums, superuser = row
                may = superuser
                if not superuser and number >= _GRANT_SINCE:
                    ((may,),) = connection.execute(_MAY_CHECKPOINT).fetchall()
        except psycopg.Error as error:
            raise failed(self.name, "looking at it", error, until) from error
        return _Facts(
            version=version.split()[0],
            standby=standby,
            fsync=fsync,
            synchronous_commit=commit,
            checksums=checksums,
            may_checkpoint=may,
        )

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """None: nothing is held."""
        return []

    def arm(self, deadline_s: float) -> None:  # noqa: ARG002 - no timer is needed
        """Connect, and a first CHECKPOINT, which writes most of what the second would have to."""
        self._connection = self._connect()
        self._first_ms = self._flush(time.monotonic() + self._entry.timeout_s)

    def _flush(self, until: float) -> float:
        """CHECKPOINT; returns its milliseconds."""
        began = time.monotonic()
        try:
            with cut_off(self._armed.fileno(), until):
                self._armed.execute("CHECKPOINT")
        except psycopg.Error as error:
            raise failed(self.name, "CHECKPOINT", error, until) from error
        return (time.monotonic() - began) * 1000

    @property
    def _armed(self) -> Connection:
        if self._connection is None:
            raise UnavailableError(f"{self.name} is not connected", code="freeze-failed")
        return self._connection

    def freeze(self, until: float) -> Consistency:
        """The second CHECKPOINT. Raises UnavailableError (`freeze-failed`, `freeze-late`)."""
        until = min(until, time.monotonic() + self._entry.timeout_s)
        took_ms = self._flush(until)
        try:
            with cut_off(self._armed.fileno(), until):
                self.what = tuple(name for (name,) in self._armed.execute(_DATABASES))
        except psycopg.Error as error:
            raise failed(self.name, "CHECKPOINT", error, until) from error
        self._checkpoint = (
            f"CHECKPOINT in {took_ms:.0f} ms (before it one of {self._first_ms:.0f} ms)"
            + self._redo(until)
        )
        return Consistency.APPLICATION

    def _redo(self, until: float) -> str:
        """Where recovery begins; who may not look there does without."""
        try:
            with cut_off(self._armed.fileno(), until):
                row = self._armed.execute(_REDO).fetchone()
        except psycopg.Error as error:
            return f", redo position not known: {one_line(error)}"
        return f", redo from {row[0]}, {row[1]} bytes of WAL since" if row else ""

    def still_frozen(self) -> bool:
        """True: nothing is held. While file systems are frozen the server is not asked."""
        return True

    def thaw(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()

    @property
    def output(self) -> str:
        """Version, CHECKPOINT, and what may surprise at a restore."""
        facts = self._facts
        if facts is None:
            return ""
        said = [f"PostgreSQL {facts.version}"]
        if self._checkpoint:
            said.append(self._checkpoint)
        if facts.standby:
            said.append("a standby: its CHECKPOINT is a restartpoint of the primary's last one")
        if facts.synchronous_commit == "off":
            said.append("synchronous_commit=off: the last commits may be missing")
        if not facts.checksums:
            said.append("pages without checksums")
        return "; ".join(said)
