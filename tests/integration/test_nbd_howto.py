"""The how-to on NBD over the network: its commands, run as they are printed, on two machines."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload import run
from offload.testing.networks import Namespace

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "howto" / "nbd-over-the-network.md"
PLACE = "/etc/offload"
MIB = 1 << 20

pytestmark = pytest.mark.needs_root


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    heading: str
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for chapter in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, body = chapter.partition("\n")
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```", body, re.DOTALL | re.MULTILINE):
            found.append(Block(heading=heading, language=language, text=text))
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofh-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def proxy() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def client(proxy: Namespace) -> Iterator[Namespace]:
    made = Namespace()
    proxy.connect(made, ["192.0.2.10/24"], ["192.0.2.20/24"])
    yield made
    made.close()


def test_howto_commands_all_succeed(folder: Path, proxy: Namespace, client: Namespace) -> None:
    content = bytes(MIB) + os.urandom(MIB) + bytes(MIB)
    (folder / "db.raw").write_bytes(content)
    config = folder / "offload.toml"
    shown = blocks()
    (table,) = (block.text for block in shown if block.language == "toml")
    config.write_text(
        f"""
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
pool.min_free = "0%"
volumes.shop-db = {{ provider = "copy", path = "{folder}/db.raw" }}
groups.shop = {{ volumes = ["shop-db"], atomic = "record" }}
"""
        + table.replace(PLACE, str(folder))
    )
    env = {
        "OFFLOAD_CONFIG": str(config),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def shell(script: str) -> str:
        script = "set -euxo pipefail\n" + script.replace(PLACE, str(folder))
        done = run.run(["bash", "-c", script], cwd=folder, env=env, check=False)
        assert done.status == 0, done.stderr[-3000:]
        return done.stdout

    try:
        for block in shown:
            if block.language == "sh":
                machine = client if block.heading.startswith("On the client") else proxy
                with machine.entered():
                    shell(block.text)
        assert (folder / "shop-db.raw").read_bytes() == content
        assert (folder / "shop-db-2.raw").read_bytes() == content
        for name in ("shop-db.qcow2", "shop-db-2.qcow2"):
            shell(f"qemu-img compare -f qcow2 -F raw {name} db.raw")
    finally:
        shell("offload unmount --all --force")
