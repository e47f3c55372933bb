"""The pytest plugin in the guest: each report, as a line of JSON, to the host.

It is loaded by the host (`delegation.py`), which names the descriptor for the lines.
"""

from __future__ import annotations

import json
import os

import pytest

REPORTS_FD = "OFFLOAD_LAB_REPORTS_FD"


class Reporter:
    """Two kinds of lines: {"report": …} as pytest serializes it, {"finished": node id}."""

    def __init__(self, config: pytest.Config, fd: int) -> None:
        self._config = config
        self._out = os.fdopen(fd, "w", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test has ended."""
        hook = self._config.hook
        self._send(
            {"report": hook.pytest_report_to_serializable(config=self._config, report=report)}
        )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """All phases of a test have."""
        self._send({"finished": nodeid})

    def _send(self, message: dict[str, object]) -> None:
        # a property that a test has recorded may be anything
        self._out.write(json.dumps(message, default=repr) + "\n")
        self._out.flush()


def pytest_configure(config: pytest.Config) -> None:
    """Take the descriptor over; what the tests start does not inherit it."""
    fd = int(os.environ[REPORTS_FD])
    os.set_inheritable(fd, False)
    config.pluginmanager.register(Reporter(config, fd))
