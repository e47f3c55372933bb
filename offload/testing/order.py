"""A pytest plugin: the order in which test modules are given to the processes of pytest-xdist.

With `--dist loadfile` a module runs in one process. So do the modules of a group, which share a
server that takes long to start; and the groups that take longest are begun first. `order.toml`, in
the folder of the tests, says which: see there.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

_FILE = "order.toml"
_OTHERS_S = 3  # a module that the file does not name
_SLOWEST = pytest.StashKey[defaultdict[str, float]]()


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """`together`: the group of all modules whose path begins so. `seconds` of modules."""

    together: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def group_of(self, nodeid: str) -> str:
        """The group of a test: its module, or that of several."""
        module = _module(nodeid)
        fitting = (name for start, name in self.together.items() if module.startswith(start))
        return next(fitting, module)

    def seconds_of(self, nodeids: Mapping[str, object]) -> float:
        """What the modules of these tests take."""
        return sum(self.seconds.get(m, _OTHERS_S) for m in {_module(n) for n in nodeids})


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """The one of `--dist loadfile`, but for the groups and their order."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

    path = config.rootpath / config.getini("testpaths")[0] / _FILE
    if config.getoption("dist") != "loadfile" or not path.exists():
        return None
    order = Order(**tomllib.loads(path.read_text(encoding="utf-8")))

    class LongestFirst(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return order.group_of(nodeid)

        def _assign_work_unit(self, node: object) -> None:
            longest = max(self.workqueue, key=lambda name: order.seconds_of(self.workqueue[name]))
            self.workqueue.move_to_end(longest, last=False)
            super()._assign_work_unit(node)

    return LongestFirst(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option."""
    words = "at the end, show the seconds of so many modules"
    parser.addoption("--slowest-modules", type=int, default=0, metavar="N", help=words)


def pytest_configure(config: pytest.Config) -> None:
    """The sums begin."""
    config.stash[_SLOWEST] = defaultdict(float)


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> Any:
    """Add up, where a report of any process is counted, once."""
    if hasattr(report, "duration"):
        config.stash[_SLOWEST][_module(report.nodeid)] += report.duration
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """As they stand in the file."""
    config = terminalreporter.config
    if count := config.getoption("--slowest-modules"):
        terminalreporter.section("slowest modules, seconds")
        found = sorted(config.stash[_SLOWEST].items(), key=lambda entry: -entry[1])
        for module, seconds in found[:count]:
            terminalreporter.write_line(f'"{module}" = {seconds:.0f}')
