"""The gateway to other programs, and who is a process."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from offload import procs
from offload.errors import UnavailableError
from offload.run import ProgramError, find_program, require_program, run, spawn, terminate


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_run_program_gives_streams_and_status() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = run(_python(code), check=False)
    assert (done.stdout, done.stderr, done.status) == ("out\n", "err\n", 3)


def test_run_failing_program_is_an_error_with_its_last_words() -> None:
    code = "import sys; print('noise\\nthe cause\\na hint', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ProgramError, match=r"ended with status 3 .*: the cause; a hint$") as caught:
        run(_python(code))
    assert caught.value.status == 3
    assert caught.value.argv[0] == sys.executable
    assert caught.value.stderr == "noise\nthe cause\na hint"


def test_run_late_program_is_killed_even_if_it_ignores_sigterm(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    process = spawn(_python(code))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    terminate(process, grace_s=0.1)
    assert process.returncode == -signal.SIGKILL
    terminate(process)  # again: nothing to do
    with pytest.raises(ProgramError, match="did not end in time") as caught:
        run(["sleep", "60"], timeout_s=0.1)
    assert caught.value.status is None


def test_run_much_output_on_both_streams_does_not_hang() -> None:
    code = "import sys; sys.stderr.write('e' * 3000000); sys.stdout.write('o' * 3000000)"
    done = run(_python(code), timeout_s=30)
    assert (len(done.stdout), len(done.stderr)) == (3000000, 3000000)


def test_run_stdin_is_closed_unless_given() -> None:
    code = "import sys; print(repr(sys.stdin.read()))"
    assert run(_python(code), timeout_s=60).stdout == "''\n"
    assert run(_python(code), timeout_s=60, stdin=b"x" * 200000).stdout == f"'{'x' * 200000}'\n"


def test_run_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    code = "import os; print(*sorted(os.environ), os.environ['LC_ALL'], os.environ['MORE'])"
    words = run(_python(code), env={"MORE": "yes"}).stdout.split()
    assert "AWS_SECRET_ACCESS_KEY" not in words
    assert "LANG" not in words
    assert words[-2:] == ["C.UTF-8", "yes"]


def test_run_descriptors_are_not_inherited_unless_passed() -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        code = f"import os; os.fstat({write})"
        assert run(_python(code), check=False).status == 1
        assert run(_python(code), check=False, pass_fds=(write,)).status == 0
    finally:
        os.close(read)
        os.close(write)


def test_run_missing_program_is_unavailable_and_names_the_package() -> None:
    with pytest.raises(UnavailableError) as caught:
        run(["no-such-program-here"])
    assert caught.value.code == "program-missing"
    assert find_program("no-such-program-here") is None
    with pytest.raises(UnavailableError) as wanted:
        require_program("no-such-program-here", "some-package")
    assert "some-package" in wanted.value.hint


def test_find_program_looks_into_the_sbin_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_program("sh")


def test_process_reference_with_another_start_is_dead_and_left_alone() -> None:
    process = spawn(["sleep", "60"])
    try:
        mine = procs.ref_of(process.pid)
        assert mine is not None
        assert mine.alive()
        assert procs.ProcessRef.from_strings(mine.to_strings()) == mine
        for other in (replace(mine, start="1"), replace(mine, boot="another")):
            assert not other.alive()
            other.end()
        assert mine.alive()
        mine.end()
        assert not mine.alive()
        mine.end()
    finally:
        terminate(process)
    assert procs.ref_of(process.pid) is None


def test_process_zombie_counts_as_dead() -> None:
    process = spawn(["true"])
    try:
        mine = procs.ref_of(process.pid)
        until = time.monotonic() + 60
        while mine is not None and mine.alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert Path(f"/proc/{process.pid}").exists()  # not reaped yet
        assert mine is None or not mine.alive()
    finally:
        terminate(process)


def test_process_reference_of_no_process_is_none() -> None:
    assert procs.ProcessRef.from_strings({}) is None
    assert procs.ref_of(2**22 + 1) is None
