"""The tgt target passes the contract suite, on a real tgtd."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from offload.model import Exposure
from offload.target import Target
from offload.testing.instances import make_instance
from offload.testing.libiscsi import Initiator
from offload.testing.target import TargetClient, TargetContract
from targets.tgt import TgtTarget


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class TestTgtTarget(TargetContract):
    exposure = Exposure(port=_free_port())

    @pytest.fixture
    def target(self, folder: Path) -> Target:
        return TgtTarget(make_instance(folder))

    def connect(self, uri: str) -> TargetClient:
        return Initiator(uri)
