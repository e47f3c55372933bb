"""A bare machine: from an address and a key to restored bytes and the next backup."""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from offload import instance
from offload.cli.main import run as offload

MIB = 1 << 20
SIZE = 6 * MIB


@dataclass
class Machine:
    """One machine's configuration and state; several share a store."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def config(self) -> Path:
        return self.folder / "o.toml"

    def ask(self, *words: str, code: int = 0) -> Any:
        self.capsys.readouterr()
        got = offload(["--config", str(self.config), "--json", *words])
        said = self.capsys.readouterr()
        assert got == code, said.err
        return json.loads(said.err if code else said.out)

    def init(self, *words: str, code: int = 0) -> Any:
        state = str(self.folder / "state")
        return self.ask("init", "--state-dir", state, *words, code=code)


@dataclass
class Lost:
    """A machine that is gone: its store, its recovery key, what its volume held."""

    store: Path
    recovery: Path
    content: bytes
    backup: str


@pytest.fixture
def machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Machine]:
    # A configuration that `init` wrote names no runtime folder.
    monkeypatch.setattr(instance, "_runtime_base", lambda _: tmp_path / "run")

    def make(name: str) -> Machine:
        folder = tmp_path / name
        folder.mkdir()
        return Machine(folder, capsys)

    return make


def typing(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Somebody sits at the terminal and types this."""

    def prompt(*_words: object, **_options: object) -> str:
        return text

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "prompt", prompt)


def lose(machine: Machine, *, encrypted: bool) -> Lost:
    """Make a backup on a machine, then let the machine be gone."""
    top = machine.folder.parent
    content = os.urandom(SIZE // 2) + bytes(SIZE // 2)
    (top / "db.raw").write_bytes(content)
    lines = [
        f'state_dir = "{machine.folder}/state"',
        f'runtime_dir = "{machine.folder}/r"',
        f'[volumes.db]\nprovider = "copy"\npath = "{top}/db.raw"',
        '[groups.shop]\nvolumes = ["db"]\natomic = "record"\nstore = "vault"',
        f'[stores.vault]\nkind = "disk"\npath = "{top}/store"\nmin_free = "1MiB"',
        '[pool]\nmin_free = "1MiB"',
    ]
    if encrypted:
        lines.append(f'[stores.vault.key]\nfile = "{machine.folder}/vault.key"')
    machine.config.write_text("\n".join(lines) + "\n")
    recovery = top / "paper"
    options = ["--recovery-key-to", str(recovery)] if encrypted else []
    machine.ask("store", "init", "vault", *options)
    backup = machine.ask("backup", "shop")["id"]
    for path in sorted(machine.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (top / "db.raw").unlink()
    return Lost(top / "store", recovery, content, backup)


def goes_on(made: Machine, lost: Lost) -> None:
    """List, restore, and back up again, incrementally in the store."""
    (listed,) = made.ask("backup", "list")
    assert (listed["id"], listed["group"]) == (lost.backup, "shop")
    volume = made.folder.parent / "db.raw"
    made.ask("restore", f"{lost.backup}/db", "--to", str(volume), "--onto-production", "db")
    assert volume.read_bytes() == lost.content
    again = made.ask("backup", "shop")
    assert again["images"][0]["stored_bytes"] < MIB
    assert made.ask("verify", "--all")["problems"] == []


def test_bare_machine_from_a_plain_store(machine: Callable[[str], Machine]) -> None:
    lost = lose(machine("old"), encrypted=False)
    made = machine("new")
    report = made.init("--from-store", str(lost.store))
    assert (report["store"], report["backups"], report["problems"]) == ("vault", 1, [])
    goes_on(made, lost)


def test_bare_machine_from_address_and_recovery_key_in_seconds(
    machine: Callable[[str], Machine],
) -> None:
    lost = lose(machine("old"), encrypted=True)
    made = machine("new")
    began = time.monotonic()
    made.init("--from-store", str(lost.store), "--recovery-key-file", str(lost.recovery))
    target = made.folder / "db.raw"
    made.ask("restore", f"{lost.backup}/db", "--to", str(target))
    seconds = time.monotonic() - began
    assert target.read_bytes() == lost.content
    assert seconds < 60
    goes_on(made, lost)


def test_bare_machine_gets_a_key_of_its_own(machine: Callable[[str], Machine]) -> None:
    lost = lose(machine("old"), encrypted=True)
    made = machine("new")
    made.init("--from-store", str(lost.store), "--recovery-key-file", str(lost.recovery))
    key = made.folder / "vault.key"
    made.ask("key", "add", "vault", "--file", str(key))
    text = made.config.read_text()
    wanted = tomllib.loads(text)["stores"]["vault"]["key"]
    assert wanted == {"recovery_file": str(lost.recovery)}
    line = f'recovery_file = "{lost.recovery}"'
    assert line in text
    made.config.write_text(text.replace(line, f'file = "{key}"'))
    lost.recovery.unlink()
    goes_on(made, lost)


def test_bare_machine_asks_for_the_recovery_key(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = lose(machine("old"), encrypted=True)
    made = machine("new")
    typing(monkeypatch, lost.recovery.read_text().strip().upper().replace("-", " "))
    words = ["init", "--state-dir", str(made.folder / "state"), "--from-store", str(lost.store)]
    assert offload(["--config", str(made.config), *words]) == 0
    kept = made.folder / "o.recovery-key"
    assert kept.stat().st_mode & 0o777 == 0o600
    goes_on(made, lost)


def test_bare_machine_with_the_key_of_another_store_leaves_nothing(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = lose(machine("old"), encrypted=True)
    other = machine("other")
    other.config.write_text(
        f'state_dir = "{other.folder}/state"\n'
        f'[stores.o]\nkind = "disk"\npath = "{other.folder}/s"\n'
        f'[stores.o.key]\nfile = "{other.folder}/o.key"\n'
    )
    other.ask("store", "init", "o", "--recovery-key-to", str(other.folder / "paper"))
    made = machine("new")
    wrong = other.folder / "paper"
    options = ("--from-store", str(lost.store), "--recovery-key-file", str(wrong))
    assert made.init(*options, code=3)["code"] == "key-wrong"
    words = ("init", "--state-dir", str(made.folder / "s"), "--from-store", str(lost.store))
    for typed in (wrong.read_text(), "offload-nonsense"):
        typing(monkeypatch, typed)
        assert offload(["--config", str(made.config), *words]) == 3
    assert list(made.folder.iterdir()) == []


def test_bare_machine_encrypted_without_a_key_is_said(machine: Callable[[str], Machine]) -> None:
    lost = lose(machine("old"), encrypted=True)
    made = machine("new")
    error = made.init("--from-store", str(lost.store), code=2)
    assert error["code"] == "key-missing"
    assert "--recovery-key-file" in error["hint"]
    assert list(made.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (("--from-store", "/nonexistent/store"), "store-not-initialised", 6),
        (("--from-store", "ftp://there"), "bad-address", 2),
        (("--from-store", "s3://"), "bad-address", 2),
        (("--from-store", "/srv", "--endpoint", "http://127.0.0.1:1"), "bad-address", 2),
        (("--from-store", "s3://b", "--endpoint", "nonsense"), "bad-address", 2),
        (("--endpoint", "http://127.0.0.1:1"), "usage", 2),
        (("--from-store", "/srv", "--key-file", "/a", "--passphrase-file", "/b"), "usage", 2),
    ],
)
def test_bare_machine_with_a_bad_address_is_one_clear_line(
    machine: Callable[[str], Machine], words: tuple[str, ...], code: str, status: int
) -> None:
    made = machine("new")
    assert made.init(*words, code=status)["code"] == code
    assert list(made.folder.iterdir()) == []


def test_bare_machine_with_an_empty_folder_is_said(machine: Callable[[str], Machine]) -> None:
    made = machine("new")
    (made.folder.parent / "empty").mkdir()
    error = made.init("--from-store", str(made.folder.parent / "empty"), code=6)
    assert error["code"] == "store-not-initialised"


def test_bare_machine_never_overwrites_a_configuration(machine: Callable[[str], Machine]) -> None:
    lost = lose(machine("old"), encrypted=False)
    made = machine("new")
    made.config.write_text("# mine\n")
    assert made.init("--from-store", str(lost.store), code=5)["code"] == "config-exists"
    assert made.config.read_text() == "# mine\n"
