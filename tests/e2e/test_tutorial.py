"""The tutorial's commands, run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from demo.guest import kvm_works
from offload import mountinfo
from offload.run import run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "/tmp/first"

pytestmark = [pytest.mark.needs_root, pytest.mark.slow]


def test_tutorial_commands_all_succeed() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    parent = Path(tempfile.mkdtemp(prefix="oft-"))
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    script = "set -euxo pipefail\n" + script.replace(FOLDER, str(parent / "first"))
    env = {"HOME": str(parent), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    if not kvm_works():
        env["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    try:
        done = run(["bash", "-c", script], cwd=ROOT, env=env, timeout_s=200, check=False)
        assert done.status == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert "changed" in done.stdout  # the file out of the backup
        assert not (parent / "first").exists()
    finally:
        for mount in reversed(mountinfo.mounts()):
            if mount.point.is_relative_to(parent):
                run(["umount", str(mount.point)], check=False)
        shutil.rmtree(parent)
