"""The contract suite of targets. Subclass `TargetContract` and give it its fixtures.

class TestMyTarget(TargetContract):
    @pytest.fixture
    def target(self, folder: Path) -> Target: ...
    def connect(self, uri: str) -> TargetClient: ...
"""
# ruff: noqa: S101 - assertions are what a test suite is made of

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from offload.errors import OffloadError
from offload.model import Exposure, RawSource
from offload.overlay import create
from offload.target import Endpoint, ExportRequest, Overlay, Target

_SIZE = 1 << 20


class TargetClient(Protocol):
    """A client of the target's protocol. A refused request raises any exception."""

    def pread(self, count: int, offset: int) -> bytes:
        """Read `count` bytes."""
        ...

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write."""
        ...

    def close(self) -> None:
        """Disconnect; the server has noticed when this returns, or soon after."""
        ...


class TargetContract(ABC):
    """What every target does. All of it on a plain file as source."""

    exposure = Exposure()  # what is asked of the target in each test

    @abstractmethod
    def connect(self, uri: str) -> TargetClient:
        """A connected client."""

    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        """A temporary folder with a path short enough for sockets."""
        made = Path(tempfile.mkdtemp(prefix="oft-", dir="/tmp"))
        yield made
        shutil.rmtree(made, ignore_errors=True)

    @pytest.fixture
    def content(self) -> bytes:
        """What the image holds."""
        return os.urandom(_SIZE)

    @pytest.fixture
    def request_(self, target: Target, folder: Path, content: bytes) -> ExportRequest:
        """A read-only view of a plain file."""
        path = folder / "image.raw"
        path.write_bytes(content)
        return ExportRequest(
            view_id="v1",
            name="one",
            source=RawSource(path=path, size_bytes=_SIZE),
            run_dir=folder / "views" / "v1",
            exposure=target.check(self.exposure),
        )

    @pytest.fixture
    def endpoint(self, target: Target, request_: ExportRequest) -> Iterator[Endpoint]:
        """The read-only view, served."""
        made = target.export(request_)
        yield made
        target.withdraw(request_.run_dir, made.server)

    def test_export_read_gives_the_image(self, endpoint: Endpoint, content: bytes) -> None:
        """Start, middle and end."""
        client = self.connect(endpoint.uri)
        assert client.pread(4096, 0) == content[:4096]
        assert client.pread(8192, 65536) == content[65536 : 65536 + 8192]
        assert client.pread(512, _SIZE - 512) == content[-512:]
        client.close()

    def test_export_two_clients_at_once_both_read(self, endpoint: Endpoint, content: bytes) -> None:
        """Neither waits for the other to leave."""
        one, two = self.connect(endpoint.uri), self.connect(endpoint.uri)
        assert one.pread(512, 0) == two.pread(512, 0) == content[:512]
        one.close()
        two.close()

    def test_export_read_only_write_is_refused_by_the_server(
        self, endpoint: Endpoint, request_: ExportRequest, content: bytes
    ) -> None:
        """And the source stays as it was."""
        client = self.connect(endpoint.uri)
        with pytest.raises(Exception):  # noqa: B017, PT011 - the error is the client library's
            client.pwrite(b"x" * 512, 0)
        client.close()
        assert isinstance(request_.source, RawSource)
        assert request_.source.path.read_bytes() == content

    def test_export_writable_takes_writes_and_leaves_the_source(
        self, target: Target, request_: ExportRequest, content: bytes
    ) -> None:
        """Another client sees what was written; the file does not."""
        request_ = writable(request_)
        endpoint = target.export(request_)
        try:
            writer = self.connect(endpoint.uri)
            writer.pwrite(b"x" * 512, 512)
            writer.close()
            reader = self.connect(endpoint.uri)
            assert reader.pread(1536, 0) == content[:512] + b"x" * 512 + content[1024:1536]
            reader.close()
        finally:
            target.withdraw(request_.run_dir, endpoint.server)
        assert isinstance(request_.source, RawSource)
        assert request_.source.path.read_bytes() == content

    def test_clients_are_those_connected_now(
        self, target: Target, request_: ExportRequest, endpoint: Endpoint
    ) -> None:
        """The target's own look at the server does not count."""
        assert target.clients(request_.run_dir, endpoint.server) == []
        clients = [self.connect(endpoint.uri) for _ in range(2)]
        assert len(target.clients(request_.run_dir, endpoint.server)) == 2
        for client in clients:
            client.close()

    def test_withdraw_leaves_nothing_and_may_be_repeated(
        self, target: Target, request_: ExportRequest
    ) -> None:
        """With a record, again, and where nothing ever was."""
        endpoint = target.export(request_)
        assert target.alive(request_.run_dir, endpoint.server)
        for _ in range(2):
            target.withdraw(request_.run_dir, endpoint.server)
            assert not target.alive(request_.run_dir, endpoint.server)
            assert not request_.run_dir.exists()
        target.withdraw(request_.run_dir, {})

    def test_withdraw_without_a_record_ends_the_server(
        self, target: Target, request_: ExportRequest
    ) -> None:
        """Whoever started it died before the record was kept."""
        endpoint = target.export(request_)
        target.withdraw(request_.run_dir, {})
        assert not target.alive(request_.run_dir, endpoint.server)
        assert not request_.run_dir.exists()

    def test_withdraw_leaves_other_views_alone(
        self, target: Target, request_: ExportRequest, endpoint: Endpoint, content: bytes
    ) -> None:
        """One whose folder's name goes on where the withdrawn one's ends, too."""
        other = replace(request_, view_id="v", run_dir=request_.run_dir.parent / "v")
        made = target.export(other)
        target.withdraw(other.run_dir, made.server)
        target.withdraw(other.run_dir, {})
        client = self.connect(endpoint.uri)
        assert client.pread(512, 0) == content[:512]
        client.close()

    def test_alive_killed_server_is_dead_and_can_be_served_again(
        self, target: Target, request_: ExportRequest, content: bytes
    ) -> None:
        """`kill -9` of the server, where the target has a process a view."""
        endpoint = target.export(request_)
        if not endpoint.server.get("pid"):
            pytest.skip("this target has no process of its own a view")
        os.kill(int(endpoint.server["pid"]), signal.SIGKILL)
        _wait_dead(target, request_, endpoint)
        assert target.clients(request_.run_dir, endpoint.server) == []
        target.withdraw(request_.run_dir, endpoint.server)
        again = target.export(request_)
        client = self.connect(again.uri)
        assert client.pread(512, 0) == content[:512]
        client.close()
        target.withdraw(request_.run_dir, again.server)

    def test_export_missing_source_leaves_nothing(
        self, target: Target, request_: ExportRequest
    ) -> None:
        """No folder either."""
        gone = RawSource(path=request_.run_dir.parent / "gone.raw", size_bytes=_SIZE)
        with pytest.raises(OffloadError):
            target.export(replace(request_, source=gone))
        assert not request_.run_dir.exists()

    def test_export_source_of_another_size_is_refused(
        self, target: Target, request_: ExportRequest
    ) -> None:
        """Never other data than was asked for."""
        wrong = replace(request_.source, size_bytes=2 * _SIZE)
        with pytest.raises(OffloadError):
            target.export(replace(request_, source=wrong))
        assert not request_.run_dir.exists()


def writable(request: ExportRequest) -> ExportRequest:
    """The same view on a fresh overlay of 64 MiB, beside the folder of its server."""
    path = request.run_dir.parent.parent / f"{request.view_id}.qcow2"
    overlay = Overlay(path=path, limit_bytes=64 << 20)
    create(overlay, request.source.size_bytes)
    return replace(request, overlay=overlay)


def _wait_dead(target: Target, request: ExportRequest, endpoint: Endpoint) -> None:
    for _ in range(1000):
        if not target.alive(request.run_dir, endpoint.server):
            return
        time.sleep(0.005)
    raise AssertionError("the killed server is still said to be alive")
