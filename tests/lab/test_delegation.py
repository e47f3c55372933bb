"""Tests that run in the guest: what the host's pytest makes of them. In pytests of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import run

pytestmark = pytest.mark.timeout(600)  # a whole test run in each, and guests that boot twice

_PATIENCE_S = 580
_OUTCOMES = """
    import os
    import warnings
    import pytest

    pytestmark = pytest.mark.in_guest

    @pytest.fixture(scope="module")
    def process():
        return os.getpid()

    @pytest.fixture
    def broken():
        raise RuntimeError("no such fixture today")

    @pytest.fixture
    def untidy():
        yield
        raise RuntimeError("left something behind")

    @pytest.mark.parametrize("number", [1, 2, "a::b c"])
    def test_param(number, process):
        assert os.uname().nodename == "lab"
        print(f"process {process}, tests in it")

    def test_fails(tmp_path):
        wanted, got = "this", "that"
        os.write(1, b'{"finished": "no report"}' + b"\\n")
        assert wanted == got

    def test_skips():
        pytest.skip("not today")

    @pytest.mark.xfail(reason="known")
    def test_xfails():
        raise AssertionError

    def test_set_up_breaks(broken):
        pass

    def test_tear_down_breaks(untidy):
        pass

    class TestClass:
        def test_method(self, record_property):
            record_property("key", "recorded value")
"""

_CRASH = """
    import os
    import signal
    import pytest

    pytestmark = pytest.mark.in_guest

    def test_before():
        pass

    def test_crashes():
        os.kill(os.getpid(), signal.SIGSEGV)

    def test_behind():
        pass
"""

_LATE = """
    import time
    import pytest

    pytestmark = pytest.mark.in_guest(timeout_s=8)

    def test_late():
        time.sleep(600)

    def test_behind_late():
        pass
"""

_PANIC = """
    from pathlib import Path
    import time
    import pytest

    pytestmark = pytest.mark.in_guest

    def test_panics():
        Path("/proc/sysrq-trigger").write_text("c")
        time.sleep(600)
"""

_AFTER = """
    import os
    from pathlib import Path
    import pytest

    @pytest.fixture(scope="module")
    def untidy_module():
        yield
        raise RuntimeError("the module left something behind")

    @pytest.mark.in_guest
    def test_there():
        assert os.uname().nodename == "lab"

    def test_here(guest, untidy_module):
        assert os.uname().nodename != "lab"
        assert guest.run(["hostname"]).text == "lab\\n"

    @pytest.mark.in_guest
    def test_there_again():
        Path("/tmp/once").mkdir()
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A test suite under /tmp, where the guest has a file system of its own."""
    made = Path(tempfile.mkdtemp(prefix="offload-lab-tests-", dir="/tmp"))
    (made / "pytest.ini").write_text("[pytest]\naddopts = -p offload.testing.lab.plugin\n")
    modules = {"a": _OUTCOMES, "b": _CRASH, "c": _LATE, "d": _PANIC, "e": _AFTER}
    for letter, text in modules.items():
        (made / f"test_{letter}.py").write_text(textwrap.dedent(text))
    yield made
    shutil.rmtree(made)


def run_pytest(folder: Path, *words: str) -> str:
    return run.run(
        pytest_argv(folder, "-v", "-rA", *words), cwd=folder, timeout_s=_PATIENCE_S, check=False
    ).stdout


def pytest_argv(folder: Path, *words: str) -> list[str]:
    base = f"--basetemp={folder}/base"
    return [sys.executable, "-m", "pytest", "-p", "no:hypothesispytest", base, *words]


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> str:
    """What pytest says of all of them."""
    return run_pytest(folder, f"--junitxml={folder}/report.xml")


def outcome(said: str, test: str) -> str:
    """The word after a test's name in the list of tests."""
    found = re.search(rf"^{re.escape(test)} (\w+)", said, re.MULTILINE)
    assert found is not None, said
    return found[1]


@pytest.mark.parametrize(
    ("test", "word"),
    [
        ("test_a.py::test_param[1]", "PASSED"),
        ("test_a.py::test_param[a::b c]", "PASSED"),
        ("test_a.py::test_fails", "FAILED"),
        ("test_a.py::test_skips", "SKIPPED"),
        ("test_a.py::test_xfails", "XFAIL"),
        ("test_a.py::test_set_up_breaks", "ERROR"),
        ("test_a.py::test_tear_down_breaks", "PASSED"),
        ("test_a.py::TestClass::test_method", "PASSED"),
        ("test_b.py::test_before", "PASSED"),
        ("test_b.py::test_crashes", "FAILED"),
        ("test_b.py::test_behind", "FAILED"),
        ("test_c.py::test_late", "FAILED"),
        ("test_c.py::test_behind_late", "FAILED"),
        ("test_d.py::test_panics", "FAILED"),
        ("test_e.py::test_there", "PASSED"),
        ("test_e.py::test_here", "PASSED"),
        ("test_e.py::test_there_again", "PASSED"),
    ],
)
def test_delegated_test_has_its_own_outcome_on_the_host(
    whole_run: str, test: str, word: str
) -> None:
    assert outcome(whole_run, test) == word


def test_delegated_counts_are_the_usual_ones(whole_run: str) -> None:
    last = whole_run.strip().splitlines()[-1]
    for words in ("6 failed", "9 passed", "1 skipped", "1 xfailed", "3 errors"):
        assert words in last


def test_delegated_failure_has_its_traceback_and_output(whole_run: str) -> None:
    assert "AssertionError: assert 'this' == 'that'" in whole_run
    assert '{"finished": "no report"}' in whole_run  # captured, as all output
    assert "RuntimeError: no such fixture today" in whole_run
    assert "RuntimeError: left something behind" in whole_run
    assert re.search(r"SKIPPED.*test_a.py.*not today", whole_run)


def test_delegated_module_runs_in_one_process(whole_run: str) -> None:
    assert len(set(re.findall(r"^process (\d+), tests in it", whole_run, re.MULTILINE))) == 1


def test_delegated_properties_reach_the_report_file(whole_run: str, folder: Path) -> None:
    assert 'name="key" value="recorded value"' in (folder / "report.xml").read_text()


def test_delegated_crash_fails_the_rest_with_its_last_words(whole_run: str) -> None:
    assert whole_run.count("ended with status -11 before its tests did") >= 2
    assert "Fatal Python error: Segmentation fault" in whole_run


def test_delegated_module_past_its_limit_is_killed(whole_run: str) -> None:
    assert "did not end within 8 s, the limit of a module" in whole_run


def test_delegated_panic_shows_the_console(whole_run: str) -> None:
    assert "the lab guest went away" in whole_run
    assert "sysrq triggered crash" in whole_run


def test_host_fixture_between_delegated_tests_is_torn_down_and_reported(whole_run: str) -> None:
    assert "ERROR at teardown of test_there_again" in whole_run
    assert "the module left something behind" in whole_run


def test_delegated_first_failure_ends_the_run_where_asked(folder: Path) -> None:
    said = run_pytest(folder, "-x", "test_a.py", "-k", "param and 2 or fails or skips")
    assert outcome(said, "test_a.py::test_param[2]") == "PASSED"
    assert outcome(said, "test_a.py::test_fails") == "FAILED"
    assert "1 failed, 1 passed" in said.strip().splitlines()[-1]
    assert "test_skips" not in said


# -- the end -------------------------------------------------------------------------------------


def test_guest_of_a_killed_test_run_dies_with_it(folder: Path) -> None:
    """Nobody is left to end QEMU: the kernel does."""
    mark = folder / "running"
    test = folder / "test_waits.py"
    test.write_text(
        textwrap.dedent(f"""
        import pathlib, time
        def test_waits(guest):
            pathlib.Path("{mark}").write_text(str(guest.pid))
            time.sleep(600)
        """)
    )
    process = run.spawn(
        pytest_argv(folder, str(test)),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + _PATIENCE_S
        while not (mark.exists() and mark.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        assert "mount_tag=root" in Path(f"/proc/{mark.read_text()}/cmdline").read_text()
        os.kill(process.pid, signal.SIGKILL)
        while Path(f"/proc/{mark.read_text()}").exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert not Path(f"/proc/{mark.read_text()}").exists()
    finally:
        run.terminate(process)
        test.unlink()
