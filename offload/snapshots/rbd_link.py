"""The process that works with librbd, seen from ours: see `rbd_worker`.

librbd is kept out of this process where it writes. It waits for ever for a cluster that does not
answer; told to give up after a while, that of Ceph 16 sometimes ends the whole process instead
("FAILED ceph_assert(m_pending_ops == 0)"). A process of its own can be killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import IO, Any

import offload
from offload import errors, run
from offload.errors import OffloadError, UnavailableError

SILENCE_S = 30.0  # the worker says that it goes on far more often than that
_CODE = (
    "import sys; sys.path.insert(0, {root!r}); "
    "from offload.snapshots.rbd_worker import main; main(sys.argv[1])"
)


class WorkerLostError(UnavailableError):
    """What was asked for may have been done in part, or may still be done."""

    code = "ceph-failed"


class Link:
    """Starts the worker when it is first needed; it ends with this object, or with our process.

    Calls of several threads come one after the other.
    """

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._lock = threading.Lock()
        self._end: weakref.finalize[..., Any] | None = None
        self._worker: _Worker | None = None

    def call(self, verb: str, **args: object) -> Any:
        """The answer of a verb, or its error raised.

        Raises WorkerLostError (`ceph-timeout`: it fell silent and was killed; `ceph-failed`: it
        ended), and what the verb raises.
        """
        with self._lock:
            try:
                answer = self._started().ask({"verb": verb, "args": args})
            except BaseException:
                self._stop()
                raise
        if "error" in answer:
            raise _raised(answer["error"])
        return answer["value"]

    def _started(self) -> _Worker:
        if self._worker is not None and not self._worker.listens():
            self._stop()  # it died between two questions
        if self._worker is None:
            self._worker = _Worker(self._instance)
            self._end = weakref.finalize(self, _Worker.close, self._worker)
        return self._worker

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._worker, self._end = None, None


class _Worker:
    """One running worker. Lines of JSON, a question at a time."""

    def __init__(self, instance: str) -> None:
        root = str(Path(offload.__file__).parent.parent)
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._pending = b""
        self.process = run.spawn(
            [sys.executable, "-I", "-c", _CODE.format(root=root), instance],
            stdin=subprocess.PIPE,
            stderr=self._said.fileno(),
            new_session=True,  # Ctrl-C ends the command, which then undoes what it began
        )

    def listens(self) -> bool:
        """Whether a question would reach it."""
        assert self.process.stdin is not None  # noqa: S101 - made with pipes
        poll = select.poll()
        poll.register(self.process.stdin, 0)
        return not poll.poll(0)  # POLLERR: nobody has the other end any more

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None  # noqa: S101 - made with pipes
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failed() from error
        while True:
            answer = json.loads(self._line())
            if answer:  # an empty one: it goes on
                return answer

    def _line(self) -> bytes:
        assert self.process.stdout is not None  # noqa: S101 - made with pipes
        fd = self.process.stdout.fileno()
        until = time.monotonic() + SILENCE_S
        while b"\n" not in self._pending:
            left = until - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise WorkerLostError(
                    f"the Ceph cluster did not answer within {SILENCE_S:g} s",
                    code="ceph-timeout",
                    hint="look at its health: ceph status",
                )
            data = os.read(fd, 1 << 16)
            if not data:
                raise self._failed()
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _failed(self) -> WorkerLostError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1.0)
        self._said.seek(0)
        words = self._said.read().decode(errors="replace").strip().splitlines()
        last = words[-1].strip() if words else "it said nothing"
        return WorkerLostError(
            f"the process that works with Ceph ended with status {self.process.returncode}: {last}",
            hint="look at the cluster's health: ceph status",
        )

    def close(self) -> None:
        run.terminate(self.process)
        self._said.close()


def _raised(record: dict[str, Any]) -> OffloadError:
    """An error as it was raised in the worker."""
    family = getattr(errors, record["family"], OffloadError)
    made: OffloadError = family(record["message"], hint=record["hint"], code=record["code"])
    for note in record["notes"]:
        made.add_note(note)
    return made
