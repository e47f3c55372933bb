"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e_site import Site, new_site


@pytest.fixture
def site() -> Iterator[Site]:
    """A whole site of its own for one test. Mark the test `needs_root`."""
    with new_site() as made:
        yield made
