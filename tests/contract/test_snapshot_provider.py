"""The snapshot providers of the project pass the contract suite, on real file systems."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.model import Volume
from offload.snapshot import SnapshotProvider
from offload.snapshots.copy import CopyProvider
from offload.snapshots.device import DeviceProvider
from offload.snapshots.reflink import ReflinkProvider
from offload.testing.pools import loop_device
from offload.testing.snapshot_provider import (
    INSTANCE,
    LiveProviderContract,
    SnapshotProviderContract,
)

_SIZE = 4 << 20


def _volumes(folder: Path, provider: str) -> tuple[Volume, ...]:
    made = []
    for name in ("db", "web.1"):
        path = folder / f"{name}.img"
        with path.open("xb") as out:
            os.ftruncate(out.fileno(), _SIZE)
        made.append(Volume(name=name, provider=provider, path=path))
    return tuple(made)


def _write(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


class _WritesFiles:
    def write(self, volume: Volume, offset: int, data: bytes) -> None:
        _write(volume.path, offset, data)


@pytest.mark.needs_root
class TestReflinkOnXfs(_WritesFiles, SnapshotProviderContract):
    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return ReflinkProvider(INSTANCE)

    @pytest.fixture
    def volumes(self, xfs_pool: Path) -> tuple[Volume, ...]:
        return _volumes(xfs_pool, "reflink")


@pytest.mark.needs_root
class TestReflinkOnBtrfs(_WritesFiles, SnapshotProviderContract):
    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return ReflinkProvider(INSTANCE)

    @pytest.fixture
    def volumes(self, btrfs_pool: Path) -> tuple[Volume, ...]:
        return _volumes(btrfs_pool, "reflink")


class TestCopy(_WritesFiles, SnapshotProviderContract):
    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return CopyProvider(INSTANCE)

    @pytest.fixture
    def volumes(self, tmp_path: Path) -> tuple[Volume, ...]:
        return _volumes(tmp_path, "copy")


class TestDeviceOnFiles(_WritesFiles, LiveProviderContract):
    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return DeviceProvider(INSTANCE)

    @pytest.fixture
    def volumes(self, tmp_path: Path) -> tuple[Volume, ...]:
        return _volumes(tmp_path, "device")


@pytest.mark.needs_root
class TestDeviceOnLoopDevices(_WritesFiles, LiveProviderContract):
    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return DeviceProvider(INSTANCE)

    @pytest.fixture
    def volumes(self, tmp_path: Path) -> Iterator[tuple[Volume, ...]]:
        db, web = _volumes(tmp_path, "device")
        with loop_device(db.path) as one, loop_device(web.path) as two:
            yield (
                Volume(name=db.name, provider="device", path=one),
                Volume(name=web.name, provider="device", path=two),
            )
