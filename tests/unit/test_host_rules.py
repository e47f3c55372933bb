"""The rules that keep a machine off what views hold, in folders of a test's own."""

from __future__ import annotations

import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload import host_rules, run
from offload.errors import PolicyError, PrivilegeError
from offload.host_rules import Rule, RuleState


@dataclass(frozen=True)
class Machine:
    """Its folder, and the socket at which its udevd listens until it is closed."""

    folder: Path
    udevd: socket.socket


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with udev and multipath, and without LVM."""
    programs = {"udevadm": "/bin/true", "multipath": "/bin/true"}
    folders = (tmp_path / "etc", tmp_path / "run", tmp_path / "lib")
    monkeypatch.setattr(host_rules, "_UDEV_FOLDERS", folders)
    monkeypatch.setattr(host_rules, "_MULTIPATH", tmp_path / "conf.d" / "offload.conf")
    monkeypatch.setattr(host_rules, "_UDEV_SOCKET", tmp_path / "control")
    monkeypatch.setattr(run, "find_program", programs.get)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as udevd:
        udevd.bind(str(tmp_path / "control"))
        udevd.listen()
        yield Machine(tmp_path, udevd)


def state(name: str) -> RuleState:
    return rule(name).state


def rule(name: str) -> Rule:
    return next(rule for rule in host_rules.look() if rule.name == name)


def test_install_writes_what_is_missing_and_again_is_no_harm(machine: Machine) -> None:
    assert (state("udev"), state("multipath")) == (RuleState.MISSING, RuleState.MISSING)
    for _ in range(2):
        host_rules.install()
        assert (state("udev"), state("multipath")) == (RuleState.INSTALLED, RuleState.INSTALLED)
    written = machine.folder / "etc" / "60-offload.rules"
    assert written.read_text() == rule("udev").text
    assert stat.S_IMODE(written.stat().st_mode) & 0o444 == 0o444
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_require_without_the_udev_rule_is_refused_with_the_command() -> None:
    with pytest.raises(PolicyError) as error:
        host_rules.require()
    assert error.value.code == "host-rules-missing"
    assert "offload host-rules --install" in error.value.hint


def test_require_without_udevd_only_warns(machine: Machine) -> None:
    machine.udevd.close()
    (warning,) = host_rules.require()
    assert "multipath" in warning


def test_udev_runs_an_ended_udevd_is_none_though_its_socket_is_there(machine: Machine) -> None:
    assert host_rules.udev_runs()
    machine.udevd.close()
    assert (machine.folder / "control").exists()
    assert not host_rules.udev_runs()


def test_require_after_install_has_nothing_to_say() -> None:
    host_rules.install()
    assert host_rules.require() == []


def test_look_packaged_rule_counts(machine: Machine) -> None:
    (machine.folder / "lib").mkdir()
    (machine.folder / "lib" / "60-offload.rules").write_text(rule("udev").text)
    assert state("udev") is RuleState.INSTALLED


def test_look_masked_or_old_rule_is_outdated_and_install_mends_it(machine: Machine) -> None:
    (machine.folder / "etc").mkdir()
    (machine.folder / "etc" / "60-offload.rules").write_text("")
    assert state("udev") is RuleState.OUTDATED
    host_rules.install()
    assert state("udev") is RuleState.INSTALLED


def test_look_machine_without_the_programs_needs_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.udevd.close()
    monkeypatch.setattr(run, "find_program", lambda _: None)
    assert {rule.state for rule in host_rules.look()} == {RuleState.NOT_NEEDED}
    assert host_rules.install() == host_rules.look()
    assert [path.name for path in machine.folder.iterdir()] == ["control"]


def test_install_folder_that_may_not_be_written_says_who_may(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PrivilegeError):
        host_rules.install()
