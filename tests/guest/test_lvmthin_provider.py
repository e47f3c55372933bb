"""The lvmthin provider on a real thin pool: the contract suite, and what LVM and udev add to it."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pytest

from offload import devicemapper
from offload import run as run_module
from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    OffloadError,
    PolicyError,
    PrivilegeError,
    UnavailableError,
)
from offload.extents import Ranges, normalize, subtract
from offload.ids import new_id
from offload.journal import CRASH_ENV
from offload.model import Consistency, Instant, Snapshot, Volume
from offload.run import find_program, run
from offload.snapshot import HoldsForChanged, SnapshotProvider
from offload.snapshots import lvmthin_delta, lvmthin_names, lvmthin_pool, lvmthin_udev
from offload.snapshots.lvmthin import LvmThinProvider
from offload.snapshots.lvmthin_lvm import LogicalVolume
from offload.testing.snapshot_provider import INSTANCE, SnapshotProviderContract, taken
from offload.testing.thinpool import ThinPool, lvm, lvm_script, thin_pool, udev

pytestmark = pytest.mark.in_guest(timeout_s=2400)

MIB = 1 << 20
BLOCK = 64 << 10  # of the pool
SIZE = 8 * MIB
MANY = int(os.environ.get("OFFLOAD_TEST_SNAPSHOTS", "32"))  # of one volume; 255 takes long
QUICK = '--config "backup { backup = 0 archive = 0 }" --noudevsync'


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Iterator[None]:
    run(["modprobe", "--all", "dm-thin-pool", "loop"])
    with udev():
        yield


@pytest.fixture(scope="module")
def pool(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    with thin_pool(tmp_path_factory.mktemp("pool")) as made:
        yield made


@pytest.fixture
def volumes(pool: ThinPool) -> Iterator[tuple[Volume, ...]]:
    with pool.lend(SIZE) as first, pool.lend(SIZE) as second:
        yield volume_of(first), volume_of(second)


@pytest.fixture
def volume(pool: ThinPool) -> Iterator[Volume]:
    with pool.lend(SIZE) as path:
        yield volume_of(path)


@pytest.fixture
def provider() -> LvmThinProvider:
    return LvmThinProvider(INSTANCE)


def add_volume(pool: ThinPool, size_bytes: int = SIZE) -> Volume:
    return volume_of(pool.add(new_id(), size_bytes))


def volume_of(path: Path) -> Volume:
    return Volume(name=path.name, provider="lvmthin", path=path)


def write(volume: Volume, offset: int, data: bytes) -> None:
    """Through to the storage."""
    fd = os.open(volume.path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def take(provider: SnapshotProvider, timemark: str, *volumes: Volume) -> tuple[Snapshot, ...]:
    plan = provider.plan(timemark, volumes)
    provider.prepare(plan)
    made = provider.snapshot(plan)
    provider.settle(made)
    return made


class TestLvmThinProvider(SnapshotProviderContract):
    """The contract."""

    @pytest.fixture
    def provider(self) -> SnapshotProvider:
        return LvmThinProvider(INSTANCE)

    def write(self, volume: Volume, offset: int, data: bytes) -> None:
        write(volume, offset, data)

    @pytest.mark.timeout(900)
    def test_snapshots_255_of_one_volume_all_stay_readable(
        self, provider: SnapshotProvider, volumes: tuple[Volume, ...]
    ) -> None:
        """As in the contract, but most of them are made and deleted by one process of LVM, in the
        way of the provider, and so many only where asked for: each command rewrites what LVM knows
        of all, which is ten minutes of an emulated processor for 255."""
        volume = volumes[0]
        vg, origin = lvmthin_names.place_of(volume)
        tag = lvmthin_names.tag_of(INSTANCE)
        refs = [{"vg": vg, "lv": f"{tag}.tmany{n:05}.{origin}"} for n in range(MANY)]
        made: list[Snapshot] = []
        try:
            for number in (0, 1):
                write(volume, 4096, number.to_bytes(8, "big"))
                made += take(provider, f"tmany{number:05}", volume)
            assert [dict(snapshot.ref) for snapshot in made] == refs[:2]
            write(volume, 4096, (2).to_bytes(8, "big"))
            make = f"lvcreate {QUICK} -s -pr -ky --addtag {tag} {vg}/{origin} -n"
            lvm_script(f"{make} {ref['lv']}" for ref in refs[2:-2])
            for number in (MANY - 2, MANY - 1):
                write(volume, 4096, number.to_bytes(8, "big"))
                made += take(provider, f"tmany{number:05}", volume)
            middle = [replace(made[0], ref=refs[number]) for number in (2, MANY // 2, MANY - 3)]
            shown = [self.read(provider, s, 4096, 8) for s in (*made, *middle)]
            assert [int.from_bytes(data, "big") for data in shown] == [
                0, 1, MANY - 2, MANY - 1, 2, 2, 2
            ]  # fmt: skip
            assert provider.changed(made[0], made[-1]) == [(0, BLOCK)]
            found = provider.leftovers([volume])
            assert sorted(ref["lv"] for ref in found) == [ref["lv"] for ref in refs]
            for snapshot in (*made, *middle):
                provider.delete(dict(snapshot.ref))
            assert len(provider.leftovers([volume])) == MANY - 7
        finally:
            rest = [ref["lv"] for ref in provider.leftovers([volume])]
            lvm_script(f"lvremove {QUICK} -y {vg}/{name}" for name in rest)
        assert provider.leftovers([volume]) == []


# -- what is looked at ------------------------------------------------------------------------


def test_inspect_tells_space_of_data_and_of_metadata(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    before = provider.inspect(volume)
    assert before.pool == f"{pool.vg}/pool"
    assert (before.pool_size_bytes, before.metadata_size_bytes) == (512 * MIB, 8 * MIB)
    assert before.allocated_bytes == 0
    write(volume, 0, os.urandom(4 * MIB))
    after = provider.inspect(volume)
    assert after.allocated_bytes == 4 * MIB
    assert before.pool_free_bytes - after.pool_free_bytes == 4 * MIB
    assert 0 < after.metadata_free_bytes <= before.metadata_free_bytes
    assert not after.freezes_itself


def test_inspect_takes_all_names_of_a_volume(provider: LvmThinProvider, volume: Volume) -> None:
    vg, name = lvmthin_names.place_of(volume)
    paths = [lvmthin_names.device_of(vg, name), volume.path.resolve()]
    states = [provider.inspect(replace(volume, path=path)) for path in (volume.path, *paths)]
    assert states[0] == states[1] == states[2]
    assert str(paths[0]) == f"/dev/mapper/{vg.replace('-', '--')}-{name}"


def test_inspect_volume_made_anew_has_another_identity(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    before = provider.inspect(volume)
    lvm("lvremove", str(volume.path))
    pool.add(volume.path.name, SIZE)
    assert provider.inspect(volume).identity != before.identity


def test_inspect_volume_rolled_back_by_a_merge_has_another_identity(
    provider: LvmThinProvider, volume: Volume
) -> None:
    """LVM gives the origin the snapshot's thin device."""
    before = provider.inspect(volume)
    vg, name = lvmthin_names.place_of(volume)
    lvm("lvcreate", "--snapshot", "--name", f"{name}-old", f"{vg}/{name}")
    lvm("lvconvert", "--merge", f"{vg}/{name}-old")
    assert provider.inspect(volume).identity != before.identity


@pytest.mark.parametrize("kind", ["thick", "pool", "file"])
def test_inspect_what_is_no_thin_volume_is_refused(
    provider: LvmThinProvider, pool: ThinPool, tmp_path: Path, kind: str
) -> None:
    path = Path("/dev") / pool.vg / kind
    if kind == "thick":
        lvm("lvcreate", "--size", "1m", "--name", "thick", pool.vg)
    if kind == "file":
        path = tmp_path / "image"
        path.touch()
    try:
        with pytest.raises(UnavailableError) as caught:
            provider.inspect(Volume(name="v", provider="lvmthin", path=path))
        assert caught.value.code == "not-a-thin-volume"
    finally:
        if kind == "thick":
            lvm("lvremove", f"{pool.vg}/thick")


def test_inspect_missing_volume_group_is_not_found(provider: LvmThinProvider) -> None:
    gone = Volume(name="v", provider="lvmthin", path=Path("/dev/no-such-group/db"))
    with pytest.raises(NotFoundError) as caught:
        provider.inspect(gone)
    assert caught.value.code == "volume-missing"


def test_inspect_inactive_volume_says_how_to_activate_it(
    provider: LvmThinProvider, volume: Volume
) -> None:
    lvm("lvchange", "--activate", "n", str(volume.path))
    with pytest.raises(UnavailableError) as caught:
        provider.inspect(volume)
    assert caught.value.code == "volume-inactive"
    run(caught.value.hint.partition(": ")[2].split())
    assert provider.inspect(volume).size_bytes == SIZE


def test_inspect_suspended_volume_is_busy_instead_of_waiting(
    provider: LvmThinProvider, volume: Volume
) -> None:
    device = str(volume.path)
    run(["dmsetup", "suspend", device])
    try:
        with pytest.raises(BusyError) as caught:
            provider.inspect(volume)
    finally:
        run(["dmsetup", "resume", device])
    assert caught.value.code == "volume-suspended"


def test_inspect_other_sector_size_than_the_device_has_is_refused(
    provider: LvmThinProvider, volume: Volume
) -> None:
    with pytest.raises(ConfigError) as caught:
        provider.inspect(replace(volume, sector_size=4096))
    assert caught.value.code == "sector-size"


def test_inspect_without_root_says_so(
    provider: LvmThinProvider, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(PrivilegeError) as caught:
        provider.inspect(volume)
    assert caught.value.code == "needs-root"


def test_inspect_without_lvm_names_the_package(
    provider: LvmThinProvider, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.run.shutil.which", lambda *_, **__: None)
    with pytest.raises(UnavailableError, match="lvs is not installed") as caught:
        provider.inspect(volume)
    assert (caught.value.code, caught.value.hint) == (
        "program-missing",
        "install it: apt-get install lvm2",
    )


# -- what is made -----------------------------------------------------------------------------


def test_snapshot_is_read_only_tagged_and_skipped_by_activation(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    lvm("lvchange", "--monitor", "y", f"{pool.vg}/pool")
    with taken(provider, "tflags0000", volume) as (snapshot,):
        name = f"{snapshot.ref['vg']}/{snapshot.ref['lv']}"
        assert name == f"{pool.vg}/offload.{INSTANCE}.tflags0000.{volume.name}"
        options = "lv_permissions,lv_skip_activation,lv_active,lv_tags"
        said = run(["lvs", "--noheadings", "--separator", "|", "--options", options, name]).stdout
        assert said.strip().split("|") == [
            "read-only", "skip activation", "", f"offload.{INSTANCE}"
        ]  # fmt: skip
        run(["vgchange", "--activate", "y", pool.vg])  # as at boot
        assert devicemapper.find(str(row_of(pool, snapshot).dm_uuid)) is None
        device = provider.source(snapshot).path
        assert run(["blockdev", "--getro", str(device)]).stdout == "1\n"
        # dmeventd still extends the pool, if it was told to
        said = run(["lvs", "--noheadings", "--options", "seg_monitor", f"{pool.vg}/pool"]).stdout
        assert said.strip() == "monitored"
    lvm("lvchange", "--monitor", "n", f"{pool.vg}/pool")


def row_of(pool: ThinPool, snapshot: Snapshot) -> LogicalVolume:
    row = pool.row(snapshot.ref["lv"])
    assert row is not None
    return row


def test_snapshot_metadata_copy_in_etc_is_made_once_the_writers_go_on(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    copy = Path("/etc/lvm/backup") / pool.vg
    archived = list(Path("/etc/lvm/archive").glob(f"{pool.vg}*"))
    plan = provider.plan("tbackup000", [volume])
    provider.prepare(plan)
    made = provider.snapshot(plan)
    row = f"{plan.refs[0]['lv']} {{"
    assert not copy.exists() or row not in copy.read_text()
    provider.settle(made)
    assert row in copy.read_text()
    provider.delete(dict(plan.refs[0]))
    assert row not in copy.read_text()
    assert list(Path("/etc/lvm/archive").glob(f"{pool.vg}*")) == archived


def test_snapshot_volume_name_that_lvm_keeps_for_itself_is_hashed(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    odd = replace(volume, name="db_tmeta")
    with taken(provider, "todd000000", odd) as (snapshot,):
        assert "_" not in snapshot.ref["lv"]
        assert provider.leftovers([odd]) == [dict(snapshot.ref)]


def check_in_step(pool: ThinPool) -> None:
    assert row_of_pool(pool).transaction_id == pool.status().transaction_id


def test_snapshot_origin_suspended_in_between_is_busy_and_leaves_nothing(
    provider: LvmThinProvider, pool: ThinPool, volumes: tuple[Volume, ...]
) -> None:
    plan = provider.plan("tsuspend00", volumes)
    provider.prepare(plan)
    run(["dmsetup", "suspend", str(volumes[1].path)])
    try:
        with pytest.raises(BusyError) as caught:
            provider.snapshot(plan)
    finally:
        run(["dmsetup", "resume", str(volumes[1].path)])
    assert caught.value.code == "volume-suspended"
    assert provider.leftovers(volumes) == []
    check_in_step(pool)


def test_delete_snapshot_that_lvcreate_said_it_made_and_had_not(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    """Of an origin that somebody else had suspended: LVM's count runs away from the pool's."""
    (ref,) = provider.plan("tsaid00000", [volume]).refs
    run(["dmsetup", "suspend", str(volume.path)])
    run(
        ["lvcreate", "--snapshot", "--setactivationskip", "y", "--addtag", f"offload.{INSTANCE}",
         "--name", ref["lv"], str(volume.path)]
    )  # fmt: skip
    run(["dmsetup", "resume", str(volume.path)])
    assert row_of_pool(pool).transaction_id == pool.status().transaction_id + 1
    provider.delete(ref)
    check_in_step(pool)
    write(volume, 0, b"writers go on")
    with taken(provider, "tafter0000", volume):
        pass


def test_prepare_pool_out_of_step_is_refused(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    count = pool.status().transaction_id
    pool.message(f"set_transaction_id {count} {count + 1}")
    try:
        with pytest.raises(UnavailableError) as caught:
            provider.prepare(provider.plan("tstep00000", [volume]))
        assert caught.value.code == "pool-out-of-step"
    finally:
        pool.message(f"set_transaction_id {count + 1} {count}")


def test_snapshot_of_one_volume_is_one_instant_of_two_it_is_not(
    provider: LvmThinProvider, volumes: tuple[Volume, ...]
) -> None:
    assert provider.plan("tone000000", volumes[:1]).instant_alone is Instant.ONE
    assert provider.plan("ttwo000000", volumes).instant_alone is Instant.NONE


@contextmanager
def mounted(volume: Volume, folder: Path, kind: str = "ext4") -> Iterator[Path]:
    run([f"mkfs.{kind}", "-q", str(volume.path)], timeout_s=300)
    point = folder / "mnt"
    point.mkdir()
    run(["mount", str(volume.path), str(point)])
    try:
        yield point
    finally:
        run(["umount", str(point)])


def test_snapshot_of_a_file_system_mounted_here_is_clean(
    provider: LvmThinProvider, volume: Volume, tmp_path: Path
) -> None:
    """LVM froze it: nothing is left in its journal, without any quiescer."""
    with mounted(volume, tmp_path) as point:
        assert provider.inspect(volume).freezes_itself
        plan = provider.plan("tmount0000", [volume])
        assert plan.consistency == (Consistency.FILESYSTEM,)
        provider.prepare(plan)
        (point / "file").write_text("not flushed by anybody")
        (snapshot,) = provider.snapshot(plan)
        device = str(provider.source(snapshot).path)
        assert "needs_recovery" in run(["dumpe2fs", "-h", str(volume.path)]).stdout
        assert "needs_recovery" not in run(["dumpe2fs", "-h", device]).stdout
        run(["e2fsck", "-fn", device])
        shown = run(["debugfs", "-R", "cat file", device]).stdout
        assert shown == "not flushed by anybody"
        provider.delete(dict(snapshot.ref))
    assert provider.plan("tmount0000", [volume]).consistency == (Consistency.CRASH,)


def test_snapshot_file_system_unmounted_in_between_is_an_error(
    provider: LvmThinProvider, volume: Volume, tmp_path: Path
) -> None:
    """The consistency that was promised is not there."""
    with mounted(volume, tmp_path):
        plan = provider.plan("tgone00000", [volume])
    with pytest.raises(UnavailableError) as caught:
        provider.snapshot(plan)
    assert caught.value.code == "file-system-gone"
    assert provider.leftovers([volume]) == []


def test_snapshot_of_a_frozen_file_system_is_busy_and_leaves_nothing(
    provider: LvmThinProvider, volume: Volume, tmp_path: Path
) -> None:
    with mounted(volume, tmp_path) as point:
        plan = provider.plan("tfrozen000", [volume])
        run(["fsfreeze", "--freeze", str(point)])
        try:
            with pytest.raises(BusyError) as caught:
                provider.snapshot(plan)
        finally:
            run(["fsfreeze", "--unfreeze", str(point)])
        assert caught.value.code == "volume-frozen"
        assert provider.leftovers([volume]) == []
        (point / "file").write_text("writers go on")


def test_snapshot_active_one_takes_no_link_of_its_origin(
    provider: LvmThinProvider, volume: Volume
) -> None:
    """And would, without the rule."""
    run(["mkfs.ext4", "-q", str(volume.path)], timeout_s=300)
    found = run(["blkid", "--probe", "-o", "value", "-s", "UUID", str(volume.path)]).stdout.strip()
    link = Path("/dev/disk/by-uuid") / found
    run(["udevadm", "trigger", "--settle", str(volume.path)])
    assert link.resolve() == volume.path.resolve()
    with taken(provider, "tlinks0000", volume) as (snapshot,):
        device = provider.source(snapshot).path
        run(["udevadm", "settle"])
        assert device.resolve() != volume.path.resolve()
        assert link.resolve() == volume.path.resolve()
        (Path("/run/udev/rules.d") / lvmthin_udev.NAME).unlink()
        run(["udevadm", "control", "--reload"])
        name = f"{snapshot.ref['vg']}/{snapshot.ref['lv']}"
        lvm("lvchange", "--activate", "n", name)
        lvm("lvchange", "--activate", "y", "--ignoreactivationskip", name)
        assert link.resolve() == device.resolve()


def test_source_after_a_reboot_activates_the_snapshot_again(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    data = os.urandom(4096)
    write(volume, 0, data)
    with taken(provider, "treboot000", volume) as (snapshot,):
        assert provider.source(snapshot).path.read_bytes()[:4096] == data
        run(["vgchange", "--activate", "n", pool.vg])
        run(["vgchange", "--activate", "y", pool.vg])
        device = provider.source(snapshot).path
        assert device.is_block_device()
        with device.open("rb") as opened:
            assert opened.read(4096) == data


# -- what is deleted --------------------------------------------------------------------------


def test_delete_snapshot_that_is_open_is_busy_and_stays(
    provider: LvmThinProvider, volume: Volume
) -> None:
    with taken(provider, "topen00000", volume) as (snapshot,):
        with provider.source(snapshot).path.open("rb"), pytest.raises(BusyError) as caught:
            provider.delete(dict(snapshot.ref))
        assert caught.value.code == "snapshot-in-use"
        assert provider.exists(dict(snapshot.ref))


@pytest.mark.parametrize(
    "name",
    ["db", "offload.another.t1.db", f"offload.{INSTANCE}.t1", f"offload.{INSTANCE}..db", "-a", ""],
)
def test_delete_what_is_not_of_our_scheme_is_refused(provider: LvmThinProvider, name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        provider.delete({"vg": "vg", "lv": name})
    assert caught.value.code == "foreign-snapshot"


def test_delete_volume_of_our_name_without_our_tag_is_refused(
    provider: LvmThinProvider, pool: ThinPool
) -> None:
    ref = {"vg": pool.vg, "lv": f"offload.{INSTANCE}.tmine00000.db"}
    pool.add(ref["lv"], MIB)
    with pytest.raises(PolicyError):
        provider.delete(ref)
    assert ref["lv"] in pool.names()
    lvm("lvremove", f"{ref['vg']}/{ref['lv']}")


def test_delete_finds_what_a_probe_left(provider: LvmThinProvider, volume: Volume) -> None:
    """A process that died in the milliseconds in which it had the thin device open."""
    with taken(provider, "tprobe0000", volume) as (snapshot,):
        probe = lvmthin_pool.probe_name(snapshot.ref["vg"], snapshot.ref["lv"])
        run(["dmsetup", "create", "--notable", probe])
        provider.delete(dict(snapshot.ref))
        assert probe not in run(["dmsetup", "ls"]).stdout


STAGES = ("ordered", "suspended", "made", "counted", "resumed")


def trace_lvcreate(folder: Path, *options: str) -> str:
    """A PATH in which lvcreate runs under strace."""
    script = folder / "lvcreate"
    trace = f"{find_program('strace')} -o {folder}/trace -e trace=ioctl {' '.join(options)}"
    script.write_text(f'#!/bin/sh\nexec {trace} /sbin/lvcreate "$@"\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def stages(pool: ThinPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The number of the ioctl at which lvcreate has come so far. Of a group with one volume."""
    folder = tmp_path_factory.mktemp("traced")
    origin = add_volume(pool)
    run(
        ["lvcreate", "--snapshot", "--setactivationskip", "y", "--name", "traced",
         "--noudevsync", "--ignoremonitoring", str(origin.path)],
        env={"PATH": trace_lvcreate(folder)},
    )  # fmt: skip
    lvm("lvremove", f"{pool.vg}/traced", str(origin.path))
    lines = list(enumerate((folder / "trace").read_text().splitlines(), 1))
    suspend, resume = [number for number, line in lines if "DM_DEV_SUSPEND" in line]
    tell, count = [number for number, line in lines if "DM_TARGET_MSG" in line]
    numbers = (suspend, suspend + 1, tell + 1, count + 1, resume + 1)
    return dict(zip(STAGES, numbers, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_delete_puts_right_what_a_killed_lvcreate_left(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume, stages: dict[str, int], stage: str
) -> None:
    """At every stage of it: writers go on, the snapshot is gone, LVM and the pool agree."""
    before = pool.status().transaction_id
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        kill = f"inject=ioctl:signal=KILL:when={stages[stage]}"
        patched.setenv("PATH", trace_lvcreate(Path(folder), "-e", kill))
        with pytest.raises(OffloadError):
            provider.snapshot(provider.plan("tkilled000", [volume]))
    assert provider.leftovers([volume]) == []
    device = devicemapper.find_named(lvmthin_names.mapper_name(pool.vg, volume.path.name))
    assert device is not None
    assert not device.suspended
    check_in_step(pool)
    assert pool.status().transaction_id > before
    write(volume, 0, b"writers go on")
    with taken(provider, "tnext00000", volume):
        pass


# -- what changed -----------------------------------------------------------------------------


def compared(provider: LvmThinProvider, older: Snapshot, newer: Snapshot) -> Ranges:
    """Blocks of the pool's size that differ, by reading both."""
    old, new = (provider.source(snapshot).path.read_bytes() for snapshot in (older, newer))
    return normalize(
        (at, at + BLOCK)
        for at in range(0, SIZE, BLOCK)
        if old[at : at + BLOCK] != new[at : at + BLOCK]
    )


@pytest.mark.parametrize("seed", range(2))
def test_changed_holds_all_that_a_comparison_finds(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume, seed: int
) -> None:
    """Writes of any size, discards, snapshots in between that stay and that go."""
    dice = random.Random(seed)
    kept: list[Snapshot] = []
    for number in range(5):
        for _ in range(dice.randrange(6)):
            at = dice.randrange(SIZE // 4096) * 4096
            length = min(dice.choice([4096, 20480, BLOCK, 5 * BLOCK]), SIZE - at)
            if dice.random() < 0.3:
                run(["blkdiscard", "--offset", str(at), "--length", str(length), str(volume.path)])
            else:
                write(volume, at, dice.randbytes(length))
        kept += take(provider, f"tchanged{number:02}", volume)
        if number == 2:
            provider.delete(dict(kept.pop(1).ref))
    pairs = [(kept[0], kept[1]), (kept[-2], kept[-1]), (kept[0], kept[-1])]
    for older, newer in pairs:
        changed = provider.changed(older, newer)
        assert changed is not None
        found = compared(provider, older, newer)
        assert subtract(found, changed) == []
    assert pool.status().held_root is None
    for snapshot in kept:
        provider.delete(dict(snapshot.ref))


def test_changed_is_no_more_than_the_blocks_that_were_written(
    provider: LvmThinProvider, volume: Volume
) -> None:
    write(volume, 0, os.urandom(SIZE))
    with taken(provider, "tolder0000", volume) as (older,):
        write(volume, 3 * BLOCK + 100, b"x")
        run(["blkdiscard", "--offset", str(9 * BLOCK), "--length", str(BLOCK), str(volume.path)])
        with taken(provider, "tnewer0000", volume) as (newer,):
            assert provider.changed(older, newer) == [
                (3 * BLOCK, 4 * BLOCK), (9 * BLOCK, 10 * BLOCK)
            ]  # fmt: skip


def test_changed_last_block_that_is_cut_off_stays_inside_the_volume(
    provider: LvmThinProvider, pool: ThinPool
) -> None:
    name = new_id()
    odd = Volume(name=name, provider="lvmthin", path=pool.add(name, MIB))
    size = MIB
    with taken(provider, "tolder0000", odd) as (older,):
        write(odd, size - 4096, b"x" * 4096)
        with taken(provider, "tnewer0000", odd) as (newer,):
            assert provider.changed(older, newer) == [(size - BLOCK, size)]
    lvm("lvremove", str(odd.path))


def test_changed_resized_volume_is_unknown(provider: LvmThinProvider, volume: Volume) -> None:
    with taken(provider, "tolder0000", volume) as (older,):
        lvm("lvextend", "--size", "+1m", str(volume.path))
        with taken(provider, "tnewer0000", volume) as (newer,):
            assert newer.identity == older.identity
            assert provider.changed(older, newer) is None


def test_changed_older_snapshot_gone_is_not_found(
    provider: LvmThinProvider, volume: Volume
) -> None:
    with taken(provider, "tolder0000", volume) as (older,):
        pass
    with taken(provider, "tnewer0000", volume) as (newer,), pytest.raises(NotFoundError) as caught:
        provider.changed(older, newer)
    assert caught.value.code == "snapshot-missing"


@contextmanager
def two(provider: LvmThinProvider, volume: Volume) -> Iterator[tuple[Snapshot, Snapshot]]:
    with taken(provider, "tolder0000", volume) as (older,):
        write(volume, BLOCK, b"x")
        with taken(provider, "tnewer0000", volume) as (newer,):
            yield older, newer


def test_provider_says_that_changed_holds_something(provider: LvmThinProvider) -> None:
    """So that the backup journals it."""
    assert isinstance(provider, HoldsForChanged)


def test_changed_metadata_snapshot_of_somebody_else_is_unknown_and_stays(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume, caplog: pytest.LogCaptureFixture
) -> None:
    with two(provider, volume) as (older, newer):
        pool.message("reserve_metadata_snap")
        try:
            held = pool.status().held_root
            assert held is not None
            assert provider.changed(older, newer) is None
            provider.release_changed(provider.changed_undo(newer))
            assert pool.status().held_root == held
        finally:
            pool.message("release_metadata_snap")
        assert "another program holds the metadata snapshot" in caplog.text
        assert provider.changed(older, newer) == [(BLOCK, 2 * BLOCK)]


@pytest.mark.parametrize("place", ["tagged", "reserved", "released"])
def test_changed_killed_process_leaves_nothing_after_release(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume, place: str
) -> None:
    with two(provider, volume) as (older, newer):
        args = provider.changed_undo(newer)
        killed(provider, older, newer, f"lvmthin.metadata.{place}")
        assert (pool.status().held_root is not None) is (place == "reserved")
        assert (lvmthin_delta.TAG in row_of_pool(pool).tags) is (place != "released")
        provider.release_changed(args)
        assert pool.status().held_root is None
        assert row_of_pool(pool).tags == ()
        provider.release_changed(args)


def row_of_pool(pool: ThinPool) -> LogicalVolume:
    row = pool.row("pool")
    assert row is not None
    return row


def killed(provider: LvmThinProvider, older: Snapshot, newer: Snapshot, place: str) -> None:
    """`changed` in a process that is killed there."""
    pid = os.fork()
    if pid == 0:
        os.environ[CRASH_ENV] = place
        provider.changed(older, newer)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)


def test_changed_after_a_killed_process_takes_its_metadata_snapshot_back_first(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    with two(provider, volume) as (older, newer):
        killed(provider, older, newer, "lvmthin.metadata.reserved")
        assert provider.changed(older, newer) == [(BLOCK, 2 * BLOCK)]
        assert pool.status().held_root is None
        assert row_of_pool(pool).tags == ()


def test_changed_at_the_same_time_waits_its_turn(
    provider: LvmThinProvider, pool: ThinPool, volume: Volume
) -> None:
    with two(provider, volume) as (older, newer), ThreadPoolExecutor(3) as crew:
        said = list(crew.map(lambda _: provider.changed(older, newer), range(3)))
    assert said == [[(BLOCK, 2 * BLOCK)]] * 3


def test_changed_without_thin_delta_is_unknown_and_says_so(
    provider: LvmThinProvider,
    volume: Volume,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    find = run_module.find_program
    with two(provider, volume) as (older, newer):
        monkeypatch.setattr(
            run_module, "find_program", lambda name: None if name == "thin_delta" else find(name)
        )
        assert provider.changed(older, newer) is None
    assert "apt-get install thin-provisioning-tools" in caplog.text


# -- a pool that runs full --------------------------------------------------------------------


def test_pool_out_of_data_is_looked_at_but_takes_no_snapshot_until_there_is_room(
    provider: LvmThinProvider, tmp_path: Path
) -> None:
    """So that deleting TimeMarks can make that room."""
    with thin_pool(tmp_path, size_bytes=4 * MIB, metadata_bytes=2 * MIB) as small:
        lvm("lvchange", "--errorwhenfull", "y", f"{small.vg}/pool")
        volume = Volume(name="db", provider="lvmthin", path=small.add("db", 4 * MIB))
        write(volume, 0, os.urandom(3 * MIB))
        (old,) = take(provider, "told000000", volume)
        with pytest.raises(OSError, match=r"Input/output error|No space left"):
            write(volume, 0, os.urandom(2 * MIB))
        assert small.status().out_of_data
        assert provider.inspect(volume).pool_free_bytes == 0
        with pytest.raises(UnavailableError) as caught:
            provider.prepare(provider.plan("tnew000000", [volume]))
        assert caught.value.code == "pool-out-of-data"
        provider.delete(dict(old.ref))
        assert provider.inspect(volume).pool_free_bytes > 0
        with taken(provider, "tnew000000", volume):
            pass


def test_snapshot_metadata_that_is_nearly_full_is_refused_by_lvm_and_leaves_nothing(
    provider: LvmThinProvider, tmp_path: Path
) -> None:
    with thin_pool(tmp_path, size_bytes=64 * MIB, metadata_bytes=2 * MIB) as small:
        volume = Volume(name="db", provider="lvmthin", path=small.add("db", 32 * MIB))
        ids = count(1000)  # far from those that LVM gives
        while (state := provider.inspect(volume)).metadata_free_bytes > MIB // 2:
            for thin_id in islice(ids, 50):
                small.message(f"create_thin {thin_id}")
        assert 0 < state.metadata_free_bytes <= MIB // 2
        with pytest.raises(UnavailableError) as caught:
            take(provider, "tfull00000", volume)
        assert caught.value.code == "no-space"
        assert provider.leftovers([volume]) == []
