"""The disk store: the contract, and what is its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.errors import UnavailableError
from offload.stores import disk
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.store import ExclusiveStoreContract


class TestDiskStore(ExclusiveStoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path)

    def open(self, url: str) -> DiskStore:
        return DiskStore(StoreSpec(url=url))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    made = DiskStore(StoreSpec(url=str(tmp_path)))
    yield made
    made.close()


def _files(store: DiskStore) -> list[str]:
    return sorted(
        p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file()
    )


def test_put_leaves_no_temporary_file_and_a_read_only_object(store: DiskStore) -> None:
    store.put("packs/ab/x", [b"data"])
    assert _files(store) == ["packs/ab/x"]
    assert (store.root / "packs/ab/x").stat().st_mode & 0o777 == 0o400


def test_put_that_fails_while_writing_leaves_nothing(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UnavailableError) as caught:
            store.put("packs/ab/x", [b"data"])
    assert caught.value.code == "store-unavailable"
    assert _files(store) == []
    store.put("packs/ab/x", [b"data"])


def test_put_makes_every_new_folder_durable(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(disk, "fsync_folder", synced.append)
    store.put("packs/ab/x", [b"data"])
    root = store.root
    assert {root, root / "packs", root / "packs" / "ab"} <= set(synced)


def test_sweep_removes_only_what_it_is_told(store: DiskStore) -> None:
    folder = store.root / "tmp"
    folder.mkdir()
    for name in ("packs_ab_abcdefghjk-000001.x", "packs_cd_cdefghjkmn-000001.y"):
        (folder / name).touch()
    os.utime(folder / "packs_ab_abcdefghjk-000001.x", (0, 0))
    assert store.sweep("abcdefghjk", min_age_s=1e12) == 0
    assert store.sweep("", min_age_s=3600) == 1
    assert store.sweep("cdefghjkmn") == 1
    assert store.sweep("") == 0
    assert _files(store) == []


@pytest.mark.parametrize("name", ["tmp/x", "lock", "tmp"])
def test_names_that_the_store_uses_itself_are_refused(store: DiskStore, name: str) -> None:
    with pytest.raises(ValueError, match="no object name"):
        store.put(name, [b"x"])


def test_missing_store_folder_is_unavailable_and_never_an_empty_list(tmp_path: Path) -> None:
    store = DiskStore(StoreSpec(url=str(tmp_path / "unmounted")))
    for ask in (
        lambda: list(store.list("manifests/")),
        lambda: store.get("store.json"),
        store.space_bytes,
    ):
        with pytest.raises(UnavailableError) as caught:
            ask()
        assert caught.value.code == "store-unavailable"


def test_list_of_a_folder_that_cannot_be_read_is_an_error(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("packs/ab/x", [b"x"])
    real = os.scandir

    def broken(path: str | Path) -> object:
        if str(path).endswith("ab"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(UnavailableError):
        list(store.list("packs/"))


@pytest.mark.needs_root
def test_put_on_a_full_file_system_leaves_nothing_and_says_so(ext4_pool: Path) -> None:
    folder = ext4_pool / "store"
    folder.mkdir()
    store = DiskStore(StoreSpec(url=str(folder)))
    try:
        space = store.space_bytes()
        assert space is not None
        with pytest.raises(UnavailableError) as caught:
            store.put("packs/ab/big", [bytes(1 << 20)] * (space[1] // (1 << 20) + 1))
        assert caught.value.code == "no-space"
        assert _files(store) == []
        again = store.space_bytes()
        assert again is not None
        assert again[0] > space[0] * 0.9
        store.put("packs/ab/small", [bytes(1000)])
    finally:
        store.close()
