"""The commands of docs/howto/iscsi-lio.md, run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.run import run

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "iscsi-lio.md").read_text(encoding="utf-8")
FOLDER, PROXY, INITIATOR = "/etc/offload", "192.0.2.10", "iqn.2004-10.com.example:backup-host"

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
    made = Path(tempfile.mkdtemp(prefix="ofp-", dir="/tmp"))
    run(["ip", "address", "add", f"{PROXY}/24", "dev", "lo"])
    yield made
    run(["ip", "address", "del", f"{PROXY}/24", "dev", "lo"])
    shutil.rmtree(made)


def _blocks(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return "\n".join(block for block in found if not block.startswith("apt-get "))


def _own_name() -> str:
    text = Path("/etc/iscsi/initiatorname.iscsi").read_text()
    found = re.search(r"^InitiatorName=(\S+)", text, re.MULTILINE)
    assert found is not None
    return found[1]


def test_page_commands_all_succeed(folder: Path) -> None:
    (folder / "db.raw").write_bytes(os.urandom(1 << 20))
    run(["modprobe", "--all", "iscsi_tcp", "sd_mod"])
    if run(["pgrep", "-x", "iscsid"], check=False).status != 0:
        run(["iscsid"])

    def here(text: str) -> str:
        return text.replace(FOLDER, str(folder)).replace(INITIATOR, _own_name())

    config = folder / "offload.toml"
    config.write_text(_CONFIG.format(folder=folder) + here(_blocks("toml")))
    env = {
        "HOME": str(folder),
        "OFFLOAD_CONFIG": str(config),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    argv = ["bash", "-c", "set -euxo pipefail\n" + here(_blocks("sh"))]
    done = run(argv, env=env, timeout_s=280, check=False)
    assert done.status == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"iscsi://{PROXY}:3260/iqn.2026-11.internal.offload:" in done.stderr
    assert "Attached scsi disk" in done.stdout
    assert list((folder / "run").glob("*/views/*")) == []
    secret = (folder / "chap.secret").read_text().strip()
    assert secret not in done.stdout
