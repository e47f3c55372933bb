"""The commands of docs/howto/iscsi-tgt.md, run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.run import run
from offload.testing.instances import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "iscsi-tgt.md").read_text(encoding="utf-8")
FOLDER, PORT = "/etc/offload", "3261"

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[groups.shop]
volumes = ["db"]
atomic = "record"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="oft-"))
    yield made
    shutil.rmtree(made)


def _blocks(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return "\n".join(block for block in found if not block.startswith("apt-get "))


def test_page_commands_all_succeed(folder: Path) -> None:
    (folder / "db.raw").write_bytes(os.urandom(1 << 20))
    port = str(free_port())

    def here(text: str) -> str:
        return text.replace(FOLDER, str(folder)).replace(PORT, port)

    config = folder / "offload.toml"
    config.write_text(_CONFIG.format(folder=folder) + here(_blocks("toml")))
    env = {
        "HOME": str(folder),
        "OFFLOAD_CONFIG": str(config),
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    argv = ["bash", "-c", "set -euxo pipefail\n" + here(_blocks("sh"))]
    done = run(argv, cwd=ROOT, env=env, timeout_s=120, check=False)
    assert done.status == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"iscsi://127.0.0.1:{port}/iqn.2026-11.internal.offload:" in done.stderr
    assert "Vendor:OFFLOAD" in done.stdout
    assert f"RETURNED LOGICAL BLOCK ADDRESS:{(1 << 20) // 512 - 1}" in done.stdout
    assert list((folder / "run").glob("*/views/*")) == []
