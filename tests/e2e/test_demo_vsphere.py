"""`make demo-vsphere`, as a user runs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from offload.run import run

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.needs_root, pytest.mark.slow, pytest.mark.timeout(600)]


def test_demo_vsphere_shows_an_island_and_leaves_nothing() -> None:
    argv = [sys.executable, str(ROOT / "demo" / "vsphere.py"), "--vms", "2", "--luns", "1"]
    before = set(Path("/tmp").glob("offload-demo-*"))
    done = run(argv, check=False, timeout_s=500, cwd=ROOT)
    assert done.status == 0, done.stdout + done.stderr
    assert "vm02  vm02, after the TimeMark  vm02, before the TimeMark" in done.stdout
    assert re.search(r"^  left on backup-esx1 +nothing$", done.stdout, re.MULTILINE)
    assert re.search(r"^  LUNs pulled from under a datastore +0$", done.stdout, re.MULTILINE)
    assert set(Path("/tmp").glob("offload-demo-*")) == before
