"""NBD as the kernel gets it: exports opened for it, and TLS through a local nbdkit."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest

from offload import nbd_export, nbd_tunnel, procs, qemu_nbd, run
from offload.endpoint import NbdEndpoint, parse
from offload.errors import ConfigError, NotFoundError, OffloadError, UnavailableError
from offload.model import Exposure, RawSource
from offload.target import ExportRequest
from offload.testing import certificates
from offload.testing.instances import make_instance
from targets.nbd import NbdTarget

MIB = 1 << 20


@dataclass
class Site:
    """A TLS view on loopback, and what its clients need."""

    folder: Path
    target: NbdTarget
    client: Path
    keys: Path
    running: list[Path]

    def export(self, tls: str, sector_size: int = 512) -> str:
        source = RawSource(path=self.folder / "image.raw", size_bytes=MIB, sector_size=sector_size)
        run_dir = self.folder / "views" / f"v{len(self.running)}"
        asked = Exposure(transport="tcp", tls=tls) if tls else Exposure()
        request = ExportRequest(
            view_id=run_dir.name,
            name="view",
            source=source,
            run_dir=run_dir,
            exposure=self.target.check(asked),
        )
        self.running.append(run_dir)
        return self.target.export(request).uri


@pytest.fixture
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="oft-", dir="/tmp"))
    (folder / "image.raw").write_bytes(os.urandom(MIB))
    authority = certificates.make_authority()
    server = certificates.write_server(folder / "server", authority)
    keys = certificates.write_keys(folder / "keys.psk", ["alice"])
    instance = make_instance(folder, {"nbd": {"certificates": str(server), "psk": str(keys)}})
    client = certificates.write_client(folder / "client", authority)
    made = Site(folder, NbdTarget(instance), client, keys, [])
    yield made
    nbd_tunnel.stop(folder / "tunnel")
    for run_dir in made.running:
        made.target.withdraw(run_dir, {})
    shutil.rmtree(folder)


def endpoint(uri: str) -> NbdEndpoint:
    found = parse(uri)
    assert isinstance(found, NbdEndpoint)
    return found


def read_all(path: Path) -> bytes:
    handle = nbd.NBD()
    handle.connect_unix(str(path))
    data = bytes(handle.pread(handle.get_size(), 0))
    handle.shutdown()
    return data


@pytest.mark.parametrize("tls", ["certificates", "psk"])
def test_tunnel_shows_what_the_server_serves(site: Site, tls: str) -> None:
    files = {
        "certificates": f"?tls-certificates={site.client}",
        "psk": f"?tls-psk-file={site.keys}",
    }
    uri = site.export(tls) + files[tls]
    path = nbd_tunnel.start(site.folder / "tunnel", endpoint(uri))
    assert read_all(path) == (site.folder / "image.raw").read_bytes()
    opened = nbd_export.open_export(path)
    assert opened.read_only
    assert opened.size_bytes == MIB
    opened.wire.close()
    assert nbd_tunnel.alive(site.folder / "tunnel")
    nbd_tunnel.stop(site.folder / "tunnel")
    assert not nbd_tunnel.alive(site.folder / "tunnel")
    assert not (site.folder / "tunnel").exists()


def test_tunnel_keeps_keys_off_its_command_line(site: Site) -> None:
    uri = site.export("psk") + f"?tls-psk-file={site.keys}"
    nbd_tunnel.start(site.folder / "tunnel", endpoint(uri))
    (ref,) = procs.find_running("nbdkit", str(site.folder / "tunnel" / "pid"))
    words = Path(f"/proc/{ref.pid}/cmdline").read_bytes()
    secret = site.keys.read_text().strip().partition(":")[2]
    assert secret.encode() not in words
    assert str(site.keys).encode() in words


def test_tunnel_with_a_strangers_certificate_says_why(site: Site) -> None:
    stranger = certificates.write_client(
        site.folder / "stranger", certificates.make_authority("other")
    )
    uri = site.export("certificates") + f"?tls-certificates={stranger}"
    folder = site.folder / "tunnel"
    path = nbd_tunnel.start(folder, endpoint(uri))
    with pytest.raises(OffloadError) as error:
        nbd_export.open_export(path)
    explained = nbd_tunnel.explain(folder, error.value)
    assert explained.code == "tls-failed"
    assert "certificate" in explained.message


@pytest.mark.parametrize("query", ["", "?tls-certificates=/nowhere", "?tls-psk-file=/nowhere"])
def test_tunnel_without_its_files_names_the_key(site: Site, query: str) -> None:
    with pytest.raises(ConfigError) as error:
        nbd_tunnel.start(site.folder / "tunnel", endpoint("nbds://127.0.0.1:1" + query))
    assert error.value.code == "tls-files-missing"
    assert "[nbd]" in error.value.hint
    assert not (site.folder / "tunnel").exists()


def test_tunnel_started_again_replaces_the_old_one(site: Site) -> None:
    uri = site.export("psk") + f"?tls-psk-file={site.keys}"
    folder = site.folder / "tunnel"
    nbd_tunnel.start(folder, endpoint(uri))
    (first,) = procs.find_running("nbdkit", str(folder / "pid"))
    path = nbd_tunnel.start(folder, endpoint(uri))
    assert not first.alive()
    assert read_all(path) == (site.folder / "image.raw").read_bytes()


def test_open_export_server_that_wants_tls_names_the_scheme(site: Site) -> None:
    found = endpoint(site.export("psk").replace("nbds://alice@", "nbd://"))
    with pytest.raises(UnavailableError) as error:
        nbd_export.open_export(found.address)
    assert error.value.code == "tls-needed"
    assert "nbds://" in error.value.hint


def test_open_export_tells_sectors_and_mode(site: Site) -> None:
    found = endpoint(site.export("", sector_size=4096))
    opened = nbd_export.open_export(found.address)
    assert opened.block_size_minimum == 4096
    assert opened.flags & nbd_export.CAN_MULTI_CONN
    opened.wire.close()


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 64])
def test_open_export_of_no_nbd_server_is_one_clear_error(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            wire, _ = server.accept()
            with wire:
                wire.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UnavailableError) as error:
            nbd_export.open_export(("127.0.0.1", port), timeout_s=5)
        thread.join()
    assert error.value.code in {"server-gone", "server-failed"}
    assert str(port) in error.value.message


def test_open_export_silent_server_is_given_up(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UnavailableError) as error:
            nbd_export.open_export(("127.0.0.1", port), timeout_s=0.2)
    assert error.value.code == "server-gone"


def test_open_export_unknown_name_is_not_found(site: Site) -> None:
    path = site.folder / "qemu.sock"
    argv = ["qemu-nbd", "-r", "-f", "raw", "-x", "known", "-e", "0", "-t", "-k", str(path)]
    process = run.spawn([*argv, str(site.folder / "image.raw")], stdout=None, stderr=None)
    try:
        while not qemu_nbd.greets(path):
            assert process.poll() is None
            time.sleep(0.005)
        with pytest.raises(NotFoundError):
            nbd_export.open_export(path, "unknown")
    finally:
        run.terminate(process)
