"""The demonstration, from start to end, as a user runs it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import leftovers
from offload.run import require_program, run

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, str(ROOT / "demo" / "run.py")]
NOBODY = 65534  # of Debian's base-passwd
TIMEOUT_S = 480
EARLIER = "An earlier demonstration was interrupted: its leftovers go first."

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * TIMEOUT_S)]


@pytest.fixture
def work() -> Iterator[Path]:
    """A work folder that does not exist yet, on a path that is short enough for sockets."""
    parent = Path(tempfile.mkdtemp(prefix="ofd-"))
    folder = parent / "work"
    yield folder
    leftovers.clean(folder, {"OFFLOAD_CONFIG": str(leftovers.config_of(folder))})
    shutil.rmtree(parent)


def demo(work: Path, *prefix: str, options: tuple[str, ...] = ()) -> str:
    """Run it to its end, which must be a good one; returns what it showed, without line breaks."""
    done = run([*prefix, *DEMO, "--work", str(work), *options], timeout_s=TIMEOUT_S, check=False)
    assert done.status == 0, done.stdout[-3000:] + done.stderr
    return " ".join(done.stdout.split())


def assert_nothing_left(work: Path) -> None:
    """No process, mount, loop device or file of a demonstration."""
    assert leftovers.programs(work) == []
    assert leftovers.servers(work) == []
    assert leftovers.mounts(work) == []
    assert leftovers.loops(work) == []
    assert not work.exists()


@pytest.mark.needs_root
def test_demo_after_a_killed_one_cleans_up_shows_the_main_job_and_leaves_nothing(
    work: Path,
) -> None:
    kill_when_mounted(work)
    assert leftovers.mounts(work)
    assert leftovers.servers(work)
    shown = demo(work)
    assert EARLIER in shown
    assert "FALLBACK" not in shown
    for command in (
        "$ offload timemark create shop", "$ nbdinfo", "$ offload backup shop",
        "$ offload restore", "$ guestfish", "$ offload unmount --all",
    ):  # fmt: skip
        assert command in shown
    assert shown.count("one instant of both volumes.") == 2
    assert "Identical." in shown
    assert "second backup (incremental)" in shown
    assert_nothing_left(work)


@pytest.mark.needs_root
def test_demo_clean_after_a_killed_one_takes_its_leftovers_away(work: Path) -> None:
    kill_when_mounted(work)
    assert demo(work, options=("--clean",)) == EARLIER
    assert_nothing_left(work)


@pytest.mark.needs_root
def test_demo_without_root_falls_back_to_copies(work: Path) -> None:
    if any(not folder.stat().st_mode & stat.S_IXOTH for folder in (ROOT, *ROOT.parents)):
        pytest.skip("the checkout is in a folder that other users may not enter")
    os.chown(work.parent, NOBODY, NOBODY)
    setpriv = require_program("setpriv", "util-linux")
    ids = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    shown = demo(work, setpriv, *ids)
    assert "FALLBACK" in shown
    assert "this is not root" in shown
    assert "instant: none" in shown
    assert "Identical." in shown
    assert_nothing_left(work)


def test_demo_in_a_folder_of_something_else_touches_nothing(work: Path) -> None:
    work.mkdir()
    (work / "precious").write_text("mine")
    done = run([*DEMO, "--work", str(work)], check=False)
    assert done.status == 1
    assert "not of a demonstration" in done.stderr
    assert (work / "precious").read_text() == "mine"
    (work / "precious").unlink()
    (work / leftovers.MARKER).touch()  # for the fixture: an empty work folder


def kill_when_mounted(work: Path) -> None:
    """kill -9 of a demonstration whose TimeViews are mounted."""
    with subprocess.Popen(
        [*DEMO, "--work", str(work)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + TIMEOUT_S
        while len(leftovers.servers(work)) < 2 and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
