"""What the copy provider does beyond the contract."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import PolicyError, UnavailableError
from offload.model import Instant, Volume
from offload.snapshots import copy as copy_module
from offload.snapshots.copy import CopyProvider
from offload.testing.snapshot_provider import taken

_SIZE = 8 << 20


@pytest.fixture
def provider() -> CopyProvider:
    return CopyProvider("icopy00000")


def _volume(path: Path, name: str = "db") -> Volume:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.ftruncate(fd, _SIZE + 100)
    for at in (0, 1 << 20, 5 << 20, _SIZE):
        os.pwrite(fd, os.urandom(100), at)
    os.fsync(fd)
    os.close(fd)
    return Volume(name=name, provider="copy", path=path)


def _tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "lost+found")


def test_snapshot_is_equal_and_sparse(provider: CopyProvider, tmp_path: Path) -> None:
    volume = _volume(tmp_path / "db.img")
    with taken(provider, "tone000000", volume) as (snapshot,):
        made = Path(snapshot.ref["path"])
        assert made.read_bytes() == volume.path.read_bytes()
        assert made.stat().st_blocks <= volume.path.stat().st_blocks
        assert made.stat().st_mode & 0o777 == 0o400


def test_plan_single_volume_is_no_instant_and_needs_its_space(
    provider: CopyProvider, tmp_path: Path
) -> None:
    volume = _volume(tmp_path / "db.img")
    assert provider.plan("tone000000", [volume]).instant_alone is Instant.NONE
    state = provider.inspect(volume)
    assert state.needed_bytes >= state.allocated_bytes >= 4 * 100
    assert state.allocated_bytes < _SIZE


@pytest.mark.needs_root
def test_snapshot_dir_on_another_file_system_is_the_pool(
    provider: CopyProvider, ext4_pool: Path, tmp_path: Path
) -> None:
    volume = replace(_volume(tmp_path / "db.img"), snapshot_dir=ext4_pool / "snaps")
    state = provider.inspect(volume)
    assert state.pool == str(ext4_pool)
    assert state.pool_size_bytes < 64 << 20
    with taken(provider, "tone000000", volume) as (snapshot,):
        assert Path(snapshot.ref["path"]).read_bytes() == volume.path.read_bytes()


@pytest.mark.needs_root
def test_inspect_made_again_with_the_same_inode_is_another_volume(
    provider: CopyProvider, ext4_pool: Path
) -> None:
    """ext4 gives the inode of a deleted file to the next one."""
    volume = _volume(ext4_pool / "db.img")
    inode, identity = volume.path.stat().st_ino, provider.inspect(volume).identity
    volume.path.unlink()
    _volume(ext4_pool / "db.img")
    assert volume.path.stat().st_ino == inode
    assert provider.inspect(volume).identity != identity


def test_snapshot_no_copy_file_range_falls_back_to_reads_and_writes(
    provider: CopyProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _none(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", _none)
    volume = _volume(tmp_path / "db.img")
    with taken(provider, "tone000000", volume) as (snapshot,):
        assert Path(snapshot.ref["path"]).read_bytes() == volume.path.read_bytes()


@pytest.mark.needs_root
def test_snapshot_full_pool_is_no_space_and_leaves_nothing(
    provider: CopyProvider, ext4_pool: Path, tmp_path: Path
) -> None:
    """The first volume fits, the second does not: neither is left."""
    small = replace(_volume(tmp_path / "small.img", "small"), snapshot_dir=ext4_pool)
    large = replace(_volume(tmp_path / "large.img", "large"), snapshot_dir=ext4_pool)
    with large.path.open("r+b") as out:
        for _ in range(100):
            out.write(os.urandom(1 << 20))
    plan = provider.plan("tfull00000", [small, large])
    provider.prepare(plan)
    with pytest.raises(UnavailableError) as refused:
        provider.snapshot(plan)
    assert refused.value.code == "no-space"
    assert [name for name in _tree(ext4_pool) if not (ext4_pool / name).is_dir()] == []
    for ref in plan.refs:
        provider.delete(dict(ref))
    assert _tree(ext4_pool) == []


def test_snapshot_shrinking_volume_is_refused(
    provider: CopyProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = _volume(tmp_path / "db.img")
    real = copy_module._copy_some

    def _shrink(source: int, target: int, at: int, length: int) -> int:
        os.truncate(volume.path, 2 << 20)
        return real(source, target, at, length)

    monkeypatch.setattr(copy_module, "_copy_some", _shrink)
    plan = provider.plan("tone000000", [volume])
    provider.prepare(plan)
    with pytest.raises(UnavailableError) as refused:
        provider.snapshot(plan)
    assert refused.value.code == "volume-replaced"
    assert not any(provider.exists(dict(ref)) for ref in plan.refs)


def test_delete_half_made_copy_removes_it(provider: CopyProvider, tmp_path: Path) -> None:
    """What a killed process leaves in the middle of a copy."""
    volume = _volume(tmp_path / "db.img")
    plan = provider.plan("thalf00000", [volume])
    provider.prepare(plan)
    whole = Path(plan.refs[0]["path"])
    whole.with_name(whole.name + ".part").write_bytes(b"half")
    assert not provider.exists(dict(plan.refs[0]))
    assert provider.leftovers([volume]) == list(plan.refs)
    provider.delete(dict(plan.refs[0]))
    assert _tree(tmp_path) == ["db.img"]


def test_leftovers_of_clones_beside_copies_are_not_named(
    provider: CopyProvider, tmp_path: Path
) -> None:
    """Both providers of one instance may use one folder: each answers for its own files."""
    volume = _volume(tmp_path / "db.img")
    with taken(provider, "tone000000", volume) as (snapshot,):
        clone = Path(snapshot.ref["path"]).with_name("web.raw")
        clone.write_bytes(b"a clone")
        assert provider.leftovers([volume]) == [dict(snapshot.ref)]
        with pytest.raises(PolicyError):
            provider.delete({"path": str(clone)})
        clone.unlink()
