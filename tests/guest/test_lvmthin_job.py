"""The main job on LVM thin: a group held by commands, mounted, backed up, restored, recovered."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload import compose
from offload.errors import PolicyError
from offload.journal import CRASH_ENV
from offload.model import Consistency, Instant, TimeMark
from offload.run import run
from offload.services import director, recover, status, store_init
from offload.services import mount as mounts
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.director import CreateOptions
from offload.services.restore import Request, restore
from offload.services.watch import EventKind, Watch
from offload.testing.thinpool import ThinPool, lvm, lvm_script, thin_pool, udev

pytestmark = pytest.mark.in_guest(timeout_s=2400)

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 24 * MIB
POOL_SIZE = 256 * MIB
CRASH = CreateOptions(consistency=Consistency.CRASH)

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "{min_free}"

[volumes.db]
provider = "lvmthin"
path = "{db}"

[volumes.web]
provider = "lvmthin"
path = "{web}"

[groups.shop]
volumes = ["db", "web"]
[[groups.shop.quiesce]]
kind = "local"
pre = ["{folder}/hold"]
post = ["{folder}/let-go"]

[groups.frozen]
volumes = ["db", "web"]
[[groups.frozen.quiesce]]
kind = "local"
mounts = ["{folder}/db", "{folder}/web"]

[groups.loose]
volumes = ["db", "web"]

[groups.solo]
volumes = ["db"]
consistency = "filesystem"

[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
"""

# Writes one number to both file systems, again and again, but for while it is held.
WRITER = """
number=0
while true; do
    if [[ -e pause ]]; then touch held; while [[ -e pause ]]; do sleep 0.02; done; fi
    number=$((number + 1))
    echo $number >db/number; echo $number >web/number
done
"""
HOLD = "#!/bin/sh\ncd {folder}\nrm -f held\ntouch pause\nuntil [ -e held ]; do sleep 0.02; done\n"
LET_GO = "#!/bin/sh\nrm {folder}/pause\n"


@dataclass
class Site:
    """A thin pool with two mounted volumes and a store."""

    folder: Path
    pool: ThinPool
    volumes: dict[str, Path]
    config: Path

    def configure(self, min_free: str = "0%") -> None:
        text = CONFIG.format(folder=self.folder, min_free=min_free, **self.volumes)
        self.config.write_text(text)
        self.config.chmod(0o600)

    def snapshots(self) -> list[str]:
        return [name for name in self.pool.names() if name.startswith("offload.")]

    def write(self, volume: str, offset: int, data: bytes) -> None:
        """Below the file system: what it is, is no matter here."""
        fd = os.open(self.volumes[volume], os.O_WRONLY)
        os.pwrite(fd, data, offset)
        os.fsync(fd)
        os.close(fd)


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Iterator[None]:
    run(["modprobe", "--all", "dm-thin-pool", "loop"])
    with udev():
        yield


@pytest.fixture(scope="module")
def pool(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    folder = tmp_path_factory.mktemp("pool")
    with thin_pool(folder, size_bytes=POOL_SIZE, metadata_bytes=2 * MIB) as made:
        yield made


@pytest.fixture
def own_pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ThinPool]:
    """The module's, or one of the test's own, where space is what matters: marker `own_pool`."""
    if request.node.get_closest_marker("own_pool") is None:
        yield request.getfixturevalue("pool")
        return
    with thin_pool(tmp_path, size_bytes=POOL_SIZE, metadata_bytes=2 * MIB) as made:
        yield made


@pytest.fixture
def site(own_pool: ThinPool) -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="ofl-", dir="/tmp"))
    with own_pool.lend(SIZE) as db, own_pool.lend(SIZE) as web:
        made = Site(
            folder=folder,
            pool=own_pool,
            volumes={"db": db, "web": web},
            config=folder / "offload.toml",
        )
        made.configure()
        for name, text in (("hold", HOLD), ("let-go", LET_GO)):
            (folder / name).write_text(text.format(folder=folder))
            (folder / name).chmod(0o755)
        yield made
        lvm_script(f"lvremove --yes {own_pool.vg}/{name}" for name in made.snapshots())
    shutil.rmtree(folder)


@pytest.fixture
def ctx(site: Site) -> Iterator[Context]:
    with open_context(site.config) as made:
        yield made
        if made.catalog.views():
            mounts.unmount(made, [], all_views=True, force=True)


@contextmanager
def mounted(site: Site) -> Iterator[None]:
    """ext4 on both, mounted on this host."""
    with ExitStack() as stack:
        for name in ("db", "web"):
            device, point = str(site.volumes[name]), site.folder / name
            run(["mkfs.ext4", "-q", device], timeout_s=300)
            point.mkdir()
            run(["mount", device, str(point)])
            stack.callback(run, ["umount", str(point)])
        yield


@contextmanager
def writing(site: Site) -> Iterator[None]:
    with subprocess.Popen(["/bin/bash", "-c", WRITER], cwd=site.folder) as writer:
        try:
            yield
        finally:
            writer.kill()


def device_of(site: Site, mark: TimeMark, volume: str) -> str:
    snapshot = mark.snapshot(volume)
    assert snapshot is not None
    name = f"{snapshot.ref['vg']}/{snapshot.ref['lv']}"
    run(["lvchange", "--activate", "y", "--ignoreactivationskip", name])
    return f"/dev/{name}"


# -- TimeMarks --------------------------------------------------------------------------------


def test_timemark_of_a_group_that_commands_hold_shows_one_number_in_both(
    site: Site, ctx: Context
) -> None:
    """And each file system is clean: LVM has frozen it."""
    numbers = []
    with mounted(site), writing(site):
        while not (site.folder / "web/number").exists():
            time.sleep(0.1)
        marks = [director.create(ctx, "shop") for _ in range(3)]
        for mark in marks:
            assert (mark.instant, mark.consistency) == (Instant.HELD, Consistency.APPLICATION)
            shown = []
            for volume in ("db", "web"):
                device = device_of(site, mark, volume)
                run(["e2fsck", "-fn", device])
                shown.append(run(["debugfs", "-R", "cat number", device]).stdout)
            assert shown[0] == shown[1] != ""
            numbers.append(int(shown[0]))
    assert numbers == sorted(set(numbers))


def test_timemark_of_one_mounted_volume_is_consistent_without_a_quiescer(
    site: Site, ctx: Context
) -> None:
    with mounted(site):
        mark = director.create(ctx, "solo")
    assert (mark.instant, mark.consistency) == (Instant.ONE, Consistency.FILESYSTEM)
    with pytest.raises(PolicyError) as caught:  # nothing is mounted any more: LVM freezes nothing
        director.create(ctx, "solo")
    assert caught.value.code == "consistency-not-reached"


def test_timemark_whose_mounts_would_be_frozen_twice_is_refused_before_the_freeze(
    site: Site, ctx: Context
) -> None:
    with mounted(site):
        with pytest.raises(PolicyError) as caught:
            director.create(ctx, "frozen")
        assert caught.value.code == "frozen-twice"
        assert "remove their mount points from mounts" in caught.value.hint
        (site.folder / "db/file").write_text("writers go on")
    assert site.snapshots() == []
    assert ctx.journal.leftovers() == []


def test_timemark_of_a_group_that_nothing_holds_is_refused(site: Site, ctx: Context) -> None:
    with pytest.raises(PolicyError) as caught:
        director.create(ctx, "loose")
    assert caught.value.code == "not-atomic"
    assert site.snapshots() == []


# -- the main job -----------------------------------------------------------------------------


def test_job_mount_backup_incremental_and_restore(site: Site, ctx: Context) -> None:
    store_init.init(ctx, "main")
    content = {name: os.urandom(4 * MIB) for name in ("db", "web")}
    for name, data in content.items():
        site.write(name, MIB, data)
    with held(site):
        first = backup(ctx, "shop", "main")
    assert [image.mode for image in first.images] == ["full", "full"]
    site.write("db", 2 * MIB, b"x" * 512)
    run(["blkdiscard", "--offset", str(9 * MIB), "--length", str(MIB), str(site.volumes["db"])])
    with held(site):
        second = backup(ctx, "shop", "main")
    db, web = second.images
    assert (db.mode, db.reason, web.mode, web.reason) == ("incremental", "", "incremental", "")
    assert (db.looked_at_bytes, web.looked_at_bytes) == (BLOCK, 0)
    assert len(site.snapshots()) == 2  # the parents of the next one
    assert site.pool.status().held_root is None
    out = site.folder / "restored"
    out.mkdir()
    restore(ctx, Request(what=second.backup.id, to=str(out)))
    mark = ctx.catalog.timemarks()[-1]
    views = {
        view.origin.partition("/")[2]: view for view in mounts.mount(ctx, [f"timemark:{mark.id}"])
    }
    for name in ("db", "web"):
        live = site.volumes[name].read_bytes()
        assert (out / f"{name}.raw").read_bytes() == live
        shown = site.folder / f"{name}.shown"
        run(["nbdcopy", views[name].uri, str(shown)])
        assert shown.read_bytes() == live
    mounts.unmount(ctx, [], all_views=True)
    assert len(site.snapshots()) == 2


@contextmanager
def held(site: Site) -> Iterator[None]:
    """A writer that has nothing to write answers the commands."""
    with subprocess.Popen(
        ["/bin/bash", "-c", "while true; do [[ ! -e pause ]] || touch held; sleep 0.02; done"],
        cwd=site.folder,
    ) as writer:
        try:
            yield
        finally:
            writer.kill()


def killed(site: Site, place: str, work: Callable[[Context], object]) -> None:
    """Do it in a process that is killed there."""
    pid = os.fork()
    if pid == 0:
        os.environ[CRASH_ENV] = place
        try:
            with open_context(site.config) as ctx:
                work(ctx)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), place
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_killed_timemark_is_taken_back(site: Site, ctx: Context) -> None:
    for place in ("lvmthin.snapshot.1", "lvmthin.snapshot.2", "timemark.settled"):
        with held(site):
            killed(site, place, lambda ctx: director.create(ctx, "shop"))
        assert site.snapshots() != []
        recover.recover(ctx)
        assert site.snapshots() == []
        assert not (site.folder / "pause").exists()
        assert ctx.journal.leftovers() == []


def test_killed_backup_leaves_no_metadata_snapshot(site: Site, ctx: Context) -> None:
    """And the next one is incremental again."""
    store_init.init(ctx, "main")
    with held(site):
        backup(ctx, "shop", "main")
        parents = site.snapshots()
        for place in ("lvmthin.metadata.reserved", "backup.changed.known"):
            killed(site, place, lambda ctx: backup(ctx, "shop", "main"))
            reserved = place == "lvmthin.metadata.reserved"
            assert (site.pool.status().held_root is not None) is reserved
            recover.recover(ctx)
            assert site.pool.status().held_root is None
            assert site.pool.row("pool").tags == ()  # type: ignore[union-attr]
            assert site.snapshots() == parents
        again = backup(ctx, "shop", "main")
    assert [image.mode for image in again.images] == ["incremental", "incremental"]


def test_view_after_a_reboot_is_served_again_from_a_snapshot_that_was_no_device(
    site: Site, ctx: Context
) -> None:
    site.write("db", 0, b"content")
    mark = director.create(ctx, "solo", CRASH)
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    compose.target("nbd", ctx.instance).withdraw(ctx.instance.views_dir / view.id, view.server)
    lvm("vgchange", "--activate", "n", site.pool.vg)
    lvm("vgchange", "--activate", "y", site.pool.vg)
    again = mounts.remount(ctx)
    assert [shown.uri for shown in again.views] == [view.uri]
    done = run(["nbdsh", "-u", view.uri, "-c", "print(h.pread(512, 0)[:7].decode())"])
    assert done.stdout == "content\n"


# -- space ------------------------------------------------------------------------------------


@pytest.mark.own_pool
def test_watch_pool_that_runs_low_loses_timemarks_until_there_is_room(
    site: Site, ctx: Context
) -> None:
    with held(site):
        site.write("db", 0, os.urandom(16 * MIB))
        old = director.create(ctx, "shop")
        site.write("db", 0, os.urandom(16 * MIB))
        new = director.create(ctx, "shop")
    site.configure(min_free=f"{(256 - 16 - 8) * 1024}KiB")
    watch = Watch(lambda: open_context(site.config))
    assert [event.event for event in watch.round()] == [EventKind.RECLAIMED]
    assert [mark.id for mark in ctx.catalog.timemarks()] == [new.id]
    assert old.id not in " ".join(site.snapshots())
    assert watch.round() == []


@pytest.mark.own_pool
def test_timemark_metadata_that_runs_low_is_refused_like_data(site: Site, ctx: Context) -> None:
    number = 1000  # far from those that LVM gives
    while site.pool.status().metadata_free_bytes > MIB * 3 // 4:
        site.pool.message(f"create_thin {number}")
        number += 1
    site.configure(min_free="50%")
    with open_context(site.config) as strict:
        with pytest.raises(PolicyError) as caught:
            director.create(strict, "solo", CRASH)
        assert caught.value.code == "pool-full"
        assert "free for metadata" in caught.value.message
        assert any("free for metadata" in alarm for alarm in status.collect(strict).alarms)
