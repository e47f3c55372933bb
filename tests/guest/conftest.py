"""Tests in this folder run in the lab guest: see docs/howto/lab.md."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE) and item.get_closest_marker("in_guest") is None:
            item.add_marker("in_guest")
