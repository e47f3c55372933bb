"""NBD over TCP with TLS, client addresses and real clients."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import compose, run
from offload.cli.main import run as cli
from offload.errors import ConfigError, OffloadError, UnavailableError, UsageError
from offload.model import Exposure, ExtentKind, Qcow2Source, RawSource, Source
from offload.origin import parse_origin
from offload.services import director, points, store_init
from offload.services import mount as mounts
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.target import Endpoint, ExportRequest
from offload.testing import certificates, malformed_nbd
from offload.testing.certificates import Wanted, issue, make_authority
from offload.testing.instances import make_instance
from offload.testing.networks import Namespace
from offload.testing.target import writable
from targets import handshake, nbdkit, processes
from targets.nbd import NbdTarget

MIB = 1 << 20
SIZE = 4 * MIB
HOLE, ZERO = 1, 2
CERTIFICATES = Exposure(transport="tcp", tls="certificates")
PSK = Exposure(transport="tcp", tls="psk")
PLAIN = Exposure(transport="tcp", tls="off")
# What a client that gets no answer waits for, in seconds. One that is served is greeted at once.
UNANSWERED_S = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Files of a server and of its clients."""

    server: Path
    client: Path
    stranger: Path  # trusts the server, has a certificate of another authority
    nobody: Path  # trusts the server, has no certificate
    mistaken: Path  # trusts another authority
    keys: Path  # of alice
    wrong_keys: Path  # of alice, another key

    @property
    def tables(self) -> dict[str, object]:
        return {"nbd": {"certificates": str(self.server), "psk": str(self.keys)}}

    def uri(self, endpoint: Endpoint, exposure: Exposure) -> str:
        """With what the right client adds."""
        own = {
            "certificates": f"?tls-certificates={self.client}",
            "psk": f"?tls-psk-file={self.keys}",
        }
        return endpoint.uri + own.get(exposure.tls, "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    ours, other = make_authority(), make_authority("other")
    names = ("127.0.0.1", "::1", "192.0.2.10", "2001:db8::10")
    server = issue("server", Wanted(names=names), ours)
    stranger = certificates.write_client(folder / "stranger", other)
    (stranger / "ca-cert.pem").write_bytes(ours.certificate_pem)
    nobody = folder / "nobody"
    nobody.mkdir()
    (nobody / "ca-cert.pem").write_bytes(ours.certificate_pem)
    mistaken = certificates.write_client(folder / "mistaken", ours)
    (mistaken / "ca-cert.pem").write_bytes(other.certificate_pem)
    return Site(
        server=certificates.write_server(folder / "server", ours, server),
        client=certificates.write_client(folder / "client", ours),
        stranger=stranger,
        nobody=nobody,
        mistaken=mistaken,
        keys=certificates.write_keys(folder / "keys.psk", ["alice"]),
        wrong_keys=certificates.write_keys(folder / "wrong.psk", ["alice"]),
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofs-", dir="/tmp"))
    yield made
    left = [ref for path in (made / "views").glob("*") for ref in processes.find_servers(path)]
    for ref in left:
        ref.end()
    shutil.rmtree(made, ignore_errors=True)
    assert left == []


@pytest.fixture
def target(folder: Path, site: Site) -> NbdTarget:
    return NbdTarget(make_instance(folder, site.tables))


@pytest.fixture
def request_(folder: Path) -> ExportRequest:
    """A view of a 4 MiB file: a hole, 1 MiB of data, a hole."""
    path = folder / "image.raw"
    with path.open("xb") as out:
        out.truncate(SIZE)
        out.seek(MIB)
        out.write(os.urandom(MIB))
    return ExportRequest(
        view_id="v1",
        name="one",
        source=RawSource(path=path, size_bytes=SIZE),
        run_dir=folder / "views" / "v1",
        exposure=CERTIFICATES,
    )


@pytest.fixture
def serve(target: NbdTarget) -> Iterator[Callable[[ExportRequest], Endpoint]]:
    made: list[tuple[Path, Endpoint]] = []

    def export(request: ExportRequest) -> Endpoint:
        endpoint = target.export(request)
        made.append((request.run_dir, endpoint))
        return endpoint

    yield export
    for run_dir, endpoint in made:
        target.withdraw(run_dir, endpoint.server)


Serve = Callable[[ExportRequest], Endpoint]


@contextlib.contextmanager
def connect(uri: str) -> Iterator[Any]:
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.set_strict_mode(0)  # the server must refuse, not the library
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    yield handle
    with contextlib.suppress(nbd.Error):  # the server may be gone by now
        handle.shutdown()


def content(request: ExportRequest) -> bytes:
    assert isinstance(request.source, RawSource)
    return request.source.path.read_bytes()


def dial(port: int, source: str, *, timeout_s: float = 5) -> bytes:
    """The first bytes of the server's greeting, to a client with this address."""
    here = ("::1" if ":" in source else "127.0.0.1", port)
    with socket.create_connection(here, timeout_s, source_address=(source, 0)) as wire:
        return wire.recv(8, socket.MSG_WAITALL)


# -- what clients see -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backup_source() -> Iterator[Source]:
    """A backup of the 4 MiB file of the other tests."""
    folder = Path(tempfile.mkdtemp(prefix="ofs-", dir="/tmp"))
    with (folder / "db.raw").open("xb") as out:
        out.truncate(SIZE)
        out.seek(MIB)
        out.write(os.urandom(MIB))
    config = folder / "offload.toml"
    config.write_text(
        f"""
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
pool.min_free = "0%"
volumes.db = {{ provider = "copy", path = "{folder}/db.raw" }}
groups.shop = {{ volumes = ["db"], atomic = "record" }}
stores.main = {{ kind = "disk", path = "{folder}/store", min_free = "0%" }}
"""
    )
    with open_context(config) as ctx:
        store_init.init(ctx, "main")
        made = backup(ctx, "shop", "main").backup.id
        (point,) = points.of_backup(ctx, parse_origin(f"backup:{made}/db"))
    yield point.source
    shutil.rmtree(folder)


@pytest.fixture(params=["raw", "qcow2", "backup"])
def source(request: pytest.FixtureRequest, request_: ExportRequest, folder: Path) -> Source:
    if request.param == "raw":
        return request_.source
    if request.param == "backup":
        found: Source = request.getfixturevalue("backup_source")
        return found
    assert isinstance(request_.source, RawSource)
    inside = folder / "image.qcow2"
    run.run(["qemu-img", "convert", "-O", "qcow2", str(request_.source.path), str(inside)])
    return Qcow2Source(path=inside, size_bytes=SIZE)


@pytest.mark.parametrize("exposure", [PLAIN, CERTIFICATES, PSK], ids=lambda e: e.tls)
def test_view_has_the_extents_and_bytes_of_the_image_and_takes_several_readers(
    serve: Serve, request_: ExportRequest, site: Site, source: Source, exposure: Exposure
) -> None:
    with contextlib.closing(compose.open_image(source)) as image:
        wanted = bytearray(SIZE)
        image.readinto(0, memoryview(wanted))
        extents = [(e.length, e.kind is not ExtentKind.DATA) for e in image.extents(0, SIZE)]
    endpoint = serve(replace(request_, source=source, exposure=exposure))
    with connect(site.uri(endpoint, exposure)) as one, connect(site.uri(endpoint, exposure)) as two:
        assert one.get_tls_negotiated() is (exposure.tls != "off")
        assert one.get_structured_replies_negotiated()
        assert one.can_multi_conn()
        assert one.is_read_only()
        assert bytes(one.pread(SIZE, 0)) == bytes(two.pread(SIZE, 0)) == bytes(wanted)
        assert allocation(two) == merged(extents)
        assert any(is_zero for _, is_zero in extents)


def allocation(handle: Any) -> list[tuple[int, bool]]:
    """`(length, reads as zero)` from the start on, as the server says."""
    found: list[tuple[int, bool]] = []

    def collect(_name: str, _offset: int, flat: list[int], _error: object) -> int:
        pairs = zip(flat[::2], flat[1::2], strict=True)
        found.extend((length, bool(flags & ZERO)) for length, flags in pairs)
        return 0

    while (at := sum(length for length, _ in found)) < SIZE:
        handle.block_status(SIZE - at, at, collect)
    return merged(found)


def merged(extents: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
    runs = groupby(extents, key=lambda extent: extent[1])
    return [(sum(length for length, _ in group), kind) for kind, group in runs]


@pytest.mark.parametrize("exposure", [CERTIFICATES, PSK], ids=lambda e: e.tls)
def test_view_write_to_a_read_only_one_is_refused_by_the_server(
    serve: Serve, request_: ExportRequest, site: Site, exposure: Exposure
) -> None:
    before = content(request_)
    endpoint = serve(replace(request_, exposure=exposure))
    with connect(site.uri(endpoint, exposure)) as other:
        with pytest.raises(nbd.Error), connect(site.uri(endpoint, exposure)) as client:
            client.pwrite(b"x" * 512, 0)
        assert bytes(other.pread(512, 0)) == before[:512]
    assert content(request_) == before


def test_view_writable_shows_each_client_what_another_has_written(
    serve: Serve, request_: ExportRequest, site: Site
) -> None:
    """What NBD_FLAG_CAN_MULTI_CONN promises: a flush on one connection counts for all."""
    endpoint = serve(writable(request_))
    uri = site.uri(endpoint, CERTIFICATES)
    with connect(uri) as one, connect(uri) as two:
        assert not one.is_read_only()
        assert one.can_multi_conn()
        assert bytes(two.pread(4096, 0)) == bytes(4096)
        one.pwrite(b"w" * 4096, 0)
        two.flush()
        assert bytes(two.pread(4096, 0)) == b"w" * 4096


# -- clients that are not ours ----------------------------------------------------------------


def qemu_options(
    site: Site, endpoint: Endpoint, exposure: Exposure, host: str = "127.0.0.1"
) -> tuple[str, str]:
    """The object with the credentials, and the image, as QEMU's programs want them."""
    if exposure.tls == "psk":
        folder = site.keys.parent
        secret = f"tls-creds-psk,id=tls0,endpoint=client,dir={folder},username=alice"
    else:
        secret = f"tls-creds-x509,id=tls0,endpoint=client,dir={site.client}"
    port = endpoint.server["port"]
    return secret, f"driver=nbd,host={host},port={port},tls-creds=tls0"


@pytest.mark.parametrize("exposure", [CERTIFICATES, PSK], ids=lambda e: e.tls)
def test_clients_of_other_projects_read_the_view(
    serve: Serve, request_: ExportRequest, site: Site, folder: Path, exposure: Exposure
) -> None:
    endpoint = serve(replace(request_, exposure=exposure))
    uri = site.uri(endpoint, exposure)
    told = json.loads(run.run(["nbdinfo", "--json", uri]).stdout)
    assert told["TLS"] is True
    assert told["exports"][0]["is_read_only"] is True
    assert told["exports"][0]["export-size"] == SIZE
    copy = folder / "copy.raw"
    run.run(["nbdcopy", uri, str(copy)])
    assert copy.read_bytes() == content(request_)
    secret, image = qemu_options(site, endpoint, exposure)
    converted = folder / "converted.raw"
    run.run(
        ["qemu-img", "convert", "--object", secret, "--image-opts", image, "-O", "raw",
         str(converted)]
    )  # fmt: skip
    assert converted.read_bytes() == content(request_)
    listed = run.run(
        ["qemu-nbd", "--list", "--bind=127.0.0.1", f"--port={endpoint.server['port']}",
         "--object", secret, "--tls-creds=tls0"]
    )  # fmt: skip
    assert str(SIZE) in listed.stdout


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    exposure: Exposure
    uri: Callable[[Site, str], str]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Refused(exposure=CERTIFICATES, uri=lambda _, uri: uri.replace("nbds:", "nbd:")),
            id="certificates-plain",
        ),
        pytest.param(
            Refused(exposure=PSK, uri=lambda _, uri: uri.replace("nbds:", "nbd:")), id="psk-plain"
        ),
        pytest.param(
            Refused(exposure=CERTIFICATES, uri=lambda s, uri: f"{uri}?tls-certificates={s.nobody}"),
            id="no-certificate",
        ),
        pytest.param(
            Refused(
                exposure=CERTIFICATES, uri=lambda s, uri: f"{uri}?tls-certificates={s.stranger}"
            ),
            id="certificate-of-another-authority",
        ),
        pytest.param(
            Refused(
                exposure=CERTIFICATES, uri=lambda s, uri: f"{uri}?tls-certificates={s.mistaken}"
            ),
            id="client-that-trusts-another-authority",
        ),
        pytest.param(
            Refused(exposure=CERTIFICATES, uri=lambda s, uri: f"{uri}?tls-psk-file={s.keys}"),
            id="key-in-place-of-a-certificate",
        ),
        pytest.param(
            Refused(exposure=PSK, uri=lambda s, uri: f"{uri}?tls-psk-file={s.wrong_keys}"),
            id="wrong-key",
        ),
        pytest.param(
            Refused(
                exposure=PSK,
                uri=lambda s, uri: uri.replace("alice", "bob") + f"?tls-psk-file={s.keys}",
            ),
            id="unknown-user",
        ),
        pytest.param(
            Refused(exposure=PSK, uri=lambda s, uri: f"{uri}?tls-certificates={s.client}"),
            id="certificate-in-place-of-a-key",
        ),
    ],
)
def test_client_without_the_right_credentials_is_refused_and_others_are_served(
    serve: Serve, request_: ExportRequest, site: Site, case: Refused
) -> None:
    endpoint = serve(replace(request_, exposure=case.exposure))
    with pytest.raises(nbd.Error), connect(case.uri(site, endpoint.uri)) as client:
        client.pread(512, 0)
    with connect(site.uri(endpoint, case.exposure)) as client:
        assert bytes(client.pread(512, MIB)) == content(request_)[MIB : MIB + 512]


def test_client_without_a_certificate_is_served_where_clients_are_not_verified(
    folder: Path, site: Site, request_: ExportRequest
) -> None:
    tables = {"nbd": {"certificates": str(site.server), "verify_clients": False}}
    target = NbdTarget(make_instance(folder, tables))
    endpoint = target.export(request_)
    with connect(f"{endpoint.uri}?tls-certificates={site.nobody}") as client:
        assert len(client.pread(512, 0)) == 512
    target.withdraw(request_.run_dir, endpoint.server)


# -- client addresses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "served", "refused"),
    [
        (("127.0.0.2",), ("127.0.0.2",), ("127.0.0.1", "127.0.0.3")),
        (("127.0.0.0/30", "127.1.0.0/16"), ("127.0.0.3", "127.1.2.3"), ("127.0.0.4", "127.2.0.0")),
        (("127.0.0.4/31", "::1", "10.0.0.0/8"), ("127.0.0.5",), ("127.0.0.6",)),
        (("0.0.0.0/0",), ("127.0.0.1", "127.9.9.9"), ()),
        ((), ("127.0.0.1", "127.9.9.9"), ()),
    ],
)
def test_allow_serves_the_named_addresses_and_gives_others_no_answer(
    serve: Serve,
    request_: ExportRequest,
    allow: tuple[str, ...],
    served: tuple[str, ...],
    refused: tuple[str, ...],
) -> None:
    endpoint = serve(replace(request_, exposure=replace(PLAIN, allow=allow)))
    port = int(endpoint.server["port"])
    for source in served:
        assert dial(port, source) == b"NBDMAGIC"
    for source in refused:
        with pytest.raises(TimeoutError):
            dial(port, source, timeout_s=UNANSWERED_S)


@pytest.mark.parametrize(
    "allow", [("::1",), ("::/0",), ("fd00::/8", "::/127", "2001:db8::/33", "127.0.0.1")]
)
def test_allow_knows_ipv6(serve: Serve, request_: ExportRequest, allow: tuple[str, ...]) -> None:
    endpoint = serve(replace(request_, exposure=replace(PLAIN, address="::1", allow=allow)))
    assert dial(int(endpoint.server["port"]), "::1") == b"NBDMAGIC"


@pytest.mark.parametrize(
    ("address", "allow"),
    [
        ("127.0.0.1", ("10.0.0.0/8", "::1")),
        ("::1", ("::2", "fd00::/8", "127.0.0.1")),
        ("127.0.0.1", ("::1",)),
    ],
)
def test_allow_of_nobody_who_could_connect_is_refused(
    target: NbdTarget, address: str, allow: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        target.check(replace(PLAIN, address=address, allow=allow))
    assert caught.value.code == "allow-for-no-one"
    assert address in caught.value.hint


def test_allow_of_the_configuration_counts_where_none_is_asked_for(
    folder: Path, request_: ExportRequest
) -> None:
    target = NbdTarget(make_instance(folder, {"nbd": {"allow": ["127.0.0.2"]}}))
    assert target.check(Exposure(transport="tcp")).allow == ("127.0.0.2",)
    asked = Exposure(transport="tcp", allow=("127.0.0.8/29",))
    assert target.check(asked).allow == ("127.0.0.8/29",)
    assert target.check(Exposure()).allow == ()


def test_allow_of_many_networks_is_kept_or_refused_never_ignored(
    serve: Serve, request_: ExportRequest
) -> None:
    many = tuple(f"127.{n}.0.2" for n in range(1, 101))
    endpoint = serve(replace(request_, exposure=replace(PLAIN, allow=many)))
    port = int(endpoint.server["port"])
    assert dial(port, "127.100.0.2") == b"NBDMAGIC"
    with pytest.raises(TimeoutError):
        dial(port, "127.101.0.2", timeout_s=UNANSWERED_S)
    too_many = tuple(f"127.{n >> 8}.{n & 255}.2" for n in range(4096))
    with pytest.raises(UsageError) as caught:
        serve(replace(request_, view_id="v2", exposure=replace(PLAIN, allow=too_many)))
    assert caught.value.code == "too-many-networks"


# -- a network of our own ---------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def remote(proxy: Namespace) -> Iterator[Namespace]:
    """Another machine, with several addresses, at the other end of a cable."""
    made = Namespace()
    proxy.connect(
        made,
        ["192.0.2.10/24", "2001:db8::10/64"],
        ["192.0.2.20/24", "192.0.2.21/24", "192.0.2.22/24", "2001:db8::20/64", "2001:db8::1:20/64"],
    )
    yield made
    made.close()


@pytest.fixture
def network_view(
    target: NbdTarget, request_: ExportRequest, proxy: Namespace
) -> Iterator[Callable[[Exposure], int]]:
    """Serves one view on the proxy and tells its port."""
    made: list[Endpoint] = []

    def export(exposure: Exposure) -> int:
        with proxy.entered():
            made.append(target.export(replace(request_, exposure=exposure)))
        return int(made[0].server["port"])

    yield export
    for endpoint in made:
        target.withdraw(request_.run_dir, endpoint.server)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A view outside loopback: its URI up to the port, and the address that clients use."""

    exposure: Exposure
    shown: str
    host: str = "192.0.2.10"


@pytest.fixture(
    params=[
        Reached(exposure=replace(CERTIFICATES, address="192.0.2.10"), shown="nbds://192.0.2.10"),
        Reached(exposure=replace(PSK, address="192.0.2.10"), shown="nbds://alice@192.0.2.10"),
        Reached(exposure=replace(PSK, address="0.0.0.0"), shown="nbds://alice@0.0.0.0"),  # noqa: S104
        Reached(
            exposure=replace(CERTIFICATES, address="2001:db8::10"),
            shown="nbds://[2001:db8::10]",
            host="2001:db8::10",
        ),
        Reached(
            exposure=replace(PSK, address="::"), shown="nbds://alice@[::]", host="2001:db8::10"
        ),
    ],
    ids=lambda case: case.shown,
)
def reached(request: pytest.FixtureRequest) -> Reached:
    found: Reached = request.param
    return found


@pytest.fixture
def over_network(
    target: NbdTarget, request_: ExportRequest, proxy: Namespace, reached: Reached
) -> Iterator[Endpoint]:
    with proxy.entered():
        endpoint = target.export(replace(request_, exposure=reached.exposure))
    yield endpoint
    target.withdraw(request_.run_dir, endpoint.server)


@pytest.mark.needs_root
def test_network_view_is_read_by_another_machine(
    remote: Namespace, over_network: Endpoint, reached: Reached, request_: ExportRequest, site: Site
) -> None:
    assert over_network.uri == f"{reached.shown}:{over_network.server['port']}"
    copy = request_.run_dir.parent.parent / "copy.raw"
    secret, image = qemu_options(site, over_network, reached.exposure, host=reached.host)
    with remote.entered():
        run.run(
            ["qemu-img", "convert", "--object", secret, "--image-opts", image, "-O", "raw",
             str(copy)]
        )  # fmt: skip
        assert copy.read_bytes() == content(request_)
        # the libnbd of Debian 12 sends an IPv6 address as a server name, which GnuTLS refuses
        if ":" not in reached.host:
            shown = site.uri(over_network, reached.exposure)
            run.run(["nbdcopy", shown.replace("0.0.0.0", reached.host), str(copy)])  # noqa: S104
            assert copy.read_bytes() == content(request_)


@pytest.mark.needs_root
def test_network_client_is_shown_with_its_address(
    remote: Namespace,
    over_network: Endpoint,
    reached: Reached,
    request_: ExportRequest,
    target: NbdTarget,
) -> None:
    there = (reached.host, int(over_network.server["port"]))
    with remote.entered(), socket.create_connection(there, 5) as wire:
        assert wire.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        (client,) = target.clients(request_.run_dir, over_network.server)
        port = wire.getsockname()[1]
        here = wire.getsockname()[0]
    assert client.address in {f"{here}:{port}", f"[{here}]:{port}"}


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("address", "allow", "sources"),
    [
        ("192.0.2.10", "192.0.2.21", ("192.0.2.21", "192.0.2.20")),
        ("0.0.0.0", "192.0.2.20/31", ("192.0.2.21", "192.0.2.22")),  # noqa: S104
        ("2001:db8::10", "2001:db8::20", ("2001:db8::20", "2001:db8::1:20")),
        ("::", "2001:db8::/112", ("2001:db8::20", "2001:db8::1:20")),
    ],
)
def test_network_allow_serves_the_named_machine_alone(
    network_view: Callable[[Exposure], int],
    remote: Namespace,
    address: str,
    allow: str,
    sources: tuple[str, str],
) -> None:
    served, refused = sources
    port = network_view(replace(CERTIFICATES, address=address, allow=(allow,)))
    there = ("2001:db8::10" if ":" in address else "192.0.2.10", port)
    with remote.entered():
        with socket.create_connection(there, 5, source_address=(served, 0)) as wire:
            assert wire.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        with pytest.raises(TimeoutError):
            socket.create_connection(there, UNANSWERED_S, source_address=(refused, 0))


@pytest.mark.needs_root
def test_network_cut_in_the_middle_of_a_read_withdraw_does_not_wait(
    target: NbdTarget, request_: ExportRequest, site: Site, proxy: Namespace, remote: Namespace
) -> None:
    with proxy.entered():
        endpoint = target.export(replace(request_, exposure=replace(PSK, address="192.0.2.10")))
    with remote.entered():
        reader = run.spawn(["nbdcopy", site.uri(endpoint, PSK), "-"])  # nobody reads its output
    try:
        _wait(lambda: bool(target.clients(request_.run_dir, endpoint.server)))
        proxy.cut()
        began = time.monotonic()
        target.withdraw(request_.run_dir, endpoint.server)
        assert time.monotonic() - began < 5
        assert not target.alive(request_.run_dir, endpoint.server)
    finally:
        run.terminate(reader, grace_s=0.1)


# -- clients that go without a word -----------------------------------------------------------


@pytest.mark.parametrize("exposure", [CERTIFICATES, PSK], ids=lambda e: e.tls)
def test_client_stopped_in_the_middle_of_a_read_withdraw_does_not_wait(
    target: NbdTarget, request_: ExportRequest, site: Site, exposure: Exposure
) -> None:
    endpoint = target.export(replace(request_, exposure=exposure))
    reader = run.spawn(["nbdcopy", site.uri(endpoint, exposure), "-"])
    try:
        _wait(lambda: bool(target.clients(request_.run_dir, endpoint.server)))
        os.kill(reader.pid, signal.SIGSTOP)
        began = time.monotonic()
        target.withdraw(request_.run_dir, endpoint.server)
        assert time.monotonic() - began < 5
        assert not request_.run_dir.exists()
    finally:
        os.kill(reader.pid, signal.SIGKILL)
        run.terminate(reader)


@pytest.mark.parametrize("exposure", [CERTIFICATES, PSK], ids=lambda e: e.tls)
def test_client_killed_or_reset_others_read_on_and_it_is_forgotten(
    serve: Serve, target: NbdTarget, request_: ExportRequest, site: Site, exposure: Exposure
) -> None:
    endpoint = serve(replace(request_, exposure=exposure))
    here = ("127.0.0.1", int(endpoint.server["port"]))
    with connect(site.uri(endpoint, exposure)) as other:
        for _ in range(5):
            reader = run.spawn(["nbdcopy", site.uri(endpoint, exposure), "-"])
            _wait(lambda: len(target.clients(request_.run_dir, endpoint.server)) > 1)
            reader.kill()
            run.terminate(reader)
            with socket.create_connection(here) as wire:
                assert wire.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
                # close with a reset instead of an end: socket(7), SO_LINGER
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert bytes(other.pread(512, MIB)) == content(request_)[MIB : MIB + 512]
        _wait(lambda: len(target.clients(request_.run_dir, endpoint.server)) == 1)
    assert target.alive(request_.run_dir, endpoint.server)


def test_client_that_sends_garbage_others_read_on(
    serve: Serve, request_: ExportRequest, site: Site
) -> None:
    """In place of the NBD handshake, and in place of the TLS one."""
    endpoint = serve(request_)
    here = ("127.0.0.1", int(endpoint.server["port"]))
    chance = random.Random(7)
    with connect(site.uri(endpoint, CERTIFICATES)) as other:
        for seed in range(14):
            malformed_nbd.send(lambda: socket.create_connection(here, 5), seed)
            with socket.create_connection(here, 5) as wire:
                wire.recv(18, socket.MSG_WAITALL)
                wire.sendall(struct.pack(">I", 3) + malformed_nbd.option(5, b""))
                assert len(wire.recv(20, socket.MSG_WAITALL)) == 20
                wire.sendall(chance.randbytes(chance.randint(1, 4096)))
            assert bytes(other.pread(512, MIB)) == content(request_)[MIB : MIB + 512]


def test_client_on_a_unix_socket_is_known_by_its_process(
    serve: Serve, target: NbdTarget, request_: ExportRequest
) -> None:
    endpoint = serve(replace(request_, exposure=Exposure()))
    reader = run.spawn(["nbdcopy", "--connections=1", endpoint.uri, "-"])
    try:
        _wait(lambda: bool(target.clients(request_.run_dir, endpoint.server)))
        (client,) = target.clients(request_.run_dir, endpoint.server)
        assert (client.address, client.name, client.pid) == ("unix", "nbdcopy", reader.pid)
    finally:
        run.terminate(reader)


def test_client_that_vanished_without_a_word_is_asked_for_after_a_minute(
    serve: Serve, request_: ExportRequest
) -> None:
    """The kernel's own timer of the server's side: /proc/net/tcp, column `tr`, 02 is keepalive."""
    endpoint = serve(replace(request_, exposure=PLAIN))
    port = int(endpoint.server["port"])
    with connect(endpoint.uri) as client:
        client.pread(512, 0)
        _wait(lambda: timers(port) == ["02"])  # as soon as the answer has been acknowledged


def timers(port: int) -> list[str]:
    """Of the connections to a port of 127.0.0.1."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = f"0100007F:{port:04X}"
    return [c[5].partition(":")[0] for c in lines if c[1] == ours and c[3] == "01"]


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (Exposure(transport="tcp", address="192.0.2.77"), "not-loopback"),
        (Exposure(transport="tcp", address="0.0.0.0"), "not-loopback"),  # noqa: S104
        (Exposure(transport="tcp", address="backup.example"), "bad-address"),
        (Exposure(transport="tcp", allow=("10.0.0.1/8",)), "bad-network"),
        (Exposure(transport="tcp", allow=("host.example",)), "bad-network"),
        (Exposure(transport="tcp", port=70000), "bad-port"),
        (Exposure(transport="tcp", tls="yes"), "bad-tls"),
        (Exposure(tls="psk"), "tcp-only"),
        (Exposure(allow=("127.0.0.1",)), "tcp-only"),
        (Exposure(address="127.0.0.1"), "tcp-only"),
        (Exposure(initiators=("iqn.2004-10.com.example:host",)), "iscsi-only"),
    ],
)
def test_exposure_that_makes_no_sense_is_refused_with_a_way_out(
    target: NbdTarget, asked: Exposure, code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        target.check(asked)
    assert caught.value.code == code
    assert caught.value.hint or code == "bad-port"


def test_exposure_to_an_address_of_another_machine_is_refused(target: NbdTarget) -> None:
    with pytest.raises(UnavailableError) as caught:
        target.check(replace(CERTIFICATES, address="198.51.100.77"))
    assert caught.value.code == "bad-address"
    assert "198.51.100.77" in caught.value.message


def test_exposure_outside_loopback_of_unverified_unnamed_clients_is_refused(
    folder: Path, site: Site
) -> None:
    tables = {"nbd": {"certificates": str(site.server), "verify_clients": False}}
    target = NbdTarget(make_instance(folder, tables))
    with pytest.raises(ConfigError) as caught:
        target.check(replace(CERTIFICATES, address="0.0.0.0"))  # noqa: S104
    assert caught.value.code == "clients-unchecked"
    assert "verify_clients" in caught.value.hint
    target.check(replace(CERTIFICATES, address="0.0.0.0", allow=("192.0.2.20",)))  # noqa: S104


def test_server_with_another_certificate_is_not_taken_for_ours(
    target: NbdTarget, request_: ExportRequest, site: Site, folder: Path
) -> None:
    authority = make_authority()
    other = certificates.write_server(folder / "other", authority)
    server = run.spawn(
        ["nbdkit", "-f", "-U", str(folder / "s"), "--tls=require", f"--tls-certificates={other}",
         "null", "1M"]
    )  # fmt: skip
    try:
        _wait((folder / "s").exists)
        tls = target._tls(CERTIFICATES)
        with pytest.raises(UnavailableError, match="another certificate"):
            _asked(folder / "s", tls)
        with pytest.raises(UnavailableError, match="TLS"):
            _asked(folder / "s", target._tls(PSK))
    finally:
        run.terminate(server)


def test_server_that_would_serve_without_tls_is_not_taken_for_ours(
    target: NbdTarget, folder: Path
) -> None:
    server = run.spawn(["nbdkit", "-f", "-U", str(folder / "s"), "null", "1M"])
    try:
        _wait((folder / "s").exists)
        with pytest.raises(UnavailableError, match="without TLS"):
            _asked(folder / "s", target._tls(PSK))
    finally:
        run.terminate(server)


def _asked(path: Path, tls: Any) -> handshake.Export:
    return handshake.ask(str(path), tls=tls, timeout_s=60)


def test_server_that_refuses_our_tls_is_ended_and_its_words_are_told(
    target: NbdTarget, request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not when the time for its start is over."""
    real = NbdTarget._tls

    def loaded(self: NbdTarget, exposure: Exposure) -> Any:
        found: Any = real(self, exposure)
        return replace(found, server=b"another")

    monkeypatch.setattr(NbdTarget, "_tls", loaded)
    began = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        target.export(request_)
    assert "another certificate" in caught.value.message
    assert time.monotonic() - began < nbdkit._READY_S / 2
    assert not request_.run_dir.exists()


# -- secrets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exposure", [CERTIFICATES, PSK], ids=lambda e: e.tls)
def test_secrets_are_in_no_command_line_log_or_record(
    serve: Serve, request_: ExportRequest, site: Site, exposure: Exposure
) -> None:
    endpoint = serve(replace(request_, exposure=exposure))
    with pytest.raises(nbd.Error), connect(endpoint.uri):
        pass  # whose refusal is logged
    pid = endpoint.server["pid"]
    shown = [
        Path(f"/proc/{pid}/cmdline").read_bytes().decode(),
        Path(f"/proc/{pid}/environ").read_bytes().decode(),
        *(path.read_text() for path in request_.run_dir.iterdir()),
        endpoint.uri,
        *endpoint.server.values(),
    ]
    key = site.keys.read_text().strip().partition(":")[2]
    pem = (site.server / "server-key.pem").read_text().splitlines()[1]
    assert not any(key in text or pem in text for text in shown)


def test_uri_names_the_user_of_a_key_only_where_there_is_one(
    folder: Path, request_: ExportRequest
) -> None:
    keys = certificates.write_keys(folder / "keys.psk", ["alice-1", "b@b"])
    target = NbdTarget(make_instance(folder, {"nbd": {"tls": "psk", "psk": str(keys)}}))
    endpoint = target.export(replace(request_, exposure=Exposure(transport="tcp")))
    assert endpoint.uri == f"nbds://127.0.0.1:{endpoint.server['port']}"
    target.withdraw(request_.run_dir, endpoint.server)
    lines = keys.read_text().splitlines()
    for line, start in zip(lines, ("nbds://alice-1@127.0.0.1:", "nbds://127.0.0.1:"), strict=True):
        keys.write_text(line + "\n")
        endpoint = target.export(replace(request_, exposure=Exposure(transport="tcp")))
        assert endpoint.uri.startswith(start)
        uri = endpoint.uri.replace("nbds://127", "nbds://b%40b@127")
        with connect(f"{uri}?tls-psk-file={keys}") as client:
            assert len(client.pread(512, 0)) == 512
        target.withdraw(request_.run_dir, endpoint.server)


def test_plain_view_is_served_without_what_tls_needs(request_: ExportRequest, folder: Path) -> None:
    """Imports are most of the time that a mount takes."""
    assert isinstance(request_.source, RawSource)
    script = f"""
import sys
from pathlib import Path
from offload.model import Exposure, RawSource
from offload.target import ExportRequest
from offload.testing.instances import make_instance
from targets.nbd import NbdTarget
source = RawSource(path=Path({str(request_.source.path)!r}), size_bytes={SIZE})
folder = Path({str(request_.run_dir)!r})
target = NbdTarget(make_instance(folder.parents[1]))
exposure = target.check(Exposure(transport="tcp"))
request = ExportRequest(
    view_id="v1", name="one", source=source, run_dir=folder, exposure=exposure
)
target.withdraw(folder, target.export(request).server)
print(*sys.modules)
"""
    loaded = set(run.run([sys.executable, "-c", script]).stdout.split())
    assert "targets.nbdkit" in loaded
    assert not loaded & {"cryptography", "nbd"}


# -- mount and its like -----------------------------------------------------------------------


@pytest.fixture
def ctx(folder: Path, site: Site) -> Iterator[Context]:
    with (folder / "db.raw").open("xb") as out:
        out.write(b"db" * MIB)
    server = shutil.copytree(site.server, folder / "tls")
    config = folder / "offload.toml"
    config.write_text(
        f"""
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
pool.min_free = "0%"
volumes.db = {{ provider = "copy", path = "{folder}/db.raw" }}
groups.shop = {{ volumes = ["db"], atomic = "record" }}
nbd = {{ tls = "certificates", certificates = "{server}" }}
"""
    )
    with open_context(config) as made:
        yield made
        mounts.unmount(made, [], all_views=True, force=True)


OVER_TCP = MountOptions(exposure=Exposure(transport="tcp"))


def _expire(folder: Path) -> None:
    authority = make_authority()
    server = issue("server", Wanted(days=(-9, -1)), authority)
    certificates.write_server(folder / "tls", authority, server)


def test_mount_with_an_expired_certificate_takes_no_timemark(ctx: Context, folder: Path) -> None:
    _expire(folder)
    with pytest.raises(ConfigError) as caught:
        mounts.mount(ctx, ["shop"], OVER_TCP)
    assert caught.value.code == "certificate-expired"
    assert ctx.catalog.timemarks() == []
    assert ctx.catalog.views() == []


def test_mount_over_unix_needs_no_certificate(ctx: Context, folder: Path) -> None:
    _expire(folder)
    (view,) = mounts.mount(ctx, ["shop"])
    assert view.uri.startswith("nbd+unix:")


def test_remount_after_kill_serves_with_tls_at_the_same_port(
    ctx: Context, site: Site, folder: Path
) -> None:
    (view,) = mounts.mount(ctx, ["shop"], OVER_TCP)
    uri = f"{view.uri}?tls-certificates={site.client}"
    with connect(uri) as client:
        assert bytes(client.pread(2, 0)) == b"db"
        os.kill(int(view.server["pid"]), signal.SIGKILL)
        _wait(lambda: not mounts.views(ctx)[0].alive)
        done = mounts.remount(ctx)  # while the first connection still lingers
        assert (done.warnings, [v.uri for v in done.views]) == ((), [view.uri])
        with pytest.raises(nbd.Error):
            client.pread(2, 0)
    with connect(uri) as client:
        assert bytes(client.pread(2, 0)) == b"db"
    (again,) = ctx.catalog.views()
    assert (again.exposure.tls, again.exposure.address) == ("certificates", "127.0.0.1")


def test_remount_with_an_expired_certificate_warns_and_keeps_the_view(
    ctx: Context, folder: Path
) -> None:
    (view,) = mounts.mount(ctx, ["shop"], OVER_TCP)
    os.kill(int(view.server["pid"]), signal.SIGKILL)
    _wait(lambda: not mounts.views(ctx)[0].alive)
    _expire(folder)
    (warning,) = mounts.remount(ctx).warnings
    assert view.name in warning
    assert "valid only until" in warning
    assert [v.id for v in ctx.catalog.views()] == [view.id]


def test_unmount_names_the_client_and_with_force_leaves_nothing(ctx: Context, site: Site) -> None:
    (view,) = mounts.mount(ctx, ["shop"], OVER_TCP)
    with connect(f"{view.uri}?tls-certificates={site.client}"):
        (status,) = mounts.views(ctx)
        (client,) = status.clients
        with pytest.raises(OffloadError) as caught:
            mounts.unmount(ctx, [view.name])
        assert client.address in caught.value.message
        assert client.address.startswith("127.0.0.1:")
        mounts.unmount(ctx, [view.name], force=True)
    assert ctx.catalog.views() == []
    assert ctx.catalog.timemarks() == []


def test_views_for_people_shows_who_is_connected(
    ctx: Context, site: Site, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = director.create(ctx, "shop")
    (one,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"], OVER_TCP)
    (two,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    config = ["--config", str(folder / "offload.toml")]
    with connect(f"{one.uri}?tls-certificates={site.client}"), connect(two.uri), connect(two.uri):
        assert cli(["--json", *config, "views"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert cli([*config, "views"]) == 0
        table = " ".join(capsys.readouterr().out.split())
    ((remote,), local) = (view["clients"] for view in shown)
    assert remote["address"].startswith("127.0.0.1:")
    assert [client["pid"] for client in local] == [os.getpid()] * 2
    assert f"read-only, 1 client: {remote['address']}" in table
    assert f"read-only, 2 clients: {local[0]['name']} at process {os.getpid()} " in table


def test_sixty_four_views_over_tls_at_once_all_read(ctx: Context, site: Site) -> None:
    mark = director.create(ctx, "shop")
    made = [mounts.mount(ctx, [f"timemark:{mark.id}/db"], OVER_TCP)[0] for _ in range(64)]
    assert len({view.uri for view in made}) == 64
    with contextlib.ExitStack() as held:
        clients = [
            held.enter_context(connect(f"{view.uri}?tls-certificates={site.client}"))
            for view in made
        ]
        assert all(bytes(client.pread(4, MIB)) == b"dbdb" for client in clients)
        ours = [own_address(client) for client in clients]
        shown = [[client.address for client in status.clients] for status in mounts.views(ctx)]
        # whatever else connects to free ports of this machine does not count
        assert [[a for a in addresses if a in ours] for addresses in shown] == [[a] for a in ours]


def own_address(client: Any) -> str:
    with socket.socket(fileno=os.dup(client.aio_get_fd())) as wire:
        host, port = wire.getsockname()
    return f"{host}:{port}"


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
