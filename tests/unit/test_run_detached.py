"""Programs that outlive whoever started them."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offload import procs, run
from offload.errors import UnavailableError


def _start(argv: list[str], log: Path) -> int:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        return run.spawn_detached(argv, output=fd, env={"GREETING": "hello"})
    finally:
        os.close(fd)


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_spawn_detached_has_neither_our_parenthood_session_nor_folder(tmp_path: Path) -> None:
    pid = _start(["sleep", "60"], tmp_path / "log")
    ref = procs.ref_of(pid)
    assert ref is not None
    try:
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        assert int(parent) != os.getpid()
        assert os.getsid(pid) != os.getsid(0)
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\0" + b"60\0"
    finally:
        ref.end()
    assert not ref.alive()


def test_spawn_detached_writes_both_streams_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    _start(["sh", "-c", 'echo "$GREETING"; echo error >&2'], log)
    _wait(lambda: log.read_text() == "hello\nerror\n")


def test_spawn_detached_missing_program_is_one_error_and_no_process(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not used
    with pytest.raises(UnavailableError) as caught:
        _start(["/no/such/program"], tmp_path / "log")
    assert caught.value.code == "program-missing"
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_spawn_detached_hands_listening_sockets_over_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, socket\n"
        "assert os.environ['LISTEN_PID'] == str(os.getpid())\n"
        "count = int(os.environ['LISTEN_FDS'])\n"
        "sockets = [socket.socket(fileno=3 + n) for n in range(count)]\n"
        "print(*[s.getsockname()[1] for s in sockets])\n"
        "print(*sorted(os.listdir('/proc/self/fd')), flush=True)\n"
    )
    log = tmp_path / "log"
    leak = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.set_inheritable(leak, True)
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as two,
    ):
        run.spawn_detached(
            [sys.executable, "-c", script], output=leak, listening=[two.fileno(), one.fileno()]
        )
        ports = [sock.getsockname()[1] for sock in (two, one)]
    _wait(lambda: log.read_text().count("\n") == 2)
    os.close(leak)
    # 5 is the folder that lists them
    assert log.read_text().split() == [str(p) for p in ports] + ["0", "1", "2", "3", "4", "5"]


def test_spawn_detached_listening_program_that_is_missing_is_gone(tmp_path: Path) -> None:
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        pid = run.spawn_detached(["/no/such/program"], output=log, listening=[server.fileno()])
        port = server.getsockname()[1]
    os.close(log)
    _wait(lambda: procs.ref_of(pid) is None)
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) != 0
