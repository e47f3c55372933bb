"""The load of a production VM: writers that count, on this side of the wire.

Each writer commits the numbers 1, 2, 3 … and keeps two counts in this process's memory, outside
of anything that is frozen:

- `begun` is raised before anything of a number leaves this process: no image of the VM can hold a
  number above it;
- `acknowledged` is raised after the VM has confirmed that the number is durable.

So no clock is needed to judge a TimeMark. `acknowledged` is read before the command starts: all
numbers up to it must be in the image. `begun` is read when all writers are held: none above it may
be there, for whatever was begun later was written after the snapshot.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import psycopg
import pymysql
from pymysql.connections import Connection
from pymysql.cursors import Cursor

from offload.errors import OffloadError, UnavailableError

ACCOUNTS = 500
TABLES = (
    "CREATE TABLE account (id INTEGER PRIMARY KEY, balance BIGINT NOT NULL)",
    (
        "CREATE TABLE ledger (writer VARCHAR(20) NOT NULL, number BIGINT NOT NULL, "
        "PRIMARY KEY (writer, number))"
    ),
)
UPDATE = "UPDATE account SET balance = balance + %s WHERE id = %s"
INSERT = "INSERT INTO ledger VALUES (%s, %s)"
_ANSWER_S = 180.0  # of a guest in emulation, on a busy machine
_CONNECT_S = 60
_STRIDE = 7919  # a prime: accounts in no order

Commit = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """A database server of the VM, as it is reached from here."""

    port: int  # of 127.0.0.1
    user: str
    password: str = field(repr=False)
    database: str = "shop"


class Writer:
    """Commits numbers, one after another, in a thread of its own."""

    def __init__(self, name: str, commit: Commit) -> None:
        self.name = name
        self.begun = 0
        self.acknowledged = 0
        self.error: Exception | None = None
        self._commit = commit
        self._stop = threading.Event()
        self.moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"writer {name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """After the number that it is at."""
        self._stop.set()

    def join(self) -> None:
        """Wait for its end. Raises what ended it."""
        self._thread.join()
        self.check()

    def check(self) -> None:
        """UnavailableError if it has failed."""
        if self.error is not None:
            raise UnavailableError(f"the writer {self.name} failed: {self.error}") from self.error

    def wait_for(self, number: int, timeout_s: float) -> None:
        """Until this number is acknowledged. UnavailableError if it fails, or is late."""
        with self.moved:
            done = self.moved.wait_for(
                lambda: self.acknowledged >= number or self.error is not None, timeout_s
            )
        self.check()
        if not done:
            raise UnavailableError(f"the writer {self.name} has stopped at {self.acknowledged}")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.begun += 1
                self._commit(self.begun)
                with self.moved:
                    self.acknowledged = self.begun
                    self.moved.notify_all()
        except (OSError, OffloadError, psycopg.Error, pymysql.MySQLError) as error:
            with self.moved:
                self.error = error
                self.moved.notify_all()


class Load:
    """All writers of a VM."""

    def __init__(self, writers: Mapping[str, Commit]) -> None:
        self._writers = {name: Writer(name, commit) for name, commit in writers.items()}

    @property
    def begun(self) -> dict[str, int]:
        """The count of each writer."""
        return {name: writer.begun for name, writer in self._writers.items()}

    @property
    def acknowledged(self) -> dict[str, int]:
        """The count of each writer."""
        return {name: writer.acknowledged for name, writer in self._writers.items()}

    def wait_more(self, count: int, timeout_s: float = _ANSWER_S) -> None:
        """Until each writer has so many more acknowledged than now."""
        goals = {name: number + count for name, number in self.acknowledged.items()}
        for name, goal in goals.items():
            self._writers[name].wait_for(goal, timeout_s)

    def check(self) -> None:
        """UnavailableError if one has failed."""
        for writer in self._writers.values():
            writer.check()

    def __enter__(self) -> Self:
        for writer in self._writers.values():
            writer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers.values():
            writer.stop()
        for writer in self._writers.values():
            if error is None:
                writer.join()
            else:
                with contextlib.suppress(UnavailableError):  # the first error is the one to tell
                    writer.join()


# -- what they write to ----------------------------------------------------------------------------


class Orders:
    """A client of `production_writer.py` in the guest. `digests`: of each number acknowledged."""

    def __init__(self, port: int, kind: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")
        self._kind = kind
        self.digests: dict[int, str] = {}

    def commit(self, number: int) -> None:
        """Have it written. OSError, UnavailableError."""
        self._socket.sendall(f"{self._kind} {number}\n".encode())
        answered, _, digest = self._answers.readline().decode().strip().partition(" ")
        if answered != str(number):
            raise UnavailableError(f"the guest did not write {self._kind} {number}: {answered!r}")
        self.digests[number] = digest

    def close(self) -> None:
        """Hang up."""
        self._answers.close()
        self._socket.close()


def connect_postgres(login: Login) -> psycopg.Connection[Any]:
    """Each statement its own transaction."""
    return psycopg.connect(
        host="127.0.0.1",
        port=login.port,
        user=login.user,
        password=login.password,
        dbname=login.database,
        sslmode="disable",
        connect_timeout=_CONNECT_S,
        autocommit=True,
    )


def connect_mariadb(login: Login) -> Connection[Cursor]:
    """Nothing is committed by itself."""
    return pymysql.connect(
        host="127.0.0.1",
        port=login.port,
        user=login.user,
        password=login.password,
        database=login.database,
        connect_timeout=_CONNECT_S,
        read_timeout=_ANSWER_S,
    )


def account_of(number: int) -> int:
    """Which account a transaction changes."""
    return number * _STRIDE % ACCOUNTS + 1


@contextmanager
def postgres_writer(name: str, login: Login) -> Iterator[Commit]:
    """Transactions that move an account and note it in the ledger."""
    with connect_postgres(login) as connection:

        def commit(number: int) -> None:
            with connection.transaction():
                connection.execute(UPDATE, (number, account_of(number)))
                connection.execute(INSERT, (name, number))

        yield commit


@contextmanager
def mariadb_writer(name: str, login: Login) -> Iterator[Commit]:
    """The same for MariaDB."""
    connection = connect_mariadb(login)

    def commit(number: int) -> None:
        with connection.cursor() as cursor:
            cursor.execute(UPDATE, (number, account_of(number)))
            cursor.execute(INSERT, (name, number))
        connection.commit()

    with connection:
        yield commit


@contextmanager
def order_writer(port: int, kind: str) -> Iterator[Orders]:
    """Files, pairs or rows."""
    orders = Orders(port, kind)
    try:
        yield orders
    finally:
        orders.close()


@contextmanager
def full_load(writer_port: int, postgres: Login, mariadb: Login) -> Iterator[tuple[Load, Orders]]:
    """All kinds of writers; with the load, the files that were written.

    | writer | what it writes |
    | --- | --- |
    | postgres, postgres-2 | transactions on the disk with ext4 |
    | mariadb | transactions on the disk with XFS |
    | databases | the same number in a transaction there, then in one here |
    | pair | the same numbers on both disks, the one after the other |
    | file | small files on both |
    | row | rows of an SQLite database |
    """
    with ExitStack() as stack:
        on: Callable[[Any], Any] = stack.enter_context
        first = on(postgres_writer("databases", postgres))
        second = on(mariadb_writer("databases", mariadb))

        def both(number: int) -> None:
            first(number)
            second(number)

        files = on(order_writer(writer_port, "file"))
        writers: dict[str, Commit] = {
            "postgres": on(postgres_writer("postgres", postgres)),
            "postgres-2": on(postgres_writer("postgres-2", postgres)),
            "mariadb": on(mariadb_writer("mariadb", mariadb)),
            "databases": both,
            "pair": on(order_writer(writer_port, "pair")).commit,
            "file": files.commit,
            "row": on(order_writer(writer_port, "row")).commit,
        }
        yield on(Load(writers)), files
