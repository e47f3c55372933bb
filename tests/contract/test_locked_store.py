"""A store under object lock is a store like any other, and shows no less than what is locked."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from offload import compose
from offload.errors import ConfigError, NotFoundError, PolicyError, UnavailableError
from offload.objectlock import Locking, LockRules
from offload.store import Store
from offload.stores.s3_lock import LockedStore
from offload.stores.s3_past import PastStore
from offload.storespec import StoreSpec
from offload.testing.rgw import REGION, RunningRgw
from offload.testing.store import StoreContract

RULES = LockRules(mode="compliance", retain_s=600, generation_s=600, max_s=7200)


def _spec(rgw: RunningRgw, bucket: str) -> StoreSpec:
    options = {
        "endpoint": rgw.endpoint,
        "region": REGION,
        "path_style": "yes",
        "credentials_file": str(rgw.credentials_file),
        "retry_for": "5",
    }
    return StoreSpec(url=f"s3://{bucket}/p", options=options | RULES.options())


class TestLockedStore(StoreContract):
    """Ceph's gateway ignores conditions in buckets with versions."""

    refuses_taken_names = False

    @pytest.fixture(autouse=True)
    def _server(self, rgw: RunningRgw) -> None:
        self.rgw = rgw

    @pytest.fixture
    def url(self, rgw: RunningRgw) -> str:
        return rgw.new_bucket(locked=True)

    def open(self, url: str) -> Store:
        return compose.open_store(_spec(self.rgw, url))


@pytest.fixture
def store(rgw: RunningRgw) -> Iterator[LockedStore]:
    made = compose.open_store(_spec(rgw, rgw.new_bucket(locked=True)))
    assert isinstance(made, LockedStore)
    assert isinstance(made, Locking)
    yield made
    made.close()


def test_manifest_that_was_overwritten_and_hidden_is_read_as_it_was_put(store: LockedStore) -> None:
    name = "manifests/abcdefghjk"
    until = (store.clock() + timedelta(minutes=5)).replace(microsecond=0)
    store.put(name, [b"good"], retain_until=until)
    first = store.originals([name])[name]
    for number in range(3):
        store.inner.put(name, [b"bad %d" % number])
        store.inner.delete(name)
    assert store.get(name) == b"good"
    assert store.get_range(name, 1, 2) == b"oo"
    assert store.size(name) == 4
    assert store.exists(name)
    assert list(store.list("manifests/")) == [name]
    assert store.locked_until(first) == until
    with pytest.raises(PolicyError) as caught:
        store.delete(name)
    assert caught.value.code == "object-locked"


def test_manifest_without_lock_that_was_deleted_is_gone(store: LockedStore) -> None:
    """Whether it ended or never was: a delete marker counts then."""
    name = "manifests/abcdefghjk"
    store.put(name, [b"x"])
    store.delete(name)
    assert not store.exists(name)
    assert list(store.list("manifests/")) == []
    with pytest.raises(NotFoundError):
        store.get(name)


def test_pack_that_is_gone_or_cut_is_read_from_its_original(store: LockedStore) -> None:
    for name, spoil in (
        ("packs/ab/abcdefghjk-000001", store.inner.delete),
        ("packs/ab/abcdefghjk-000002", lambda name: store.inner.put(name, [b"x"])),
    ):
        store.put(name, [b"0123456789"])
        spoil(name)
        assert store.get_range(name, 5, 5) == b"56789"
        assert store.get(name) == b"0123456789"


def test_pack_that_was_replaced_is_read_from_its_original_once_distrusted(
    store: LockedStore,
) -> None:
    name = "packs/ab/abcdefghjk-000001"
    store.put(name, [b"good"])
    assert not store.distrust(name)
    store.inner.put(name, [b"evil"])
    assert store.get_range(name, 0, 4) == b"evil"  # who reads packs checks each chunk
    assert store.distrust(name)
    assert store.get_range(name, 0, 4) == b"good"
    assert not store.distrust(name)


def test_hidden_index_objects_are_named(store: LockedStore) -> None:
    for ident in ("aaaaaaaaaa", "bbbbbbbbbb"):
        store.put(f"index/{ident}", [b"x"])
    store.delete("index/aaaaaaaaaa")
    assert list(store.list("index/")) == ["index/bbbbbbbbbb"]
    assert list(store.hidden("index/")) == ["index/aaaaaaaaaa"]
    assert store.get("index/aaaaaaaaaa") == b"x"


def test_void_does_not_count_against_a_locked_manifest(store: LockedStore) -> None:
    until = (store.clock() + timedelta(minutes=5)).replace(microsecond=0)
    store.put("manifests/aaaaaaaaaa", [b"x"], retain_until=until)
    store.put("manifests/bbbbbbbbbb", [b"x"])
    for ident in ("aaaaaaaaaa", "bbbbbbbbbb", "cccccccccc"):
        store.put(f"voids/{ident}", [b"x"])
    assert list(store.list("voids/")) == ["voids/bbbbbbbbbb", "voids/cccccccccc"]
    assert not store.exists("voids/aaaaaaaaaa")
    assert store.exists("voids/cccccccccc")


def test_a_lock_is_extended_and_never_shortened(store: LockedStore) -> None:
    name = "packs/ab/abcdefghjk-000001"
    store.put(name, [b"x"])
    version = store.originals([name])[name]
    before = store.locked_until(version)
    assert before is not None
    store.extend(version, before - timedelta(minutes=5))
    assert store.locked_until(version) == before
    store.extend(version, before + timedelta(minutes=5))
    assert store.locked_until(version) == before + timedelta(minutes=5)


def test_object_that_is_uploaded_in_parts_is_locked_too(
    store: LockedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.inner, "multipart_above", 5 << 20)
    monkeypatch.setattr(store.inner, "part_bytes", 5 << 20)
    store.put("index/abcdefghjk", [bytes(12 << 20)])
    version = store.originals(["index/abcdefghjk"])["index/abcdefghjk"]
    assert store.retained_until(version) == store.placed()["index/abcdefghjk"]


def test_past_store_shows_what_was_and_changes_nothing(rgw: RunningRgw, store: LockedStore) -> None:
    store.put("packs/ab/abcdefghjk-000001", [b"old"])
    store.put("pins/x.1", [b"pin"])
    inner = store.inner
    moment = max(v.modified for v in inner.versions(""))
    bucket = store.url.removeprefix("s3://").partition("/")[0]
    inner.put("packs/ab/abcdefghjk-000001", [b"new, and longer"])
    inner.put("packs/ab/abcdefghjk-000002", [b"new"])
    inner.delete("pins/x.1")
    spec = _spec(rgw, bucket)
    options = {**spec.options, "as_of": moment.isoformat()}
    past = compose.open_store(StoreSpec(url=spec.url, options=options))
    try:
        assert isinstance(past, PastStore)
        assert list(past.list("packs/")) == ["packs/ab/abcdefghjk-000001"]
        assert past.get("packs/ab/abcdefghjk-000001") == b"old"
        assert past.size("packs/ab/abcdefghjk-000001") == 3
        assert past.get("pins/x.1") == b"pin"
        assert not past.exists("packs/ab/abcdefghjk-000002")
        with pytest.raises(UnavailableError) as caught:
            past.put("pins/y.1", [b"x"])
        assert caught.value.code == "store-read-only"
        with pytest.raises(UnavailableError):
            past.delete("pins/x.1")
    finally:
        past.close()


def test_store_without_versions_has_no_lock(tmp_path: Path) -> None:
    spec = StoreSpec(url=str(tmp_path), options=RULES.options())
    with pytest.raises(ConfigError, match="keeps no versions"):
        compose.open_store(spec)
