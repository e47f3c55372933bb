"""Tests that run in the guest and count on the host.

All selected tests of a module run in one pytest in the guest (to start it takes seconds there);
their reports come back one by one, and the host's pytest takes them for its own.
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

from offload.testing.lab.guest import Guest
from offload.testing.lab.inside import REPORTS_FD

MARKER = "in_guest"
INSIDE = "OFFLOAD_IN_LAB_GUEST"  # set in the guest: the tests are where they belong
_MODULE_S = 1800.0
_END_S = 60.0
_PASSED_ON = ("CI", "OFFLOAD_TEST_SNAPSHOTS")  # hypothesis looks at the first
_TAIL = 6000  # characters of what pytest said in the guest


def is_delegated(item: pytest.Item) -> bool:
    """Whether this test is one for the guest, and this is not the guest."""
    return INSIDE not in os.environ and item.get_closest_marker(MARKER) is not None


class LostError(Exception):
    """No report will come any more; says why."""


class ModuleRun:
    """One pytest in the guest. `timeout_s` of the first test's marker bounds it all."""

    def __init__(self, guest: Guest, items: Sequence[pytest.Item]) -> None:
        """Start it. GuestError where the guest has gone."""
        self._guest = guest
        self._config = items[0].config
        self._expected = {item.nodeid for item in items}
        self._finished: set[str] = set()
        self._reports: dict[str, list[pytest.TestReport]] = {}
        marker = items[0].get_closest_marker(MARKER)
        self._limit_s = float(marker.kwargs.get("timeout_s", _MODULE_S) if marker else _MODULE_S)
        # descriptor 3 is for the reports, so that no test's own output gets in between
        argv = ["bash", "-c", 'exec 3>&1 1>&2; exec "$@"', "pytest", *_pytest_argv(items)]
        env = {INSIDE: "1", REPORTS_FD: "3"}
        env |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        self._command = guest.start(argv, env=env, cwd=str(self._config.rootpath))
        self._lines = self._command.lines(time.monotonic() + self._limit_s)
        self._lost = ""

    def expects(self, nodeid: str) -> bool:
        """Whether this test was given to it."""
        return nodeid in self._expected

    def reports(self, nodeid: str) -> Iterator[pytest.TestReport]:
        """A test's reports, as they come. LostError where they do not come to their end."""
        while True:
            yield from self._reports.pop(nodeid, ())
            if nodeid in self._finished:
                return
            line = next(self._lines, None)
            if line is None:
                self._lost = self._lost or self._why_lost()
                raise LostError(self._lost)
            self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "finished" in message:
            self._finished.add(message["finished"])
            return
        hook = self._config.hook
        data = message["report"]
        if isinstance(data["longrepr"], list):  # JSON has no tuples; a skip's place is one
            data["longrepr"] = tuple(data["longrepr"])
        report = hook.pytest_report_from_serializable(config=self._config, data=data)
        self._reports.setdefault(report.nodeid, []).append(report)

    def finish(self) -> None:
        """Wait for its end. LostError if that is not a regular one."""
        if not self._command.wait(_END_S):
            self.stop()
            raise LostError(f"pytest in the guest did not end within {_END_S:g} s of its tests")
        if self._command.status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise LostError(self._why_lost())

    def stop(self) -> None:
        """Nobody wants the rest. Idempotent."""
        if not self._command.ended and self._guest.alive():
            self._command.kill()

    def _why_lost(self) -> str:
        command = self._command
        if command.status is not None:
            how = f"ended with status {command.status} before its tests did"
        elif command.failure:
            how = f"is lost: {command.failure}"
        else:
            how = f"did not end within {self._limit_s:g} s, the limit of a module"
            self.stop()
        said = command.stderr.decode("utf-8", "replace").strip()[-_TAIL:]
        return f"pytest in the guest {how}; it said:\n{said}{self._guest.tails()}"


def _pytest_argv(items: Sequence[pytest.Item]) -> list[str]:
    """The same Python, configuration and ways to show failures as on the host."""
    config = items[0].config
    argv = [sys.executable, "-m", "pytest", "-p", "offload.testing.lab.inside"]
    # hypothesis works without its plugin, which takes emulated seconds to load
    argv += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
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
        self._run: ModuleRun | None = None

    def protocol(self, item: pytest.Item, nextitem: pytest.Item | None, guest: Guest) -> None:
        """Have a test run in the guest, and report it as pytest does. GuestError, LostError."""
        if self._run is None or not self._run.expects(item.nodeid):
            self.stop()
            self._run = ModuleRun(guest, _rest_of_module(item))
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
