"""Other people's initiators for the kernel's NBD, in the guest, against this host's servers."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.model import Exposure, RawSource
from offload.target import ExportRequest
from offload.testing import certificates
from offload.testing.certificates import Wanted, issue, make_authority
from offload.testing.instances import make_instance
from offload.testing.lab.guest import Guest
from targets.nbd import NbdTarget

MIB = 1 << 20
DEVICE = "/dev/nbd3"


class Site:
    """Views of this host, on its loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "image.raw"
        self.image.write_bytes(os.urandom(4 * MIB))
        authority = make_authority()
        server = issue("server", Wanted(names=("127.0.0.1", Guest.host_address)), authority)
        pki = certificates.write_server(folder / "server", authority, server)
        self.client = certificates.write_client(folder / "client", authority)
        self.stranger = certificates.write_client(folder / "stranger", make_authority("other"))
        self.target = NbdTarget(make_instance(folder, {"nbd": {"certificates": str(pki)}}))
        self.run_dir = folder / "views" / "v1"

    def export(self, tls: str) -> int:
        """The port."""
        request = ExportRequest(
            view_id="v1",
            name="v",
            source=RawSource(path=self.image, size_bytes=4 * MIB),
            run_dir=self.run_dir,
            exposure=self.target.check(Exposure(transport="tcp", tls=tls)),
        )
        return int(self.target.export(request).server["port"])

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.image.read_bytes()).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="ofl-", dir="/tmp"))
    made = Site(folder)
    yield made
    made.target.withdraw(made.run_dir, {})
    shutil.rmtree(folder)


@pytest.fixture
def client(guest: Guest) -> Iterator[Guest]:
    """The guest with the module, and with nothing attached to the device afterwards."""
    guest.modprobe("nbd")
    yield guest
    guest.run(["nbd-client", "-d", DEVICE], check=False)


def assert_shows(guest: Guest, site: Site) -> None:
    assert guest.shell(f"sha256sum <{DEVICE}").text.split()[0] == site.hash
    assert guest.run(["blockdev", "--getro", DEVICE]).text.strip() == "1"
    before = site.hash
    refused = guest.shell(f"dd if=/dev/zero of={DEVICE} bs=4096 count=1 oflag=direct", check=False)
    assert refused.status != 0
    assert guest.shell(f"sha256sum <{DEVICE}").text.split()[0] == before == site.hash


def copy_in(guest: Guest, folder: Path) -> str:
    """A client's certificates, as the guest sees them."""
    where = f"/tmp/{folder.name}"
    for path in folder.iterdir():
        guest.shell(
            f"mkdir -p {where}; umask 077; cat >{where}/{path.name}", stdin=path.read_bytes()
        )
    return where


def test_nbd_client_reads_and_may_not_write(client: Guest, site: Site) -> None:
    port = site.export("off")
    client.run(["nbd-client", Guest.host_address, str(port), DEVICE, "-b", "512"])
    assert_shows(client, site)


def tls_options(folder: str) -> list[str]:
    return [
        "-enable-tls",
        "-cacertfile", f"{folder}/ca-cert.pem",
        "-certfile", f"{folder}/client-cert.pem",
        "-keyfile", f"{folder}/client-key.pem",
        "-tlshostname", Guest.host_address,
    ]  # fmt: skip


def test_nbd_client_over_tls_reads_and_may_not_write(client: Guest, site: Site) -> None:
    port = site.export("certificates")
    options = tls_options(copy_in(client, site.client))
    client.run(["nbd-client", Guest.host_address, str(port), DEVICE, "-b", "512", *options])
    assert_shows(client, site)


def test_nbd_client_with_a_strangers_certificate_gets_nothing(client: Guest, site: Site) -> None:
    port = site.export("certificates")
    options = tls_options(copy_in(client, site.stranger))
    argv = ["nbd-client", Guest.host_address, str(port), DEVICE, "-b", "512", *options]
    client.run(argv, check=False, timeout_s=30)
    assert client.run(["blockdev", "--getsize64", DEVICE]).text.strip() == "0"


def test_nbd_client_without_tls_is_refused(client: Guest, site: Site) -> None:
    port = site.export("certificates")
    argv = ["nbd-client", Guest.host_address, str(port), DEVICE]
    assert client.run(argv, check=False, timeout_s=30).status != 0
    assert client.run(["blockdev", "--getsize64", DEVICE]).text.strip() == "0"


def test_qemu_nbd_connects_the_kernel_to_a_view(client: Guest, site: Site) -> None:
    port = site.export("off")
    uri = f"nbd://{Guest.host_address}:{port}"
    client.run(["qemu-nbd", "--read-only", "--format=raw", "--fork", "--connect", DEVICE, uri])
    try:
        assert client.shell(f"sha256sum <{DEVICE}").text.split()[0] == site.hash
        assert client.run(["blockdev", "--getro", DEVICE]).text.strip() == "1"
    finally:
        client.run(["qemu-nbd", "--disconnect", DEVICE])
