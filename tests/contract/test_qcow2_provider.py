"""The qcow2 provider passes the contract suite with images at rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload import run
from offload.model import Volume
from offload.snapshot import SnapshotProvider
from offload.snapshots.qcow2 import Qcow2Provider
from offload.testing.snapshot_provider import INSTANCE, SnapshotProviderContract

_SIZE = 8 << 20


class TestQcow2AtRest(SnapshotProviderContract):
    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return Qcow2Provider(INSTANCE)

    @pytest.fixture
    def volumes(self, tmp_path: Path) -> tuple[Volume, ...]:
        made = []
        for name in ("db", "web.1"):
            path = tmp_path / f"{name}, disk.qcow2"  # a comma means something to QEMU's options
            run.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(_SIZE)])
            made.append(Volume(name=name, provider="qcow2", path=path))
        self._raw = tmp_path / "pattern"
        return tuple(made)

    def write(self, volume: Volume, offset: int, data: bytes) -> None:
        self._raw.write_bytes(data)
        command = f"write -q -s {self._raw} {offset} {len(data)}"
        file = f"driver=qcow2,file.driver=file,file.filename={str(volume.path).replace(',', ',,')}"
        run.run(["qemu-io", "--image-opts", "-c", command, file])

    @pytest.mark.slow  # four programs for each of the 255
    def test_snapshots_255_of_one_volume_all_stay_readable(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        super().test_snapshots_255_of_one_volume_all_stay_readable(provider, volumes)
