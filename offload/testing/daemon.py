"""Servers that tests start: as a user of their own, ended with the block."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload.errors import UnavailableError
from offload.run import require_program, run, spawn

_LOOK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """What to start. `user` counts where we are root, else it runs as we do. `end_with` ends it
    cleanly."""

    argv: Sequence[str]
    log: Path
    user: str = "root"
    end_with: signal.Signals = signal.SIGTERM
    start_s: float = 120.0
    end_s: float = 60.0


def as_user(user: str, argv: Sequence[str]) -> list[str]:
    """`argv`, to be run as `user` if we are root; ended if the calling thread ends."""
    setpriv = [require_program("setpriv", "util-linux"), "--pdeathsig", "KILL"]
    if os.geteuid() == 0 and user != "root":
        setpriv += ["--reuid", user, "--regid", str(pwd.getpwnam(user).pw_gid), "--init-groups"]
    return [*setpriv, *argv]


def run_as(user: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """The output of a program that is run as `user`; ProgramError if it fails."""
    return run(as_user(user, argv), timeout_s=300.0, env=env, cwd=Path("/")).stdout


def give(path: Path, user: str) -> None:
    """Let `user` own a file or folder, where we are root."""
    if os.geteuid() == 0:
        shutil.chown(path, user, pwd.getpwnam(user).pw_gid)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that servers under other users reach, short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="offload-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def running(daemon: Daemon, answers: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """Started, and ready: `answers` says so. Ended with the block, unless it has ended before."""
    log = os.open(daemon.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = spawn(
            as_user(daemon.user, daemon.argv),
            stdout=log,
            stderr=log,
            cwd=Path("/"),
            new_session=True,  # Ctrl-C is for the test
        )
    finally:
        os.close(log)
    try:
        _wait(daemon, process, answers)
        yield process
    finally:
        _end(daemon, process)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """For the block, it hangs: all its threads stand, its connections stay."""
    os.kill(pid, signal.SIGSTOP)
    try:
        tasks = Path(f"/proc/{pid}/task")
        while any(" T " not in (task / "stat").read_text() for task in tasks.iterdir()):
            time.sleep(_LOOK_S)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _wait(daemon: Daemon, process: subprocess.Popen[bytes], answers: Callable[[], bool]) -> None:
    until = time.monotonic() + daemon.start_s
    while not answers():
        if process.poll() is not None or time.monotonic() > until:
            how = "does not answer" if process.poll() is None else "ended"
            tail = daemon.log.read_text(errors="replace")[-2000:]
            raise UnavailableError(f"{Path(daemon.argv[0]).name} {how}: {tail}")
        time.sleep(_LOOK_S)


def _end(daemon: Daemon, process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)  # a test may have stopped it
        process.send_signal(daemon.end_with)
    try:
        process.wait(timeout=daemon.end_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
