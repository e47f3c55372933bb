"""The commands of docs/howto/placeholders-libvirt.md, run as they are printed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from offload.run import run
from offload.testing.libvirt_host import LibvirtHost

pytestmark = [pytest.mark.needs_root]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "placeholders-libvirt.md").read_text(encoding="utf-8")
_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"
"""
_DOMAIN = """
<domain type='qemu'>
  <name>shop</name><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{folder}/vms/shop.raw'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ol-"))
    yield made
    shutil.rmtree(made)


def _blocks(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return "\n".join(block for block in found if not block.startswith("apt-get "))


def test_page_commands_all_succeed(folder: Path) -> None:
    for name in ("vms", "d"):
        (folder / name).mkdir()
    content = os.urandom(1 << 20)
    (folder / "vms/shop.raw").write_bytes(content)
    with LibvirtHost(folder / "d").running() as daemon:
        connection = libvirt.open(daemon.uri)
        connection.defineXML(_DOMAIN.format(folder=folder))

        def here(text: str) -> str:
            """Folders and daemon of the test; a plain copy of a disk that is off."""
            there = {
                "qemu:///system": daemon.uri,
                "/srv": str(folder),
                '"reflink"': '"copy"',
                '"filesystem"': '"crash"',
            }
            for printed, ours in there.items():
                text = text.replace(printed, ours)
            return text

        config = folder / "offload.toml"
        config.write_text(_CONFIG.format(folder=folder) + here(_blocks("toml")))
        env = {
            "HOME": str(folder),
            "LIBVIRT_DEFAULT_URI": daemon.uri,
            "OFFLOAD_CONFIG": str(config),
            "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        argv = ["bash", "-c", "set -euxo pipefail\n" + here(_blocks("sh"))]
        done = run(argv, cwd=ROOT, env=env, timeout_s=300, check=False)
        assert done.status == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert [domain.name() for domain in connection.listAllDomains(0)] == ["shop"]
        connection.close()
    assert content[:4096] in (folder / "backup/vda.copy.data").read_bytes()
    assert list((folder / "placeholders").iterdir()) == []
    assert list((folder / "run").glob("*/views/*")) == []
