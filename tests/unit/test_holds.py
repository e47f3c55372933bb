"""Holds on TimeMarks, between processes."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offload.config import Config
from offload.errors import BusyError
from offload.holds import claim_timemark, claim_view, hold_timemark
from offload.instance import Instance
from offload.run import spawn, terminate

_CHILD = """
import sys, time
from pathlib import Path
from offload import holds
from offload.config import Config
from offload.instance import Instance
folder = Path(sys.argv[1])
instance = Instance(config=Config(), config_path=None, state_dir=folder, runtime_dir=folder, id="i")
wait = {"wait": True} if sys.argv[2] == "claim_view" else {}
with getattr(holds, sys.argv[2])(instance, "mark", **wait):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return Instance(
        config=Config(), config_path=None, state_dir=tmp_path, runtime_dir=tmp_path, id="i"
    )


def test_hold_by_another_process_refuses_the_claim_until_it_dies(instance: Instance) -> None:
    process = spawn([sys.executable, "-c", _CHILD, str(instance.state_dir), "hold_timemark"])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with hold_timemark(instance, "mark"):  # any number of readers
            pass
        with pytest.raises(BusyError) as caught, claim_timemark(instance, "mark"):
            pass
        assert caught.value.code == "timemark-in-use"
        with claim_timemark(instance, "another"):
            pass
        process.kill()
        process.wait()
        with claim_timemark(instance, "mark"):
            pass
    finally:
        terminate(process)


def test_claim_by_another_process_refuses_holds_and_claims(instance: Instance) -> None:
    process = spawn([sys.executable, "-c", _CHILD, str(instance.state_dir), "claim_timemark"])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(BusyError) as caught, hold_timemark(instance, "mark"):
            pass
        assert caught.value.code == "timemark-going"
        with pytest.raises(BusyError), claim_timemark(instance, "mark"):
            pass
    finally:
        terminate(process)


def test_claim_that_succeeds_removes_its_file_and_one_that_fails_keeps_it(
    instance: Instance,
) -> None:
    with pytest.raises(ZeroDivisionError), claim_timemark(instance, "mark"):
        raise ZeroDivisionError
    assert (instance.state_dir / "holds" / "mark").exists()
    with claim_timemark(instance, "mark"):
        pass
    assert not (instance.state_dir / "holds" / "mark").exists()


def test_hold_that_opened_the_file_before_it_went_locks_the_new_one(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, path = os.open, instance.state_dir / "holds" / "mark"
    opened: list[int] = []

    def slow(name: Path, *rest: int) -> int:
        fd = real(name, *rest)
        if not opened:
            path.unlink()  # a claim ended between open and lock
        opened.append(fd)
        return fd

    monkeypatch.setattr(os, "open", slow)
    with hold_timemark(instance, "mark"):
        monkeypatch.undo()
        with pytest.raises(BusyError), claim_timemark(instance, "mark"):
            pass


def test_claim_of_a_view_by_another_process_is_refused_or_waited_for(instance: Instance) -> None:
    process = spawn([sys.executable, "-c", _CHILD, str(instance.state_dir), "claim_view"])
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with claim_view(instance, "mark", wait=False) as mine:
            assert not mine
        with hold_timemark(instance, "mark"):  # a TimeMark of the same id is another thing
            pass
        with ThreadPoolExecutor(1) as crew:
            waiting = crew.submit(_claim, instance)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            process.kill()
            assert waiting.result(timeout=30)
    finally:
        terminate(process)


def _claim(instance: Instance) -> bool:
    with claim_view(instance, "mark", wait=True) as mine:
        return mine
