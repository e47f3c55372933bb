"""Fixtures that several areas share: real pools, and what a test needs to run."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.snapshots import rbd_link
from offload.testing.ceph import RunningCeph, running_ceph
from offload.testing.pools import loop_pool
from offload.testing.rgw import RunningRgw, running_rgw

pytest_plugins = ["offload.testing.lab.plugin", "offload.testing.order"]


def pytest_collection_finish() -> None:
    """What thousands of tests are made of is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    logging.getLogger().setLevel(logging.WARNING)  # a command run in this process has its own
    if os.geteuid() != 0 and item.get_closest_marker("needs_root"):
        pytest.skip("needs root")


@pytest.fixture
def xfs_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mount point of a fresh XFS with reflinks, 1 GiB, sparse. Mark the test `needs_root`."""
    with loop_pool(tmp_path_factory.mktemp("pool"), "xfs") as point:
        yield point


@pytest.fixture
def btrfs_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mount point of a fresh btrfs, 1 GiB, sparse. Mark the test `needs_root`."""
    with loop_pool(tmp_path_factory.mktemp("pool"), "btrfs") as point:
        yield point


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCeph]:
    """A real Ceph cluster with the pool `vms`, shared: who makes an image removes it."""
    with (
        running_ceph(tmp_path_factory.mktemp("ceph") / "cluster") as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(rbd_link, "SILENCE_S", 180.0)  # it shares a machine with other tests
        yield cluster


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRgw]:
    """A real S3 server, shared: each test makes buckets of its own with `new_bucket`."""
    with running_rgw(tmp_path_factory.mktemp("rgw") / "gateway") as server:
        yield server


@pytest.fixture
def ext4_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mount point of a fresh ext4, 64 MiB: small, and without reflinks."""
    with loop_pool(tmp_path_factory.mktemp("pool"), "ext4", size_bytes=64 << 20) as point:
        yield point
