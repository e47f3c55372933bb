"""Who may log in to views of the lio target: ACLs, CHAP, portals; open-iscsi as an initiator."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload.errors import ConfigError, UnavailableError, UsageError
from offload.model import Exposure
from offload.run import Completed, run
from offload.target import Client
from offload.testing.libiscsi import Initiator, Login, ScsiError
from offload.testing.lio import (
    CHAP,
    HERE,
    MIB,
    MUTUAL,
    MUTUAL_SECRET,
    SECRET,
    THERE,
    WRONG_SECRET,
    Site,
    command_lines,
    site,
    wait_until,
)

pytestmark = pytest.mark.in_guest(timeout_s=1200)

TO_BOTH = Exposure(initiators=(HERE, THERE))
PATTERN = bytes(range(256)) * 2
_AUTH_FAILED = 24  # iscsiadm(8): ISCSI_ERR_LOGIN_AUTH_FAILED

as_here = Login(initiator=HERE)
with_secret = Login(initiator=HERE, user="backup", secret=SECRET)


@pytest.fixture
def lio() -> Iterator[Site]:
    with site() as made:
        yield made


def refused(uri: str, login: Login) -> bool:
    try:
        Initiator(uri, login).close()
    except ScsiError:
        return True
    return False


# -- ACLs -------------------------------------------------------------------------------------


def test_named_initiators_log_in_and_nobody_else(lio: Site) -> None:
    image = lio.image()
    endpoint = lio.export(lio.request(image, exposure=TO_BOTH))
    for name in (HERE, THERE):
        with Initiator(endpoint.uri, Login(initiator=name)) as client:
            assert client.pread(MIB, 0) == image.read_bytes()
    assert refused(endpoint.uri, Login(initiator=f"{HERE}.not"))


@pytest.mark.parametrize(
    "name", ["iqn.2004-10.com:plain", "eui.02004567a425678d", "naa.5000c50035d1e1ab"]
)
def test_names_of_every_form_have_their_acl(lio: Site, name: str) -> None:
    endpoint = lio.export(lio.request(exposure=Exposure(initiators=(name,))))
    with Initiator(endpoint.uri, Login(initiator=name)) as client:
        assert len(client.pread(512, 0)) == 512


def test_acl_keeps_a_read_only_view_read_only(lio: Site) -> None:
    endpoint = lio.export(lio.request(exposure=TO_BOTH))
    with Initiator(endpoint.uri, as_here) as client:
        with pytest.raises(ScsiError) as error:
            client.pwrite(PATTERN, 0)
        assert error.value.sense_key == 7  # DATA PROTECT


def test_acl_lets_the_named_write_to_a_writable_view(lio: Site) -> None:
    endpoint = lio.export(lio.request(exposure=TO_BOTH, on_overlay=True))
    with (
        Initiator(endpoint.uri, as_here) as one,
        Initiator(endpoint.uri, Login(initiator=THERE)) as two,
    ):
        one.pwrite(PATTERN, 512)
        assert two.pread(512, 512) == PATTERN


def test_clients_are_named_with_their_address(lio: Site) -> None:
    request = lio.request(exposure=TO_BOTH)
    endpoint = lio.export(request)
    with Initiator(endpoint.uri, as_here), Initiator(endpoint.uri, Login(initiator=THERE)):
        found = lio.target.clients(request.run_dir, endpoint.server)
    assert sorted(found, key=lambda client: client.name) == [
        Client(address="127.0.0.1", name=HERE),
        Client(address="127.0.0.1", name=THERE),
    ]


def test_clients_of_one_name_are_counted_each(lio: Site) -> None:
    """The kernel shows only the last session of a name; how many there are it tells elsewhere."""
    request = lio.request(exposure=TO_BOTH)
    endpoint = lio.export(request)
    with Initiator(endpoint.uri, as_here), Initiator(endpoint.uri, as_here):
        assert len(lio.target.clients(request.run_dir, endpoint.server)) == 2


def test_clients_without_an_acl_are_named_too(lio: Site) -> None:
    request = lio.request()
    endpoint = lio.export(request)
    with Initiator(endpoint.uri, as_here):
        found = lio.target.clients(request.run_dir, endpoint.server)
    assert found == [Client(address="127.0.0.1", name=HERE)]


def test_discovery_shows_a_view_to_those_that_may_log_in(lio: Site) -> None:
    open_view = lio.export(lio.request(view_id="v1"))
    closed = lio.export(lio.request(view_id="v2", exposure=TO_BOTH))
    argv = ["iscsi-ls", f"--initiator-name={HERE}.not", "iscsi://127.0.0.1"]
    assert closed.server["iqn"] not in run(argv).stdout
    assert open_view.server["iqn"] in run(argv).stdout


# -- CHAP -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exposure", [Exposure(), TO_BOTH], ids=["everybody", "acl"])
def test_chap_admits_the_right_secret_alone(exposure: Exposure) -> None:
    with site(CHAP) as lio:
        image = lio.image()
        endpoint = lio.export(lio.request(image, exposure=exposure))
        with Initiator(endpoint.uri, with_secret) as client:
            assert client.pread(MIB, 0) == image.read_bytes()
        assert refused(endpoint.uri, as_here)
        assert refused(endpoint.uri, Login(initiator=HERE, user="backup", secret=WRONG_SECRET))
        assert refused(endpoint.uri, Login(initiator=HERE, user="other", secret=SECRET))


def test_chap_does_not_open_the_acl() -> None:
    with site(CHAP) as lio:
        endpoint = lio.export(lio.request(exposure=TO_BOTH))
        assert refused(endpoint.uri, Login(initiator=f"{HERE}.not", user="backup", secret=SECRET))


@pytest.mark.parametrize("exposure", [Exposure(), TO_BOTH], ids=["everybody", "acl"])
def test_mutual_chap_proves_the_target_to_the_initiator(exposure: Exposure) -> None:
    login = {"initiator": HERE, "user": "backup", "secret": SECRET, "mutual_user": "offload"}
    with site(MUTUAL) as lio:
        endpoint = lio.export(lio.request(exposure=exposure))
        with Initiator(endpoint.uri, Login(**login, mutual_secret=MUTUAL_SECRET)) as client:
            assert len(client.pread(512, 0)) == 512
        assert refused(endpoint.uri, Login(**login, mutual_secret=WRONG_SECRET))
        # one that does not ask for the proof is not refused for that
        assert not refused(endpoint.uri, with_secret)


def test_secrets_are_in_the_kernel_and_nowhere_else() -> None:
    with site(MUTUAL) as lio:
        endpoint = lio.export(lio.request(exposure=TO_BOTH, on_overlay=True))
        for secret in (SECRET, MUTUAL_SECRET):
            assert secret not in json.dumps(dict(endpoint.server))
            assert secret not in endpoint.uri
            assert secret not in command_lines()
            for path in (lio.folder / "run").rglob("*"):
                assert not path.is_file() or secret.encode() not in path.read_bytes()
        group = Path("/sys/kernel/config/target/iscsi", endpoint.server["iqn"], "tpgt_1")
        held = group / "acls" / HERE / "auth" / "password"
        assert held.read_text().strip() == SECRET
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(
                ["/usr/bin/setpriv", "--reuid=65534", "--clear-groups", "cat", str(held)],
                check=True,
                capture_output=True,
            )


@pytest.mark.parametrize("secret", ["NULL and some more", " begins blank", "a" * 11])
def test_chap_secret_that_lio_would_twist_is_refused(secret: str) -> None:
    with site(CHAP | {"secret": secret}) as lio, pytest.raises(ConfigError) as error:
        lio.target.check(Exposure())
    assert error.value.code in {"chap-unfit", "chap-secret-length"}
    assert secret not in error.value.message


# -- portals ----------------------------------------------------------------------------------


def test_port_of_another_server_is_taken(lio: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UnavailableError) as error:
            lio.target.check(Exposure(port=port))
        assert (error.value.code, str(port) in error.value.message) == ("port-taken", True)


def test_address_of_another_machine_is_refused() -> None:
    with site(CHAP, networks=["192.0.2.0/24"]) as lio, pytest.raises(UnavailableError) as error:
        lio.target.check(Exposure(address="192.0.2.1", initiators=(HERE,)))
    assert error.value.code == "bad-address"


def test_address_outside_loopback_needs_acl_and_chap(lio: Site) -> None:
    with pytest.raises(UsageError):
        lio.target.check(Exposure(address="10.0.2.15"))
    with pytest.raises(ConfigError) as error:
        lio.target.check(Exposure(address="10.0.2.15", insecure_network=True))
    assert error.value.code == "acl-for-no-one"
    with pytest.raises(ConfigError) as error:
        lio.target.check(Exposure(address="10.0.2.15", insecure_network=True, initiators=(HERE,)))
    assert error.value.code == "chap-needed"


def test_portal_of_ipv6_serves(lio: Site) -> None:
    image = lio.image()
    request = lio.request(image, exposure=Exposure(address="0::1"))
    endpoint = lio.export(request)
    with Initiator(endpoint.uri) as client:
        assert client.pread(MIB, 0) == image.read_bytes()
        assert [c.address for c in lio.target.clients(request.run_dir, endpoint.server)] == ["::1"]
    assert lio.target.alive(request.run_dir, endpoint.server)


def test_views_on_one_portal_go_one_by_one(lio: Site) -> None:
    one, two = lio.request(view_id="v1"), lio.request(view_id="v2")
    lio.export(one)
    kept = lio.export(two)
    lio.withdraw(one)
    with Initiator(kept.uri) as client:
        assert len(client.pread(512, 0)) == 512


# -- initiators that misbehave ----------------------------------------------------------------

_READER = """
import sys
from offload.testing.libiscsi import Initiator
client = Initiator(sys.argv[1])
while True:
    client.pread(65536, 0)
    print(flush=True)
"""


@contextmanager
def reading(uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """An initiator in a process of its own, which reads all the time."""
    process = subprocess.Popen([sys.executable, "-c", _READER, uri], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_initiator_gone_without_logout_does_not_keep_a_view(lio: Site, number: int) -> None:
    request = lio.request()
    endpoint = lio.export(request)
    with reading(endpoint.uri) as process:
        process.send_signal(number)
        if number == signal.SIGKILL:
            wait_until(lambda: not lio.target.clients(request.run_dir, endpoint.server))
        lio.withdraw(request)


def test_withdraw_ends_sessions_that_are_reading(lio: Site) -> None:
    request = lio.request()
    endpoint = lio.export(request)
    with reading(endpoint.uri) as one, reading(endpoint.uri) as two:
        lio.withdraw(request)
        assert one.wait(60) != 0
        assert two.wait(60) != 0


def test_initiator_gone_comes_back(lio: Site) -> None:
    request = lio.request(exposure=TO_BOTH)
    endpoint = lio.export(request)
    for _ in range(5):
        Initiator(endpoint.uri, as_here).vanish()
    with Initiator(endpoint.uri, as_here) as client:
        assert len(client.pread(512, 0)) == 512


# -- open-iscsi -------------------------------------------------------------------------------


class OpenIscsi:
    """A target as the kernel's initiator knows it."""

    def __init__(self, server: Mapping[str, str], login: Login) -> None:
        self._argv = [
            "iscsiadm", "-m", "node", "-T", server["iqn"],
            "-p", f"{server['address']}:{server['port']}",
        ]  # fmt: skip
        run([*self._argv, "-o", "new"])
        nodes = Path("/etc/iscsi/nodes", server["iqn"])
        record = next(path for path in nodes.rglob("*") if path.is_file())
        settings = {"iface.initiatorname": login.initiator, "node.session.scan": "auto"}
        if login.user:
            settings |= {
                "node.session.auth.authmethod": "CHAP",
                "node.session.auth.username": login.user,
                "node.session.auth.password": login.secret,
                "node.session.auth.username_in": login.mutual_user,
                "node.session.auth.password_in": login.mutual_secret,
            }
        kept = [
            line for line in record.read_text().splitlines() if line.split(" ")[0] not in settings
        ]
        kept[1:1] = [f"{name} = {value}" for name, value in settings.items() if value]
        record.chmod(0o600)
        record.write_text("\n".join(kept) + "\n")

    def run(self, *action: str, check: bool = True) -> Completed:
        return run([*self._argv, *action], check=check, timeout_s=120)

    def disk(self) -> Path:
        """Its disk, once the kernel has it."""
        found: list[str] = []

        def look() -> bool:
            text = run(["iscsiadm", "-m", "session", "-P", "3"]).stdout
            part = text.partition(self._argv[4])[2]
            found[:] = re.findall(r"Attached scsi disk (\w+)", part)[:1]
            return bool(found)

        wait_until(look)
        return Path("/dev", found[0])


@contextmanager
def open_iscsi(server: Mapping[str, str], login: Login) -> Iterator[OpenIscsi]:
    run(["modprobe", "--all", "iscsi_tcp", "sd_mod"])  # udev would, elsewhere
    if run(["pgrep", "-x", "iscsid"], check=False).status != 0:
        run(["iscsid"])
    node = OpenIscsi(server, login)
    try:
        yield node
    finally:
        node.run("--logout", check=False)
        node.run("-o", "delete")


def test_open_iscsi_logs_in_with_mutual_chap_reads_and_may_not_write() -> None:
    with site(MUTUAL) as lio:
        image = lio.image()
        request = lio.request(image, exposure=TO_BOTH)
        endpoint = lio.export(request)
        login = Login(
            initiator=HERE, user="backup", secret=SECRET,
            mutual_user="offload", mutual_secret=MUTUAL_SECRET,
        )  # fmt: skip
        with open_iscsi(endpoint.server, login) as node:
            node.run("--login")
            disk = node.disk()
            assert disk.read_bytes() == image.read_bytes()
            assert lio.target.clients(request.run_dir, endpoint.server) == [
                Client(address="127.0.0.1", name=HERE)
            ]
            model = Path("/sys/block", disk.name, "device", "model").read_text().strip()
            assert model == "TimeView"
            assert SECRET not in command_lines()
            # the kernel heeds the write protection; without it, the target refuses
            assert run(["blockdev", "--getro", str(disk)]).stdout.strip() == "1"
            run(["blockdev", "--setrw", str(disk)])
            argv = ["dd", "if=/dev/zero", f"of={disk}", "bs=4096", "count=1", "oflag=direct"]
            assert run(argv, check=False).status != 0
            run(["iscsiadm", "-m", "session", "--rescan"])
            assert run(["blockdev", "--getsize64", str(disk)]).stdout.strip() == str(MIB)
            with Initiator(endpoint.uri, Login(
                initiator=THERE, user="backup", secret=SECRET,
            )) as other:  # fmt: skip
                assert other.pread(MIB, 0) == image.read_bytes()
            node.run("--logout")
            wait_until(lambda: not lio.target.clients(request.run_dir, endpoint.server))
        assert image.read_bytes() == disk_bytes(image)


def disk_bytes(path: Path) -> bytes:
    """Read past the page cache of whoever wrote."""
    run(["sync", str(path)])
    return path.read_bytes()


@pytest.mark.parametrize(
    "login",
    [
        Login(initiator=HERE, user="backup", secret=WRONG_SECRET),
        Login(initiator=HERE),
        Login(initiator=f"{HERE}.not", user="backup", secret=SECRET),
    ],
    ids=["wrong-secret", "no-secret", "no-acl"],
)
def test_open_iscsi_is_refused(login: Login) -> None:
    with site(CHAP) as lio:
        endpoint = lio.export(lio.request(exposure=TO_BOTH))
        with open_iscsi(endpoint.server, login) as node:
            done = node.run("--login", check=False)
        assert done.status == _AUTH_FAILED


def test_open_iscsi_disk_whose_view_was_withdrawn_gives_errors() -> None:
    """And no hang: the initiator's replacement timeout ends it, which is its own to set."""
    with site() as lio:
        request = lio.request()
        endpoint = lio.export(request)
        with open_iscsi(endpoint.server, as_here) as node:
            node.run("-o", "update", "-n", "node.session.timeo.replacement_timeout", "-v", "1")
            node.run("--login")
            disk = node.disk()
            lio.withdraw(request)
            argv = ["dd", f"if={disk}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]
            assert run(argv, check=False).status != 0


def test_open_iscsi_goes_on_when_its_view_is_served_again() -> None:
    with site() as lio:
        image = lio.image()
        request = lio.request(image)
        endpoint = lio.export(request)
        with open_iscsi(endpoint.server, as_here) as node:
            node.run("--login")
            disk = node.disk()
            run(["targetctl", "clear"])
            lio.withdraw(request)
            lio.export(request)
            argv = ["dd", f"if={disk}", f"of={lio.folder}/read", "bs=1M", "iflag=direct"]
            run(argv, timeout_s=120)
            assert (lio.folder / "read").read_bytes() == image.read_bytes()
            node.run("--logout")


def test_writable_view_gives_back_what_is_discarded() -> None:
    with site() as lio:
        request = lio.request(lio.image(2 * MIB), on_overlay=True)
        assert request.overlay is not None
        overlay = request.overlay.path
        endpoint = lio.export(request)
        with open_iscsi(endpoint.server, as_here) as node:
            node.run("--login")
            disk = node.disk()
            run(["dd", "if=/dev/urandom", f"of={disk}", "bs=1M", "count=2", "oflag=direct"])
            full = overlay.stat().st_blocks
            assert full * 512 >= 2 * MIB
            run(["blkdiscard", str(disk)])
            wait_until(lambda: overlay.stat().st_blocks < full // 2)
            assert disk.read_bytes() == bytes(2 * MIB)
            node.run("--logout")
