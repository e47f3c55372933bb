"""The store in memory that keeps versions: the rest of the contract, which the model rests on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from offload.errors import NotFoundError
from offload.objectlock import LockableStore
from offload.storespec import StoreSpec
from offload.testing.memory_store import PLACES
from offload.testing.versioned_store import VersionedMemoryStore, VersionedPlace

URL = "s3://versions"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def place() -> VersionedPlace:
    PLACES[URL] = made = VersionedPlace(clock=lambda: BEGAN)
    return made


@pytest.fixture
def store(place: VersionedPlace) -> VersionedMemoryStore:
    return VersionedMemoryStore(StoreSpec(url=URL))


def test_store_is_what_object_lock_needs(store: VersionedMemoryStore) -> None:
    assert isinstance(store, LockableStore)


def test_locked_version_outlives_what_is_put_over_it_and_its_deletion(
    place: VersionedPlace, store: VersionedMemoryStore
) -> None:
    store.put("packs/ab/one", [b"good"], retain_until=BEGAN + timedelta(hours=1))
    store.put("packs/ab/one", [b"bad"])
    assert store.get("packs/ab/one") == b"bad"
    store.delete("packs/ab/one")
    assert list(store.list("packs/")) == []
    marker, good = store.versions("packs/")  # "bad" was not locked
    assert (marker.deleted, marker.latest, good.deleted, good.latest) == (True, True, False, False)
    assert store.get_version(good, 1, 2) == b"oo"
    place.clock = lambda: BEGAN + timedelta(hours=1)
    assert list(store.versions("packs/")) == []
    with pytest.raises(NotFoundError):
        store.get_version(good, 0, None)


def test_lock_is_extended_and_never_shortened(store: VersionedMemoryStore) -> None:
    store.put("index/one", [b"x"], retain_until=BEGAN + timedelta(hours=2))
    (one,) = store.versions("index/one")
    store.retain(one, BEGAN + timedelta(hours=1))
    assert store.retained_until(one) == BEGAN + timedelta(hours=2)
    store.retain(one, BEGAN + timedelta(hours=3))
    assert store.retained_until(one) == BEGAN + timedelta(hours=3)
