"""Which processes live."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from offload import procs, run

# Ends its first thread alone: 60 is exit(2) on amd64, 93 on arm64.
_SCRIPT = """
import ctypes, platform, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_process_whose_first_thread_has_ended_lives_as_long_as_another() -> None:
    """`kill -9` ends the threads one after another, and the last one closes the sockets."""
    process = run.spawn([sys.executable, "-c", _SCRIPT])
    try:
        until = time.monotonic() + 60
        while _state(process.pid) != "Z":
            assert time.monotonic() < until
            time.sleep(0.005)
        ref = procs.ref_of(process.pid)
        assert ref is not None
        assert ref.alive()
    finally:
        process.kill()
        process.wait()
    assert not ref.alive()


def test_process_that_nobody_has_reaped_is_dead() -> None:
    process = run.spawn(["sleep", "600"])
    ref = procs.ref_of(process.pid)
    assert ref is not None
    process.kill()
    until = time.monotonic() + 60
    while ref.alive():
        assert time.monotonic() < until
        time.sleep(0.005)
    assert _state(process.pid) == "Z"
    process.wait()
