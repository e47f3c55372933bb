"""The journal of intents: what a dead process left is undone, once, newest first."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offload.errors import CleanupError, NotFoundError, OffloadError, UnavailableError
from offload.journal import CRASH_ENV, TRACE_ENV, Args, Journal, step
from offload.run import spawn, terminate

_CHILD = """
import sys, time
from pathlib import Path
from offload.journal import Journal
journal = Journal(Path(sys.argv[1]), lambda action, args: None)
with journal.operation("mount", sys.argv[2]) as op:
    for number in sys.argv[3:]:
        op.intend(f"step{number}", "remove", {"n": number})
    print("ready", flush=True)
    time.sleep(60)
"""


class Undo:
    """Notes what is undone; fails for chosen arguments."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, Exception] = {}

    def __call__(self, action: str, args: Args) -> None:
        self.calls.append(f"{action} {args['n']}")
        if args["n"] in self.failing:
            raise self.failing[args["n"]]


@pytest.fixture
def undo() -> Undo:
    return Undo()


@pytest.fixture
def journal(tmp_path: Path, undo: Undo) -> Journal:
    return Journal(tmp_path / "journal", undo)


def _start_child(journal: Journal, subject: str, *numbers: str) -> int:
    process = spawn([sys.executable, "-c", _CHILD, str(journal.folder), subject, *numbers])
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    _children.append(process)
    return process.pid


_children: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _end_children() -> object:
    yield None
    for process in _children:
        terminate(process)
    _children.clear()


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _leave(journal: Journal, subject: str, *numbers: str) -> None:
    """A process that dies with these intents."""
    _kill(_start_child(journal, subject, *numbers))
    time.sleep(0.002)  # began_at has milliseconds


def _files(journal: Journal) -> list[Path]:
    return sorted(journal.folder.iterdir())


def test_operation_that_ends_leaves_nothing(journal: Journal, undo: Undo) -> None:
    with journal.operation("mount", "x") as op:
        op.intend("server", "stop", {"n": "1"})
        assert journal.running() == 1
        assert journal.leftovers() == []
        op.done("server")
    assert _files(journal) == []
    assert undo.calls == []


def test_operation_that_fails_is_undone_newest_first(journal: Journal, undo: Undo) -> None:
    with pytest.raises(ZeroDivisionError), journal.operation("mount", "x") as op:  # noqa: PT012
        op.intend("a", "remove", {"n": "1"})
        op.intend("b", "stop", {"n": "2"})
        raise ZeroDivisionError
    assert undo.calls == ["stop 2", "remove 1"]
    assert _files(journal) == []


@pytest.mark.parametrize("kind", [NotFoundError("x"), OSError("x"), KeyError("x")])
def test_operation_failing_undo_keeps_the_file_tries_the_others_and_adds_a_note(
    journal: Journal, undo: Undo, kind: Exception
) -> None:
    undo.failing["2"] = kind
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError) as caught,
        journal.operation("mount", "x") as op,
    ):
        for n in "123":
            op.intend(n, "remove", {"n": n})
        raise ZeroDivisionError
    assert undo.calls == ["remove 3", "remove 2", "remove 1"]
    assert "could not take back" in caught.value.__notes__[0]
    assert len(_files(journal)) == 1
    undo.failing.clear()
    undo.calls.clear()
    assert [entry.subject for entry in journal.recover()] == ["x"]
    assert undo.calls == ["remove 3", "remove 2", "remove 1"]
    assert _files(journal) == []


def test_recover_leaves_the_living_alone_and_undoes_the_dead(journal: Journal, undo: Undo) -> None:
    pid = _start_child(journal, "x", "1", "2")
    assert journal.recover() == []
    assert (undo.calls, journal.running()) == ([], 1)
    _kill(pid)
    (left,) = journal.leftovers()
    assert (left.kind, left.subject, [i.step for i in left.intents]) == (
        "mount", "x", ["step1", "step2"],
    )  # fmt: skip
    assert journal.running() == 0
    assert [entry.id for entry in journal.recover()] == [left.id]
    assert undo.calls == ["remove 2", "remove 1"]
    assert journal.recover() == []
    assert undo.calls == ["remove 2", "remove 1"]


def test_running_intents_are_those_of_the_living_and_of_this_process(
    journal: Journal, undo: Undo
) -> None:
    pid = _start_child(journal, "x", "1", "2")
    with journal.operation("mount", "mine") as op:
        op.intend("step3", "remove", {"n": "3"})
        with op.path.open("a") as torn:
            torn.write('{"step": "step4", "un')
        assert sorted(i.args["n"] for i in journal.running_intents()) == ["1", "2", "3"]
    _kill(pid)
    assert journal.running_intents() == []
    journal.recover()


def test_recover_several_dead_newest_operation_first(journal: Journal, undo: Undo) -> None:
    _leave(journal, "old", "1")
    _leave(journal, "new", "2")
    journal.recover()
    assert undo.calls == ["remove 2", "remove 1"]


def test_recover_failing_undo_keeps_that_file_and_goes_on(journal: Journal, undo: Undo) -> None:
    _leave(journal, "old", "1")
    _leave(journal, "new", "2")
    undo.failing["2"] = CleanupError("no way")
    with pytest.raises(CleanupError, match="no way"):
        journal.recover()
    assert undo.calls == ["remove 2", "remove 1"]
    assert [entry.subject for entry in journal.leftovers()] == ["new"]
    undo.failing.clear()
    journal.recover()
    assert journal.leftovers() == []


def test_recover_torn_last_line_is_an_intent_that_never_was(journal: Journal, undo: Undo) -> None:
    _leave(journal, "x", "1")
    (path,) = _files(journal)
    with path.open("ab") as out:
        out.write(b'{"step":"step2","undo":"rem')
    assert [len(entry.intents) for entry in journal.leftovers()] == [1]
    journal.recover()
    assert undo.calls == ["remove 1"]


def test_recover_empty_file_goes(journal: Journal, undo: Undo) -> None:
    journal.folder.mkdir()
    (journal.folder / "aaaaaaaaaa.jsonl").write_bytes(b"")
    journal.recover()
    assert _files(journal) == []
    assert undo.calls == []


@pytest.mark.parametrize("wrong", [b"\x00\x00\n", b"{}\n", b'[1]\n{"step":1}\n', b"\xff\n"])
def test_recover_damaged_file_is_named_kept_and_does_not_stop_the_others(
    journal: Journal, undo: Undo, wrong: bytes
) -> None:
    _leave(journal, "x", "1")
    damaged = journal.folder / "aaaaaaaaaa.jsonl"
    damaged.write_bytes(wrong)
    assert [entry.subject for entry in journal.leftovers()] == ["x"]
    with pytest.raises(CleanupError, match="aaaaaaaaaa"):
        journal.recover()
    assert undo.calls == ["remove 1"]
    assert _files(journal) == [damaged]


def test_recover_file_of_another_host_is_untouched(journal: Journal, undo: Undo) -> None:
    _leave(journal, "x", "1")
    (path,) = _files(journal)
    head, rest = path.read_text().split("\n", 1)
    foreign = json.dumps({**json.loads(head), "host": "elsewhere"}) + "\n" + rest
    path.write_text(foreign)
    assert journal.leftovers() == []
    assert journal.recover() == []
    assert undo.calls == []
    assert path.read_text() == foreign


def test_recover_without_a_folder_finds_nothing(journal: Journal) -> None:
    assert journal.recover() == []
    assert journal.running() == 0


def test_recover_old_file_without_header_is_swept_a_fresh_one_stays(journal: Journal) -> None:
    journal.folder.mkdir()
    old, fresh = journal.folder / "a.new", journal.folder / "b.new"
    for path in (old, fresh):
        path.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    journal.recover()
    assert _files(journal) == [fresh]


def test_intend_short_write_is_an_error_and_nothing_is_glued_to_it(
    journal: Journal, undo: Undo, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    with pytest.raises(OffloadError) as caught, journal.operation("mount", "x") as op:  # noqa: PT012
        op.intend("a", "remove", {"n": "1"})
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
        op.intend("b", "remove", {"n": "2"})
    assert caught.value.code == "journal-unwritable"
    assert undo.calls == ["remove 1"]


def test_intend_on_a_full_disk_is_one_clear_error_and_undone(
    journal: Journal, undo: Undo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (  # noqa: PT012
        pytest.raises(UnavailableError) as caught,
        journal.operation("mount", "x") as op,
    ):
        op.intend("a", "remove", {"n": "1"})
        monkeypatch.setattr(os, "write", full)
        op.intend("b", "remove", {"n": "2"})
    assert caught.value.code == "journal-unwritable"
    assert undo.calls == ["remove 1"]
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UnavailableError), journal.operation("mount", "x"):
        pass


def test_step_is_traced_and_kills_the_process_at_the_named_place(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setenv(TRACE_ENV, str(trace))
    with journal.operation("mount", "x") as op:
        op.intend("server", "stop", {"n": "1"})
        op.done("server")
    assert trace.read_text().splitlines() == [
        "mount.begin", "mount.server.intended", "mount.server.done", "mount.commit.before",
        "mount.commit.after",
    ]  # fmt: skip
    monkeypatch.setenv(CRASH_ENV, "here")
    child = os.fork()
    if child == 0:
        step("elsewhere")
        step("here")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert trace.read_text().splitlines()[-2:] == ["elsewhere", "here"]
