"""Broken NBD clients: the servers that we start stay up, and others keep reading from them."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import nbd
import pytest

from offload import qemu_nbd, run
from offload.instance import Instance
from offload.model import Exposure, Qcow2Source, RawSource
from offload.target import ExportRequest
from offload.testing import malformed_nbd
from offload.testing.instances import make_instance
from offload.testing.target import writable
from targets.nbd import NbdTarget

SIZE = 4 << 20
ROUNDS = 350  # sessions a server; each seed is one
Connect = Callable[[], socket.socket]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="off-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def instance(folder: Path) -> Instance:
    return make_instance(folder)


@pytest.fixture
def image(folder: Path) -> Path:
    path = folder / "image.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


class Reader(threading.Thread):
    """Another client, which reads all the time and compares; the second half, into which no broken
    client writes."""

    def __init__(self, uri: str, content: bytes) -> None:
        super().__init__(daemon=True)
        self._handle: Any = nbd.NBD()
        self._handle.connect_uri(uri)
        self._content = content
        self._enough = threading.Event()
        self.reads = 0
        self.failure: str | None = None

    def run(self) -> None:
        at = SIZE // 2
        while not self._enough.is_set():
            try:
                got = bytes(self._handle.pread(65536, at))
            except nbd.Error as error:
                self.failure = str(error)
                return
            if got != self._content[at : at + 65536]:
                self.failure = f"other bytes at {at}"
                return
            self.reads += 1
            at = at + 65536 if at + 65536 < SIZE else SIZE // 2

    def finish(self) -> None:
        self._enough.set()
        self.join(30)
        assert not self.is_alive(), "the other client hangs"
        assert self.failure is None
        self._handle.shutdown()


@contextmanager
def reading(uri: str, content: bytes) -> Iterator[Reader]:
    reader = Reader(uri, content)
    reader.start()
    yield reader
    reader.finish()


def connector(uri: str) -> Connect:
    """Plain connections to where a URI points."""
    parts = urlsplit(uri)
    if parts.port:
        return lambda: socket.create_connection((parts.hostname, parts.port), timeout=5)
    path = parse_qs(parts.query)["socket"][0]

    def connect() -> socket.socket:
        wire = socket.socket(socket.AF_UNIX)
        wire.connect(path)
        return wire

    return connect


def attack(connect: Connect) -> set[str]:
    return {malformed_nbd.send(connect, seed) for seed in range(ROUNDS)}


@pytest.mark.parametrize("kind", ["raw-unix", "raw-tcp", "qcow2", "writable"])
def test_view_broken_clients_neither_end_it_nor_disturb_others(
    kind: str, instance: Instance, image: Path
) -> None:
    target = NbdTarget(instance)
    source: RawSource | Qcow2Source = RawSource(path=image, size_bytes=SIZE)
    content = image.read_bytes()
    if kind == "qcow2":
        path = image.with_suffix(".qcow2")
        run.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image), str(path)])
        source = Qcow2Source(path=path, size_bytes=SIZE)
    transport = "tcp" if kind == "raw-tcp" else "unix"
    request = ExportRequest(
        view_id="v1",
        name="one",
        source=source,
        run_dir=instance.views_dir / "v1",
        exposure=target.check(Exposure(transport=transport)),
    )
    if kind == "writable":
        request = writable(request)
    with ExitStack() as stack:
        endpoint = target.export(request)
        stack.callback(target.withdraw, request.run_dir, endpoint.server)
        with reading(endpoint.uri, content) as reader:
            before = reader.reads
            sent = attack(connector(endpoint.uri))
            assert reader.reads > before
        assert sent == {session.__name__ for session in malformed_nbd.SESSIONS}
        assert target.alive(request.run_dir, endpoint.server)
        with reading(endpoint.uri, content):
            pass
    assert image.read_bytes() == content


def test_qemu_nbd_behind_a_view_survives_broken_clients(folder: Path, image: Path) -> None:
    """Nobody but us can reach its socket; it is tried all the same."""
    path = folder / "image.qcow2"
    run.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image), str(path)])
    at = folder / "qemu.sock"
    server = qemu_nbd.start(
        Qcow2Source(path=path, size_bytes=SIZE),
        socket_path=at,
        pid_file=folder / "qemu.pid",
        log_path=folder / "qemu.log",
    )
    try:
        with reading(qemu_nbd.uri(at), image.read_bytes()):
            attack(connector(qemu_nbd.uri(at)))
        assert server.alive()
    finally:
        qemu_nbd.stop(at, folder / "qemu.pid")
