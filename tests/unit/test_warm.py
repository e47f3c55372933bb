"""Programs in a warm Python are processes of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import run
from offload.testing.warm import WarmPython


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmPython]:
    made = WarmPython()
    yield made
    made.close()


def test_program_has_its_arguments_environment_and_streams(warm: WarmPython) -> None:
    code = "import os, sys; print(sys.argv, os.environ['X'], 'HOLD' in os.environ); sys.exit('no')"
    os.environ["HOLD"] = "not passed on"
    done = warm.run("-c", code, "a b", "", env={"X": "1"})
    del os.environ["HOLD"]
    assert (done.status, done.stderr) == (1, "no\n")
    assert done.stdout == "['-c', 'a b', ''] 1 False\n"


def test_program_leaves_nothing_for_the_next_one(warm: WarmPython) -> None:
    change = (
        "import os, json; os.environ['LEFT'] = json.left = 'x'; os.chdir('/'); print(os.getpid())"
    )
    look = "import os, json; print(os.environ.get('LEFT'), hasattr(json, 'left'), os.getcwd())"
    first, second = warm.run("-c", change), warm.run("-c", change)
    assert first.stdout != second.stdout
    assert warm.run("-c", look).stdout == f"None False {Path.cwd()}\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os._exit(4)", 4),
        ("1 / 0", 1),
    ],
)
def test_program_ends_with_its_status(warm: WarmPython, code: str, status: int) -> None:
    done = warm.run("-c", code)
    assert done.status == status
    assert ("ZeroDivisionError" in done.stderr) == (status == 1)


def test_program_ends_its_threads_and_calls_what_is_registered(warm: WarmPython) -> None:
    code = (
        "import atexit, threading; go = threading.Event(); atexit.register(print, 'registered')\n"
        "threading.Thread(target=lambda: (go.wait(), print('thread'))).start()\n"
        "print('end'); go.set()"
    )
    assert warm.run("-c", code).stdout == "end\nthread\nregistered\n"


def test_module_is_run_as_python_runs_it(warm: WarmPython) -> None:
    argv = ("-m", "offload.cli", "nosuch")
    done = warm.run(*argv)
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.startswith("offload: error: No such command")


def test_programs_run_side_by_side_and_a_late_one_is_killed(warm: WarmPython) -> None:
    reader, writer = os.pipe()
    path = f"/proc/{os.getpid()}/fd/"
    waits = f"print(open({path + str(reader)!r}).read())"
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(warm.run("-c", waits).stdout))
    thread.start()
    assert warm.run("-c", "print('meanwhile')").stdout == "meanwhile\n"
    with pytest.raises(run.ProgramError, match="in time"):
        warm.run("-c", "import signal; signal.pause()", timeout_s=0.5)
    os.write(writer, b"go")
    os.close(writer)
    thread.join(60)
    os.close(reader)
    assert said == ["go\n"]
