"""The lab for pytest: fixtures `guest` and `fresh_guest`, and tests that run in the guest.

Load it with `pytest_plugins = ["offload.testing.lab.plugin"]`. A test with the marker `in_guest`
(`@pytest.mark.in_guest`, or `in_guest(timeout_s=900)` for its whole module) is collected here, run
there, and reported here. It is an ordinary test, but for fixtures of a scope wider than its
module, which are made once a module.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from offload.errors import OffloadError
from offload.testing.lab.delegation import INSIDE, MARKER, Delegation, LostError, is_delegated
from offload.testing.lab.guest import Guest

_GUEST = pytest.StashKey[Guest]()
_FAILURE = pytest.StashKey[OffloadError]()
_DELEGATION = pytest.StashKey[Delegation]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    line = f"{MARKER}(timeout_s=1800): runs in the lab guest; the limit is that of its module there"
    config.addinivalue_line("markers", line)
    config.stash[_DELEGATION] = Delegation()


def session_guest(config: pytest.Config) -> Guest:
    """The one guest of a test run: booted when it is first asked for, and again if it has died.

    A guest that did not boot is not tried again.
    """
    if INSIDE in os.environ:
        pytest.fail("a test that runs in the guest has no guest of its own")
    if _FAILURE in config.stash:
        raise config.stash[_FAILURE]
    try:
        if _GUEST not in config.stash:
            config.stash[_GUEST] = Guest(_folder(config), visible=[config.rootpath])
        elif not config.stash[_GUEST].alive():
            config.stash[_GUEST].reboot()
    except OffloadError as error:
        config.stash[_FAILURE] = error
        raise
    return config.stash[_GUEST]


def _folder(config: pytest.Config) -> Path:
    # a hook has no way to ask for the fixture
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]  # noqa: SLF001
    return factory.mktemp("lab")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """After `-x`, or Ctrl-C, tests may still run in the guest."""
    session.config.stash[_DELEGATION].stop()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the guest, if there is one."""
    guest = config.stash.get(_GUEST, None)
    if guest is not None:
        guest.close()


@pytest.fixture(scope="session")
def guest(pytestconfig: pytest.Config) -> Guest:
    """The lab guest that all tests of a run share. What a test makes in it, it takes away again."""
    return session_guest(pytestconfig)


@pytest.fixture
def fresh_guest(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """A lab guest of one test's own: to reboot, or to break. It takes some ten seconds to boot."""
    folder = tmp_path_factory.mktemp("fresh-lab")
    with Guest(folder, visible=[pytestconfig.rootpath]) as made:
        yield made


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that shares the guest does not suffer from one before, which has killed it."""
    if "guest" in getattr(item, "fixturenames", ()) and _GUEST in item.config.stash:
        session_guest(item.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run what is for the guest in the guest."""
    if not is_delegated(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    try:
        item.config.stash[_DELEGATION].protocol(item, nextitem, session_guest(item.config))
    except (OffloadError, LostError) as error:
        _log_failure(item, str(error))
    # fixtures of tests before, made on this host, that nobody needs after this one
    ended = pytest.CallInfo.from_call(
        lambda: item.session._setupstate.teardown_exact(nextitem),  # noqa: SLF001 - no other way
        when="teardown",
    )
    if ended.excinfo is not None:
        report = pytest.TestReport.from_item_and_call(item, ended)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _log_failure(item: pytest.Item, why: str) -> None:
    report = pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=why,
        when="call",
    )
    item.ihook.pytest_runtest_logreport(report=report)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item) -> bool | None:
    """No time limit (of pytest-timeout) here for what has one there."""
    return True if is_delegated(item) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test with a guest that fails has the end of the guest's console in its report."""
    report = yield
    if report.failed:
        for name in ("guest", "fresh_guest"):
            made = getattr(item, "funcargs", {}).get(name)
            if isinstance(made, Guest):
                report.sections.append((f"logs of {name}", made.tails()))
    return report
