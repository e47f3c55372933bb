"""Wrappers of the key ring, key files and recovery keys: right ones open, all others do not."""

from __future__ import annotations

from typing import Any

import pytest

from offload.errors import IntegrityError, OffloadError, UnavailableError
from offload.format.keyfile import (
    Secret,
    WrapperKind,
    decode_wrapper,
    key_file_text,
    new_ring,
    next_ring,
    parse_key_file,
    parse_recovery,
    recovery_text,
    unwrap,
    wrap,
)
from offload.format.keys import ring_keys
from offload.format.sealed import seal, unseal

_RING = next_ring(new_ring())
_FILE = Secret(kind=WrapperKind.FILE, value=bytes(range(32)))
_ID = "kkkkkkkkkk"
_NAME = f"keys/{_ID}"


def _wrapped(secret: Secret = _FILE) -> bytes:
    return wrap(_RING, secret, ident=_ID, label="safe", store_id="store00000")


def _resealed(**fields: object) -> bytes:
    """A wrapper as one who can write to the store can change it: the plain hash is right."""
    return seal({**unseal(_NAME, _wrapped()), **fields})


@pytest.mark.parametrize(
    "secret",
    [
        _FILE,
        Secret(kind=WrapperKind.RECOVERY, value=bytes(32)),
        Secret(kind=WrapperKind.PASSPHRASE, value="Straße 17".encode()),
    ],
    ids=lambda s: s.kind.value,
)
def test_wrapper_opens_with_its_secret_and_with_no_other(secret: Secret) -> None:
    raw = _wrapped(secret)
    wrapper = decode_wrapper(_NAME, raw)
    opened = unwrap(wrapper, secret, "store00000")
    assert opened is not None
    assert opened == _RING
    assert ring_keys(opened) == ring_keys(_RING)
    other = Secret(kind=secret.kind, value=secret.value[:-1] + b"!")
    assert unwrap(wrapper, other, "store00000") is None
    for version in _RING.versions:
        assert version.secret.hex().encode() not in raw


def test_wrapper_of_a_store_copied_under_another_id_does_not_open() -> None:
    assert unwrap(decode_wrapper(_NAME, _wrapped()), _FILE, "store00001") is None


def test_wrapper_any_flipped_bit_is_noticed() -> None:
    raw = _wrapped()
    for bit in range(len(raw) * 8):
        wrong = bytearray(raw)
        wrong[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(IntegrityError):
            decode_wrapper(_NAME, bytes(wrong))


@pytest.mark.parametrize(
    "change",
    [
        {"label": "mine"},
        {"created_at": "2020-01-01T00:00:00+00:00"},
        {"kdf": {"name": "argon2id"}},
        {"extra": 1},
        {"wrapped": "00" * 64},
        {"wrapped": "00"},
    ],
    ids=str,
)
def test_wrapper_changed_with_a_right_hash_does_not_open(change: dict[str, Any]) -> None:
    assert unwrap(decode_wrapper(_NAME, _resealed(**change)), _FILE, "store00000") is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"id": "zzzzzzzzzz"}, IntegrityError),
        ({"kind": "magic"}, IntegrityError),
        ({"wrapped": "zz"}, IntegrityError),
        ({"version": 2}, UnavailableError),
    ],
    ids=str,
)
def test_wrapper_that_is_none_is_refused(change: dict[str, Any], error: type[OffloadError]) -> None:
    with pytest.raises(error):
        decode_wrapper(_NAME, _resealed(**change))


@pytest.mark.parametrize(
    "kdf",
    [None, {}, {"time_cost": 1, "memory_kib": 1 << 30, "lanes": 1, "salt": "00" * 16},
     {"time_cost": 1, "memory_kib": 8, "lanes": 1, "salt": ""}],
    ids=str,
)  # fmt: skip
def test_wrapper_with_costs_that_are_not_sane_is_refused(kdf: dict[str, Any] | None) -> None:
    phrase = Secret(kind=WrapperKind.PASSPHRASE, value=b"x")
    with pytest.raises(IntegrityError) as caught:
        unwrap(decode_wrapper(_NAME, _resealed(kind="passphrase", kdf=kdf)), phrase, "store00000")
    assert caught.value.code == "bad-key"


def test_recovery_key_is_read_as_people_type_it() -> None:
    value = bytes(range(100, 132))
    text = recovery_text(value)
    assert [len(group) for group in text.split("-")] == [7] * 9
    assert parse_recovery(text) == value
    assert parse_recovery(f"  {text.lower().replace('-', ' ')}\n") == value
    assert parse_recovery(text.removeprefix("offload-")) == value
    assert parse_recovery(text.replace("O", "0").replace("I", "1").replace("B", "8")) == value


def test_recovery_key_mistyped_at_any_place_is_noticed() -> None:
    text = recovery_text(bytes(range(32)))
    body = text.removeprefix("offload-")
    for at, letter in enumerate(body):
        if letter != "-":
            wrong = body[:at] + ("A" if letter != "A" else "C") + body[at + 1 :]
            assert parse_recovery(f"offload-{wrong}") is None
            assert parse_recovery(f"offload-{body[:at]}{body[at + 1 :]}") is None
    assert parse_recovery("") is None
    assert parse_recovery("offload-ä") is None


def test_key_file_with_any_wrong_character_is_noticed() -> None:
    value = bytes(range(32))
    text = key_file_text(value)
    assert parse_key_file(text) == value
    for at, letter in enumerate(text):
        wrong = text[:at] + ("0" if letter != "0" else "1") + text[at + 1 :]
        assert parse_key_file(wrong) is None
    assert parse_key_file(text[:-1]) is None
    assert parse_key_file("") is None


def test_rotated_ring_keeps_its_ids_and_no_secret_is_in_a_repr() -> None:
    older, newer = new_ring(), next_ring(_RING)
    assert newer.id_key == _RING.id_key
    assert newer.versions[:-1] == _RING.versions
    assert [v.number for v in newer.versions] == [1, 2, 3]
    keys = ring_keys(older)
    assert keys.encrypted
    for thing in (older, older.versions[0], keys, keys.current, _FILE):
        assert "=" not in repr(thing)  # no field is shown
