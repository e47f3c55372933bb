"""The targets of the project pass the contract suite, on the real servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbd
import pytest

from offload.model import Exposure
from offload.target import Target
from offload.testing.instances import free_port, make_instance
from offload.testing.libiscsi import Initiator
from offload.testing.target import TargetClient, TargetContract
from targets.nbd import NbdTarget
from targets.tgt import TgtTarget


class LibnbdClient:
    def __init__(self, uri: str) -> None:
        self._handle: Any = nbd.NBD()
        self._handle.set_strict_mode(0)  # the server must refuse, not the library
        self._handle.connect_uri(uri)

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(self._handle.pread(count, offset))

    def pwrite(self, data: bytes, offset: int) -> None:
        self._handle.pwrite(data, offset)

    def close(self) -> None:
        self._handle.shutdown()


class TestNbdTarget(TargetContract):
    @pytest.fixture
    def target(self, folder: Path) -> Target:
        return NbdTarget(make_instance(folder))

    def connect(self, uri: str) -> TargetClient:
        return LibnbdClient(uri)


class TestTgtTarget(TargetContract):
    exposure = Exposure(port=free_port())

    @pytest.fixture
    def target(self, folder: Path) -> Target:
        return TgtTarget(make_instance(folder))

    def connect(self, uri: str) -> TargetClient:
        return Initiator(uri)
