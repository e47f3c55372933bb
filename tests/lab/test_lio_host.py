"""Initiators of this host against LIO in the lab guest: the tools, a cable pulled, a power cut."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from offload.iscsi import identity
from offload.testing.lab.guest import Guest
from offload.testing.libiscsi import Initiator, Login, ScsiError

MIB = 1 << 20
SIZE = 8 * MIB
HOST = "iqn.2004-10.com.example:backup-host"
SECRET, MUTUAL = "the secret of the host", "the secret of the view"
PATTERN = bytes(range(256)) * 2

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "/run/offload"

[pool]
min_free = "0%"

[overlays]
limit = "100MiB"
min_free = "1MiB"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[groups.shop]
volumes = ["db"]
atomic = "record"

[iscsi]
address = "{address}"
networks = ["10.0.2.0/24"]
initiators = ["{initiator}"]

[iscsi.chap]
user = "backup"
secret_file = "{folder}/secret"
mutual_user = "offload"
mutual_secret_file = "{folder}/mutual"
"""

login = Login(
    initiator=HOST, user="backup", secret=SECRET, mutual_user="offload", mutual_secret=MUTUAL
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Proxy:
    """An instance of offload in the guest, with one volume."""

    guest: Guest
    folder: str
    root: str  # of the checkout
    content: bytes
    view: Mapping[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        config = CONFIG.format(folder=self.folder, address=self.guest.address, initiator=HOST)
        files = {"offload.toml": config, "secret": SECRET, "mutual": MUTUAL}
        script = f"mkdir -p {self.folder}; umask 077"
        for name, text in files.items():
            script += f"\ncat >{self.folder}/{name} <<'END'\n{text}\nEND"
        self.guest.shell(script)
        self.guest.shell(f"cat >{self.folder}/db.raw; sync", stdin=self.content)

    def offload(self, *words: str) -> str:
        argv = [sys.executable, "-m", "offload.cli", "--config", f"{self.folder}/offload.toml"]
        return self.guest.run([*argv, *words], cwd=self.root, timeout_s=240).text

    def mount(self, *words: str) -> Mapping[str, str]:
        """Mount the one volume; the view as a program sees it."""
        said = self.offload("--json", "mount", "shop", "--target", "lio", *words)
        (view,) = json.loads(said)
        return {name: view[name] for name in ("id", "name", "uri")}

    def here(self, uri: str) -> str:
        """The view's URI as this host reaches it."""
        port = self.guest.forward(3260)
        return uri.replace(f"{self.guest.address}:3260", f"127.0.0.1:{port}")


def made_of(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


@pytest.fixture(scope="module")
def proxy(guest: Guest, pytestconfig: pytest.Config) -> Iterator[Proxy]:
    made = Proxy(
        guest=guest, folder="/tmp/lio-host", root=str(pytestconfig.rootpath), content=made_of(1)
    )
    made.prepare()
    made.view = made.mount()
    yield made
    guest.network(up=True)
    made.offload("unmount", "--all", "--force")
    left = guest.shell("ls /sys/kernel/config/target/iscsi; losetup -l; ls /sys/block").text
    assert "offload" not in left
    guest.shell(f"rm -r {made.folder}")


@pytest.fixture
def uri(proxy: Proxy) -> str:
    return proxy.here(proxy.view["uri"])


def tool(*argv: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A tool of libiscsi or QEMU; secrets go through its environment."""
    secrets = {
        "LIBISCSI_CHAP_USERNAME": "backup",
        "LIBISCSI_CHAP_PASSWORD": SECRET,
        "LIBISCSI_CHAP_TARGET_USERNAME": "offload",
        "LIBISCSI_CHAP_TARGET_PASSWORD": MUTUAL,
    }
    return subprocess.run(
        argv, env={**os.environ, **secrets, **(env or {})}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_iscsi_inq_and_readcapacity16_know_the_view(proxy: Proxy, uri: str) -> None:
    shown = tool("iscsi-inq", "-i", HOST, uri).stdout
    assert "Vendor:OFFLOAD" in shown
    assert "Product:TimeView" in shown
    serial = tool("iscsi-inq", "-i", HOST, "-e", "1", "-c", "128", uri).stdout
    assert identity(proxy.view["id"]).serial in serial
    capacity = tool("iscsi-readcapacity16", "-i", HOST, uri).stdout
    assert f"Total size:{SIZE}" in capacity
    assert "LOGICAL BLOCK LENGTH IN BYTES:512" in capacity


def test_iscsi_inq_with_a_wrong_secret_or_another_name_is_refused(uri: str) -> None:
    wrong = {"LIBISCSI_CHAP_PASSWORD": "the secret of nobody"}
    assert tool("iscsi-inq", "-i", HOST, uri, env=wrong).returncode != 0
    assert tool("iscsi-inq", "-i", f"{HOST}.not", uri).returncode != 0
    assert tool("iscsi-inq", "-i", HOST, uri).returncode == 0


def test_whole_lun_through_qemu_is_the_volume(proxy: Proxy, uri: str, tmp_path: Path) -> None:
    volume = tmp_path / "volume.raw"
    volume.write_bytes(proxy.content)
    shown = ["--image-opts", f"driver=iscsi,initiator-name={HOST},{_options(uri)}"]
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    given = ["--object", f"secret,id=chap,file={secret}"]
    copied = tmp_path / "copy.raw"
    done = tool("qemu-img", "convert", *given, "-O", "raw", *shown, str(copied))
    assert (done.returncode, done.stderr) == (0, "")
    assert hashlib.sha256(copied.read_bytes()).digest() == hashlib.sha256(proxy.content).digest()


def _options(uri: str) -> str:
    portal, iqn, lun = uri.removeprefix("iscsi://").split("/")
    return f"transport=tcp,portal={portal},target={iqn},lun={lun},user=backup,password-secret=chap"


def test_initiators_are_shown_by_name_and_address(proxy: Proxy, uri: str) -> None:
    with Initiator(uri, login) as client:
        with pytest.raises(ScsiError) as refused:
            client.pwrite(PATTERN, 0)
        assert refused.value.sense_key == 7  # DATA PROTECT
        shown = proxy.offload("views")
    assert HOST in shown
    assert proxy.guest.host_address in shown


def test_cable_pulled_and_back_leaves_a_view_that_serves(proxy: Proxy, uri: str) -> None:
    """The session of before is dead to its initiator; a new one works. It hinders nobody."""
    client = Initiator(uri, login, timeout_s=8)
    assert client.pread(4096, 0) == proxy.content[:4096]
    proxy.guest.network(up=False)
    with pytest.raises(ScsiError):
        client.pread(4096, 0)
    client.vanish()
    proxy.guest.network(up=True)
    with Initiator(uri, login) as again:
        assert again.pread(SIZE, 0) == proxy.content
    # and `unmount` at the end does not wait for the session that was lost


def test_views_come_back_after_a_power_cut(
    fresh_guest: Guest, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """One read-only, one with what was written to it: same IQN, LUN, address and identity."""
    disk = tmp_path / "disk.raw"
    with disk.open("xb") as out:
        out.truncate(256 * MIB)
    device = fresh_guest.attach(disk)
    fresh_guest.shell(f"mkfs.ext4 -q {device}; mkdir /data; mount {device} /data")
    proxy = Proxy(
        guest=fresh_guest, folder="/data", root=str(pytestconfig.rootpath), content=made_of(2)
    )
    proxy.prepare()
    views = [proxy.mount("--name", "seen"), proxy.mount("--name", "written", "--writable")]
    identities = {}
    for view in views:
        with Initiator(proxy.here(view["uri"]), login) as client:
            identities[view["name"]] = client.inquiry(0x83)
            if view["name"] == "written":
                client.pwrite(PATTERN, 4096)
                client.flush()
    fresh_guest.shell("sync")

    fresh_guest.reboot()
    fresh_guest.shell(f"mkdir /data; mount {device} /data")
    proxy.offload("recover")
    for view in views:
        with Initiator(proxy.here(view["uri"]), login) as client:
            assert client.inquiry(0x83) == identities[view["name"]]
            found = client.pread(SIZE, 0)
        changed = proxy.content[:4096] + PATTERN + proxy.content[4096 + len(PATTERN) :]
        assert found == (changed if view["name"] == "written" else proxy.content)
