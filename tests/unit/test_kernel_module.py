"""Modules of this machine's kernel; see tests/guest for those that are loaded."""

from __future__ import annotations

import pytest

from offload import kernel_module
from offload.errors import UnavailableError


def test_load_module_that_nobody_has_names_it_and_what_needs_it() -> None:
    with pytest.raises(UnavailableError) as error:
        kernel_module.load("a test", "offload_none", "loop")
    assert error.value.code == "module-missing"
    assert "a test" in error.value.message
    assert "offload_none" in error.value.message
    assert "linux-image-amd64" in error.value.hint
    assert not kernel_module.available("offload_none")


def test_load_module_that_is_there_is_no_error() -> None:
    kernel_module.load("a test", "loop")
    assert kernel_module.available("loop")
