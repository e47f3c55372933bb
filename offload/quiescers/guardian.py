"""The process that owns a freeze and its dead-man timer.

It is started before anything is frozen, opens all that it needs, and from then on reads no file:
whatever it froze goes on when it is told to, when its standard input closes (its parent died,
`kill -9` included), when the deadline passes, or on SIGTERM. It speaks lines of JSON; a command is
`{"do": NAME}`:

| command | answer |
| --- | --- |
| freeze, `within_s` | `ok`, `ms` (target → milliseconds), `said` (target → words); or not `ok`,
`error`: all or none |
| status | `held` (all were held without a break until now), `why` |
| thaw | `ok`, `held` (as above), `why`, `broken` (what was not held all the time, so far as it was
asked), `held_ms`, `said`; or not `ok`, `error` |
| quit | none: thaws and ends |

`marker` is a small file, outside of everything that is frozen, that names what this process may
hold. It exists only from just before the freeze to just after the thaw, so that nobody else ever
thaws what somebody else froze.

Never kill it with SIGKILL: a freeze that is under way in the kernel would still complete, and
nobody would be left to end it (`offload recover` would have to).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from offload.errors import OffloadError
from offload.qmp import Qmp, QmpBusyError, QmpGoneError, write_counts

FIFREEZE = 0xC0045877  # _IOWR('X', 119, int), linux/fs.h
FITHAW = 0xC0045878  # _IOWR('X', 120, int), linux/fs.h

_RETRY_S = 0.2


class Hold(Protocol):
    """One thing that can be held."""

    name: str
    ours: bool  # after `freeze`: whether it is for us to let go

    def freeze(self) -> None:
        """Hold the writers; raises if that fails, and then nothing is held."""
        ...

    def intact(self) -> bool:
        """Whether the writers have been held without a break since `freeze`."""
        ...

    def thaw(self) -> bool:
        """Let go; False if somebody else had let go before."""
        ...


@runtime_checkable
class RemoteHold(Hold, Protocol):
    """A hold by something that may answer late, or not at all."""

    seen: str  # why it is not intact
    stuck: bool  # the last thaw was not confirmed

    def linger(self) -> bool:
        """Try on, where it is stuck; whether it came to an end."""
        ...


@runtime_checkable
class SpeakingHold(Hold, Protocol):
    """A hold that has something for the report."""

    said: str


class MountHold:
    """The file system of a mount point."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.ours = True
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def freeze(self) -> None:
        """FIFREEZE: flushes, then blocks new writes. EBUSY: somebody else holds it already."""
        try:
            fcntl.ioctl(self._fd, FIFREEZE, 0)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise OSError(errno.EBUSY, "somebody else has frozen it already") from error
            raise

    def intact(self) -> bool:
        """A frozen file system refuses a second freeze; one that accepts it had been thawed."""
        try:
            fcntl.ioctl(self._fd, FIFREEZE, 0)
        except OSError as error:
            return error.errno == errno.EBUSY
        thaw_fd(self._fd)
        return False

    def thaw(self) -> bool:
        """FITHAW; EINVAL says that it was not frozen any more."""
        return thaw_fd(self._fd)


class QmpHold:
    """The CPUs of a QEMU: `stop` also drains and flushes its disks.

    Each step is a session of its own: QEMU serves one QMP client at a time, and snapshots are
    taken over the same socket while the CPUs stand.
    """

    def __init__(self, socket: str) -> None:
        self.name = socket
        self._path = Path(socket)
        self.ours = False
        self._written: dict[str, int] = {}

    def freeze(self) -> None:
        """Stop the CPUs, unless they stand already (then `thaw` leaves them standing)."""
        try:
            with Qmp(self._path) as qmp:
                if qmp.execute("query-status")["running"]:
                    self.ours = True
                    qmp.execute("stop")
                self._written = write_counts(qmp)
        except OffloadError:
            if self.ours:  # an answer that came too late: the stop may have happened
                self.thaw()
            raise

    def intact(self) -> bool:
        """CPUs still stand and no disk of the guest has been written since."""
        with Qmp(self._path) as qmp:
            return self._stands(qmp)

    def _stands(self, qmp: Qmp) -> bool:
        return not qmp.execute("query-status")["running"] and write_counts(qmp) == self._written

    def thaw(self) -> bool:
        """`cont`, if our `stop` did it; waits for a monitor that another client holds."""
        while True:
            try:
                with Qmp(self._path) as qmp:
                    intact = self._stands(qmp)
                    if self.ours:
                        qmp.execute("cont")
                        self.ours = False
                    return intact
            except QmpBusyError:
                time.sleep(_RETRY_S)
            except QmpGoneError:
                return False  # no QEMU, no writers to let go


def thaw_fd(fd: int) -> bool:
    """FITHAW on an open file of the file system; False if it was not frozen."""
    try:
        fcntl.ioctl(fd, FITHAW, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


class Guard:
    """Holds all or none, until `release`. Thread safe."""

    def __init__(self, holds: list[Hold], marker: Path, wake_fd: int) -> None:
        self._holds = holds
        self._marker = marker
        self._wake_fd = wake_fd
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._frozen: list[Hold] = []
        self._waiting = 0
        self._released = False
        self.began = 0.0
        self.errors: list[str] = []
        self._named: set[str] = set()  # what the marker names
        self._broken: dict[str, str] = {}  # target → what was seen
        self.ms: dict[str, float] = {}

    def begin(self) -> None:
        """Freeze each in a thread of its own; `settled` tells when all are done."""
        self._mark({hold.name for hold in self._holds})
        self.began = time.monotonic()
        self._waiting = len(self._holds)
        for hold in self._holds:
            thread = threading.Thread(target=self._freeze, args=(hold,))
            self._threads.append(thread)
            thread.start()

    def _freeze(self, hold: Hold) -> None:
        failure = ""
        try:
            hold.freeze()
        except OffloadError as error:
            failure = error.message
        except OSError as error:
            failure = f"{hold.name}: {error.strerror}"
        with self._lock:
            self._waiting -= 1
            self.ms[hold.name] = (time.monotonic() - self.began) * 1000
            late = self._released and not failure
            if failure:
                self.errors.append(failure)
            elif not late:
                self._frozen.append(hold)
            if (failure and not _is_stuck(hold)) or not hold.ours:
                self._mark(self._named - {hold.name})
        if late:
            self._thaw(hold)
        os.write(self._wake_fd, b".")

    @property
    def settled(self) -> bool:
        """Whether all freezes have ended, or one has failed."""
        with self._lock:
            return self._waiting == 0 or bool(self.errors)

    @property
    def held(self) -> bool:
        """Whether everything is held now, as far as this process did not let go itself."""
        with self._lock:
            return not self._released and len(self._frozen) == len(self._holds)

    @property
    def broken(self) -> str:
        """What was not held without a break, and why; empty if all was."""
        return "; ".join(self._broken.values())

    @property
    def said(self) -> dict[str, str]:
        """What holds have for the report."""
        return {h.name: h.said for h in self._holds if isinstance(h, SpeakingHold)}

    def check(self) -> None:
        """Ask each whether it was held without a break; `broken` tells which was not."""
        for hold in list(self._frozen):
            try:
                if not hold.intact():
                    self._let_go_by_others(hold)
            except (OffloadError, OSError) as error:
                self._broken[hold.name] = f"{hold.name}: {error}"

    def _let_go_by_others(self, hold: Hold) -> None:
        seen = f": {hold.seen}" if isinstance(hold, RemoteHold) else " was let go by somebody else"
        self._broken[hold.name] = f"{hold.name}{seen}"

    def release(self) -> None:
        """Let go of everything, now or (a freeze under way in the kernel) when it is held.
        Idempotent."""
        with self._lock:
            self._released = True
            frozen, self._frozen = self._frozen, []
        for hold in reversed(frozen):
            self._thaw(hold)

    def _thaw(self, hold: Hold) -> None:
        try:
            if not hold.thaw():
                self._let_go_by_others(hold)
            with self._lock:
                self._mark(self._named - {hold.name})
        except (OffloadError, OSError) as error:
            self.errors.append(f"{hold.name} could not be let go: {error}")

    def finish(self) -> None:
        """`release`, and wait for what is late, and for what does not answer."""
        self.release()
        for thread in self._threads:
            thread.join()
        for hold in self._holds:
            if isinstance(hold, RemoteHold) and hold.stuck and hold.linger():
                self._mark(self._named - {hold.name})

    def _mark(self, names: set[str]) -> None:
        self._named = names
        if not names:
            self._marker.unlink(missing_ok=True)
            return
        fresh = self._marker.with_suffix(".new")
        fresh.write_text(json.dumps(sorted(names)))
        fresh.replace(self._marker)


def _is_stuck(hold: Hold) -> bool:
    return isinstance(hold, RemoteHold) and hold.stuck


class Server:
    """The command loop."""

    def __init__(self, guard: Guard, wake_fd: int) -> None:
        self._guard = guard
        self._deadline_s = 0.0
        self._wake_fd = wake_fd
        self._until: float | None = None
        self._answer_due = False
        self._why = "nothing is frozen"
        self._lines = b""
        self.ending = False

    def run(self) -> None:
        """Serve until told to quit, until the parent has gone, or a signal came."""
        try:
            while not self.ending:
                patience = None if self._until is None else max(0, self._until - time.monotonic())
                ready, _, _ = select.select([0, self._wake_fd], [], [], patience)
                if self._until is not None and time.monotonic() >= self._until:
                    self._let_go(f"the deadline of {self._deadline_s:.3g} s passed")
                if self._wake_fd in ready:
                    os.read(self._wake_fd, 4096)
                if self._answer_due and (self._guard.settled or self._until is None):
                    self._answer_freeze()
                if 0 in ready:
                    self._read()
        finally:
            self._guard.finish()

    def _let_go(self, why: str) -> None:
        self._until = None
        self._why = why
        self._guard.release()

    def _read(self) -> None:
        more = os.read(0, 1 << 16)
        if not more:
            self.ending = True
            return
        *lines, self._lines = (self._lines + more).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))

    def _obey(self, order: dict[str, Any]) -> None:
        command = order["do"]
        if command == "freeze":
            self._deadline_s = order["within_s"]
            self._until = time.monotonic() + self._deadline_s
            self._answer_due = True
            self._guard.begin()
        elif command == "status":
            self._answer(self._status())
        elif command == "thaw":
            self._thaw()
        else:
            self.ending = True

    def _answer_freeze(self) -> None:
        self._answer_due = False
        if self._guard.errors:
            self._let_go("the freeze failed")
            self._answer({"ok": False, "error": "; ".join(self._guard.errors)})
        elif self._until is None:
            self._answer({"ok": False, "error": f"not frozen in time: {self._why}"})
        else:
            self._why = ""
            self._answer({"ok": True, "ms": self._guard.ms, "said": self._guard.said})

    def _status(self) -> dict[str, Any]:
        if self._guard.held:
            self._guard.check()
        broken = self._guard.broken
        return {"held": self._guard.held and not broken, "why": broken or self._why}

    def _thaw(self) -> None:
        was_held = self._guard.held
        self._guard.release()
        held_ms = (time.monotonic() - self._guard.began) * 1000
        self._until = None
        broken = self._guard.broken
        why, self._why = broken or self._why, self._why or "thawed"
        if self._guard.errors:
            self._answer({"ok": False, "error": "; ".join(self._guard.errors)})
        else:
            held = was_held and not broken
            self._answer(
                {"ok": True, "held": held, "why": why, "broken": broken, "held_ms": held_ms}
                | {"said": self._guard.said}
            )

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except OSError:  # the parent has gone
            self.ending = True


def main(order: str) -> int:
    """Run with an order: JSON of `marker`, `within_s` and what is to be held, by kind."""
    given = json.loads(order)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    try:
        holds: list[Hold] = [MountHold(path) for path in given["mounts"]]
        holds += [QmpHold(socket) for socket in given["qmp"]]
        if given["agents"]:
            from offload.quiescers.holds_agent import AgentHold

            holds += [AgentHold(**entry) for entry in given["agents"]]
        if given["libvirt"]:
            from offload.quiescers.holds_libvirt import LibvirtHold

            holds += [LibvirtHold(**entry) for entry in given["libvirt"]]
        if given["sqlite"]:
            from offload.quiescers.holds_sqlite import SqliteHold

            holds += [SqliteHold(**entry) for entry in given["sqlite"]]
        if given["programs"]:
            from offload.quiescers.holds_program import Program, ProgramHold

            holds += [
                ProgramHold(Program.from_order(entry), within_s=given["within_s"])
                for entry in given["programs"]
            ]
    except (OffloadError, OSError) as error:
        sys.stdout.write(json.dumps({"ok": False, "error": str(error)}) + "\n")
        return 1
    guard = Guard(holds, Path(given["marker"]), wake_write)
    server = Server(guard, wake_read)

    def end(_number: int, _frame: object) -> None:
        server.ending = True
        with contextlib.suppress(BlockingIOError):
            os.write(wake_write, b"!")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    os.write(1, b'{"ok": true}\n')
    server.run()
    return 0
