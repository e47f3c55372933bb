"""MariaDB and MySQL: commits wait from before the freeze to after the thaw.

MariaDB since 10.4 by `BACKUP STAGE` (mariadb.com/kb/en/backup-stage), others by `FLUSH TABLES WITH
READ LOCK`. Either lock belongs to the session: the server lets go when the connection ends, be it
that we were killed, or that we hang and `wait_timeout` has passed.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

import pymysql
from pymysql.connections import Connection
from pymysql.cursors import Cursor

from offload.configs.quiesce import MysqlApplication
from offload.errors import ConfigError, UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers.database import (
    AUTHORITIES,
    cut_off,
    failed,
    hung_up,
    on_this_machine,
    one_line,
    unreachable,
)
from offload.secret_file import read_secret

_CONNECT_S = 10
_ARMED_S = 600.0
_THAW_S = 5.0
_BACKUP_STAGE_SINCE = (10, 4)
_STAGES = ("START", "FLUSH", "BLOCK_DDL", "BLOCK_COMMIT")
_BINARY_LOG_STATUS_SINCE = (8, 2)  # of MySQL, in place of SHOW MASTER STATUS
_MAY_NOT = frozenset({1044, 1142, 1227})  # ER_DBACCESS_DENIED, ER_TABLEACCESS_, ER_SPECIFIC_
_NEEDS = 1227  # ER_SPECIFIC_ACCESS_DENIED_ERROR
_LSN = "SHOW GLOBAL STATUS WHERE Variable_name IN ('Innodb_lsn_current', 'Innodb_lsn_flushed')"
_LOOK_S = 0.02
_OF_THE_SERVER = frozenset({"information_schema", "mysql", "performance_schema", "sys"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the server says of itself. `flush_at_commit`: innodb_flush_log_at_trx_commit."""

    version: str
    number: tuple[int, int]
    mariadb: bool
    binary_log: bool
    flush_at_commit: int
    sync_binlog: int

    @property
    def stages(self) -> bool:
        """Whether it has BACKUP STAGE."""
        return self.mariadb and self.number >= _BACKUP_STAGE_SINCE

    @property
    def server(self) -> str:
        """Its name."""
        return ("MariaDB " if self.mariadb else "MySQL ") + self.version

    def describe(self) -> str:
        """For the report."""
        said = self.server
        if self.flush_at_commit != 1:
            said += f"; innodb_flush_log_at_trx_commit={self.flush_at_commit}"
        if self.binary_log and self.sync_binlog != 1:
            said += f"; sync_binlog={self.sync_binlog}"
        return said


class _Session:
    """A connection that can be watched, and cut off, from outside of the library."""

    def __init__(self, name: str, entry: MysqlApplication) -> None:
        """Raises ConfigError (files), UnavailableError (`application-unreachable`)."""
        secret = read_secret(entry.password_file, "password") if entry.password_file else None
        context = _tls(entry)
        hint = "look at host, port, user, password_file and the account's host"
        try:
            self._watched = _dial(entry)
        except OSError as error:
            raise unreachable(name, error, hint) from error
        self._connection: Connection[Cursor] = pymysql.connect(
            host=entry.host,
            user=entry.user,
            password=secret.get_secret_value() if secret else "",
            ssl=context,
            ssl_disabled=context is None,
            autocommit=True,
            program_name="offload",
            defer_connect=True,
        )
        try:
            with cut_off(self._watched.fileno(), time.monotonic() + _CONNECT_S):
                self._connection.connect(self._watched.dup())
        except (pymysql.MySQLError, OSError) as error:
            self._watched.close()
            raise unreachable(name, error, hint) from error

    def query(self, statement: str, until: float) -> list[tuple[Any, ...]]:
        """All rows; raises MySQLError, also where there is no answer by `until`."""
        with cut_off(self._watched.fileno(), until), self._connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    @property
    def lost(self) -> bool:
        """Whether the server has ended it."""
        return hung_up(self._watched.fileno())

    def close(self) -> None:
        """The server lets go of what the session held."""
        with contextlib.suppress(pymysql.MySQLError):
            self._connection.close()
        self._watched.close()


def _dial(entry: MysqlApplication) -> socket.socket:
    if entry.host.startswith("/"):
        made = socket.socket(socket.AF_UNIX)
        try:
            made.settimeout(_CONNECT_S)
            made.connect(entry.host)
        except OSError:
            made.close()
            raise
        return made
    made = socket.create_connection((entry.host, entry.port), _CONNECT_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _tls(entry: MysqlApplication) -> ssl.SSLContext | None:
    """None: in plain."""
    mode = entry.tls or ("off" if on_this_machine(entry.host) else "verify")
    if mode == "off":
        return None
    authorities = entry.ca_file or AUTHORITIES
    try:
        context = ssl.create_default_context(cafile=str(authorities))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot read the authorities in {authorities}: {error}", code="bad-certificate"
        ) from error
    if mode == "require":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class MysqlPart:
    """One `kind = "mysql"` entry."""

    kind = "mysql"
    image_at = None

    def __init__(self, vm: str, entry: MysqlApplication, instance: Instance) -> None:  # noqa: ARG002
        self._entry = entry
        place = entry.host if entry.host.startswith("/") else f"{entry.host}:{entry.port}"
        self.name = f"mysql:{entry.user}@{place}"
        self._session: _Session | None = None
        self._facts: _Facts | None = None
        self._held = False
        self._said: list[str] = []
        self._flushed = ""
        self.what: tuple[str, ...] = ()
        self.unbroken = True

    def check(self) -> None:
        """Raises ConfigError (files), UnavailableError (`application-unreachable`,
        `application-refused`)."""
        until = time.monotonic() + _CONNECT_S
        session = _Session(self.name, self._entry)
        try:
            self._facts = self._look(session, until)
            granted = session.query("SHOW GRANTS", until)
        except pymysql.MySQLError as error:
            raise failed(self.name, "looking at it", error, until) from error
        finally:
            session.close()
        needed = {"ALL PRIVILEGES", "RELOAD"} | (set() if self._facts.stages else {"FLUSH_TABLES"})
        if not needed & _global_privileges([str(row[0]) for row in granted]):
            raise UnavailableError(
                f"{self.name}: this account may not hold commits",
                code="application-refused",
                hint=f"GRANT RELOAD ON *.* TO {self._entry.user}@…",
            )

    def _look(self, session: _Session, until: float) -> _Facts:
        ((version, binary_log, flush, sync),) = session.query(
            "SELECT VERSION(), @@GLOBAL.log_bin, @@GLOBAL.innodb_flush_log_at_trx_commit, "
            "@@GLOBAL.sync_binlog",
            until,
        )
        # for old clients, MariaDB 10 says that it is a 5.5.5
        found = re.match(r"(?:5\.5\.5-)?((\d+)\.(\d+)[\d.]*)", version)
        text, major, minor = found.groups() if found else (version, "0", "0")
        return _Facts(
            version=text,
            number=(int(major), int(minor)),
            mariadb="mariadb" in version.lower(),
            binary_log=bool(binary_log),
            flush_at_commit=int(flush),
            sync_binlog=int(sync),
        )

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """None: the lock goes with the connection."""
        return []

    def arm(self, deadline_s: float) -> None:  # noqa: ARG002 - the timer is set by `freeze`
        """Connect. Nothing is held yet: the session may wait for others that are armed."""
        if self._facts is not None:
            self._checkpoint(self._facts)
        until = time.monotonic() + _CONNECT_S
        self._session = _Session(self.name, self._entry)
        try:
            self._facts = self._look(self._session, until)
            self._dead_man(self._session, time.monotonic() + _ARMED_S, until)
            # the redo log, in advance: under BLOCK_COMMIT there is little left of it
            self._session.query("FLUSH LOCAL ENGINE LOGS", until)
        except pymysql.MySQLError as error:
            self.close()
            raise failed(self.name, "getting ready", error, until) from error

    def _checkpoint(self, facts: _Facts) -> None:
        """Have InnoDB write back what is changed, so that a start from the image has little to
        redo. Nobody waits for it, and nothing depends on it: in a session of its own, which ends
        where it takes too long. MySQL knows it in debug builds only."""
        if not facts.mariadb:
            return
        began = time.monotonic()
        session = _Session(self.name, self._entry)
        try:
            session.query(
                "SET GLOBAL innodb_log_checkpoint_now = ON", began + self._entry.timeout_s
            )
        except pymysql.MySQLError as error:
            grant = " (grant SUPER for a shorter redo)" if error.args[:1] == (_NEEDS,) else ""
            self._flushed = f"no checkpoint{grant}: {one_line(error)}"
        else:
            self._flushed = f"checkpoint in {(time.monotonic() - began) * 1000:.0f} ms"
        finally:
            session.close()

    def _dead_man(self, session: _Session, deadline: float, until: float) -> None:
        left_s = max(1, math.ceil(deadline - time.monotonic()))
        session.query(f"SET SESSION wait_timeout = {left_s}", until)

    def freeze(self, until: float) -> Consistency:
        """Take the lock. Raises UnavailableError (`freeze-failed`, `freeze-late`,
        `not-durable`); then the session is ended, and with it what it held."""
        session, facts = self._session, self._facts
        if session is None or facts is None:
            raise UnavailableError(f"{self.name} is not connected", code="freeze-failed")
        limit = min(until, time.monotonic() + self._entry.timeout_s)
        began = time.monotonic()
        try:
            patience_s = max(1, math.ceil(limit - began))
            session.query(f"SET SESSION lock_wait_timeout = {patience_s}", limit)
            self._dead_man(session, until, limit)
            for statement in _locking(facts):
                session.query(statement, limit)
            took_ms = (time.monotonic() - began) * 1000
            _write_redo(session, facts, limit)
            self._dead_man(session, until, limit)
            place = _position(session, facts, limit)
            names = [str(row[0]) for row in session.query("SHOW DATABASES", limit)]
        except pymysql.MySQLError as error:
            self.close()
            raise failed(self.name, "the lock", error, limit) from error
        except UnavailableError:
            self.close()
            raise
        self._held = True
        seen = tuple(name for name in names if name not in _OF_THE_SERVER)
        self.what = seen or (facts.server,)  # the account may see none
        how = "BACKUP STAGE BLOCK_COMMIT" if facts.stages else "FLUSH TABLES WITH READ LOCK"
        if self._flushed:
            self._said.append(self._flushed)
        self._said.append(f"{how} in {took_ms:.0f} ms")
        if place:
            self._said.append(place)
        return Consistency.APPLICATION

    def still_frozen(self) -> bool:
        """Whether the server has not ended the session. It is asked in words at the thaw: while
        its file systems are frozen it may be unable to answer (general_log)."""
        if not self._held or self._session is None:
            return False
        if self._session.lost:
            self._break("the server ended the session that held it")
        return self.unbroken

    def _break(self, why: str) -> None:
        if self.unbroken:
            self._said.append(f"not held all the time: {why}")
        self.unbroken = False

    def thaw(self) -> None:
        """Let go; the server's answer proves that this session held on until now. Raises
        UnavailableError (`thaw-failed`) where the server does not answer."""
        if not self._held or self._session is None or self._facts is None:
            return
        self._held = False
        until = time.monotonic() + _THAW_S
        try:
            self._session.query(
                "BACKUP STAGE END" if self._facts.stages else "UNLOCK TABLES", until
            )
        except pymysql.MySQLError as error:
            self._break("the server did not know of it at the thaw")
            if time.monotonic() >= until:
                raise UnavailableError(
                    f"{self.name} does not answer: commits go on when its session ends",
                    code="thaw-failed",
                    hint="look at the server; wait_timeout ends the session within the deadline",
                ) from error
        finally:
            self.close()

    def close(self) -> None:
        """End the session, which lets go."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    @property
    def output(self) -> str:
        """Version, lock, position in the binary log."""
        if self._facts is None:
            return ""
        return "; ".join([self._facts.describe(), *self._said])


def _locking(facts: _Facts) -> list[str]:
    if facts.stages:
        return [f"BACKUP STAGE {stage}" for stage in _STAGES]
    return ["FLUSH LOCAL TABLES WITH READ LOCK"]


def _write_redo(session: _Session, facts: _Facts, until: float) -> None:
    """Have what was acknowledged, but waits in memory, written. Raises UnavailableError.

    With innodb_flush_log_at_trx_commit=0 MariaDB's FLUSH ENGINE LOGS does nothing; what is written
    every innodb_flush_log_at_timeout seconds is waited for.
    """
    session.query("FLUSH LOCAL ENGINE LOGS", until)
    if not facts.mariadb or facts.flush_at_commit != 0:
        return
    wanted = None
    while True:
        lsn = {name: int(value) for name, value in session.query(_LSN, until)}
        wanted = wanted or lsn["Innodb_lsn_current"]
        if lsn["Innodb_lsn_flushed"] >= wanted:
            return
        if time.monotonic() + 2 * _LOOK_S >= until:
            raise UnavailableError(
                "what was committed is not written in time (innodb_flush_log_at_trx_commit=0)",
                code="not-durable",
                hint="set it to 1 or 2, or innodb_flush_log_at_timeout to a second",
            )
        time.sleep(_LOOK_S)


def _position(session: _Session, facts: _Facts, until: float) -> str:
    """Where the binary log stands, as far as the account may see it; empty without one."""
    if not facts.binary_log:
        return ""
    variable = "gtid_binlog_pos" if facts.mariadb else "gtid_executed"
    ((gtid,),) = session.query(f"SELECT @@GLOBAL.{variable}", until)
    said = [f"GTID {gtid}"] if gtid else []
    new = not facts.mariadb and facts.number >= _BINARY_LOG_STATUS_SINCE
    try:
        rows = session.query("SHOW BINARY LOG STATUS" if new else "SHOW MASTER STATUS", until)
        said += [f"binary log {row[0]}:{row[1]}" for row in rows]
    except pymysql.MySQLError as error:
        if error.args[:1] and error.args[0] not in _MAY_NOT:
            raise
    return ", ".join(said)


def _global_privileges(grants: list[str]) -> set[str]:
    """Of `SHOW GRANTS`, those on everything, roles included."""
    found: set[str] = set()
    for line in grants:
        match = re.match(r"GRANT (.+) ON \*\.\* TO ", line)
        if match:
            found |= {word.strip().upper() for word in match.group(1).split(",")}
    return found
