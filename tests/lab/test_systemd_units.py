"""The shipped units under a live systemd: what they start is everybody's, what they copy is whole.

The guest is these tests' own, for it boots with systemd.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload.journal import CRASH_ENV
from offload.testing.lab.channel import GuestError
from offload.testing.lab.guest import Guest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/howto/nightly.md").read_text(encoding="utf-8")
GIB = 1 << 30
_UNIT_S = 240  # to start Python alone takes seconds in emulation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# A pool with reflinks, two file systems on one of its volumes, of which one is mounted and can be
# frozen.
STORAGE = """
mkdir -p /etc/offload /srv/pool /srv/shop /srv/backups
mkfs.xfs -q "$1"
mount "$1" /srv/pool
cd /srv/pool
truncate -s 32M shop.raw
mkfs.ext4 -q shop.raw 16M
mkfs.ext4 -q -E offset=16777216 shop.raw 16M
mount -o loop,sizelimit=16M shop.raw /srv/shop
echo sold >/srv/shop/goods
head -c 16M /dev/urandom >san.raw
head -c 16M /dev/urandom >esx.raw
cat >/etc/offload/offload.toml
"""

CONFIG = """
state_dir = "/var/lib/offload"
pool.min_free = "1%"
overlays = { limit = "32MiB", min_free = "1MiB" }
volumes.shop = { provider = "reflink", path = "/srv/pool/shop.raw" }
volumes.san = { provider = "reflink", path = "/srv/pool/san.raw" }
volumes.esx = { provider = "reflink", path = "/srv/pool/esx.raw" }
stores.main = { kind = "disk", path = "/srv/backups/main", min_free = "1MiB" }

[groups.shop]
volumes = ["shop"]
consistency = "filesystem"
deadline_s = 60
store = "main"
[[groups.shop.quiesce]]
kind = "local"
mounts = ["/srv/shop"]

[groups.san]
volumes = ["san"]
atomic = "record"

[groups.esx]
volumes = ["esx"]
atomic = "record"
store = "main"
"""

# the other one, in a mount namespace of its own
CONTAINER = """
mount -o loop,offset=16M,sizelimit=16M /srv/pool/shop.raw /mnt
echo mounted
exec sleep infinity
"""

TARGETS = {"san": "--target tgt --writable", "esx": "--target lio --port 3261 --writable"}

# the namespaces of process 1 and of all servers of views, each once
NAMESPACES = """
for pid in 1 $(pgrep 'nbdkit|tgtd|qemu-storage'); do readlink "/proc/$pid/ns/mnt"; done | sort -u
"""
SERVERS = "nbdkit|tgtd|qemu-storage"

# the kernel keeps a device until udev, which looks at every change of it, has closed it
NOTHING_LEFT = """
for _ in {1..500}; do
    [[ -e /sys/block/nbd1000 ]] || break
    sleep 0.1
done
if [[ -e /sys/block/nbd1000 ]]; then
    echo "nbd1000 stays; connected: $(cat /sys/block/nbd1000/pid); open in:" >&2
    ls -l /proc/[0-9]*/fd 2>/dev/null | grep nbd1000 >&2
    dmesg | tail -20 >&2
    exit 1
fi
[[ -z $(ls /run/offload/*/views) ]]
"""


@dataclass
class Host:
    """A machine with offload's units, and a shell beside them."""

    guest: Guest

    def offload(self, *words: str) -> Any:
        """Run `offload --json` in a shell."""
        done = self.guest.run(["offload", "--json", *words], timeout_s=_UNIT_S)
        return json.loads(done.text)

    def drop_in(self, unit: str, *lines: str) -> None:
        """Settings as `systemctl edit` makes them; they count after the next `daemon-reload`."""
        folder = f"/etc/systemd/system/{unit}.d"
        text = "\n".join(["[Service]", *lines, ""])
        script = f"mkdir -p {folder}; cat >{folder}/override.conf"
        self.guest.shell(script, stdin=text.encode())

    def start(self, *units: str) -> None:
        """Start units, all at once, also such as have run and count as active. They must succeed,
        else what they said is in the error."""
        try:
            self.guest.run(["systemctl", "restart", *units], timeout_s=_UNIT_S)
        except GuestError as error:
            words = self.guest.run(["journalctl", "--no-pager", "--unit", "offload-*"]).text
            raise AssertionError(f"{units} failed:\n{words}") from error

    def servers(self) -> dict[str, list[str]]:
        """Pids of what serves views, by program."""
        found: dict[str, list[str]] = {}
        said = self.guest.run(["pgrep", "--list-name", SERVERS], check=False).text
        for line in said.splitlines():
            pid, _, name = line.partition(" ")
            found.setdefault(name, []).append(pid)
        return found

    def ask_disk(self, uri: str, *commands: str) -> None:
        """Have qemu-io do this to a disk; it fails where a pattern is not what was said."""
        words = [word for command in commands for word in ("-c", command)]
        said = self.guest.run(["qemu-io", "-f", "raw", *words, uri]).text
        assert "failed" not in said


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("systemd-lab")
    disk = folder / "disk.raw"
    with disk.open("xb") as out:
        out.truncate(GIB)
    with Guest(folder, visible=[ROOT], systemd=True) as guest:
        made = Host(guest)
        device = guest.attach(disk)
        guest.run(
            ["bash", "-euc", STORAGE, "bash", device], stdin=CONFIG.encode(), timeout_s=_UNIT_S
        )
        # a checkout in /tmp is out of sight of a unit with a /tmp of its own
        made.drop_in("offload-backup@.service", f"BindReadOnlyPaths={ROOT}")
        for group, options in TARGETS.items():
            command = f"ExecStart=offload mount %i {options}"
            made.drop_in(f"offload-mount@{group}.service", "ExecStart=", command)
        commands = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0]
        guest.shell(commands, cwd=str(ROOT), timeout_s=_UNIT_S)
        # it would be quicker than a test, or than a unit that is to be tested
        guest.run(["systemctl", "stop", "offload-watch.service"], check=False)
        guest.run(["offload", "store", "init", "main"], timeout_s=_UNIT_S)
        yield made


def test_units_installed_as_the_page_says_are_in_force(host: Host) -> None:
    units = ["offload-backup@shop.timer", "offload-recover.service"]
    said = host.guest.run(["systemctl", "is-enabled", *units]).text
    assert said.split() == ["enabled", "enabled"]
    timers = ["list-timers", "--no-legend", "--no-pager", "offload-*"]
    assert "offload-backup@shop.service" in host.guest.run(["systemctl", *timers]).text
    window = ["offload-mount@shop.timer", "offload-unmount@shop.timer"]
    host.start(*window)
    listed = host.guest.run(["systemctl", *timers]).text
    assert {"offload-mount@shop.service", "offload-unmount@shop.service"} <= set(listed.split())
    host.guest.run(["systemctl", "stop", *window])  # it may be nearly nine


def test_backup_units_freeze_snapshot_and_copy(host: Host) -> None:
    host.start("offload-backup@shop.service", "offload-backup@esx.service")
    made = {backup["group"]: backup["consistency"] for backup in host.offload("backup", "list")}
    assert made == {"shop": "filesystem", "esx": "crash"}


def test_backup_unit_sees_what_a_container_writes(host: Host) -> None:
    """Held is not the whole volume, and a backup that claims it is would be a lie."""
    container = host.guest.start(["unshare", "--mount", "bash", "-euc", CONTAINER])
    try:
        assert next(container.lines(time.monotonic() + 60)) == "mounted"
        with pytest.raises(AssertionError, match="nothing quiesces shop"):
            host.start("offload-backup@shop.service")
    finally:
        container.kill()
        container.wait(60)


def test_backup_unit_leaves_in_the_kernel_what_it_may_not_take_back(host: Host) -> None:
    """And says so, with a backup made; the unit that may takes it back."""
    before = len(host.offload("backup", "list"))
    options = TARGETS["esx"].split()
    killed = host.guest.run(
        ["offload", "mount", "esx", *options],
        env={CRASH_ENV: "mount.server-1.done"},
        timeout_s=_UNIT_S,
        check=False,
    )
    assert killed.status == -signal.SIGKILL
    with pytest.raises(AssertionError, match="could not take back"):
        host.start("offload-backup@esx.service")
    assert len(host.offload("backup", "list")) == before + 1
    host.guest.run(["test", "-e", "/sys/block/nbd1000"])
    host.start("offload-recover.service")
    assert host.servers() == {}
    host.guest.shell(NOTHING_LEFT)


def test_mount_units_views_are_everybody_s(host: Host) -> None:
    """Seen, written, mended and unmounted in a shell and by other units."""
    guest = host.guest
    host.start(*(f"offload-mount@{group}.service" for group in ("shop", "san", "esx")))
    views = {view["origin"].rpartition("/")[2]: view for view in host.offload("views")}
    assert [views[name]["alive"] for name in ("shop", "san", "esx")] == [True] * 3
    assert len(guest.shell(NAMESPACES).text.split()) == 1
    assert " fuse " in guest.run(["cat", "/proc/mounts"]).text  # proc(5): the type, of tgt's view

    guest.run(["nbdinfo", "--size", views["shop"]["uri"]])
    for name in ("san", "esx"):
        host.ask_disk(views[name]["uri"], "write -P 65 0 8k", "flush", "read -P 65 0 8k")

    # a server with all of a shell's capabilities is alive to a unit that has fewer
    by_hand = ["mount", views["san"]["origin"], "--name", "by-hand", "--target", "tgt"]
    host.offload(*by_hand, "--writable", "--port", "3262")
    before = host.servers()
    guest.shell("kill -KILL $(pgrep nbdkit)")
    host.start("offload-recover.service")
    after = host.servers()
    assert after.pop("nbdkit") != before.pop("nbdkit")
    assert after == before

    host.offload("unmount", "by-hand", views["san"]["name"])
    assert " fuse " not in guest.run(["cat", "/proc/mounts"]).text
    host.start("offload-unmount@shop.service", "offload-unmount@esx.service")
    assert host.offload("views") == []
    assert host.servers() == {}
    guest.shell(NOTHING_LEFT)
    said = guest.run(["systemctl", "is-active", "offload-mount@shop.service"], check=False)
    assert said.text == "inactive\n"  # the next window can open
