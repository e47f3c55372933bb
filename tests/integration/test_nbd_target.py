"""The nbd target on real servers: what the contract suite does not ask of every target."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import procs, run
from offload.errors import (
    BusyError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    UnavailableError,
    UsageError,
)
from offload.model import BackupSource, Exposure, NbdSource, Qcow2Source, RawSource
from offload.target import Endpoint, ExportRequest
from offload.testing.instances import make_instance
from offload.testing.target import writable
from targets import command, handshake, processes
from targets.nbd import NbdTarget

MIB = 1 << 20
HOLE, ZERO = 1, 2


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofn-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def target(folder: Path) -> NbdTarget:
    return NbdTarget(make_instance(folder))


@pytest.fixture
def request_(folder: Path) -> ExportRequest:
    """A view of a 4 MiB file: a hole, 1 MiB of data, a hole."""
    path = folder / "image.raw"
    with path.open("xb") as out:
        out.truncate(4 * MIB)
        out.seek(MIB)
        out.write(os.urandom(MIB))
    return ExportRequest(
        view_id="v1",
        name="one",
        source=RawSource(path=path, size_bytes=4 * MIB),
        run_dir=folder / "views" / "v1",
        exposure=Exposure(),
    )


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source is served by our own plugin, as a backup is."""
    monkeypatch.setattr(command, "_plugin", command._composed)


@pytest.fixture(autouse=True)
def no_leftovers(folder: Path) -> Iterator[None]:
    """Whatever a test does, no server of its folder may be left, and no folder of a view."""
    yield
    left = [ref for path in _run_dirs(folder) for ref in processes.find_servers(path)]
    for ref in left:
        ref.end()
    assert left == []
    assert _run_dirs(folder) == []


def _run_dirs(folder: Path) -> list[Path]:
    return sorted((folder / "views").glob("*"))


def connect(uri: str) -> Any:
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    return closing(_Handle(handle))


class _Handle:
    def __init__(self, handle: Any) -> None:
        self.nbd = handle

    def close(self) -> None:
        self.nbd.shutdown()


@pytest.fixture
def serve(target: NbdTarget) -> Iterator[Any]:
    made: list[tuple[Path, Endpoint]] = []

    def export(request: ExportRequest) -> Endpoint:
        endpoint = target.export(request)
        made.append((request.run_dir, endpoint))
        return endpoint

    yield export
    for run_dir, endpoint in made:
        target.withdraw(run_dir, endpoint.server)


def allocation(handle: Any, length: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def collect(_name: str, _offset: int, flat: list[int], _error: object) -> int:
        found.extend(zip(flat[::2], flat[1::2], strict=True))
        return 0

    handle.block_status(length, 0, collect)
    return found


# -- what clients see -------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ["compiled", "composed"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_view_shows_sector_size_holes_and_multi_conn(
    request: pytest.FixtureRequest, serve: Any, request_: ExportRequest, plugin: str, sector: int
) -> None:
    if plugin == "composed":
        request.getfixturevalue("composed")
    source = replace(request_.source, sector_size=sector)
    endpoint = serve(replace(request_, source=source))
    with connect(endpoint.uri) as client:
        assert client.nbd.get_size() == 4 * MIB
        assert client.nbd.get_block_size(nbd.SIZE_MINIMUM) == sector
        assert client.nbd.is_read_only()
        assert client.nbd.can_multi_conn()
        assert allocation(client.nbd, 4 * MIB) == [
            (MIB, HOLE | ZERO),
            (MIB, 0),
            (2 * MIB, HOLE | ZERO),
        ]


def test_composed_view_reads_in_parallel_what_the_image_holds(
    composed: None, serve: Any, request_: ExportRequest
) -> None:
    assert isinstance(request_.source, RawSource)
    content = request_.source.path.read_bytes()
    endpoint = serve(request_)
    with connect(endpoint.uri) as client:
        buffers = [nbd.Buffer(65536) for _ in range(64)]
        cookies = [client.nbd.aio_pread(b, n * 65536) for n, b in enumerate(buffers)]
        for cookie in cookies:
            while not client.nbd.aio_command_completed(cookie):
                client.nbd.poll(1000)
        assert b"".join(bytes(b.to_bytearray()) for b in buffers) == content
        assert bytes(client.nbd.pread(1000, MIB + 77)) == content[MIB + 77 : MIB + 1077]


def test_composed_view_medium_fails_client_gets_an_error_not_other_data(
    composed: None, serve: Any, request_: ExportRequest
) -> None:
    assert isinstance(request_.source, RawSource)
    endpoint = serve(request_)
    with connect(endpoint.uri) as client:
        os.truncate(request_.source.path, MIB)
        with pytest.raises(nbd.Error) as caught:
            client.nbd.pread(512, 2 * MIB)
        assert caught.value.errno == "EIO"
        assert len(client.nbd.pread(512, 0)) == 512


def test_composed_view_writable_takes_writes(
    composed: None, serve: Any, request_: ExportRequest
) -> None:
    endpoint = serve(writable(request_))
    with connect(endpoint.uri) as client:
        client.nbd.pwrite(b"w" * 512, 0)
        assert bytes(client.nbd.pread(512, 0)) == b"w" * 512


def test_composed_view_starts_fast_and_without_heavy_libraries(
    composed: None, serve: Any, request_: ExportRequest
) -> None:
    endpoint = serve(request_)
    mapped = Path(f"/proc/{endpoint.server['pid']}/maps").read_text()
    for heavy in ("numpy", "pydantic", "sqlalchemy", "libnbd"):
        assert heavy not in mapped


def test_qcow2_view_reads_the_disk_inside(
    serve: Any, target: NbdTarget, request_: ExportRequest, folder: Path
) -> None:
    assert isinstance(request_.source, RawSource)
    inside = folder / "image.qcow2"
    run.run(["qemu-img", "convert", "-O", "qcow2", str(request_.source.path), str(inside)])
    source = Qcow2Source(path=inside, size_bytes=4 * MIB, sector_size=4096)
    request = writable(replace(request_, source=source))
    endpoint = serve(request)
    with connect(endpoint.uri) as client:
        assert client.nbd.get_block_size(nbd.SIZE_MINIMUM) == 4096
        assert bytes(client.nbd.pread(2 * MIB, 0)) == request_.source.path.read_bytes()[: 2 * MIB]
        client.nbd.pwrite(b"w" * 4096, 0)
    os.kill(int(endpoint.server["backing_base_pid"]), signal.SIGKILL)
    backend = procs.ProcessRef(
        pid=int(endpoint.server["backing_base_pid"]),
        start=endpoint.server["backing_base_start"],
        boot=endpoint.server["backing_base_boot"],
    )
    _wait(lambda: not backend.alive())
    assert not target.alive(request.run_dir, endpoint.server)


def test_foreign_nbd_view_is_a_read_only_proxy(
    serve: Any, request_: ExportRequest, folder: Path
) -> None:
    assert isinstance(request_.source, RawSource)
    behind = serve(writable(request_))
    source = NbdSource(uri=behind.uri, size_bytes=4 * MIB)
    front = serve(replace(request_, source=source, run_dir=folder / "views" / "v2"))
    with connect(front.uri) as client:
        assert client.nbd.is_read_only()
        assert bytes(client.nbd.pread(MIB, MIB)) == request_.source.path.read_bytes()[MIB : 2 * MIB]


# -- what the server is -----------------------------------------------------------------------


def test_server_has_no_descriptor_terminal_or_session_of_ours(
    serve: Any, request_: ExportRequest, folder: Path
) -> None:
    lock = (folder / "lock").open("w")
    os.set_inheritable(lock.fileno(), True)
    endpoint = serve(request_)
    pid = int(endpoint.server["pid"])
    held = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    lock.close()
    assert not any("lock" in name or "/dev/pts" in name or "tty" in name for name in held)
    assert os.getsid(pid) != os.getsid(0)
    assert request_.run_dir.stat().st_mode & 0o777 == 0o700


def test_server_outlives_the_process_that_started_it(
    target: NbdTarget, request_: ExportRequest
) -> None:
    assert isinstance(request_.source, RawSource)
    script = f"""
from pathlib import Path
from offload.model import Exposure, RawSource
from offload.target import ExportRequest
from offload.testing.instances import make_instance
from targets.nbd import NbdTarget
source = RawSource(path=Path({str(request_.source.path)!r}), size_bytes={4 * MIB})
folder = Path({str(request_.run_dir)!r})
made = NbdTarget(make_instance(folder.parents[1])).export(
    ExportRequest(view_id="v1", name="one", source=source, run_dir=folder, exposure=Exposure())
)
print(made.uri)
"""
    uri = run.run([sys.executable, "-c", script]).stdout.strip()
    time.sleep(0.1)
    with connect(uri) as client:
        assert len(client.nbd.pread(512, 0)) == 512
    target.withdraw(request_.run_dir, {})


def test_composed_server_source_is_private_and_not_on_the_command_line(
    composed: None, serve: Any, request_: ExportRequest
) -> None:
    assert isinstance(request_.source, RawSource)
    endpoint = serve(request_)
    argv = Path(f"/proc/{endpoint.server['pid']}/cmdline").read_bytes()
    assert bytes(request_.source.path) not in argv
    assert (request_.run_dir / "source.json").stat().st_mode & 0o777 == 0o600


def test_withdraw_with_idle_client_does_not_wait_for_it(
    target: NbdTarget, request_: ExportRequest
) -> None:
    endpoint = target.export(request_)
    handle = nbd.NBD()
    handle.connect_uri(endpoint.uri)
    began = time.monotonic()
    target.withdraw(request_.run_dir, endpoint.server)
    assert time.monotonic() - began < 3
    assert not target.alive(request_.run_dir, endpoint.server)


def test_withdraw_leaves_a_client_that_names_our_socket_alone(
    target: NbdTarget, request_: ExportRequest, folder: Path
) -> None:
    """An nbdkit of somebody else that reads our view is a client, not our server."""
    endpoint = target.export(request_)
    other = run.spawn(
        ["nbdkit", "-f", "-r", "-U", str(folder / "o.sock"), "nbd", f"uri={endpoint.uri}"]
    )
    try:
        _wait((folder / "o.sock").exists)
        target.withdraw(request_.run_dir, {})
        assert other.poll() is None
    finally:
        run.terminate(other)


def test_withdraw_record_of_a_reused_pid_kills_nobody(
    target: NbdTarget, request_: ExportRequest
) -> None:
    bystander = run.spawn(["sleep", "60"])
    try:
        ref = procs.ref_of(bystander.pid)
        assert ref is not None
        record = {**ref.to_strings(), "start": "1"}
        request_.run_dir.mkdir(parents=True)
        (request_.run_dir / "nbdkit.pid").write_text(f"{bystander.pid}\n")
        assert not target.alive(request_.run_dir, record)
        target.withdraw(request_.run_dir, record)
        assert bystander.poll() is None
    finally:
        run.terminate(bystander)


# -- TCP --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_tcp_view_is_on_a_free_port_of_loopback_and_knows_its_clients(
    serve: Any, target: NbdTarget, request_: ExportRequest, address: str
) -> None:
    endpoint = serve(replace(request_, exposure=Exposure(transport="tcp", address=address)))
    assert target.clients(request_.run_dir, endpoint.server) == []
    with connect(endpoint.uri) as client:
        assert len(client.nbd.pread(512, 0)) == 512
        (found,) = target.clients(request_.run_dir, endpoint.server)
        assert address in found.address


def test_tcp_port_taken_by_another_server_is_refused(
    target: NbdTarget, request_: ExportRequest
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError) as caught:
            target.export(replace(request_, exposure=Exposure(transport="tcp", port=port)))
    assert caught.value.code == "port-taken"
    assert str(port) in caught.value.message


def test_tcp_port_taken_between_look_and_bind_is_refused(
    target: NbdTarget, request_: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        NbdTarget, "check", lambda _, exposure: replace(exposure, address="127.0.0.1")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError) as caught:
            target.export(replace(request_, exposure=Exposure(transport="tcp", port=port)))
    assert caught.value.code == "port-taken"


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("0.0.0.0", "not-loopback"),  # noqa: S104
        ("::", "not-loopback"),
        ("192.0.2.1", "not-loopback"),
        ("localhost", "bad-address"),
        ("224.0.0.1", "bad-address"),
        ("fe80::1%lo", "bad-address"),
        ("::ffff:127.0.0.1", "bad-address"),
    ],
)
def test_tcp_address_outside_loopback_is_refused(
    target: NbdTarget, request_: ExportRequest, address: str, code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        target.export(replace(request_, exposure=Exposure(transport="tcp", address=address)))
    assert caught.value.code == code
    assert address in caught.value.message


# -- what fails -------------------------------------------------------------------------------


def test_export_without_nbdkit_names_the_package(
    target: NbdTarget, request_: ExportRequest, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(run, "_DEFAULT_PATH", str(folder))
    with pytest.raises(UnavailableError) as caught:
        target.export(request_)
    assert caught.value.code == "program-missing"
    assert "apt-get install nbdkit" in caught.value.hint


def test_export_of_a_folder_says_what_the_server_said(
    target: NbdTarget, request_: ExportRequest, folder: Path
) -> None:
    source = RawSource(path=folder, size_bytes=4 * MIB)
    with pytest.raises(UnavailableError) as caught:
        target.export(replace(request_, source=source))
    assert caught.value.code == "server-failed"
    assert str(folder) in caught.value.message


def test_export_of_a_missing_file_names_it(target: NbdTarget, request_: ExportRequest) -> None:
    source = RawSource(path=Path("/gone.raw"), size_bytes=MIB)
    with pytest.raises(NotFoundError) as caught:
        target.export(replace(request_, source=source))
    assert caught.value.code == "source-missing"
    assert "/gone.raw" in caught.value.message


def test_export_of_a_grown_file_is_an_integrity_error(
    target: NbdTarget, request_: ExportRequest
) -> None:
    source = replace(request_.source, size_bytes=MIB)
    with pytest.raises(IntegrityError) as caught:
        target.export(replace(request_, source=source))
    assert caught.value.code == "size-mismatch"


def test_composed_export_image_does_not_open_raises_its_own_error(
    composed: None, target: NbdTarget, request_: ExportRequest
) -> None:
    source = replace(request_.source, size_bytes=64 * MIB)
    with pytest.raises(IntegrityError) as caught:
        target.export(replace(request_, source=source))
    assert caught.value.code == "image-short"
    assert caught.value.hint


def test_backup_export_without_store_is_one_clear_error(
    target: NbdTarget, request_: ExportRequest, folder: Path
) -> None:
    source = BackupSource(
        store=str(folder / "no-store"),
        backup="b1",
        volume="v",
        size_bytes=MIB,
        cache_dir=folder / "cache",
    )
    with pytest.raises(OffloadError) as caught:
        target.export(replace(request_, source=source))
    assert "Traceback" not in caught.value.message
    assert "no-store" in caught.value.message


def test_export_into_the_folder_of_another_view_is_refused_and_leaves_it(
    target: NbdTarget, serve: Any, request_: ExportRequest
) -> None:
    endpoint = serve(request_)
    with pytest.raises(BusyError):
        target.export(request_)
    assert target.alive(request_.run_dir, endpoint.server)


def test_export_server_that_never_listens_is_ended_in_time(
    target: NbdTarget,
    request_: ExportRequest,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    monkeypatch.setattr("targets.nbdkit._READY_S", 0.3)
    silent = folder / "bin" / "nbdkit"
    silent.parent.mkdir()
    silent.write_text("#!/bin/sh\nexec sleep 100\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", str(silent.parent))
    with pytest.raises(UnavailableError, match="did not answer"):
        target.export(request_)


def test_handshake_with_another_protocol_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")

        greeter = threading.Thread(target=greet)
        greeter.start()
        with pytest.raises(UnavailableError, match="no NBD server"):
            handshake.ask(server.getsockname(), timeout_s=60)
        greeter.join()


def test_handshake_with_a_silent_server_ends_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError):
        handshake.ask(server.getsockname(), timeout_s=0.1)


# -- many -------------------------------------------------------------------------------------


def test_fifty_views_of_one_volume_at_once_all_read(
    target: NbdTarget, serve: Any, request_: ExportRequest, folder: Path
) -> None:
    assert isinstance(request_.source, RawSource)
    wanted = request_.source.path.read_bytes()[MIB : MIB + 4096]
    endpoints = [
        serve(replace(request_, view_id=f"v{n}", run_dir=folder / "views" / f"v{n}"))
        for n in range(50)
    ]
    for endpoint in endpoints:
        with connect(endpoint.uri) as client:
            assert bytes(client.nbd.pread(4096, MIB)) == wanted
    assert all(target.alive(folder, endpoint.server) for endpoint in endpoints)


def _wait(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
