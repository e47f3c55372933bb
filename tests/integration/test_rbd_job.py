"""The whole job with images in a real Ceph cluster: TimeMark, view, backups, restore, recovery."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
import rbd

from offload import compose, run
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.model import Instant, Snapshot, TimeMark, Volume
from offload.services import director, store_init, timemark
from offload.services import mount as mounts
from offload.services.backup import BackupReport, backup
from offload.services.context import Context, open_context
from offload.services.pools import survey
from offload.services.recover import find_orphans, recover
from offload.services.restore import Request, restore
from offload.services.verify import verify
from offload.testing.ceph import USER, RunningCeph
from offload.testing.rbd_site import MIB, RbdSite, writing
from offload.testing.warm import warm_python

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[volumes.db]
provider = "rbd"
image = "vms/db"
conf = "{conf}"
user = "{user}"

[volumes.web]
provider = "rbd"
image = "vms/web"
conf = "{conf}"
user = "{user}"
sector_size = 4096

[groups.shop]
volumes = ["db", "web"]

[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
"""

# A process of its own, to be killed at a step.
SCRIPT = """
import sys
from pathlib import Path
from offload.services import director, timemark
from offload.services.backup import backup
from offload.services.context import open_context
with open_context(Path(sys.argv[1])) as ctx:
    match sys.argv[2:]:
        case ["create"]:
            print(director.create(ctx, "shop").id)
        case ["delete", mark]:
            timemark.delete(ctx, mark)
        case ["backup"]:
            print(backup(ctx, "shop").backup.id)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: it holds sockets."""
    made = Path(tempfile.mkdtemp(prefix="ofr-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def site(ceph: RunningCeph) -> Iterator[RbdSite]:
    made = RbdSite(ceph)
    yield made
    made.clear()


@pytest.fixture
def pair(site: RbdSite) -> tuple[Volume, Volume]:
    """With something in them, and far more that was never written."""
    made = site.image("db", size=64 * MIB), site.image("web", size=64 * MIB)
    for number, volume in enumerate(made):
        site.write(volume, 0, random.Random(number).randbytes(3 * MIB))
        site.write(volume, 40 * MIB, random.Random(number + 9).randbytes(100_000))
    return made


@pytest.fixture
def ctx(site: RbdSite, pair: tuple[Volume, Volume], folder: Path) -> Iterator[Context]:
    config = folder / "offload.toml"
    config.write_text(CONFIG.format(folder=folder, conf=site.ceph.conf, user=USER))
    with open_context(config) as made:
        yield made
        mounts.unmount(made, [], all_views=True, force=True)
        for mark in made.catalog.timemarks():
            timemark.delete(made, mark.id)


def whole(ctx: Context, snapshot: Snapshot) -> bytes:
    """A snapshot as its provider reads it."""
    provider = compose.snapshot_provider(snapshot.provider, ctx.instance.id)
    image = compose.open_image(provider.source(snapshot))
    try:
        return image.pread(0, image.size_bytes)
    finally:
        image.close()


def content(site: RbdSite, pair: tuple[Volume, Volume]) -> dict[str, bytes]:
    """The images as they are now."""
    found = {}
    for volume in pair:
        with site.open(volume) as image:
            found[volume.name] = image.read(0, image.size())
    return found


def allocation(handle: Any) -> list[tuple[int, int]]:
    """Length and flags (1: hole, 2: zero) of each extent."""
    found: list[tuple[int, int]] = []

    def collect(_name: str, _offset: int, flat: list[int], _error: object) -> int:
        found.extend(zip(flat[::2], flat[1::2], strict=True))
        return 0

    handle.block_status(handle.get_size(), 0, collect)
    return found


# -- TimeMarks and views ----------------------------------------------------------------------


def test_timemarks_under_a_writer_are_one_instant_without_a_quiescer(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    """Nobody was held: the group's policy is `require` all the same."""
    with writing(site.ceph, *pair):
        for _ in range(10):
            mark = director.create(ctx, "shop")
            assert mark.instant is Instant.ONE
            assert mark.warnings == ()
            one, two = (_number(ctx, snapshot) for snapshot in mark.snapshots)
            assert one - two in {0, 1}
    assert len(ctx.catalog.timemarks()) == 10
    assert find_orphans(ctx) == []


def _number(ctx: Context, snapshot: Snapshot) -> int:
    data = whole(ctx, snapshot)
    return max(int.from_bytes(data[at : at + 8]) for at in range(0, 4 * 4096, 4096))


def test_view_of_a_timemark_shows_it_with_its_holes(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    before = content(site, pair)
    mark = director.create(ctx, "shop")
    for volume in pair:
        site.write(volume, 1 * MIB, b"later" * 1000)
    for view in mounts.mount(ctx, [f"timemark:{mark.id}"]):
        handle: Any = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(view.uri)
        try:
            name = view.origin.rpartition("/")[2]
            assert handle.get_size() == 64 * MIB
            assert handle.is_read_only()
            assert handle.get_block_size(nbd.SIZE_MINIMUM) == (4096 if name == "web" else 512)
            read = b"".join(bytes(handle.pread(4 * MIB, at)) for at in range(0, 64 * MIB, 4 * MIB))
            assert read == before[name]
            assert allocation(handle) == [
                (4 * MIB, 0), (36 * MIB, 3), (4 * MIB, 0), (20 * MIB, 3),
            ]  # fmt: skip
        finally:
            handle.shutdown()


def test_writable_view_leaves_the_snapshot_as_it_is(ctx: Context) -> None:
    mark = director.create(ctx, "shop")
    before = whole(ctx, mark.snapshots[0])
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"], mounts.MountOptions(writable=True))
    handle: Any = nbd.NBD()
    handle.connect_uri(view.uri)
    handle.pwrite(b"mine" * 128, 0)
    assert bytes(handle.pread(512, 0)) == b"mine" * 128
    handle.shutdown()
    assert whole(ctx, mark.snapshots[0]) == before


def test_view_whose_server_was_killed_is_served_again(ctx: Context, site: RbdSite) -> None:
    """Also after the image was renamed: views name it by its id."""
    mark = director.create(ctx, "shop")
    before = whole(ctx, mark.snapshots[0])[:4096]
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    os.kill(int(view.server["pid"]), signal.SIGKILL)
    with site.ceph.pool() as pool:
        rbd.RBD().rename(pool, "db", "moved")
    site.volume("moved")
    assert [found.id for found in recover(ctx).remounted] == [view.id]
    handle: Any = nbd.NBD()
    handle.connect_uri(ctx.catalog.view(view.id).uri)
    assert bytes(handle.pread(4096, 0)) == before
    handle.shutdown()


def test_pool_of_the_images_is_watched(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    states = {volume.name: site.provider.inspect(volume) for volume in pair}
    (pool,) = survey(ctx, states)
    assert pool.name == f"vms of Ceph {site.ceph.fsid}"
    assert set(pool.volumes) == {"db", "web"}
    assert 0 < pool.free_bytes <= pool.size_bytes <= 2 << 30
    assert states["db"].allocated_bytes == 8 * MIB  # two objects of four MiB


def test_another_user_in_the_configuration_makes_no_orphan(ctx: Context, folder: Path) -> None:
    """How the cluster is reached is no part of what a snapshot is."""
    mark = director.create(ctx, "shop")
    config = folder / "offload.toml"
    config.write_text(config.read_text().replace(USER, "client.admin"))
    with open_context(config) as changed:
        assert changed.instance.config.volume("db").user == "client.admin"
        assert find_orphans(changed) == []
        timemark.delete(changed, mark.id)


# -- backups ----------------------------------------------------------------------------------


def test_backup_full_and_incremental_restores_what_was_there(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume], folder: Path
) -> None:
    store_init.init(ctx, "main")
    reports: list[BackupReport] = []
    states = []
    for turn in range(3):
        states.append(content(site, pair))
        reports.append(backup(ctx, "shop"))
        for volume in pair:
            site.write(volume, turn * 300_000, random.Random(turn).randbytes(5000))
            with site.open(volume) as image:
                image.discard(40 * MIB, (turn + 1) * 16_384)
    assert [[i.mode for i in r.images] for r in reports] == [
        ["full", "full"], ["incremental", "incremental"], ["incremental", "incremental"],
    ]  # fmt: skip
    assert all(image.reason == "" for report in reports[1:] for image in report.images)
    assert all(image.read_bytes == 8 * MIB for image in reports[0].images)  # holes are not read
    assert all(image.looked_at_bytes < 100_000 for image in reports[1].images)
    for report, state in zip(reports, states, strict=True):
        target = folder / report.backup.id
        target.mkdir()
        restore(ctx, Request(what=report.backup.id, to=str(target)))
        for name, data in state.items():
            assert (target / f"{name}.raw").read_bytes() == data
    assert verify(ctx, all_backups=True).problems == ()
    assert len(ctx.catalog.timemarks()) == 1  # the parent of the next one
    assert len(site.groups()) == 1


def test_backup_after_the_image_was_rolled_back_has_what_it_is(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume], folder: Path
) -> None:
    store_init.init(ctx, "main")
    with site.open(pair[0]) as image:
        image.create_snap("before")
    site.write(pair[0], 0, b"wrong" * 1_000_000)
    backup(ctx, "shop")
    with site.open(pair[0]) as image:
        image.rollback_to_snap("before")
    report = backup(ctx, "shop")
    assert report.images[0].mode == "incremental"
    restore(ctx, Request(what=f"{report.backup.id}/db", to=str(folder / "db.raw")))
    assert (folder / "db.raw").read_bytes() == content(site, pair)["db"]


def test_backup_of_a_recreated_image_is_full_again(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume]
) -> None:
    store_init.init(ctx, "main")
    backup(ctx, "shop")
    with site.ceph.pool() as pool:
        rbd.RBD().rename(pool, "db", "old")
    site.volume("old")
    site.image("db", size=64 * MIB)
    report = backup(ctx, "shop")
    assert [image.mode for image in report.images] == ["full", "incremental"]
    assert report.images[0].reason


# -- kill -9 ----------------------------------------------------------------------------------


def call(ctx: Context, *words: str, **env: str) -> run.Completed:
    assert ctx.instance.config_path is not None
    return warm_python().run("-c", SCRIPT, str(ctx.instance.config_path), *words, env=env)


def steps_of(ctx: Context, folder: Path, *words: str) -> list[str]:
    trace = folder / "trace"
    done = call(ctx, *words, **{TRACE_ENV: str(trace)})
    assert done.status == 0, done.stderr
    return list(dict.fromkeys(trace.read_text().split()))


def test_timemark_killed_at_each_step_leaves_no_snapshot_and_no_group(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume], folder: Path
) -> None:
    steps = steps_of(ctx, folder, "create")
    assert "timemark.snapshot.rbd" in steps
    for mark in ctx.catalog.timemarks():
        timemark.delete(ctx, mark.id)
    for name in steps:
        assert call(ctx, "create", **{CRASH_ENV: name}).status == -signal.SIGKILL, name
        recover(ctx)
        marks: list[TimeMark] = ctx.catalog.timemarks()
        assert len(marks) == (name == "timemark.commit.after"), name
        for mark in marks:
            timemark.delete(ctx, mark.id)
        assert site.is_clean(*pair), name


def test_timemark_delete_killed_at_each_step_is_finished(
    ctx: Context, site: RbdSite, pair: tuple[Volume, Volume], folder: Path
) -> None:
    steps = steps_of(ctx, folder, "delete", director.create(ctx, "shop").id)
    assert "timemark-delete.snapshot-db.done" in steps
    for name in steps:
        mark = director.create(ctx, "shop")
        assert call(ctx, "delete", mark.id, **{CRASH_ENV: name}).status == -signal.SIGKILL, name
        recover(ctx)
        if name == "timemark-delete.begin":  # nothing was to be deleted yet
            timemark.delete(ctx, mark.id)
        assert ctx.catalog.timemarks() == []
        assert site.is_clean(*pair), name
