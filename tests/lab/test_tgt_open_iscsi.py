"""open-iscsi in the lab guest against a tgtd of this host: logins, kills, a cable pulled."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload.model import Exposure, RawSource
from offload.procs import ProcessRef
from offload.target import Endpoint, ExportRequest
from offload.testing.instances import free_port, make_instance
from offload.testing.lab.guest import Guest
from offload.testing.target import writable
from targets.tgt import TgtTarget

MIB = 1 << 20
HOST = "iqn.2004-10.com.example:backup-host"
SECRET, MUTUAL = "the secret of the host", "the secret of the view"
NAME_FILE = "/etc/iscsi/initiatorname.iscsi"
_AUTH_FAILED = 24  # iscsiadm(8): ISCSI_ERR_LOGIN_AUTH_FAILED
_SETTINGS = {
    "iface.initiatorname": HOST,  # iscsid may run already, and have another
    "node.session.auth.authmethod": "CHAP",
    "node.session.auth.username": "backup",
    "node.session.auth.username_in": "offload",
    "node.session.auth.password_in": MUTUAL,
    "node.session.initial_login_retry_max": "1",
}

pytestmark = pytest.mark.slow


@dataclass
class Site:
    """A view on a port of the host's loopback, which is 10.0.2.2 in the guest."""

    target: TgtTarget
    request: ExportRequest
    image: Path

    def export(self) -> Endpoint:
        return self.target.export(self.request)

    def clients(self, endpoint: Endpoint) -> list[str]:
        found = self.target.clients(self.request.run_dir, endpoint.server)
        return [client.name for client in found]


@pytest.fixture
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="ofo-", dir="/tmp"))
    for name, text in (("secret", SECRET), ("mutual", MUTUAL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    chap = {
        "user": "backup",
        "secret_file": str(folder / "secret"),
        "mutual_user": "offload",
        "mutual_secret_file": str(folder / "mutual"),
    }
    instance = make_instance(folder / "i", {"iscsi": {"chap": chap, "initiators": [HOST]}})
    image = folder / "image.raw"
    image.write_bytes(os.urandom(4 * MIB))
    target = TgtTarget(instance)
    request = ExportRequest(
        view_id="v1",
        name="shop-db",
        source=RawSource(path=image, size_bytes=4 * MIB),
        run_dir=instance.views_dir / "v1",
        exposure=target.check(Exposure(port=free_port())),
    )
    yield Site(target=target, request=request, image=image)
    target.withdraw(request.run_dir, {})
    shutil.rmtree(folder)


@dataclass
class Host:
    """open-iscsi in the guest, which knows one target."""

    guest: Guest
    node: str  # arguments of iscsiadm that name it

    def login(self) -> int:
        return self.guest.shell(f"iscsiadm {self.node} --login", check=False).status

    @property
    def disk(self) -> str:
        """The disk of LUN 1, once the kernel has it."""
        look = "grep -l OFFLOAD /sys/block/sd*/device/vendor"
        script = f"for i in $(seq 300); do {look} 2>/dev/null && exit; sleep 0.1; done; exit 1"
        return "/dev/" + self.guest.shell(script).text.split("/")[3]

    def digest(self, disk: str) -> str:
        """SHA-256 of the disk, read from the target."""
        read = f"dd if={disk} bs=1M iflag=direct status=none | sha256sum"
        return self.guest.shell(read, timeout_s=150).text.split()[0]


@contextmanager
def known(guest: Guest, endpoint: Endpoint, *, secret: str = SECRET) -> Iterator[Host]:
    """Made known by a record, in which the secrets are."""
    iqn, portal = endpoint.server["iqn"], f"{guest.host_address}:{endpoint.server['port']}"
    host = Host(guest=guest, node=f"-m node -T {iqn} -p {portal}")
    guest.modprobe("iscsi_tcp", "sd_mod")
    made = guest.shell(f"""
        mkdir -p /run/lock/iscsi
        [[ -s {NAME_FILE} ]] || echo InitiatorName={HOST} >{NAME_FILE}
        pgrep -x iscsid >/dev/null || iscsid
        iscsiadm {host.node} -o new >/dev/null
        find /etc/iscsi/nodes/{iqn} -type f
    """)
    (record,) = made.text.split()
    settings = {**_SETTINGS, "node.session.auth.password": secret}
    lines = guest.run(["cat", record]).text.splitlines()
    kept = [line for line in lines if line.partition(" = ")[0] not in settings]
    kept[1:1] = [f"{key} = {value}" for key, value in settings.items()]
    guest.shell(f"chmod 600 {record}; cat >{record}", stdin="\n".join([*kept, ""]).encode())
    try:
        yield host
    finally:
        guest.shell(f"iscsiadm {host.node} --logout || true; iscsiadm {host.node} -o delete")


def _wait(condition: Callable[[], bool], patience_s: float = 60) -> None:
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_open_iscsi_logs_in_reads_all_and_may_not_write(guest: Guest, site: Site) -> None:
    endpoint = site.export()
    with known(guest, endpoint) as host:
        assert host.login() == 0
        disk = host.disk
        assert site.clients(endpoint) == [HOST]
        assert host.digest(disk) == _digest(site.image)
        said = guest.run(["blockdev", "--getro", "--getsize64", disk]).text.split()
        assert said == ["1", str(4 * MIB)]
        write = f"blockdev --setrw {disk}; dd if=/dev/zero of={disk} bs=4096 count=1 oflag=direct"
        assert guest.shell(write, check=False).status != 0
        guest.shell("iscsiadm -m session --rescan")
        assert host.digest(disk) == _digest(site.image)
        guest.shell(f"iscsiadm {host.node} --logout")
        _wait(lambda: site.clients(endpoint) == [])


def test_open_iscsi_wrong_secret_is_refused(guest: Guest, site: Site) -> None:
    with known(guest, site.export(), secret="the secret of the hose") as host:  # noqa: S106
        assert host.login() == _AUTH_FAILED


def test_open_iscsi_writes_reach_the_overlay(guest: Guest, site: Site) -> None:
    before = _digest(site.image)
    site.request = writable(site.request)
    with known(guest, site.export()) as host:
        assert host.login() == 0
        guest.shell(f"yes written | dd of={host.disk} bs=4096 count=16 iflag=fullblock conv=fsync")
    site.target.withdraw(site.request.run_dir, {})
    with known(guest, site.export()) as host:
        assert host.login() == 0
        head = guest.run(["dd", f"if={host.disk}", "bs=4096", "count=16", "status=none"]).stdout
        assert head == (b"written\n" * 8192)
    assert _digest(site.image) == before


def test_open_iscsi_session_outlives_the_server_and_a_cut_of_the_network(
    guest: Guest, site: Site
) -> None:
    """Without a new login by anybody: the disk in the guest goes on where it was."""
    endpoint = site.export()
    with known(guest, endpoint) as host:
        assert host.login() == 0
        disk = host.disk
        ref = ProcessRef.from_strings(dict(endpoint.server))
        assert ref is not None
        os.kill(ref.pid, signal.SIGKILL)
        _wait(lambda: not ref.alive())
        site.target.withdraw(site.request.run_dir, endpoint.server)
        endpoint = site.export()
        assert host.digest(disk) == _digest(site.image)

        guest.network(up=False)
        try:
            _wait(lambda: site.clients(endpoint) == [])  # tgtd misses its signs of life
        finally:
            guest.network(up=True)
        assert host.digest(disk) == _digest(site.image)
        assert site.clients(endpoint) == [HOST]

        site.target.withdraw(site.request.run_dir, endpoint.server)
        assert not site.request.run_dir.exists()
