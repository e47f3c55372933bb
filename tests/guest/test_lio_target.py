"""The lio target on the real kernel: the contract suite, and what is LIO's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.run import run
from offload.target import ExportRequest, Target
from offload.testing.instances import make_instance
from offload.testing.libiscsi import Initiator
from offload.testing.target import TargetClient, TargetContract
from targets.lio import LioTarget


class TestLioTarget(TargetContract):
    @pytest.fixture
    def target(self, folder: Path) -> Target:
        return LioTarget(make_instance(folder))

    def connect(self, uri: str) -> TargetClient:
        return Initiator(uri)

    def test_alive_killed_server_is_dead_and_can_be_served_again(
        self, target: Target, request_: ExportRequest, content: bytes
    ) -> None:
        """There is no process to kill: the administrator clears all of LIO."""
        endpoint = target.export(request_)
        run(["targetctl", "clear"])
        assert not target.alive(request_.run_dir, endpoint.server)
        assert target.clients(request_.run_dir, endpoint.server) == []
        target.withdraw(request_.run_dir, endpoint.server)
        again = target.export(request_)
        assert again.uri == endpoint.uri
        client = self.connect(again.uri)
        assert client.pread(512, 0) == content[:512]
        client.close()
        target.withdraw(request_.run_dir, again.server)
