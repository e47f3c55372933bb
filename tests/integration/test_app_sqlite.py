"""SQLite databases held under writers in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from offload import run
from offload.configs.quiesce import SqliteApplication
from offload.errors import ConfigError, NotFoundError, UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers.sqlite import SqlitePart, lock_owner
from offload.testing.instances import make_instance

ROOT = Path(__file__).parents[2]

WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
number = 0
while True:
    db.execute("INSERT INTO t VALUES (?)", (number,))
    print(number, flush=True)  # acknowledged
    number += 1
    time.sleep(float(sys.argv[2]))
"""

# A transaction that ends at the end of its standard input, in a process of its own: a lock of this
# one would be lost when the part looks at the file.
BUSY = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
db.execute("INSERT INTO t VALUES (1)")
print("begun", flush=True)
sys.stdin.read()
db.execute("COMMIT")
"""

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.integration.test_app_sqlite import part_of
from offload.testing.instances import make_instance
part = part_of(Path(sys.argv[2]), make_instance(Path(sys.argv[3])))
part.arm(60)
part.freeze(time.monotonic() + 60)
print(part._holder.pid, flush=True)
time.sleep(60)
"""


def part_of(path: Path, instance: Instance, timeout_s: float = 5.0) -> SqlitePart:
    entry = SqliteApplication(kind="sqlite", path=path, timeout_s=timeout_s)
    return SqlitePart("vm", entry, instance)


class Writer:
    """Another process that commits one row after the other."""

    def __init__(self, path: Path, pause_s: float) -> None:
        argv = [sys.executable, "-c", WRITER, str(path), str(pause_s)]
        self._process = run.spawn(argv, stderr=None)
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        os.set_blocking(self._lines.fileno(), False)
        self._text = b""

    def last(self) -> int:
        """The last number that was acknowledged; -1 before the first."""
        self._text += self._lines.read() or b""
        whole = self._text.rpartition(b"\n")[0]
        return int(whole.rpartition(b"\n")[2] or -1)

    def goes_on(self, within_s: float = 10.0) -> bool:
        was, until = self.last(), time.monotonic() + within_s
        while time.monotonic() < until:
            if self.last() > was + 2:
                return True
            time.sleep(0.01)
        return False

    def settled(self, for_s: float = 0.5, within_s: float = 20.0) -> int:
        """The last number, once no other has come for a while."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            was = self.last()
            time.sleep(for_s)
            if self.last() == was:
                return was
        raise AssertionError("the writer goes on")

    def end(self) -> None:
        run.terminate(self._process)


@contextmanager
def busy(path: Path) -> Iterator[None]:
    process = run.spawn([sys.executable, "-c", BUSY, str(path)], stdin=subprocess.PIPE, stderr=None)
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"begun\n"
        yield
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        run.terminate(process)


Begin = Callable[..., Writer]


@pytest.fixture
def write() -> Iterator[Begin]:
    with ExitStack() as stack:

        def begin(path: Path, pause_s: float = 0) -> Writer:
            made = Writer(path, pause_s)
            stack.callback(made.end)
            assert made.goes_on()
            return made

        yield begin


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return make_instance(tmp_path / "i")


Make = Callable[..., SqlitePart]


@pytest.fixture
def make(instance: Instance) -> Iterator[Make]:
    """Parts that are closed at the end."""
    with ExitStack() as stack:

        def build(path: Path, **more: Any) -> SqlitePart:
            made = part_of(path, instance, **more)
            stack.callback(made.close)
            return made

        yield build


def make_database(path: Path, journal: str) -> Path:
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA journal_mode = {journal}")
        db.execute("CREATE TABLE t (i INTEGER PRIMARY KEY)")
    db.close()
    return path


def arm_and_freeze(part: SqlitePart, within_s: float = 10.0) -> Consistency:
    part.check()
    part.arm(within_s)
    return part.freeze(time.monotonic() + within_s)


def rows_of(path: Path) -> list[int]:
    with sqlite3.connect(path) as db:
        ((sound,),) = db.execute("PRAGMA integrity_check").fetchall()
        assert sound == "ok"
        found = [row for (row,) in db.execute("SELECT i FROM t ORDER BY i")]
    db.close()
    return found


@pytest.mark.parametrize("journal", ["wal", "delete", "persist", "truncate"])
def test_sqlite_held_under_a_writer_has_exactly_the_acknowledged_rows(
    tmp_path: Path, make: Make, write: Begin, journal: str
) -> None:
    path = make_database(tmp_path / "shop.db", journal)
    writer, part = write(path), make(path)
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert part.what == (str(path),)
    acknowledged = writer.settled()
    image = tmp_path / "image"
    image.mkdir()
    for file in tmp_path.glob("shop.db*"):
        shutil.copy(file, image)
    assert part.still_frozen()
    part.thaw()
    part.thaw()
    assert part.unbroken
    assert writer.goes_on()
    assert rows_of(image / "shop.db") == list(range(acknowledged + 1))
    done = run.run(["sqlite3", "-readonly", str(image / "shop.db"), "PRAGMA integrity_check"])
    assert done.stdout == "ok\n"


def test_sqlite_wal_is_empty_while_held(tmp_path: Path, make: Make, write: Begin) -> None:
    path = make_database(tmp_path / "shop.db", "wal")
    write(path, pause_s=0.1)  # one without a pause may slip in behind each of three checkpoints
    part = make(path)
    arm_and_freeze(part)
    assert "WAL empty" in part.output
    assert (tmp_path / "shop.db-wal").stat().st_size == 0


def test_sqlite_reader_that_stays_keeps_the_wal_and_it_is_said(
    tmp_path: Path, make: Make, write: Begin
) -> None:
    path = make_database(tmp_path / "shop.db", "wal")
    writer = write(path)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM t").fetchall()
    assert writer.goes_on()
    part = make(path, timeout_s=1)
    assert arm_and_freeze(part) is Consistency.APPLICATION
    left = (tmp_path / "shop.db-wal").stat().st_size
    assert left > 0
    assert f"{left} bytes of WAL" in part.output
    assert not writer.goes_on(0.3)
    assert part.still_frozen()
    reader.close()


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite_long_transaction_of_another_fails_in_time_and_holds_nothing(
    tmp_path: Path, make: Make, write: Begin, journal: str
) -> None:
    path = make_database(tmp_path / "shop.db", journal)
    part = make(path, timeout_s=0.5)
    part.check()
    part.arm(30)
    with busy(path):
        with pytest.raises(UnavailableError) as caught:
            part.freeze(time.monotonic() + 30)
        assert "did not let go of it in 0.5 s" in caught.value.message
        assert part.what == ()
    assert rows_of(path) == [1]


def test_sqlite_deadline_before_the_lock_fails_and_holds_nothing(
    tmp_path: Path, make: Make
) -> None:
    path = make_database(tmp_path / "shop.db", "wal")
    part = make(path, timeout_s=2)
    part.arm(0.3)
    with busy(path):
        with pytest.raises(UnavailableError) as caught:
            part.freeze(time.monotonic() + 0.3)
        assert "deadline" in caught.value.message
    part.close()
    assert rows_of(path) == [1]
    with sqlite3.connect(path, timeout=5) as again:
        again.execute("INSERT INTO t VALUES (2)")
    again.close()


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite_deadline_passed_lets_writers_go_on_and_is_noticed(
    tmp_path: Path, make: Make, write: Begin, journal: str
) -> None:
    path = make_database(tmp_path / "shop.db", journal)
    writer, part = write(path), make(path)
    arm_and_freeze(part, 1.5)
    assert writer.goes_on()
    assert not part.still_frozen()
    assert not part.unbroken
    assert "deadline" in part.output
    part.thaw()


def test_sqlite_guardian_killed_lets_writers_go_on_and_is_noticed(
    tmp_path: Path, make: Make, write: Begin, instance: Instance
) -> None:
    path = make_database(tmp_path / "shop.db", "wal")
    writer, part = write(path), make(path)
    arm_and_freeze(part, 60)
    assert part._holder.pid is not None
    os.kill(part._holder.pid, signal.SIGKILL)
    assert writer.goes_on()
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert list((instance.runtime_dir / "holds").iterdir()) == []


def test_sqlite_lock_lost_without_the_guardians_knowledge_is_noticed(
    tmp_path: Path, make: Make
) -> None:
    path = make_database(tmp_path / "shop.db", "delete")
    part = make(path)
    arm_and_freeze(part, 60)
    assert part.still_frozen()
    make_database(tmp_path / "new.db", "delete").replace(path)
    assert not part.still_frozen()
    assert "nobody locks" in part.output


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite_director_killed_lets_writers_go_on(
    tmp_path: Path, write: Begin, journal: str
) -> None:
    path = make_database(tmp_path / "shop.db", journal)
    writer = write(path)
    director = start_director(path, tmp_path / "d")
    try:
        guardian = int(director.stdout.readline())  # type: ignore[union-attr]
        assert not writer.goes_on(0.3)
        place = (path, 0x40000001) if journal == "delete" else (Path(f"{path}-shm"), 120)
        assert lock_owner(*place) == guardian
        director.kill()
        assert writer.goes_on()
    finally:
        run.terminate(director)


def start_director(path: Path, folder: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", HOLDER, str(ROOT), str(path), str(folder)]
    return run.spawn(argv, stderr=None)


def test_sqlite_idle_database_is_left_without_other_files(tmp_path: Path, make: Make) -> None:
    path = make_database(tmp_path / "shop.db", "wal")
    part = make(path)
    arm_and_freeze(part)
    part.thaw()
    assert sorted(file.name for file in tmp_path.glob("shop.db*")) == ["shop.db"]


def test_sqlite_undo_where_nothing_is_left_does_nothing(
    tmp_path: Path, make: Make, instance: Instance
) -> None:
    part = make(make_database(tmp_path / "shop.db", "wal"))
    ((action, args),) = part.undos()
    assert action == "thaw-sqlite"
    assert json.loads(args["programs"]) == []


def test_sqlite_empty_file_is_a_database(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "new.db"
    path.touch()
    part = make(path)
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert part.still_frozen()


def test_sqlite_missing_file_is_refused_and_not_made(tmp_path: Path, make: Make) -> None:
    with pytest.raises(NotFoundError) as caught:
        make(tmp_path / "none.db").check()
    assert caught.value.code == "no-database"
    assert not (tmp_path / "none.db").exists()


def test_sqlite_file_that_goes_before_arm_is_not_made_again(tmp_path: Path, make: Make) -> None:
    path = make_database(tmp_path / "shop.db", "wal")
    part = make(path)
    part.check()
    path.unlink()
    with pytest.raises(UnavailableError, match="unable to open"):
        part.arm(10)
    assert not path.exists()


def test_sqlite_symlink_is_refused_with_the_name_behind_it(tmp_path: Path, make: Make) -> None:
    path = make_database(tmp_path / "shop.db", "wal")
    link = tmp_path / "link.db"
    link.symlink_to(path)
    with pytest.raises(ConfigError) as caught:
        make(link).check()
    assert caught.value.code == "symlink"
    assert str(path) in caught.value.hint


@pytest.mark.parametrize("content", [b"not a database at all", bytes(100)])
def test_sqlite_other_file_is_refused(tmp_path: Path, make: Make, content: bytes) -> None:
    path = tmp_path / "other.db"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        make(path).check()
    assert caught.value.code == "not-a-database"
    assert path.read_bytes() == content


def test_sqlite_folder_is_refused(tmp_path: Path, make: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        make(tmp_path).check()
    assert caught.value.code == "not-a-database"


def test_sqlite_damaged_database_fails_with_its_name(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "bad.db"
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    part = make(path)
    part.check()
    with pytest.raises(UnavailableError, match=r"bad\.db"):
        part.arm(10)
