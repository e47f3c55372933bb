"""The journal of intents: what is about to change outside, and how to take it back.

One operation is one file `ID.jsonl` in the journal folder, locked (flock) as long as its process
lives. Its first line says who; each further line is an intent, made durable *before* the change
that it names. A finished operation removes its file. A file whose lock is free belongs to a dead
process: its intents are undone, newest first.

An undo is the name of an idempotent action and its arguments. An operation that builds something
(mount) names actions that take it away; one that takes away (unmount) names the same actions, so
that recovery finishes it. What a crash leaves:

| at | is there | recovery |
| --- | --- | --- |
| header written, no intent | an empty operation | the file goes |
| intent torn in writing | a last line without end; its change never began | it is ignored |
| intent durable | perhaps the change | undo (already gone is success) |
| commit: file unlinked | the change, complete | nothing |

Steps have names (`mount.server.intended`, `mount.server.done` …): tests kill the process at each
(`OFFLOAD_CRASH_AT`), stop it there until it gets SIGCONT (`OFFLOAD_STALL_AT`), and list them
(`OFFLOAD_STEP_TRACE`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from offload import procs
from offload.errors import CleanupError, IntegrityError, OffloadError, UnavailableError
from offload.filesystem import fsync_folder
from offload.ids import new_id

log = logging.getLogger(__name__)

Args = Mapping[str, str]
Undo = Callable[[str, Args], None]

_UNBORN_AGE_S = 60.0

CRASH_ENV = "OFFLOAD_CRASH_AT"
STALL_ENV = "OFFLOAD_STALL_AT"
TRACE_ENV = "OFFLOAD_STEP_TRACE"


def step(name: str) -> None:
    """A named place at which the process may die, or stand still: in tests it does."""
    trace = os.environ.get(TRACE_ENV)
    if trace:
        with open(trace, "a", encoding="utf-8") as out:
            out.write(name + "\n")
    if os.environ.get(CRASH_ENV) == name:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get(STALL_ENV) == name:
        os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """One change and how to take it back."""

    step: str
    undo: str
    args: Args


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What a dead process left."""

    path: Path
    id: str
    kind: str
    subject: str
    began_at: str
    intents: tuple[Intent, ...]


class Operation:
    """A running operation. Made by `Journal.operation`."""

    def __init__(self, path: Path, fd: int, kind: str, subject: str) -> None:
        self.path = path
        self.kind = kind
        self.subject = subject
        self._fd = fd
        self._intents: list[Intent] = []
        self._finished = False

    def intend(self, step_name: str, undo: str, args: Args) -> None:
        """Make it durable that `step_name` is about to happen and how it is taken back."""
        intent = Intent(step=step_name, undo=undo, args=dict(args))
        try:
            _append(self._fd, {"step": step_name, "undo": undo, "args": dict(args)})
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._intents.append(intent)
        step(f"{self.kind}.{step_name}.intended")

    def done(self, step_name: str) -> None:
        """The change has happened; its intent stays until the operation commits."""
        step(f"{self.kind}.{step_name}.done")

    def commit(self) -> None:
        """The operation is complete: forget how to undo it. Idempotent."""
        if self._finished:
            return
        step(f"{self.kind}.commit.before")
        _remove(self.path)
        self._finished = True
        step(f"{self.kind}.commit.after")

    def roll_back(self, undo: Undo) -> None:
        """Undo everything, newest first; every undo is tried. CleanupError if one failed."""
        if self._finished:
            return
        _undo_all(self._intents, undo, self.path)
        self._finished = True

    def close(self) -> None:
        """Let go of the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Journal:
    """The journal of one instance. `undo` runs an action by its name."""

    def __init__(self, folder: Path, undo: Undo) -> None:
        self.folder = folder
        self._undo = undo

    @contextmanager
    def operation(self, kind: str, subject: str) -> Iterator[Operation]:
        """An operation that rolls back on any exception and commits at the end of the block."""
        op = self._begin(kind, subject)
        try:
            yield op
            op.commit()
        except BaseException as failure:
            try:
                op.roll_back(self._undo)
            except CleanupError as cleanup:
                log.error("%s", cleanup.message)  # noqa: TRY400 - the first error is the one raised
                failure.add_note(cleanup.message)
            raise
        finally:
            op.close()

    def _begin(self, kind: str, subject: str) -> Operation:
        path = self.folder / f"{new_id()}.jsonl"
        try:
            fd = self._create(path, kind, subject)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        step(f"{kind}.begin")
        return Operation(path, fd, kind, subject)

    def _create(self, path: Path, kind: str, subject: str) -> int:
        """A locked, durable file with its header."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_suffix(".new")  # no recovery may see the file before it is locked
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            me = procs.ref_of(os.getpid())
            header = {
                "op": kind,
                "subject": subject,
                "began_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "host": procs.machine_id(),
                **(me.to_strings() if me else {}),
            }
            _append(fd, header)
            fresh.rename(path)
            fsync_folder(self.folder)
        except BaseException:
            fresh.unlink(missing_ok=True)
            os.close(fd)
            raise
        return fd

    def leftovers(self) -> list[Leftover]:
        """Operations of dead processes of this host, oldest first. Changes nothing."""
        found, damaged = self._survey()
        for message in damaged:
            log.warning("%s", message)
        return found

    def _survey(self) -> tuple[list[Leftover], list[str]]:
        """Leftovers, oldest first, and what is wrong with files that cannot be read."""
        found: list[Leftover] = []
        damaged: list[str] = []
        for path in self._files():
            with _try_lock(path) as fd:
                try:
                    entry = _read(path) if fd is not None else None
                except IntegrityError as error:
                    damaged.append(error.message)
                else:
                    found += [entry] if entry else []
        return sorted(found, key=lambda entry: entry.began_at), damaged

    def running(self) -> int:
        """How many operations live processes hold."""
        count = 0
        for path in self._files():
            with _try_lock(path) as fd:
                count += fd is None and path.exists()
        return count

    def running_intents(self) -> list[Intent]:
        """What the operations of live processes, also of this one, have announced."""
        found: list[Intent] = []
        for path in self._files():
            with _try_lock(path) as fd, contextlib.suppress(FileNotFoundError, IntegrityError):
                entry = _read(path) if fd is None else None
                found += entry.intents if entry else ()
        return found

    def recover(self) -> list[Leftover]:
        """Undo what dead processes of this host left; returns what was undone.

        Raises CleanupError after every leftover was tried.
        """
        self._sweep_unborn()
        done: list[Leftover] = []
        found, failed = self._survey()
        for known in reversed(found):
            with _try_lock(known.path) as fd:
                if fd is None:
                    continue  # another recovery was faster
                try:
                    _undo_all(list(known.intents), self._undo, known.path)
                    done.append(known)
                except CleanupError as error:
                    failed.append(error.message)
        if failed:
            raise CleanupError(
                "; ".join(failed),
                hint="mend the cause and run: offload recover",
            )
        return done

    def _sweep_unborn(self) -> None:
        """Files that never got their header: nothing was done under them."""
        for path in self.folder.glob("*.new"):
            with contextlib.suppress(FileNotFoundError), _try_lock(path) as fd:
                if fd is not None and time.time() - path.stat().st_mtime > _UNBORN_AGE_S:
                    path.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl")) if self.folder.is_dir() else []


def _undo_all(intents: list[Intent], undo: Undo, path: Path) -> None:
    failed = []
    for intent in reversed(intents):
        step(f"undo.{intent.undo}")
        try:
            undo(intent.undo, intent.args)
        except OffloadError as error:
            failed.append(f"{intent.undo}: {error.message}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must be tried
            failed.append(f"{intent.undo}: {type(error).__name__}: {error}")
    if failed:
        raise CleanupError(f"could not take back {path.stem}: " + "; ".join(failed))
    _remove(path)


def _append(fd: int, record: Mapping[str, object]) -> None:
    line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
    if os.write(fd, line) != len(line):  # a next line would be glued to the torn one
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(fd)


def _unwritable(path: Path, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"cannot write the journal {path}: {error.strerror}",
        code="journal-unwritable",
        hint="make room in state_dir; nothing was changed without a note of it",
    )


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        fsync_folder(path.parent)


@contextmanager
def _try_lock(path: Path) -> Iterator[int | None]:
    """The locked descriptor, or None while a live process holds the file (or it is gone)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        yield None
        return
    try:
        yield fd if path.exists() else None
    finally:
        os.close(fd)


def _read(path: Path) -> Leftover | None:
    """Parse one file; a torn last line is ignored, another host's file is not ours."""
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        return _parse(path, [json.loads(line) for line in whole.splitlines()])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"the journal file {path} is damaged: {error}",
            code="journal-damaged",
            hint="see what it names, take that back by hand, and remove the file",
        ) from error


def _parse(path: Path, lines: list[dict[str, Any]]) -> Leftover | None:
    if not lines:
        return Leftover(path=path, id=path.stem, kind="?", subject="", began_at="", intents=())
    head = lines[0]
    if head["host"] != procs.machine_id():
        return None
    return Leftover(
        path=path,
        id=path.stem,
        kind=head["op"],
        subject=head["subject"],
        began_at=head["began_at"],
        intents=tuple(Intent(step=x["step"], undo=x["undo"], args=x["args"]) for x in lines[1:]),
    )
