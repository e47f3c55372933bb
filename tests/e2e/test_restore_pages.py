"""docs/howto/restore.md and bare-machine.md: their commands, run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_site import OFFLOAD, ROOT

from offload import run
from offload.testing.instances import free_port
from offload.testing.pools import loop_device

MIB = 1 << 20
CONTENT = os.urandom(3 * MIB) + bytes(3 * MIB)

pytestmark = pytest.mark.needs_root


def blocks(page: str, language: str = "sh") -> list[str]:
    """The code blocks of a page."""
    text = (ROOT / "docs" / "howto" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@dataclass
class Shell:
    """Runs lines of a page with its places moved into a folder of the test."""

    folder: Path
    places: dict[str, str]

    @property
    def config(self) -> Path:
        return self.folder / "etc" / "offload.toml"

    def here(self, text: str) -> str:
        for place, moved in self.places.items():
            text = text.replace(place, moved)
        return text

    def run(self, script: str) -> run.Completed:
        """One script; the shell stops at the first command that fails."""
        env = {"PATH": f"{OFFLOAD.parent}:{os.environ['PATH']}", "OFFLOAD_CONFIG": str(self.config)}
        argv = ["bash", "-euo", "pipefail", "-c", self.here(script)]
        return run.run(argv, env=env, check=False, timeout_s=240)

    def ok(self, script: str) -> str:
        done = self.run(script)
        assert done.status == 0, f"{script}\n{done.stderr}\n{done.stdout}"
        return done.stdout


@pytest.fixture
def shell() -> Iterator[Shell]:
    """A machine with a volume, an encrypted store in /srv/backups and a backup of group shop."""
    folder = Path(tempfile.mkdtemp(prefix="ofp-", dir="/tmp"))
    made = Shell(
        folder,
        {
            "/etc/offload/": f"{folder}/etc/",
            "/srv/": f"{folder}/srv/",
            "/media/usb/": f"{folder}/usb/",
            "/pool/": f"{folder}/pool/",
        },
    )
    for name in ("etc", "srv", "usb", "pool"):
        (folder / name).mkdir()
    (folder / "pool" / "shop-db.raw").write_bytes(CONTENT)
    made.config.write_text(
        made.here(
            f'state_dir = "{folder}/state"\nruntime_dir = "{folder}/r"\npool.min_free = "0%"\n'
            '[volumes.shop-db]\nprovider = "copy"\npath = "/pool/shop-db.raw"\n'
            '[groups.shop]\nvolumes = ["shop-db"]\natomic = "record"\nstore = "main"\n'
            '[stores.main]\nkind = "disk"\npath = "/srv/backups"\nmin_free = "1MiB"\n'
            '[stores.main.key]\nfile = "/etc/offload/main.key"\n'
        )
    )
    made.config.chmod(0o600)
    made.ok("offload store init main --recovery-key-to /media/usb/main.recovery")
    made.ok("offload backup shop")
    yield made
    forget_runtime(folder / "state")
    shutil.rmtree(folder)


def forget_runtime(state: Path) -> None:
    """A configuration that `init` wrote names no runtime folder: root's own is used."""
    instance = (state / "instance").read_text().strip()
    shutil.rmtree(Path("/run/offload") / instance, ignore_errors=True)


def test_restore_page_commands_all_succeed(shell: Shell) -> None:
    disk, export = shell.folder / "disk", shell.folder / "export"
    for path in (disk, export):
        path.write_bytes(os.urandom(len(CONTENT)))
    port, pid = free_port(), shell.folder / "pid"
    argv = ["nbdkit", "-i", "127.0.0.1", "-p", str(port), "-P", str(pid), "file", str(export)]
    run.run(argv)
    try:
        with loop_device(disk) as device:
            shell.places |= {"/dev/vg0/shop-db": str(device), "10.0.0.5:10809": f"127.0.0.1:{port}"}
            (shell.folder / "srv" / "restore" / "all").mkdir(parents=True)
            script = "\n".join(blocks("restore.md"))
            said = shell.run(script)
            # the last command of the page has nothing to give up: nothing was interrupted
            assert said.status == 4, said.stderr
            assert "there is no unfinished restore" in said.stderr
    finally:
        run.run(["kill", pid.read_text().strip()])
    out = shell.folder / "srv" / "restore"
    assert (out / "shop-db.raw").read_bytes() == CONTENT
    assert disk.read_bytes() == CONTENT
    assert export.read_bytes() == CONTENT
    assert (shell.folder / "pool" / "shop-db.raw").read_bytes() == CONTENT
    for image in (out / "shop-db.qcow2", out / "all" / "shop-db.vhdx"):
        raw = shell.folder / "raw"
        run.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)])
        assert raw.read_bytes()[: len(CONTENT)] == CONTENT


def test_bare_machine_page_followed_literally_gives_the_bytes_back(shell: Shell) -> None:
    for gone in ("state", "r", "pool", "etc"):
        shutil.rmtree(shell.folder / gone)
    scripts = blocks("bare-machine.md")
    begin, check, key, rebuild = scripts
    begin = begin.replace("offload init", f"offload init --state-dir {shell.folder}/state")
    shell.ok(begin)
    assert (shell.folder / "srv" / "restore" / "shop-db.raw").read_bytes() == CONTENT
    shell.ok(check)
    shell.ok(key)
    (table,) = blocks("bare-machine.md", "toml")
    wanted = tomllib.loads(shell.here(table))["stores"]["main"]["key"]
    text = shell.config.read_text()
    line = re.search(r"^recovery_file = .*$", text, re.MULTILINE)
    assert line is not None
    shell.config.write_text(text.replace(line.group(), f'file = "{wanted["file"]}"'))
    (shell.folder / "usb" / "main.recovery").unlink()
    shell.ok(rebuild)
    assert "shop" in shell.ok("offload backup list")
