"""The store in memory keeps the contract, so that what is proved with it holds for the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload.storespec import StoreSpec
from offload.testing.memory_store import MemoryStore
from offload.testing.store import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path)

    def open(self, url: str) -> MemoryStore:
        return MemoryStore(StoreSpec(url=url))
