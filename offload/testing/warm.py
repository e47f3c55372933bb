"""Python programs that start at once: a process that has loaded what they load, and forks.

Each is a process of its own, as if Python had been started for it: its own arguments, environment,
streams and end; it may be killed, and nothing of it stays for the next one. What this does not show
is how long loading takes, and an import that is missing.

The warm process gets a datagram for each, `{"argv": …, "env": …}` as JSON with three descriptors:
stdout, stderr and a socket for the answers, which are the pid, then the status.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket as sockets
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

from offload import run

_REQUEST_BYTES = 1 << 17
_LOOK_S = 0.002
PACKAGES = ("offload.cli", "offload.engine", "offload.format", "offload.services")
# what commands load on their way
_MORE = (
    "alembic.command", "alembic.runtime.environment", "argon2.low_level", "blake3", "boto3",
    "cryptography.hazmat.primitives.ciphers.aead", "cryptography.x509", "nbd", "numpy",
    "offload.images.backup", "offload.images.file", "offload.images.nbd", "offload.quiescers.local",
    "offload.snapshots.reflink", "offload.stores.disk", "offload.stores.s3", "rich.console",
    "rich.progress", "rich.table", "sqlalchemy.dialects.sqlite.pysqlite", "targets.nbd",
    "tomllib", "zstandard",
)  # fmt: skip


class WarmPython:
    """The warm process, from the first program on; it ends with ours, or by `close`. Programs of
    several threads run side by side."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._orders: sockets.socket | None = None

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, timeout_s: float = 120
    ) -> run.Completed:
        """Run `python -c CODE …` or `python -m MODULE …`, as `run.run` does with `check=False`."""
        return self.start(*argv, env=env).wait(timeout_s)

    def start(self, *argv: str, env: Mapping[str, str] | None = None) -> WarmProgram:
        """The same, started: the caller waits for it."""
        answers, theirs = sockets.socketpair()
        readers, writers = zip(os.pipe(), os.pipe(), strict=True)
        try:
            data = json.dumps({"argv": argv, "env": run.child_env(env)}).encode()
            sockets.send_fds(self._started(), [data], [*writers, theirs.fileno()])
        finally:
            theirs.close()
            for fd in writers:
                os.close(fd)
        return WarmProgram(argv, answers, readers)

    def _started(self) -> sockets.socket:
        """The wire to the warm process."""
        with self._starting:
            if self._orders is None:
                self._orders, theirs = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
                with theirs:
                    self._process = run.spawn(
                        [sys.executable, __file__, str(theirs.fileno())],
                        stdout=None,
                        stderr=None,
                        pass_fds=[theirs.fileno()],
                    )
            return self._orders

    def close(self) -> None:
        """End the warm process; commands that run go on. Idempotent."""
        with self._starting:
            if self._orders is not None:
                self._orders.close()
                self._orders = None
                self._process.wait()


@cache
def warm_python() -> WarmPython:
    """The one of this process."""
    return WarmPython()


class WarmProgram:
    """A program that was started, with its process id."""

    def __init__(
        self, argv: tuple[str, ...], answers: sockets.socket, readers: tuple[int, ...]
    ) -> None:
        self._began = time.monotonic()
        self._argv = argv
        self._answers = answers
        self._said: list[bytes] = [b"", b""]
        self._listeners = [
            threading.Thread(target=self._listen, args=(fd, place), daemon=True)
            for place, fd in enumerate(readers)
        ]
        for thread in self._listeners:
            thread.start()
        self._lines = answers.makefile("rb", buffering=0)
        self.pid = _number(self._lines.readline())

    def _listen(self, fd: int, place: int) -> None:
        with os.fdopen(fd, "rb") as stream:
            self._said[place] = stream.read()

    def stands(self) -> bool:
        """Wait until it is stopped by a signal (True) or has ended."""
        while True:
            try:
                state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                return False
            if state in "TZX":
                return state == "T"
            time.sleep(_LOOK_S)

    def wait(self, timeout_s: float) -> run.Completed:
        """Its end. ProgramError if it is late: then it is killed."""
        until = time.monotonic() + timeout_s
        self._answers.settimeout(timeout_s)
        with self._answers, self._lines:
            try:
                status = _number(self._lines.readline())
            except TimeoutError as late:
                os.kill(self.pid, signal.SIGKILL)
                raise self._late() from late
        for thread in self._listeners:  # what it has left behind may have its streams
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise self._late()
        return run.Completed(
            argv=self._argv,
            status=status,
            seconds=time.monotonic() - self._began,
            stdout=self._said[0].decode("utf-8", "replace"),
            stderr=self._said[1].decode("utf-8", "replace"),
        )

    def _late(self) -> run.ProgramError:
        return run.ProgramError(self._argv, None, time.monotonic() - self._began, "")


def _number(line: bytes) -> int:
    if not line:
        raise ConnectionResetError("the warm process has ended")
    return int(line)


# -- the warm process ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A program to become."""

    argv: list[str]
    env: dict[str, str]
    streams: tuple[int, int]


def load(packages: Sequence[str], more: Sequence[str]) -> None:
    """Import what programs import: all modules of packages, and others."""
    for name in packages:
        package = importlib.import_module(name)
        for found in pkgutil.iter_modules(package.__path__, f"{name}."):
            if not found.name.endswith(".__main__"):
                importlib.import_module(found.name)
    for name in more:
        importlib.import_module(name)
    gc.freeze()  # no collection writes to pages that the programs share


def serve(orders: sockets.socket) -> Order | None:
    """Fork for each order: returns it in the child, and None in the warm process at the end."""
    running: dict[int, tuple[int, sockets.socket]] = {}  # pidfd → pid, where the status goes
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != orders.fileno():
                poll.unregister(fd)
                _tell_status(fd, *running.pop(fd))
                continue
            data, fds, _, _ = sockets.recv_fds(orders, _REQUEST_BYTES, 3)
            if not data:
                return None
            answers = sockets.socket(fileno=fds[2])
            pid = os.fork()
            if pid == 0:
                for left, (_, wire) in running.items():
                    os.close(left)
                    wire.close()
                answers.close()
                orders.close()
                return Order(**json.loads(data), streams=(fds[0], fds[1]))
            for taken in fds[:2]:
                os.close(taken)
            ended = os.pidfd_open(pid)
            running[ended] = (pid, answers)
            poll.register(ended, select.POLLIN)
            with contextlib.suppress(BrokenPipeError):
                answers.sendall(b"%d\n" % pid)


def _tell_status(ended: int, pid: int, answers: sockets.socket) -> None:
    os.close(ended)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with answers, contextlib.suppress(BrokenPipeError):  # nobody may wait any more
        answers.sendall(b"%d\n" % status)


def become(order: Order) -> NoReturn:
    """Take the streams, the environment and the arguments of a program, and run it."""
    for place, fd in enumerate(order.streams, 1):
        os.dup2(fd, place)
        os.close(fd)
    os.environ.clear()
    os.environ.update(order.env)
    how, what, *rest = order.argv
    sys.argv[:] = [how, *rest]
    sys.path[0] = ""
    try:
        if how == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = _status_of(end.code)
    except BaseException:  # noqa: BLE001 - what Python does with it, too
        traceback.print_exc()
        status = 1
    leave(status)


def _status_of(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)  # noqa: T201 - as Python says it
    return 1


def leave(status: int) -> NoReturn:
    """End as Python does, but for the memory: to free all that was loaded takes longer than most
    programs run."""
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - waits for threads
    atexit._run_exitfuncs()  # noqa: SLF001
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    load(PACKAGES, _MORE)
    wanted = serve(sockets.socket(fileno=int(sys.argv[1])))
    if wanted is not None:
        become(wanted)
