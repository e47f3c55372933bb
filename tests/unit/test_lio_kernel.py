"""What is said where LIO cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload.errors import PrivilegeError, UnavailableError
from offload.services import doctor
from targets import lio_kernel


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with rtslib and root, whose kernel has loaded nothing and cannot load any."""
    monkeypatch.setattr(lio_kernel, "LOADED", tmp_path / "loaded")
    monkeypatch.setattr(lio_kernel, "INSTALLED", tmp_path / "installed")
    monkeypatch.setattr(lio_kernel, "find_spec", lambda _name: object())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    modprobe_ends_with(tmp_path, 1)
    return tmp_path


def modprobe_ends_with(machine: Path, status: int) -> None:
    program = machine / "bin" / "modprobe"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)


def refused(code: str) -> UnavailableError:
    with pytest.raises(UnavailableError) as error:
        lio_kernel.check()
    assert error.value.code == code
    return error.value


def test_lio_that_can_be_loaded_is_fine(machine: Path) -> None:
    modprobe_ends_with(machine, 0)
    lio_kernel.check()


def test_lio_that_is_loaded_needs_no_modules_on_disk(machine: Path) -> None:
    for name in lio_kernel.MODULES:
        (machine / "loaded" / name).mkdir(parents=True)
    lio_kernel.check()


def test_lio_in_a_container_cannot_be_had(machine: Path) -> None:
    error = refused("module-missing")
    assert "container" in error.hint
    assert "--target tgt" in error.hint


@pytest.mark.parametrize(
    ("release", "says"), [("6.1.0-56-cloud-amd64", "cloud"), ("6.1.0-56-amd64", "")]
)
def test_lio_missing_modules_are_named_with_their_package(
    machine: Path, monkeypatch: pytest.MonkeyPatch, release: str, says: str
) -> None:
    there = os.uname_result(("Linux", "host", release, "#1", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: there)
    (machine / "installed" / release).mkdir(parents=True)
    (machine / "loaded" / "configfs").mkdir(parents=True)
    error = refused("module-missing")
    assert "target_core_mod, target_core_iblock, iscsi_target_mod" in error.message
    assert "configfs" not in error.message
    assert "linux-image-amd64" in error.hint
    assert says in error.message


def test_lio_without_rtslib_names_the_package(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lio_kernel, "find_spec", lambda _name: None)
    assert "python3-rtslib-fb" in refused("library-missing").hint


def test_lio_without_root_is_refused_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError):
        lio_kernel.check()


def test_doctor_says_what_lio_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_lio() -> doctor.Check:
        return next(check for check in doctor.examine(None) if check.name == "LIO")

    monkeypatch.setattr(lio_kernel, "check", lambda: None)
    assert of_lio().status is doctor.Status.OK

    def lacking() -> None:
        raise lio_kernel.library_missing()

    monkeypatch.setattr(lio_kernel, "check", lacking)
    assert of_lio().status is doctor.Status.MISSING
    assert "python3-rtslib-fb" in of_lio().fix
    assert not of_lio().required
