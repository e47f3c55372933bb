"""Tests that run in the guest and count on the host.

All selected tests of a module run in one pytest in the guest (`forked.py` forks it); their reports
come back one by one, and the host's pytest takes them for its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import pytest

from offload.testing import warm
from offload.testing.lab.guest import Guest
from offload.testing.lab.inside import REPORTS_FD

MARKER = "in_guest"
INSIDE = "OFFLOAD_IN_LAB_GUEST"  # set in the guest: the tests are where they belong
_MODULE_S = 1800.0
_LOAD_S = 300.0
_KILL_S = 60.0
_PASSED_ON = ("CI", "OFFLOAD_TEST_SNAPSHOTS")  # hypothesis looks at the first
_TAIL = 6000  # characters of what pytest said in the guest


def is_delegated(item: pytest.Item) -> bool:
    """Whether this test is one for the guest, and this is not the guest."""
    return INSIDE not in os.environ and item.get_closest_marker(MARKER) is not None


class LostError(Exception):
    """No report will come any more; says why."""


class Pytests:
    """The process in the guest that forks a pytest for each module."""

    def __init__(self, guest: Guest, config: pytest.Config) -> None:
        """Start it, and wait until it has loaded what they need. GuestError, LostError."""
        self.guest = guest
        # descriptor 3 is for the reports, so that no test's own output gets in between
        argv = ["bash", "-c", 'exec 3>&1 1>&2; exec "$@"', "pytest"]
        argv += [sys.executable, "-m", "offload.testing.lab.forked"]
        argv += [name for name in warm.PACKAGES if name in sys.modules]  # a test here needs them
        env = {INSIDE: "1", REPORTS_FD: "3"}
        env |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self.command = guest.start(argv, env=env, cwd=str(config.rootpath), feed=True)
        if next(self.command.lines(time.monotonic() + _LOAD_S), None) is None:
            self.stop()
            said = self.command.stderr.decode("utf-8", "replace").strip()[-_TAIL:]
            raise LostError(f"pytest in the guest was not loaded; it said:\n{said}{guest.tails()}")

    def serves(self, guest: Guest) -> bool:
        """Whether it runs in this guest."""
        return self.guest is guest and guest.alive() and not self.command.ended

    def stop(self) -> None:
        """End it, and what it has forked. Idempotent."""
        if self.serves(self.guest):
            self.command.kill()
            self.command.wait(_KILL_S)


class ModuleRun:
    """One pytest in the guest. `timeout_s` of the first test's marker bounds it all."""

    def __init__(self, pytests: Pytests, items: Sequence[pytest.Item]) -> None:
        """Start it. GuestError where the guest has gone."""
        self._pytests = pytests
        self._config = items[0].config
        self._expected = {item.nodeid for item in items}
        self._finished: set[str] = set()
        self._reports: dict[str, list[pytest.TestReport]] = {}
        marker = items[0].get_closest_marker(MARKER)
        self._limit_s = float(marker.kwargs.get("timeout_s", _MODULE_S) if marker else _MODULE_S)
        command = pytests.command
        self._said_from = len(command.stderr)
        self._lines = command.lines(time.monotonic() + self._limit_s, len(command.stdout))
        self._status: int | None = None
        self._lost = ""
        command.feed(json.dumps(_pytest_words(items)).encode() + b"\n")

    def expects(self, nodeid: str) -> bool:
        """Whether this test was given to it."""
        return nodeid in self._expected

    def reports(self, nodeid: str) -> Iterator[pytest.TestReport]:
        """A test's reports, as they come. LostError where they do not come to their end."""
        while True:
            yield from self._reports.pop(nodeid, ())
            if nodeid in self._finished:
                return
            if not self._take_next():
                self._lost = self._lost or self._why_lost()
                raise LostError(self._lost)

    def _take_next(self) -> bool:
        """Whether more has come."""
        line = None if self._status is not None else next(self._lines, None)
        if line is None:
            return False
        message = json.loads(line)
        if "ended" in message:
            self._status = message["ended"]
        elif "finished" in message:
            self._finished.add(message["finished"])
        else:
            self._take_report(message["report"])
        return True

    def _take_report(self, data: dict[str, Any]) -> None:
        hook = self._config.hook
        if isinstance(data["longrepr"], list):  # JSON has no tuples; a skip's place is one
            data["longrepr"] = tuple(data["longrepr"])
        report = hook.pytest_report_from_serializable(config=self._config, data=data)
        self._reports.setdefault(report.nodeid, []).append(report)

    def finish(self) -> None:
        """Wait for its end. LostError if that is not a regular one."""
        while self._take_next():
            pass
        if self._status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise LostError(self._why_lost())

    def stop(self) -> None:
        """Nobody wants the rest. Idempotent."""
        if self._status is None:
            self._pytests.stop()

    def _why_lost(self) -> str:
        command = self._pytests.command
        if self._status is not None:
            how = f"ended with status {self._status} before its tests did"
        elif command.ended:
            how = f"is lost: {command.failure or f'status {command.status}'}"
        else:
            how = f"did not end within {self._limit_s:g} s, the limit of a module"
            self.stop()
        said = command.stderr[self._said_from :].decode("utf-8", "replace").strip()[-_TAIL:]
        return f"pytest in the guest {how}; it said:\n{said}{self._pytests.guest.tails()}"


def _pytest_words(items: Sequence[pytest.Item]) -> list[str]:
    """The same configuration and ways to show failures as on the host."""
    config = items[0].config
    argv = ["-p", "offload.testing.lab.inside"]
    # hypothesis works without its plugin, which takes emulated seconds to load
    for name in ("cacheprovider", "hypothesispytest", "xdist", "xdist.looponfail"):
        argv += ["-p", f"no:{name}"]
    argv += ["--color=no", f"--rootdir={config.rootpath}"]
    argv += ["-c", str(config.inipath)] if config.inipath else []
    argv += [f"--tb={config.getoption('tbstyle')}"]
    argv += ["--showlocals"] if config.getoption("showlocals") else []
    if most := config.getoption("maxfail"):
        argv += [f"--maxfail={max(1, most - items[0].session.testsfailed)}"]
    return argv + [item.nodeid for item in items]


class Delegation:
    """The host's side of all modules of a test run."""

    def __init__(self) -> None:
        self._pytests: Pytests | None = None
        self._run: ModuleRun | None = None

    def protocol(self, item: pytest.Item, nextitem: pytest.Item | None, guest: Guest) -> None:
        """Have a test run in the guest, and report it as pytest does. GuestError, LostError."""
        if self._run is None or not self._run.expects(item.nodeid):
            self.stop()
            if self._pytests is None or not self._pytests.serves(guest):
                self._pytests = Pytests(guest, item.config)
            self._run = ModuleRun(self._pytests, _rest_of_module(item))
        run = self._run
        for report in run.reports(item.nodeid):
            item.ihook.pytest_runtest_logreport(report=report)
        if nextitem is None or not run.expects(nextitem.nodeid):
            self._run = None
            run.finish()

    def stop(self) -> None:
        """End what runs in the guest: the host's pytest goes on to something else, or ends."""
        if self._run is not None:
            self._run.stop()
            self._run = None


def _rest_of_module(item: pytest.Item) -> list[pytest.Item]:
    """This test and those that follow it without one for the host in between."""
    items = item.session.items
    rest = items[items.index(item) :]
    return list(takewhile(lambda one: one.path == item.path and is_delegated(one), rest))
