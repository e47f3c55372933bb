"""`--vmdk` and `volume vmdks`: a VM's disk out of a TimeMark or a backup of a LUN with a VMFS."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vmfs_images import unpack

from offload import run as programs
from offload.cli.main import run

MIB = 1 << 20
GIB = 1 << 30

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A LUN, a TimeMark of it, a store with a backup of that, and a configuration."""
    folder = Path(tempfile.mkdtemp(prefix="ofv-", dir="/tmp"))
    unpack("vmfs6", folder / "lun")
    (folder / "o.toml").write_text(
        f'state_dir = "{folder}/state"\nruntime_dir = "{folder}/run"\n'
        f'[volumes.ds1]\nprovider = "copy"\npath = "{folder}/lun"\n'
        f'[volumes.plain]\nprovider = "copy"\npath = "{folder}/plain"\n'
        '[groups.esx]\nvolumes = ["ds1"]\natomic = "record"\n'
        '[groups.both]\nvolumes = ["ds1", "plain"]\natomic = "record"\n'
        f'[stores.main]\nkind = "disk"\npath = "{folder}/store"\n'
        '[pool]\nmin_free = "1MiB"\n[overlays]\nlimit = "8MiB"\nmin_free = "1MiB"\n'
    )
    (folder / "plain").write_bytes(os.urandom(4 * MIB))
    try:
        assert run(["--config", str(folder / "o.toml"), "--quiet", "store", "init", "main"]) == 0
        yield folder
    finally:
        run(["--config", str(folder / "o.toml"), "unmount", "--all", "--force"])
        shutil.rmtree(folder)


@pytest.fixture
def ask(place: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command with --json; its value, or with `code` its error."""

    def command(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert run(["--config", str(place / "o.toml"), "--json", *words]) == code
        said = capsys.readouterr()
        return json.loads(said.err if code else said.out)

    return command


@pytest.fixture
def mark(ask: Ask) -> str:
    """One TimeMark for all tests."""
    known = [mark for mark in ask("timemark", "list") if mark["group"] == "esx"]
    return str((known[0] if known else ask("timemark", "create", "esx"))["id"])


def test_vmdks_are_listed(ask: Ask, mark: str) -> None:
    found = ask("volume", "vmdks", f"timemark:{mark}/ds1")
    assert (found["label"], found["version"]) == ("vmfs6", 6)
    assert [(disk["path"], disk["kind"]) for disk in found["disks"]] == [
        ("large.vmdk", "flat"), ("normal.vmdk", "flat"), ("rdm.vmdk", "rdm"),
    ]  # fmt: skip


def test_disk_is_served_written_to_and_served_again(ask: Ask, mark: str) -> None:
    options = ("--vmdk", "normal.vmdk", "--name", "disk", "--writable")
    (view,) = ask("mount", f"timemark:{mark}/ds1", *options)
    assert view["size_bytes"] == 69 * GIB
    assert view["vmdk"] == "normal.vmdk"
    _io(view["uri"], f"read -P 0x42 {42 * GIB} 512", f"write -P 7 {GIB} 64k", "flush")
    ask("unmount", "disk", "--keep")
    (again,) = ask("mount", "--again", "disk")
    _io(again["uri"], f"read -P 0x42 {42 * GIB} 512", f"read -P 7 {GIB} 64k", "read -P 0 0 64k")
    ask("unmount", "disk")
    assert ask("views") == []


def test_disk_of_a_backup_is_restored(ask: Ask, mark: str, place: Path) -> None:
    made = ask("backup", "create", f"timemark:{mark}")["backup"]["id"]
    to = place / "normal.raw"
    done = ask("restore", f"{made}/ds1", "--vmdk", "normal.vmdk", "--to", str(to))
    assert done["origin"] == f"backup:{made}/ds1"
    assert to.stat().st_size == 69 * GIB
    assert to.stat().st_blocks * 512 < 4 * MIB
    with to.open("rb") as file:
        assert os.pread(file.fileno(), 512, 42 * GIB) == b"\x42" * 512


def _io(uri: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    said = programs.run(["qemu-io", "-f", "raw", *words, uri], timeout_s=60).stdout
    assert "failed" not in str(said)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("volume", "vmdks", "esx"), "bad-origin"),
        (("volume", "vmdks", "timemark:{both}"), "vmdk-for-several"),
        (("volume", "vmdks", "timemark:{both}/plain"), "not-vmfs"),
        (("mount", "timemark:{both}/ds1", "--vmdk", "web.vmdk"), "no-such-file"),
        (("mount", "timemark:{both}/ds1", "--vmdk", "rdm.vmdk"), "vmdk-is-rdm"),
        (("mount", "timemark:{both}", "--vmdk", "normal.vmdk"), "vmdk-for-several"),
        (("mount", "timemark:{both}/plain", "--vmdk", "normal.vmdk"), "not-vmfs"),
        (("restore", "timemark:{both}", "--vmdk", "x", "--to", "/x/"), "vmdk-for-several"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_mounted(
    ask: Ask, words: tuple[str, ...], code: str
) -> None:
    known = [mark for mark in ask("timemark", "list") if mark["group"] == "both"]
    both = (known[0] if known else ask("timemark", "create", "both"))["id"]
    wanted = [word.replace("{both}", both) for word in words]
    assert ask(*wanted, code=_exit_of(code))["code"] == code
    assert ask("views") == []


def _exit_of(code: str) -> int:
    known = {"bad-origin": 2, "vmdk-for-several": 2, "no-such-file": 4, "vmdk-is-rdm": 6}
    return known.get(code, 7)
