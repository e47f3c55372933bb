"""The one gateway to other programs.

argv lists only, an allow-listed environment, stdin closed unless given, pipes drained while the
program runs, and a time limit always. What was started is ended and reaped on any exception.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from offload.errors import UnavailableError

_KEEP_ENV = (
    "PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR",
    "LIBGUESTFS_BACKEND", "LIBGUESTFS_BACKEND_SETTINGS",
)  # fmt: skip
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STDERR_TAIL = 2000
_LISTEN_FDS_START = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A program that has ended."""

    argv: tuple[str, ...]
    status: int
    seconds: float
    stdout: str
    stderr: str


class ProgramError(UnavailableError):
    """A program ended with a status other than 0, or did not end in time."""

    code = "program-failed"

    def __init__(
        self, argv: Sequence[str], status: int | None, seconds: float, stderr: str
    ) -> None:
        how = "did not end in time" if status is None else f"ended with status {status}"
        tail = stderr.strip()[-_STDERR_TAIL:]
        said = [line.strip() for line in tail.splitlines() if line.strip()]
        last = "; ".join(said[-2:]) or "it said nothing"  # some, like mount, end with a mere hint
        super().__init__(f"{Path(argv[0]).name} {how} after {seconds:.1f} s: {last}")
        self.argv = tuple(argv)
        self.status = status
        self.seconds = seconds
        self.stderr = tail


def child_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that programs get: an allow-list, C locale, and `extra`."""
    env = {k: os.environ[k] for k in _KEEP_ENV if k in os.environ}
    path = env.get("PATH", "")
    env["PATH"] = f"{path}:{_DEFAULT_PATH}" if path else _DEFAULT_PATH
    env["LC_ALL"] = "C.UTF-8"
    env.update(extra or {})
    return env


def find_program(name: str) -> str | None:
    """The full path of a program, looking also in the sbin folders, or None."""
    return shutil.which(name, path=child_env()["PATH"])


def require_program(name: str, package: str) -> str:
    """The full path of a program; UnavailableError naming the Debian package if it is missing."""
    found = find_program(name)
    if found is None:
        raise UnavailableError(
            f"the program {name} is not installed",
            code="program-missing",
            hint=f"install it: apt-get install {package}",
        )
    return found


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 60.0,
    check: bool = True,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a program to its end. Raises ProgramError when it fails (if `check`) or is late."""
    began = time.monotonic()
    with spawn(
        argv,
        stdin=subprocess.PIPE if stdin is not None else None,
        env=env,
        cwd=cwd,
        pass_fds=pass_fds,
    ) as process:
        try:
            out, err = process.communicate(input=stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as late:
            terminate(process)
            raise ProgramError(argv, None, time.monotonic() - began, _text(late.stderr)) from late
        except BaseException:
            terminate(process)
            raise
    seconds = time.monotonic() - began
    if check and process.returncode != 0:
        raise ProgramError(argv, process.returncode, seconds, _text(err))
    return Completed(
        argv=tuple(argv),
        status=process.returncode,
        seconds=seconds,
        stdout=_text(out),
        stderr=_text(err),
    )


def spawn(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = subprocess.PIPE,
    stderr: int | None = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program; the caller ends it (see `terminate`). Streams default to pipes."""
    with _translated(argv[0]):
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            env=child_env(env),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=new_session,
        )


def spawn_detached(
    argv: Sequence[str],
    *,
    output: int,
    env: Mapping[str, str] | None = None,
    listening: Sequence[int] = (),
) -> int:
    """Start a server that outlives us; returns its pid. Its folder is `/`, its session its own.

    Both its streams go to the descriptor `output`. It has no parent but init from its first
    instruction on: a program that asks for a signal at its parent's end (nbdkit 1.32 does in the
    foreground: PR_SET_PDEATHSIG) would otherwise end with us. Sockets in `listening` are handed
    over as systemd does it (sd_listen_fds(3)): a program that cannot be started then is seen by
    its end alone.
    """
    reader, writer = os.pipe()
    environment = child_env(env)

    def leave() -> None:
        middle = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == middle:
            os.sched_yield()
        os.write(writer, str(os.getpid()).encode())
        if listening:
            _exec_listening(argv, environment, listening)

    try:
        with _translated(argv[0]):
            first = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd="/",
                start_new_session=True,
                preexec_fn=leave,  # noqa: PLW1509 - system calls only, then it executes
            )
        first.wait()
        return int(os.read(reader, 32))
    finally:
        os.close(reader)
        os.close(writer)


def _exec_listening(
    argv: Sequence[str], env: Mapping[str, str], listening: Sequence[int]
) -> NoReturn:
    """Become the program, in the child: LISTEN_PID is known only here. Nothing else stays open."""
    end = _LISTEN_FDS_START + len(listening)
    # first out of the way of each other
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, end) for fd in listening]
    for place, fd in enumerate(moved, _LISTEN_FDS_START):
        os.dup2(fd, place)
    os.closerange(end, os.sysconf("SC_OPEN_MAX"))
    handed = {"LISTEN_FDS": str(len(listening)), "LISTEN_PID": str(os.getpid())}
    os.execve(argv[0], list(argv), {**env, **handed})  # noqa: S606 - this is the gateway


@contextmanager
def _translated(program: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as missing:
        raise UnavailableError(
            f"the program {program} is not installed",
            code="program-missing",
            hint="see: offload doctor",
        ) from missing
    except PermissionError as denied:
        raise UnavailableError(
            f"the program {program} may not be run", code="program-missing"
        ) from denied


def terminate(process: subprocess.Popen[bytes], grace_s: float = 5.0) -> None:
    """End a program that we started: SIGTERM, wait, SIGKILL, reap. Idempotent."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")
