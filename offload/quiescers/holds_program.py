"""A hold by a program of the administrator's, here or in a guest over SSH.

The contract is on the page docs/howto/quiesce-scripts.md. Loads the standard library only.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offload import run
from offload.errors import CleanupError, UnavailableError

DONE, BROKEN, NOTHING = 0, 2, 3  # exit codes
NOTHING_HELD = "nothing to hold here"
_LINGER_S = 600.0
_RETRY_S = 1.0
_OUTPUT_TAIL = 2000
_SSH_FAILED = 255
_SSH_TROUBLE = (
    (
        "IDENTIFICATION HAS CHANGED",
        "its host key is another than the one in known_hosts",
        "host-key-changed",
        "find out why before you change known_hosts: it may be another machine",
    ),
    (
        r"host key is known|Host key verification failed",
        "its host key is not in known_hosts",
        "host-key-unknown",
        "read the key on the guest itself (ssh-keygen -lf) and add it",
    ),
    (
        r"Permission denied|Load key|bad permissions",
        "it does not accept the key",
        "application-refused",
        "the public key belongs into authorized_keys; the private one has no passphrase",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is run for each phase. `via` is the argv of ssh up to the remote command, or empty;
    `timeout_s` is the limit of a phase."""

    name: str  # for errors
    command: tuple[str, ...]
    env: Mapping[str, str]
    timeout_s: float
    via: tuple[str, ...] = ()

    def to_order(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_order(cls, order: Mapping[str, Any]) -> Program:
        """The inverse of `to_order`."""
        both = {key: tuple(order[key]) for key in ("command", "via")}
        return cls(name=order["name"], env=order["env"], timeout_s=order["timeout_s"], **both)

    def run_phase(
        self, phase: str, *, within_s: float | None = None, env: Mapping[str, str] | None = None
    ) -> run.Completed:
        """Raises UnavailableError (`hook-failed`: late; of ssh also `host-key-changed`,
        `host-key-unknown`, `application-refused`, `application-unreachable`)."""
        limit_s = min(self.timeout_s, within_s or self.timeout_s)
        words = {
            **self.env,
            **(env or {}),
            "OFFLOAD_PHASE": phase,
            "OFFLOAD_TIMEOUT_S": str(math.ceil(limit_s)),
        }
        argv = [*self.command, phase]
        if self.via:
            given = [f"{key}={value}" for key, value in sorted(words.items())]
            argv, words = [*self.via, shlex.join(["env", *given, *argv])], {}
        try:
            done = run.run(argv, timeout_s=limit_s, check=False, env=words)
        except run.ProgramError as error:
            raise UnavailableError(
                f"{self.name}: the {phase} phase did not end in {limit_s:g} s", code="hook-failed"
            ) from error
        if self.via and done.status == _SSH_FAILED:
            raise self._no_session(phase, done)
        return done

    def _no_session(self, phase: str, done: run.Completed) -> UnavailableError:
        for pattern, what, code, hint in _SSH_TROUBLE:
            if re.search(pattern, done.stderr):
                return UnavailableError(f"{self.name}: {what}", code=code, hint=hint)
        return UnavailableError(
            f"{self.name}: no answer to the {phase} phase: {_last_line(done)}",
            code="application-unreachable",
        )

    def failure(self, phase: str, done: run.Completed) -> UnavailableError:
        """For a phase that ended with a status that it must not have."""
        return UnavailableError(
            f"{self.name}: the {phase} phase ended with status {done.status}: {_last_line(done)}",
            code="hook-failed",
        )


def printed(done: run.Completed) -> str:
    """What a phase printed, the end of it."""
    return (done.stdout + done.stderr).strip()[-_OUTPUT_TAIL:]


def _last_line(done: run.Completed) -> str:
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


@dataclass(slots=True)
class ProgramHold:
    """The guardian's part of it. `within_s`: when the guardian lets go at the latest."""

    program: Program
    within_s: float
    name: str = ""
    ours: bool = True
    said: str = ""
    seen: str = ""
    stuck: bool = False
    _due: bool = field(default=False)

    def __post_init__(self) -> None:
        self.name = self.program.name

    def freeze(self) -> None:
        """The freeze phase; if it fails or is late, thaw follows, whatever it left."""
        deadline = {"OFFLOAD_DEADLINE_S": str(math.ceil(self.within_s))}
        self._due = self.stuck = True
        try:
            done = self.program.run_phase("freeze", within_s=self.within_s, env=deadline)
            self._hear(done)
            if done.status == NOTHING:
                self._due = self.ours = False
                self.said = "\n".join(filter(None, [self.said, NOTHING_HELD]))
            elif done.status != DONE:
                raise self.program.failure("freeze", done)
        except UnavailableError:
            self._undo_freeze()
            raise
        self.stuck = False

    def _undo_freeze(self) -> None:
        try:
            self.thaw()
        except UnavailableError as error:
            self.said = "\n".join(filter(None, [self.said, error.message]))

    def intact(self) -> bool:
        """True, as far as is known: the program is asked by the thaw. While file systems are frozen
        it may be unable to answer (a login that is logged to a disk waits)."""
        return True

    def thaw(self) -> bool:
        """The thaw phase; False if what was held had let go before. Raises UnavailableError."""
        if not self._due:
            return True
        self.stuck = True
        done = self.program.run_phase("thaw")
        self._hear(done)
        if done.status not in (DONE, BROKEN, NOTHING):
            raise self.program.failure("thaw", done)
        self._due = self.stuck = False
        if done.status != DONE:
            self.seen = "it had ended before the thaw"
        return done.status == DONE

    def linger(self) -> bool:
        """Thaw again and again, for ten minutes; whether it was done."""
        until = time.monotonic() + _LINGER_S
        pause_s = _RETRY_S
        while self._due and time.monotonic() < until:
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 30.0)
            try:
                self.thaw()
            except UnavailableError:
                continue
        return not self._due

    def _hear(self, done: run.Completed) -> None:
        self.said = "\n".join(filter(None, [self.said, printed(done)]))


def undo_program(order: Mapping[str, Any], marker: Path, *, same_boot: bool) -> None:
    """Run the thaw phase for a guardian that has died. Raises CleanupError.

    On the same boot only where the marker names it. After another one the marker is gone, and what
    is held may not be: then it runs in any case, which the contract allows.
    """
    program = Program.from_order(order)
    if same_boot and program.name not in _named(marker):
        return
    try:
        done = program.run_phase("thaw")
    except UnavailableError as error:
        raise CleanupError(f"not thawed: {error.message}", hint=error.hint) from error
    if done.status not in (DONE, BROKEN, NOTHING):
        raise CleanupError(f"not thawed: {program.failure('thaw', done).message}")


def _named(marker: Path) -> list[str]:
    try:
        found: list[str] = json.loads(marker.read_text())
    except FileNotFoundError:
        return []
    return found
