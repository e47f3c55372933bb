"""The guardian's all-or-none, late freezes and marker, with holds that do as they are told."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.quiescers.guardian import Guard


class FakeHold:
    def __init__(self, name: str, *, fails: bool = False, ours: bool = True) -> None:
        self.name = name
        self.ours = ours
        self.fails = fails
        self.thaw_fails = False
        self.may_end = threading.Event()
        self.may_end.set()
        self.frozen = False
        self.thaws = 0

    def freeze(self) -> None:
        self.may_end.wait()
        if self.fails:
            raise OSError(errno.EBUSY, "frozen by a stranger")
        self.frozen = True

    def intact(self) -> bool:
        return self.frozen

    def thaw(self) -> bool:
        if self.thaw_fails:
            raise OSError(errno.EIO, "no")
        self.thaws += 1
        was, self.frozen = self.frozen, False
        return was


Make = Callable[..., Guard]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker.json"


@pytest.fixture
def make(marker: Path) -> Iterator[Make]:
    read, write = os.pipe()

    def build(*holds: FakeHold) -> Guard:
        return Guard(list(holds), marker, write)

    yield build
    os.close(read)
    os.close(write)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_guard_all_frozen_is_held_and_marked_until_released(make: Make, marker: Path) -> None:
    holds = [FakeHold("a"), FakeHold("b")]
    guard = make(*holds)
    assert not marker.exists()
    guard.begin()
    wait_for(lambda: guard.held)
    assert json.loads(marker.read_text()) == ["a", "b"]
    guard.release()
    guard.release()
    assert [h.thaws for h in holds] == [1, 1]
    assert not guard.held
    assert not guard.broken
    assert not marker.exists()


def test_guard_one_fails_others_are_let_go_and_the_strangers_is_not_touched(
    make: Make, marker: Path
) -> None:
    good, bad = FakeHold("good"), FakeHold("bad", fails=True)
    guard = make(good, bad)
    guard.begin()
    wait_for(lambda: guard.settled and good.frozen and len(guard.ms) == 2)
    assert not guard.held
    assert "bad: frozen by a stranger" in guard.errors[0]
    assert json.loads(marker.read_text()) == ["good"]
    guard.finish()
    assert (good.thaws, bad.thaws) == (1, 0)
    assert not marker.exists()


def test_guard_freeze_that_comes_after_the_release_is_let_go_at_once(
    make: Make, marker: Path
) -> None:
    fast, slow = FakeHold("fast"), FakeHold("slow")
    slow.may_end.clear()
    guard = make(fast, slow)
    guard.begin()
    wait_for(lambda: fast.frozen and "fast" in guard.ms)
    guard.release()
    assert fast.thaws == 1
    assert json.loads(marker.read_text()) == ["slow"], "still to be let go, should we die now"
    slow.may_end.set()
    guard.finish()
    assert (fast.thaws, slow.thaws) == (1, 1)
    assert not marker.exists()


def test_guard_let_go_by_somebody_else_is_told(make: Make) -> None:
    hold = FakeHold("a")
    guard = make(hold)
    guard.begin()
    wait_for(lambda: guard.held)
    told = []
    for still in (True, False):
        hold.frozen = still
        guard.check()
        told.append(guard.broken)
    assert told == ["", "a was let go by somebody else"]
    guard.release()


def test_guard_what_cannot_be_let_go_stays_marked(make: Make, marker: Path) -> None:
    good, stuck = FakeHold("good"), FakeHold("stuck")
    stuck.thaw_fails = True
    guard = make(good, stuck)
    guard.begin()
    wait_for(lambda: guard.held)
    guard.finish()
    assert good.thaws == 1
    assert any("stuck" in error for error in guard.errors)
    assert json.loads(marker.read_text()) == ["stuck"]


def test_guard_what_is_not_ours_is_not_marked(make: Make, marker: Path) -> None:
    guard = make(FakeHold("a", ours=False))
    guard.begin()
    wait_for(lambda: guard.held)
    assert not marker.exists()
    guard.finish()
