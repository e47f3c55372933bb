"""What the reflink provider does beyond the contract: errors, identities, btrfs subvolumes."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import (
    BusyError,
    ConfigError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    PolicyError,
    PrivilegeError,
    UnavailableError,
)
from offload.model import Instant, Volume
from offload.run import run
from offload.snapshots import reflink
from offload.snapshots.reflink import ReflinkProvider
from offload.testing.pools import loop_pool, unmount
from offload.testing.snapshot_provider import taken

pytestmark = pytest.mark.needs_root

_INSTANCE = "ireflink00"
_SIZE = 1 << 20


@pytest.fixture
def provider() -> ReflinkProvider:
    return ReflinkProvider(_INSTANCE)


def _volume(path: Path, name: str = "db", content: bytes = b"first") -> Volume:
    path.write_bytes(content)
    os.truncate(path, _SIZE)
    return Volume(name=name, provider="reflink", path=path)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "lost+found")


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """A file system without any room, until the end of the block."""
    ballast = folder / "ballast"
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    for size in (8 << 20, 64 << 10, 4096):
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, bytes(size))
                os.fsync(fd)
    os.close(fd)
    yield
    ballast.unlink()


def _snapshot_until_refused(provider: ReflinkProvider, volume: Volume) -> None:
    """File systems keep a reserve for metadata: use it up."""
    for number in range(100_000):
        plan = provider.plan(f"t{number}", [volume])
        provider.prepare(plan)
        provider.snapshot(plan)


def test_inspect_tells_pool_space_and_extents(provider: ReflinkProvider, xfs_pool: Path) -> None:
    volume = _volume(xfs_pool / "db.img")
    fd = os.open(volume.path, os.O_WRONLY)
    for at in range(8):
        os.pwrite(fd, b"x" * 4096, at * 65536 + 65536)
    os.fsync(fd)
    os.close(fd)
    state = provider.inspect(volume)
    assert state.size_bytes == _SIZE
    assert state.pool == str(xfs_pool)
    assert 900 << 20 < state.pool_size_bytes <= 1 << 30
    assert 0 < state.pool_free_bytes < state.pool_size_bytes
    assert 9 * 4096 <= state.allocated_bytes < _SIZE
    assert state.extents >= 9
    assert _files(xfs_pool) == ["db.img"]


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_inspect_partition_table_tells_the_sector_size(
    provider: ReflinkProvider, xfs_pool: Path, sector_size: int
) -> None:
    volume = _volume(xfs_pool / "db.img")
    with volume.path.open("r+b") as out:
        out.seek(sector_size)
        out.write(b"EFI PART")
    assert provider.inspect(volume).sector_size == sector_size
    with taken(provider, "tsector000", volume) as (snapshot,):
        assert snapshot.sector_size == sector_size
        assert provider.source(snapshot).sector_size == sector_size
    configured = replace(volume, sector_size=4096)
    assert provider.inspect(configured).sector_size == 4096


def test_inspect_made_again_or_remounted_identity_follows_the_file(
    provider: ReflinkProvider, tmp_path: Path
) -> None:
    """A remount gives XFS another device number perhaps; the volume stays the same."""
    with loop_pool(tmp_path, "xfs") as pool:
        volume = _volume(pool / "db.img")
        first, device = provider.inspect(volume).identity, volume.path.stat().st_dev
        unmount(pool)
        with loop_pool(tmp_path / "other", "xfs"):  # takes the loop device
            run(["mount", "-o", "loop", str(tmp_path / "xfs.img"), str(pool)])
            assert volume.path.stat().st_dev != device
            assert provider.inspect(volume).identity == first
        os.truncate(volume.path, 2 * _SIZE)
        assert provider.inspect(volume).identity == first  # the size tells a resize
        volume.path.unlink()
        _volume(pool / "db.img")
        assert provider.inspect(volume).identity != first


def test_changed_made_again_or_resized_is_unknown(
    provider: ReflinkProvider, xfs_pool: Path
) -> None:
    volume = _volume(xfs_pool / "db.img")
    with taken(provider, "tone000000", volume) as (first,):
        os.truncate(volume.path, 2 * _SIZE)
        with taken(provider, "ttwo000000", volume) as (grown,):
            assert (first.size_bytes, grown.size_bytes) == (_SIZE, 2 * _SIZE)
            assert provider.changed(first, grown) is None
        volume.path.unlink()
        _volume(xfs_pool / "db.img")
        with taken(provider, "tthree0000", volume) as (remade,):
            assert provider.changed(first, remade) is None


def test_changed_missing_or_altered_snapshot_is_an_error(
    provider: ReflinkProvider, xfs_pool: Path
) -> None:
    volume = _volume(xfs_pool / "db.img")
    with taken(provider, "tone000000", volume) as (first,):
        with taken(provider, "ttwo000000", volume) as (second,):
            os.truncate(second.ref["path"], _SIZE - 1)
            with pytest.raises(IntegrityError) as altered:
                provider.changed(first, second)
            assert altered.value.code == "snapshot-altered"
        with pytest.raises(NotFoundError) as missing:
            provider.changed(first, second)
        assert missing.value.code == "snapshot-missing"


def test_snapshot_settled_is_read_only_and_owned_by_folders_of_ours(
    provider: ReflinkProvider, xfs_pool: Path
) -> None:
    volume = _volume(xfs_pool / "db.img")
    with taken(provider, "tone000000", volume) as (snapshot,):
        path = Path(snapshot.ref["path"])
        assert path == xfs_pool / ".offload" / _INSTANCE / "tone000000" / "db.raw"
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert _files(xfs_pool) == ["db.img"]


def test_snapshot_dir_configured_stays_when_its_snapshots_go(
    provider: ReflinkProvider, xfs_pool: Path
) -> None:
    volume = replace(_volume(xfs_pool / "db.img"), snapshot_dir=xfs_pool / "snaps")
    with taken(provider, "tone000000", volume) as (snapshot,):
        assert snapshot.ref["path"].startswith(f"{xfs_pool}/snaps/{_INSTANCE}/")
    assert _files(xfs_pool) == ["db.img", "snaps"]


def test_inspect_snapshot_dir_on_another_file_system_is_a_configuration_error(
    provider: ReflinkProvider, xfs_pool: Path, tmp_path: Path
) -> None:
    volume = replace(_volume(xfs_pool / "db.img"), snapshot_dir=tmp_path / "snaps")
    with pytest.raises(ConfigError) as refused:
        provider.inspect(volume)
    assert refused.value.code == "snapshot-dir-elsewhere"
    assert not (tmp_path / "snaps").exists()


def test_inspect_file_system_without_reflink_names_the_way_out(
    provider: ReflinkProvider, ext4_pool: Path, tmp_path: Path
) -> None:
    with loop_pool(tmp_path, "xfs", mkfs_options=("-m", "reflink=0")) as plain_xfs:
        for pool in (ext4_pool, plain_xfs):
            volume = _volume(pool / "db.img")
            with pytest.raises(UnavailableError) as refused:
                provider.inspect(volume)
            assert refused.value.code == "no-reflink"
            assert 'provider = "copy"' in refused.value.hint
            assert not (pool / ".offload").exists()


@pytest.mark.parametrize(("make", "code"), [("mkdir", "not-a-file"), ("touch", "volume-empty")])
def test_inspect_folder_or_empty_file_is_refused(
    provider: ReflinkProvider, xfs_pool: Path, make: str, code: str
) -> None:
    run([make, str(xfs_pool / "db.img")])
    with pytest.raises(UnavailableError) as refused:
        provider.inspect(Volume(name="db", provider="reflink", path=xfs_pool / "db.img"))
    assert refused.value.code == code


def test_inspect_fifo_is_refused_without_waiting_for_its_writer(
    provider: ReflinkProvider, xfs_pool: Path
) -> None:
    os.mkfifo(xfs_pool / "db.img")
    with pytest.raises(UnavailableError):
        provider.inspect(Volume(name="db", provider="reflink", path=xfs_pool / "db.img"))


def test_snapshot_full_pool_is_no_space_and_leaves_nothing(
    provider: ReflinkProvider, tmp_path: Path
) -> None:
    with loop_pool(tmp_path, "xfs", size_bytes=300 << 20) as pool:
        volume = _volume(pool / "db.img")
        with _full(pool):
            with pytest.raises(OffloadError) as refused:
                _snapshot_until_refused(provider, volume)
            assert refused.value.code == "no-space"
            assert provider.inspect(volume).pool_free_bytes < 1 << 20
        for ref in provider.leftovers([volume]):
            provider.delete(ref)
        assert _files(pool) == ["db.img"]


def test_snapshot_existing_file_is_never_overwritten_nor_deleted(
    provider: ReflinkProvider, xfs_pool: Path
) -> None:
    db = _volume(xfs_pool / "db.img")
    web = _volume(xfs_pool / "web.img", "web")
    plan = provider.plan("tone000000", [web, db])
    provider.prepare(plan)
    path = Path(plan.refs[1]["path"])
    path.write_bytes(b"somebody's")
    with pytest.raises(BusyError) as refused:
        provider.snapshot(plan)
    assert refused.value.code == "snapshot-exists"
    assert path.read_bytes() == b"somebody's"
    assert not provider.exists(dict(plan.refs[0]))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "db.raw",
        "/srv/pool/db.img",
        "/srv/pool/.offload/iother0000/tone000000/db.raw",
        f"/srv/pool/.offload/{_INSTANCE}/tone000000/../../db.raw",
        f"/srv/pool/.offload/{_INSTANCE}/tone000000/db.img",
        f"/srv/pool/.offload/{_INSTANCE}/.hidden/db.raw",
        f"/srv/pool/.offload/{_INSTANCE}/tone000000/.raw",
    ],
)
def test_delete_path_that_is_not_ours_is_refused(provider: ReflinkProvider, path: str) -> None:
    with pytest.raises(PolicyError) as refused:
        provider.delete({"path": path})
    assert refused.value.code == "foreign-snapshot"


def test_prepare_link_in_place_of_our_folder_is_refused(
    provider: ReflinkProvider, xfs_pool: Path
) -> None:
    volume = _volume(xfs_pool / "db.img")
    plan = provider.plan("tone000000", [volume])
    (xfs_pool / "elsewhere").mkdir()
    (xfs_pool / ".offload").mkdir()
    (xfs_pool / ".offload" / _INSTANCE).symlink_to(xfs_pool / "elsewhere")
    with pytest.raises(PolicyError) as refused:
        provider.prepare(plan)
    assert refused.value.code == "unsafe-snapshot-dir"


def test_inspect_without_permission_says_so(provider: ReflinkProvider, xfs_pool: Path) -> None:
    volume = _volume(xfs_pool / "db.img")
    volume.path.chmod(0o600)
    code = []
    child = os.fork()
    if child == 0:  # never returns into pytest
        try:
            os.setuid(65534)
            provider.inspect(volume)
        except PrivilegeError:
            os._exit(42)
        finally:
            os._exit(1)
    code.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert code == [42]


def test_snapshot_nodatacow_volume_is_cloned_with_its_flag(
    provider: ReflinkProvider, btrfs_pool: Path
) -> None:
    """`chattr +C` is usual for VM images on btrfs."""
    path = btrfs_pool / "db.img"
    path.touch()
    run(["chattr", "+C", str(path)])
    volume = _volume(path, content=b"nocow")
    with taken(provider, "tone000000", volume) as (snapshot,):
        path.write_bytes(b"later")
        assert Path(snapshot.ref["path"]).read_bytes()[:5] == b"nocow"


def test_plan_one_subvolume_is_one_instant(provider: ReflinkProvider, btrfs_pool: Path) -> None:
    run(["btrfs", "subvolume", "create", str(btrfs_pool / "a")])
    run(["btrfs", "subvolume", "create", str(btrfs_pool / "b")])
    (btrfs_pool / "a" / "deep").mkdir()
    one = _volume(btrfs_pool / "a" / "db.img")
    two = _volume(btrfs_pool / "a" / "deep" / "web.img", "web")
    other = _volume(btrfs_pool / "b" / "log.img", "log")
    assert provider.plan("t1", [one]).instant_alone is Instant.ONE
    assert provider.plan("t1", [one, two]).instant_alone is Instant.ONE
    assert provider.plan("t1", [one, two, other]).instant_alone is Instant.NONE
    with taken(provider, "t1", one, two) as snapshots:
        assert [Path(s.ref["path"]).stat().st_size for s in snapshots] == [_SIZE, _SIZE]
        assert len(run(["btrfs", "subvolume", "list", str(btrfs_pool)]).stdout.splitlines()) == 2
    with taken(provider, "t2", one, two, other) as snapshots:
        assert len(snapshots) == 3


def test_plan_two_files_on_xfs_are_no_instant(provider: ReflinkProvider, xfs_pool: Path) -> None:
    one, two = _volume(xfs_pool / "db.img"), _volume(xfs_pool / "web.img", "web")
    assert provider.plan("t1", [one, two]).instant_alone is Instant.NONE


def test_plan_subvolume_seen_through_a_bind_mount_of_a_folder_is_no_instant(
    provider: ReflinkProvider, btrfs_pool: Path, tmp_path: Path
) -> None:
    """The top of the subvolume, which would have to be snapshot, is out of reach."""
    (btrfs_pool / "inside").mkdir()
    view = tmp_path / "view"
    view.mkdir()
    run(["mount", "--bind", str(btrfs_pool / "inside"), str(view)])
    try:
        one, two = _volume(view / "db.img"), _volume(view / "web.img", "web")
        assert provider.plan("t1", [one, two]).instant_alone is Instant.NONE
        with taken(provider, "t1", one, two) as snapshots:
            assert len(snapshots) == 2
    finally:
        unmount(view)


def test_snapshot_subvolume_of_ordered_writes_keeps_their_order(
    provider: ReflinkProvider, btrfs_pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One writer: a number to the first file, durable, then to the second, durable, and so on.

    It gets time to write between the two clones, too: they come out of one and the same snapshot.
    """
    create = reflink._create

    def _slow(path: Path) -> int:
        time.sleep(0.02)
        return create(path)

    monkeypatch.setattr(reflink, "_create", _slow)
    volumes = (_volume(btrfs_pool / "db.img"), _volume(btrfs_pool / "web.img", "web"))
    stop = threading.Event()

    def _write() -> None:
        fds = [os.open(v.path, os.O_WRONLY) for v in volumes]
        number = 0
        while not stop.is_set():
            number += 1
            for fd in fds:
                os.pwrite(fd, number.to_bytes(8, "big"), 0)
                os.fdatasync(fd)
        for fd in fds:
            os.close(fd)

    writer = threading.Thread(target=_write)
    writer.start()
    try:
        seen = []
        for at in range(12):
            with taken(provider, f"t{at}", *volumes) as snapshots:
                db, web = (
                    int.from_bytes(Path(s.ref["path"]).read_bytes()[:8], "big") for s in snapshots
                )
                assert db - web in {0, 1}
                seen.append(db)
    finally:
        stop.set()
        writer.join()
    assert len(set(seen)) > 6  # the writer was not simply held up
    assert _files(btrfs_pool) == ["db.img", "web.img"]


def test_delete_half_made_subvolume_snapshot_removes_it(
    provider: ReflinkProvider, btrfs_pool: Path
) -> None:
    """What a killed process leaves between the subvolume snapshot and the last clone."""
    volumes = (_volume(btrfs_pool / "db.img"), _volume(btrfs_pool / "web.img", "web"))
    plan = provider.plan("thalf00000", volumes)
    provider.prepare(plan)
    folder = Path(plan.refs[0]["path"]).parent
    run(["btrfs", "subvolume", "snapshot", "-r", str(btrfs_pool), str(folder / ".subvolume")])
    (folder / "db.raw").write_bytes(b"half")
    found = provider.leftovers(volumes[1:])
    assert [ref["path"] for ref in found] == [str(folder / "db.raw")]
    for ref in (found[0], *plan.refs):
        provider.delete(dict(ref))
    assert _files(btrfs_pool) == ["db.img", "web.img"]


def test_snapshot_subvolume_clone_fails_nothing_is_left(
    provider: ReflinkProvider, btrfs_pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = (_volume(btrfs_pool / "db.img"), _volume(btrfs_pool / "web.img", "web"))
    plan = provider.plan("tfails0000", volumes)
    provider.prepare(plan)
    create, made = reflink._create, []

    def _full_at_the_second(path: Path) -> int:
        made.append(path)
        if len(made) == 2:
            raise UnavailableError("no space", code="no-space")
        return create(path)

    monkeypatch.setattr(reflink, "_create", _full_at_the_second)
    with pytest.raises(UnavailableError):
        provider.snapshot(plan)
    folder = made[0].parent
    assert _files(folder) == []
    assert "ID" not in run(["btrfs", "subvolume", "list", str(btrfs_pool)]).stdout


def test_snapshot_through_a_second_mount_of_the_pool_works(
    provider: ReflinkProvider, xfs_pool: Path, tmp_path: Path
) -> None:
    """The pool is told by the mount that the path goes through."""
    point = tmp_path / "again here"
    point.mkdir()
    run(["mount", "--bind", str(xfs_pool), str(point)])
    try:
        volume = _volume(point / "db.img")
        assert provider.inspect(volume).pool == str(point)
        with taken(provider, "tone000000", volume) as (snapshot,):
            assert provider.exists(dict(snapshot.ref))
    finally:
        unmount(point)
