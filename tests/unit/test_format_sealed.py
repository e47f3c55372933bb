"""Sealed JSON, store.json, manifests, index objects: no wrong bit goes unnoticed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import IntegrityError, UnavailableError
from offload.format import layout
from offload.format.index import decode_index, encode_index
from offload.format.keys import KeyRing, Keys, RingVersion, derive_keys, ring_keys
from offload.format.layout import decode_parameters, encode_parameters, new_parameters
from offload.format.manifest import Manifest, decode_manifest, encode_manifest, manifest_hash
from offload.format.pack import Entry
from offload.format.sealed import object_hash, seal, seal_object, unseal, unseal_object
from offload.machine import DiskKind, Machine, MachineDisk, pack_file
from offload.model import Backup, BackupId, Consistency, ImageRecord, Instant

_KEYS = derive_keys(bytes(range(32)))
_NOW = datetime(2026, 11, 21, 3, 0, 0, 123456, tzinfo=UTC)


def _flips(raw: bytes) -> list[bytes]:
    out = []
    for bit in range(len(raw) * 8):
        wrong = bytearray(raw)
        wrong[bit >> 3] ^= 1 << (bit & 7)
        out.append(bytes(wrong))
    return out


def _backup() -> Backup:
    image = ImageRecord(
        volume="db", size_bytes=1 << 20, sector_size=512, identity="7:9", root="ab" * 32,
        read_bytes=5, stored_bytes=3, mode="incremental", reason="",
    )  # fmt: skip
    return Backup(
        id=BackupId("abcdefghjk"), store="main", group="shop", created_at=_NOW, finished_at=_NOW,
        timemark="kkkkkkkkkk", consistency=Consistency.FILESYSTEM, instant=Instant.HELD,
        images=(image,), parent="pppppppppp", host="h", alarms=("one",),
    )  # fmt: skip


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


_RING_KEYS = ring_keys(
    KeyRing(
        id_key=bytes(range(32)),
        versions=tuple(RingVersion(n, bytes([n]) * 32, _NOW) for n in (1, 2)),
    )
)
_both = pytest.mark.parametrize("keys", [_KEYS, _RING_KEYS], ids=["plain", "encrypted"])


@given(st.dictionaries(st.text(), _json, max_size=4))
def test_seal_round_trip(value: dict[str, object]) -> None:
    assert unseal("it", seal(value)) == value
    for keys in (_KEYS, _RING_KEYS):
        assert unseal_object("it", seal_object("it", value, keys), keys) == value


def test_seal_any_flipped_bit_is_noticed() -> None:
    for wrong in _flips(seal({"a": 1, "ü": [None, "x"]})):
        with pytest.raises(IntegrityError):
            unseal("it", wrong)


@_both
def test_sealed_object_any_flipped_bit_is_noticed(keys: Keys) -> None:
    for wrong in _flips(seal_object("it", {"a": 1, "ü": [None, "x"]}, keys)):
        with pytest.raises(IntegrityError):
            unseal_object("it", wrong, keys)


@_both
def test_sealed_object_cut_anywhere_or_longer_is_noticed(keys: Keys) -> None:
    raw = seal_object("it", {"a": 1}, keys)
    for wrong in (*(raw[:n] for n in range(len(raw))), raw + b"\n"):
        with pytest.raises(IntegrityError):
            unseal_object("it", wrong, keys)


@_both
def test_sealed_object_under_another_name_or_key_is_noticed(keys: Keys) -> None:
    raw = seal_object("pins/a.1", {"a": 1}, keys)
    other = derive_keys(bytes(32)) if keys is _KEYS else _KEYS
    for name, opener in (("pins/a.2", keys), ("pins/a.1", other)):
        with pytest.raises(IntegrityError):
            unseal_object(name, raw, opener)


def test_sealed_object_of_an_encrypted_store_shows_nothing_and_never_twice_the_same() -> None:
    first, second = (seal_object("it", {"name": "volume-of-shop"}, _RING_KEYS) for _ in range(2))
    assert b"shop" not in first
    assert first[44:] != second[44:]


def test_sealed_object_of_an_older_key_version_opens_and_of_an_unknown_one_does_not() -> None:
    older = replace(_RING_KEYS, current=_RING_KEYS.versions[1])
    raw = seal_object("it", {"a": 1}, older)
    assert unseal_object("it", raw, _RING_KEYS) == {"a": 1}
    newer = replace(older, versions=MappingProxyType({1: older.current}))
    with pytest.raises(IntegrityError) as caught:
        unseal_object("it", seal_object("it", {"a": 1}, _RING_KEYS), newer)
    assert caught.value.code == "key-version-unknown"


def _machine() -> Machine:
    disk = MachineDisk(
        name="scsi0:1", kind=DiskKind.FLAT, path="[ds1] web/web-000001.vmdk", size_bytes=1 << 30,
        volume="ds1", luns=("naa.1", "naa.2"), chain=("[ds1] web/web.vmdk",),
    )  # fmt: skip
    return Machine(
        name="web", kind="vsphere", hypervisor="vc", id="vm-7", uuid="564d", definition="a = 1",
        files={"nvram": pack_file(bytes(1000))}, disks=(disk,), summary={"cpus": 2},
    )  # fmt: skip


def test_manifest_round_trip_and_every_flipped_bit_is_noticed() -> None:
    manifest = Manifest(
        backup=replace(_backup(), vms=("web",)), group_config={"groups": {}},
        timemark={"id": "kkkkkkkkkk", "x": 1},
        previous="cd" * 32, software="offload 0", machines=(_machine(),),
    )  # fmt: skip
    raw = encode_manifest(manifest, _KEYS)
    name = layout.manifest_name("abcdefghjk")
    assert decode_manifest(name, raw, _KEYS, "main") == manifest
    assert manifest_hash(raw) == object_hash(raw) == blake3(raw).hexdigest()
    for wrong in _flips(raw):
        with pytest.raises(IntegrityError):
            decode_manifest(name, wrong, _KEYS, "main")


def test_manifest_under_the_name_of_another_is_noticed() -> None:
    raw = encode_manifest(Manifest(backup=_backup()), _KEYS)
    with pytest.raises(IntegrityError) as caught:
        decode_manifest(layout.manifest_name("zzzzzzzzzz"), raw, _KEYS, "main")
    assert caught.value.code == "bad-seal"


def test_manifest_of_a_newer_version_is_refused_as_such() -> None:
    raw = seal_object("manifests/a", {"format": "offload-manifest", "version": 2}, _KEYS)
    with pytest.raises(UnavailableError) as caught:
        decode_manifest("manifests/a", raw, _KEYS, "main")
    assert caught.value.code == "manifest-newer"


def test_parameters_round_trip_and_every_flipped_bit_is_noticed() -> None:
    parameters = new_parameters()
    raw = encode_parameters(parameters)
    assert decode_parameters(raw, "/s") == parameters
    for wrong in _flips(raw):
        with pytest.raises(IntegrityError):
            decode_parameters(wrong, "/s")


@pytest.mark.parametrize(
    ("field", "value", "error", "code"),
    [
        ("version", 2, UnavailableError, "store-newer"),
        ("encryption", {"a": 1}, UnavailableError, "store-newer"),
        ("format", "tar", IntegrityError, "not-a-store"),
        ("chunk_bytes", 1000, IntegrityError, "bad-store"),
        ("page_entries", 1, IntegrityError, "bad-store"),
        ("id_key", "ab", IntegrityError, "bad-store"),
        ("created_at", None, IntegrityError, "bad-store"),
    ],
)
def test_parameters_that_this_version_cannot_use_are_refused(
    field: str, value: object, error: type[Exception], code: str
) -> None:
    fields = unseal("s", encode_parameters(new_parameters()))
    with pytest.raises(error) as caught:
        decode_parameters(seal({**fields, field: value}), "/s")
    assert getattr(caught.value, "code") == code  # noqa: B009


@pytest.mark.parametrize("wrong", [{"chunk_bytes": 1000}, {"chunk_bytes": 0}, {"page_entries": 1}])
def test_new_parameters_impossible_geometry_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        new_parameters(**wrong)


_entry = st.builds(
    Entry, st.binary(min_size=32, max_size=32), st.integers(1, 3), st.integers(0, 1),
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1),
)  # fmt: skip


@given(st.dictionaries(st.from_regex(r"packs/[a-z0-9/-]{1,30}", fullmatch=True),
                       st.lists(_entry, max_size=5), max_size=4))  # fmt: skip
def test_index_round_trip(packs: dict[str, list[Entry]]) -> None:
    assert decode_index("i", encode_index("i", packs, _KEYS), _KEYS) == packs


def test_index_any_flipped_bit_or_cut_is_noticed() -> None:
    entry = Entry(b"i" * 32, 1, 0, 10, 10, 16)
    raw = encode_index("i", {"packs/aa/a-000001": [entry], "packs/aa/a-000002": []}, _KEYS)
    for wrong in (*_flips(raw), *(raw[:n] for n in range(len(raw)))):
        with pytest.raises(IntegrityError) as caught:
            decode_index("i", wrong, _KEYS)
        assert caught.value.code in {"bad-index", "key-version-unknown"}


def test_keys_of_one_store_differ_by_purpose_and_from_another_store() -> None:
    other = derive_keys(bytes(32))
    mine = {_KEYS.data, _KEYS.delta, _KEYS.page, _KEYS.mac}
    assert len(mine | {other.data, other.delta, other.page, other.mac}) == 8
    assert replace(new_parameters(), id_key=bytes(range(32))).keys() == _KEYS
