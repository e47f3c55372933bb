"""The databases of a production VM, started on copies of a TimeMark's images."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.run import require_program, run
from offload.testing import postgres
from offload.testing.daemon import as_user
from offload.testing.mariadb import running_mariadb
from offload.testing.postgres import running_postgres
from offload.testing.production import DATABASE
from offload.testing.production_images import Points, number_faults
from offload.testing.production_marks import Taken

_POSTGRES_WRITERS = ("postgres", "postgres-2", "databases")
_MARIADB_WRITERS = ("mariadb", "databases")
_CHECK_S = 300.0
# who knocks before it is ready is told so; that is no fault
_NOT_READY = ("is starting up", "not yet accepting connections")

Ask = Callable[[str], list[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A server that came up on a copy. Positions are bytes of its log.

    `recovery_s` is PostgreSQL's own word for its redo; MariaDB says none: there it is the time from
    the start to the first connection.
    """

    redo_from: int
    redo_to: int
    recovery_s: float
    numbers: Mapping[str, frozenset[int]]  # of each writer
    faults: tuple[str, ...]

    @property
    def redo_bytes(self) -> int:
        """What was replayed."""
        return self.redo_to - self.redo_from


def start_postgres(taken: Taken, points: Points, run_dir: Path) -> Started:
    """It recovers, answers, and every page and index is checked. Raises UnavailableError where it
    does not come up."""
    data = points.ext4 / "postgres"
    (data / "postmaster.pid").unlink()  # its process is of the VM, here another may have its id
    with running_postgres(data, run_dir) as server:

        def ask(statement: str) -> list[tuple[Any, ...]]:
            with server.connect(dbname=DATABASE) as connection:
                return connection.execute(statement.encode()).fetchall()

        numbers, faults = _ledger(taken, _POSTGRES_WRITERS, ask)
        amcheck = [postgres.program("pg_amcheck"), "--all", "--install-missing", "--heapallindexed"]
        amcheck += ["-h", str(run_dir), "-p", str(server.port), "-U", postgres.USER]
        done = run(as_user(postgres.USER, amcheck), check=False, timeout_s=_CHECK_S, cwd=Path("/"))
        if done.status != 0:
            faults.append(f"pg_amcheck: {(done.stdout + done.stderr).strip()}")
        log = server.log.read_text(errors="replace")
    faults += [f"postgresql: {line}" for line in log.splitlines() if _is_error(line)]
    began = re.search(r"redo starts at ([0-9A-F]+/[0-9A-F]+)", log)
    ended = re.search(r"redo done at ([0-9A-F]+/[0-9A-F]+) .*elapsed: ([\d.]+) s", log)
    here = _lsn(began[1]) if began else 0
    return Started(
        redo_from=here,
        redo_to=_lsn(ended[1]) if ended else here,
        recovery_s=float(ended[2]) if ended else 0.0,
        numbers=numbers,
        faults=tuple(faults),
    )


def start_mariadb(taken: Taken, points: Points, run_dir: Path) -> Started:
    """It recovers, answers, and every table is checked. Raises UnavailableError where it does not
    come up."""
    since = time.monotonic()
    with running_mariadb(points.xfs / "mariadb", run_dir) as server:
        started_s = time.monotonic() - since

        def ask(statement: str) -> list[tuple[Any, ...]]:
            with server.connect(database=DATABASE) as connection, connection.cursor() as cursor:
                cursor.execute(statement)
                return list(cursor.fetchall())

        numbers, faults = _ledger(taken, _MARIADB_WRITERS, ask)
        check = [require_program("mariadb-check", "mariadb-client"), "--no-defaults"]
        check += ["--all-databases", "--extended", "-u", "root", f"--socket={server.socket}"]
        done = run(check, check=False, timeout_s=_CHECK_S)
        bad = [line for line in done.stdout.splitlines() if re.search(r"(?i)error|corrupt", line)]
        if done.status != 0 or bad:
            faults.append(f"mariadb-check: {done.stderr.strip()} {bad}")
        log = server.log.read_text(errors="replace")
    faults += [f"mariadb: {line}" for line in log.splitlines() if "[ERROR]" in line]
    began = re.search(r"crash recovery from checkpoint LSN=(\d+)", log)
    ended = re.search(r"log sequence number (\d+)", log)
    here = int(began[1]) if began else 0
    return Started(
        redo_from=here,
        redo_to=int(ended[1]) if began and ended else here,
        recovery_s=started_s,
        numbers=numbers,
        faults=tuple(faults),
    )


def disagreement(first: Started, second: Started) -> list[str]:
    """The writer that commits each number in PostgreSQL, then in MariaDB: at any instant the first
    is at the same number, or one ahead."""
    ahead = max(first.numbers["databases"], default=0) - max(second.numbers["databases"], default=0)
    return [] if ahead in {0, 1} else [f"cross-volume tear: PostgreSQL is {ahead} ahead"]


def _ledger(
    taken: Taken, writers: tuple[str, ...], ask: Ask
) -> tuple[dict[str, frozenset[int]], list[str]]:
    """The numbers of each writer, and what is wrong with them: each transaction is there whole, or
    not at all."""
    rows = ask("SELECT writer, number FROM ledger")
    numbers = {w: frozenset(int(n) for name, n in rows if name == w) for w in writers}
    faults = [f for w in writers for f in number_faults(w, set(numbers[w]), taken)]
    ((balance,),) = ask("SELECT SUM(balance) FROM account")
    if balance != sum(number for _, number in rows):
        faults.append(f"half a transaction: the balance is {balance}")
    return numbers, faults


def _is_error(line: str) -> bool:
    found = re.search(r"\b(PANIC|FATAL|ERROR):", line)
    return found is not None and not any(text in line for text in _NOT_READY)


def _lsn(text: str) -> int:
    """A position in the WAL as bytes: https://www.postgresql.org/docs/15/datatype-pg-lsn.html"""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)
