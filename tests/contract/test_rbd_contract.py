"""The rbd provider passes the contract suite on a real Ceph cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rbd

from offload.ceph import ImageName
from offload.model import Volume
from offload.snapshot import SnapshotProvider
from offload.snapshots.rbd import RbdProvider
from offload.testing.ceph import POOL, USER, RunningCeph
from offload.testing.snapshot_provider import INSTANCE, SnapshotProviderContract

_SIZE = 8 << 20


class TestRbd(SnapshotProviderContract):
    """Two images of one pool, so TimeMarks of both are snapshots of a group."""

    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return RbdProvider(INSTANCE)

    @pytest.fixture
    def volumes(self, ceph: RunningCeph) -> Iterator[tuple[Volume, ...]]:
        self._ceph = ceph
        names = ("contract-db", "contract-web.1")
        with ceph.pool() as pool:
            for name in names:
                rbd.RBD().create(pool, name, _SIZE)
        yield tuple(
            Volume(
                name=name,
                provider="rbd",
                path=ImageName(pool=POOL, image=name).device,
                conf=ceph.conf,
                user=USER,
            )
            for name in names
        )
        with ceph.pool() as pool:
            assert rbd.RBD().group_list(pool) == []
            for name in names:
                rbd.RBD().remove(pool, name)  # fails if a snapshot is left

    def write(self, volume: Volume, offset: int, data: bytes) -> None:
        with self._ceph.pool() as pool, rbd.Image(pool, volume.path.name) as image:
            image.write(data, offset)

    @pytest.mark.slow  # each snapshot is agreed on by the monitor, and opened over a connection
    def test_snapshots_255_of_one_volume_all_stay_readable(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        super().test_snapshots_255_of_one_volume_all_stay_readable(provider, volumes)
