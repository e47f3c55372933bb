"""Backups of a qcow2 image at rest: the file that is read is the one that is cleaned up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from e2e_site import MIB, OFFLOAD

from offload import run

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "1MiB"
[volumes.disk]
provider = "qcow2"
path = "{folder}/disk.qcow2"
[groups.vm]
volumes = ["disk"]
[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "1MiB"
"""


def test_qcow2_nights_keep_one_parent_and_leave_nothing_undone(tmp_path: Path) -> None:
    config = tmp_path / "offload.toml"
    config.write_text(_CONFIG.format(folder=tmp_path))
    config.chmod(0o600)
    image = tmp_path / "disk.qcow2"

    def ok(*words: str) -> Any:
        done = run.run([str(OFFLOAD), "--config", str(config), "--json", *words], check=False)
        assert (done.status, done.stderr) == (0, ""), f"{words}: {done.stderr}"
        return json.loads(done.stdout)

    def write(pattern: int, at: int) -> None:
        run.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {at} 64k", str(image)])

    run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(64 * MIB)])
    ok("store", "init", "main")
    for night in range(3):
        write(night + 1, night * MIB)
        made = ok("backup", "vm")
        assert len(ok("timemark", "list")) == 1
        assert list((tmp_path / "state" / "journal").iterdir()) == []
    target = tmp_path / "restored.raw"
    ok("restore", made["id"], "--to", str(target))
    run.run(["qemu-img", "compare", "-F", "raw", str(image), str(target)])
    for mark in ok("timemark", "list"):
        ok("timemark", "delete", mark["id"], "--yes")
    assert "offload" not in run.run(["qemu-img", "snapshot", "-l", str(image)]).stdout
