"""The order of the test modules."""

from __future__ import annotations

import tomllib
from pathlib import Path

from offload.testing.order import Order

ROOT = Path(__file__).parents[2]


def test_group_is_the_first_that_fits_or_the_module() -> None:
    order = Order(together={"tests/a/test_x": "X", "tests/a/": "A"})
    assert order.group_of("tests/a/test_xy.py::test_one[a::b]") == "X"
    assert order.group_of("tests/a/test_y.py::test_one") == "A"
    assert order.group_of("tests/b/test_y.py::Test::test_one") == "tests/b/test_y.py"


def test_seconds_of_a_group_are_those_of_its_modules() -> None:
    order = Order(seconds={"a.py": 10, "b.py": 5})
    assert order.seconds_of(dict.fromkeys(["a.py::one", "a.py::two", "b.py::one"])) == 15
    assert order.seconds_of({"a.py::one": None}) < order.seconds_of({"a.py::one": 0, "c.py::x": 0})


def test_file_names_modules_that_there_are() -> None:
    order = Order(**tomllib.loads((ROOT / "tests/order.toml").read_text(encoding="utf-8")))
    modules = [p.relative_to(ROOT).as_posix() for p in ROOT.glob("tests/*/test_*.py")]
    assert set(order.seconds) <= set(modules)
    assert [
        start for start in order.together if not any(m.startswith(start) for m in modules)
    ] == []
