"""The lab for pytest: fixtures `guest` and `fresh_guest`.

Load it with `pytest_plugins = ["offload.testing.lab.plugin"]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.testing.lab.guest import Guest

_GUEST = pytest.StashKey[Guest]()


def session_guest(config: pytest.Config, folder: Path) -> Guest:
    """The one guest of a test run, booted when it is first asked for, and again if it has died."""
    guest = config.stash.get(_GUEST, None)
    if guest is None:
        guest = config.stash[_GUEST] = Guest(folder, visible=[config.rootpath])
    elif not guest.alive():
        guest.reboot()
    return guest


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the guest, if there is one."""
    guest = config.stash.get(_GUEST, None)
    if guest is not None:
        guest.close()


@pytest.fixture(scope="session")
def guest(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """The lab guest that all tests of a run share. What a test makes in it, it takes away again."""
    return session_guest(pytestconfig, tmp_path_factory.mktemp("lab"))


@pytest.fixture
def fresh_guest(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """A lab guest of one test's own: to reboot, or to break. It takes some ten seconds to boot."""
    folder = tmp_path_factory.mktemp("fresh-lab")
    with Guest(folder, visible=[pytestconfig.rootpath]) as made:
        yield made
