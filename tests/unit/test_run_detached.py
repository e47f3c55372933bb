"""Programs that outlive whoever started them."""

from __future__ import annotations

import os
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
    until = time.monotonic() + 5
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
