"""What an unfinished restore has written for good: a record a target, in the state folder.

A record is a file of JSON lines, locked by the process that restores. The first line says what goes
where; each further one names ranges that were made durable in the target *before* the line was. A
torn last line is ignored: what it named is written again.

| a crash leaves | then |
| --- | --- |
| a temporary file without a finished range | `recover` removes it and the record |
| a temporary file with finished ranges | both stay: the same restore goes on from there |
| a device, NBD export or file in place that was written to | the record stays: it says so |
| a target that is complete, and its record | the record goes with the command's last one |
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from offload.errors import BusyError, UnavailableError
from offload.extents import Ranges, normalize, total, union
from offload.filesystem import file_identity, fsync_folder
from offload.instance import Instance
from offload.sink import PART


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is restored, and where to. `identity` names the target for good: two paths of one
    device have the same."""

    origin: str
    to: str
    identity: str
    size_bytes: int
    form: str = "raw"
    temp: str = ""  # "": the target itself is written
    run: str = ""  # the same for all volumes that one command restores
    began_at: str = ""

    def key(self, instance: Instance) -> str:
        """The name of the record: the same restore has the same."""
        said = json.dumps([instance.id, self.origin, self.identity, self.form])
        return blake2b(said.encode(), digest_size=10).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A restore that was interrupted. `done_bytes` of the image are in the target for good."""

    path: Path
    head: Head
    done: Ranges
    last: Ranges  # of the last line: the first to be looked at again
    touched: bool  # the target itself was written to
    running: bool
    finished: str | None = None  # the file that it became; other volumes were still to come

    @property
    def done_bytes(self) -> int:
        """How far it got."""
        return total(self.done)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to copy."""
        return self.done == [(0, self.head.size_bytes)] or not self.head.size_bytes

    @property
    def resumable(self) -> bool:
        """Whether there is something to go on from, or to know about."""
        if self.finished is not None:
            return False
        if self.head.temp:
            return bool(self.done) and Path(self.head.temp).exists()
        return self.touched and not self.complete


class Record:
    """The record of the restore that runs. Made by `open_record`; close it."""

    def __init__(self, path: Path, head: Head, fd: int) -> None:
        self.path = path
        self.head = head
        self._fd = fd

    def add(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These are in the target for good: durably noted."""
        self._append({"done": normalize(ranges)})

    def touch(self) -> None:
        """The target itself is written to from here on."""
        self._append({"touched": datetime.now(UTC).isoformat(timespec="seconds")})

    def finish(self, identity: str) -> None:
        """The target is whole; `identity` as of `identity_of`."""
        self._append({"finished": identity})

    def restart(self) -> None:
        """Nothing counts that was noted so far."""
        self._append({"restart": True})

    def remove(self) -> None:
        """Forget it. Idempotent."""
        _remove(self.path)

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, line: Mapping[str, object]) -> None:
        raw = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            while raw:
                raw = raw[os.write(self._fd, raw) :]
            os.fsync(self._fd)
        except OSError as error:
            raise _unwritable(self.path, error) from error


def records_dir(instance: Instance) -> Path:
    """Where the records are."""
    return instance.state_dir / "restores"


def record_path(instance: Instance, head: Head) -> Path:
    """The file of a restore's record."""
    return records_dir(instance) / f"{head.key(instance)}.jsonl"


def open_record(instance: Instance, head: Head) -> tuple[Record, Unfinished | None]:
    """The record of this restore, locked, and what an earlier run left in it.

    Raises BusyError (`restore-running`), UnavailableError (`state-unwritable`).
    """
    path = record_path(instance, head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from error
    record = Record(path, head, fd)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"the same restore to {head.to} is running", code="restore-running",
                hint="wait for it; offload recover --dry-run shows what is unfinished",
            ) from error  # fmt: skip
        known = _read(path)
        if known is None:
            _begin(path, fd, head)
        else:
            _cut_torn_line(fd)
        return record, known
    except BaseException:
        record.close()
        raise


def _begin(path: Path, fd: int, head: Head) -> None:
    began = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({**asdict(head), "began_at": began}, separators=(",", ":")).encode() + b"\n"
    try:
        os.ftruncate(fd, 0)
        os.write(fd, line)
        os.fsync(fd)
        fsync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def _cut_torn_line(fd: int) -> None:
    """A line that was torn in writing must not be glued to the next one."""
    with open(fd, "rb", closefd=False) as raw:
        raw.seek(0)
        content = raw.read()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.ftruncate(fd, whole)


def unfinished(instance: Instance) -> list[Unfinished]:
    """All that can go on, or run, oldest first. Changes nothing."""
    return [e for e in _all(records_dir(instance)) if e.running or e.resumable]


def sweep(instance: Instance) -> None:
    """Remove what no restore can go on from: a record whose temporary file somebody has removed,
    or a crash did while it gave the restore up."""
    for entry in _all(records_dir(instance)):
        if not (entry.running or entry.resumable or _awaited(entry)):
            drop(entry)


def _all(folder: Path) -> list[Unfinished]:
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    found = [entry for path in paths if (entry := _read(path)) is not None]
    return sorted(found, key=lambda entry: entry.head.began_at)


def of_target(instance: Instance, identity: str) -> Iterator[Unfinished]:
    """The unfinished restores to one target."""
    return (e for e in _all(records_dir(instance)) if e.head.identity == identity)


def look(path: Path) -> Unfinished | None:
    """What one record says; None where there is none."""
    return _read(path)


def drop(entry: Unfinished) -> None:
    """Give an unfinished restore up: its temporary file and its record go. Idempotent.

    Raises BusyError (`restore-running`).
    """
    if entry.running:
        raise BusyError(
            f"a restore of {entry.head.origin} to {entry.head.to} is running",
            code="restore-running",
            hint="end it first",
        )
    remove_temporary(entry.head.temp)
    _remove(entry.path)


def settle(path: Path, temp: str) -> None:
    """What an operation left: kept where the same restore can go on from it, else removed."""
    entry = _read(path)
    if entry is None:
        remove_temporary(temp)
        _remove(path)
    elif not entry.resumable and not _awaited(entry):
        remove_temporary(entry.head.temp)
        _remove(path)


def _awaited(entry: Unfinished) -> bool:
    """Whether this volume is whole and another one of the same command is not."""
    return entry.finished is not None and any(
        other.head.run == entry.head.run and other.resumable for other in _all(entry.path.parent)
    )


def finished(instance: Instance, head: Head) -> bool:
    """Whether an interrupted command has brought this very volume to where it is now."""
    entry = _read(record_path(instance, head))
    return entry is not None and bool(entry.finished) and entry.finished == identity_of(head.to)


def identity_of(path: str) -> str:
    """What a file is by name, size and time: it changes when anybody writes to it. "" for others
    than files, and where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return ""
            return f"{file_identity(fd)}:{status.st_size}:{status.st_mtime_ns}"
        finally:
            os.close(fd)
    except OSError:
        return ""


def forget(instance: Instance, head: Head) -> None:
    """The command is complete. Idempotent."""
    _remove(record_path(instance, head))


def remove_temporary(temp: str) -> None:
    """Remove a temporary file of ours, and nothing else. Idempotent."""
    if temp.endswith(PART):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            Path(temp).unlink()


def _read(path: Path) -> Unfinished | None:
    """A record; None where there is none, or one that was torn in its first line."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as opened:
        running = _locked(opened.fileno())
        raw = opened.read()
    lines = raw[: raw.rfind(b"\n") + 1].splitlines()
    try:
        head = Head(**json.loads(lines[0]))
        return _collect(path, head, [json.loads(line) for line in lines[1:]], running)
    except (IndexError, ValueError, TypeError, AttributeError):
        return None


def _collect(path: Path, head: Head, lines: list[dict[str, Any]], running: bool) -> Unfinished:
    done: Ranges = []
    last: Ranges = []
    touched = False
    finished = None
    for line in lines:
        if "restart" in line:
            done, last, finished = [], [], None
        finished = line.get("finished", finished)
        touched = touched or "touched" in line
        if "done" in line:
            last = [(int(start), int(end)) for start, end in line["done"]]
            done = union(done, last)
    return Unfinished(
        path=path,
        head=head,
        done=done,
        last=last,
        touched=touched,
        running=running,
        finished=finished,
    )


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        fsync_folder(path.parent)


def _unwritable(path: Path, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"cannot write the record {path} of this restore: {error.strerror}",
        code="state-unwritable",
        hint="make room in state_dir",
    )
