"""Connections over a power cut, in a guest that boots with systemd and its udevd.

What lies below /etc is gone with the power, here alone: it is installed again.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload.run import run
from offload.testing.lab.guest import Guest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/howto/connect.md").read_text(encoding="utf-8")
MIB = 1 << 20
_COMMAND_S = 240  # to start Python alone takes seconds in emulation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# before and after the power cut; $1 is the disk
PREPARE = """
mkdir -p /etc/offload /srv/offload
mount "$1" /srv/offload
cat >/etc/offload/offload.toml
ln -sfn "$2/.venv/bin/offload" /usr/local/bin/offload
cp "$2/systemd/offload-recover.service" /etc/systemd/system/
systemctl daemon-reload
"""

CONFIG = """
state_dir = "/srv/offload/state"
runtime_dir = "/run/offload"
pool.min_free = "0%"
volumes.db = { provider = "device", path = "/srv/offload/db.raw" }
groups.shop = { volumes = ["db"], atomic = "record" }

[iscsi]
chap = { user = "backup", secret_file = "/srv/offload/secret" }
"""


# What runs in the guest, as one process, for starting one takes long there. It prints what is
# connected.
SCRIPT = """
import json
import sys
from pathlib import Path
from offload.services import connect, mount
from offload.services.context import open_context

with open_context(Path("/etc/offload/offload.toml")) as context:
    warnings = []
    match sys.argv[1]:
        case "begin":
            for name, target in ("disk", "nbd"), ("lun", "lio"):
                mount.mount(context, ["shop"], mount.MountOptions(name=name, target=target))
                warnings += connect.connect(context, name).warnings
        case "end":
            connect.disconnect(context, [], all_connections=True)
            mount.unmount(context, [], all_views=True)
    shown = {}
    for status in connect.connections(context):
        found = status.connection
        shown[found.name] = [found.id, found.kind, found.device, status.state]
    print(json.dumps({"shown": shown, "warnings": warnings}))
"""


@dataclass
class Host:
    """A backup host whose state is on a disk of its own."""

    guest: Guest
    device: str

    def do(self, word: str) -> Any:
        argv = [sys.executable, "-c", SCRIPT, word]
        return json.loads(self.guest.run(argv, cwd=str(ROOT), timeout_s=_COMMAND_S).text)

    def prepare(self) -> None:
        argv = ["bash", "-euc", PREPARE, "bash", self.device, str(ROOT)]
        self.guest.run(argv, stdin=CONFIG.encode(), timeout_s=_COMMAND_S)
        self.guest.shell(first_block(), timeout_s=_COMMAND_S)

    def shown(self, path: str) -> bytes:
        return self.guest.run(["dd", f"if={path}", "bs=1M", "status=none"]).stdout


def first_block() -> str:
    """What the page has a person do once."""
    found = re.search(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    disk = tmp_path / "disk.raw"
    with disk.open("xb") as out:
        out.truncate(256 * MIB)
    with Guest(tmp_path, visible=[ROOT], systemd=True) as guest:
        device = guest.attach(disk)
        guest.run(["mkfs.ext4", "-q", device])
        yield Host(guest, device)


def test_views_and_connections_come_back_after_a_power_cut(host: Host, tmp_path: Path) -> None:
    content = make_image(tmp_path / "ext4.raw")
    host.prepare()
    guest = host.guest
    guest.shell("cat >/srv/offload/db.raw", stdin=content)
    guest.shell("umask 077; echo correct horse battery >/srv/offload/secret")
    made = host.do("begin")
    assert made["warnings"] == []
    before = made["shown"]
    assert {name: entry[1] for name, entry in before.items()} == {"disk": "nbd", "lun": "iscsi"}

    # what a person mounts stays mounted, though systemd takes the device for not ready
    guest.shell("mount -o ro,noload /dev/offload/disk /mnt; systemctl daemon-reload")
    guest.shell("udevadm settle; mountpoint -q /mnt; [[ $(< /mnt/goods) == sold ]]")
    guest.run(["sync"])

    guest.reboot()
    host.prepare()
    assert guest.run(["ls", "/dev/offload"], check=False).status != 0
    guest.run(["systemctl", "start", "offload-recover.service"], timeout_s=_COMMAND_S)
    after = host.do("look")["shown"]
    for name in ("disk", "lun"):
        assert after[name][0] == before[name][0]
        assert after[name][3] == "connected"
        assert guest.run(["readlink", f"/dev/offload/{name}"]).text.strip() == after[name][2]
        assert host.shown(f"/dev/offload/{name}") == content
    assert host.do("end")["shown"] == {}
    assert guest.run(["ls", "/sys/class/iscsi_session"]).text == ""
    guest.shell("[[ ! -e /dev/offload/disk ]]")
    # the kernel keeps the device until udev, which looks at every change of it, has closed it
    guest.shell("until [[ ! -e /sys/block/nbd1000 ]]; do sleep 0.2; done")


def make_image(path: Path) -> bytes:
    """A small file system with a file in it."""
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "goods").write_text("sold\n")
    (folder / "noise").write_bytes(os.urandom(MIB))
    run(["mkfs.ext4", "-q", "-d", str(folder), str(path), "8M"])
    return path.read_bytes()
