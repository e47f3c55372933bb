"""Encrypted packs: what is stored opens at its place and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from offload.errors import IntegrityError
from offload.format.index import decode_index, decode_index_heads, encode_index
from offload.format.keyfile import new_ring, next_ring
from offload.format.keys import ring_keys
from offload.format.pack import (
    MAX_HEAD,
    Encoding,
    Entry,
    Kind,
    PackCipher,
    PackHead,
    chunk_id,
    decode_head,
    footer,
    read_footer,
    record_header,
    scan_records,
)

_RING = next_ring(new_ring())
_KEYS = ring_keys(_RING)
_HEAD = PackHead(2, bytes(range(32)))
_NAME = "packs/aa/aaaaaaaaaa-000001"
_PAYLOAD = b"one chunk of the shop's database"


def _entry(offset: int = MAX_HEAD) -> Entry:
    ident = chunk_id(Kind.DATA, _PAYLOAD, _KEYS)
    size = len(_PAYLOAD)
    return Entry(ident, Kind.DATA, Encoding.RAW, size, size + _HEAD.overhead, offset)


def _stored(entry: Entry) -> bytes:
    return bytes(PackCipher(_NAME, _HEAD, _KEYS).encrypt(entry, _PAYLOAD))


def _pack() -> bytes:
    entry = _entry()
    body = _HEAD.encode() + record_header(entry, 2) + _stored(entry)
    return body + footer(_NAME, [entry], entry.end, _KEYS, _HEAD)


def _range(raw: bytes, offset: int, length: int) -> bytes:
    return raw[offset : offset + length]


def test_encrypted_payload_opens_and_shows_nothing() -> None:
    entry = _entry()
    stored = _stored(entry)
    assert len(stored) == entry.stored_length
    assert b"shop" not in stored
    assert PackCipher(_NAME, _HEAD, _KEYS).decrypt(entry, stored) == _PAYLOAD


@pytest.mark.parametrize(
    "change",
    [{"offset": 104}, {"kind": 2}, {"encoding": 1}, {"raw_length": 1}, {"id": bytes(32)}],
    ids=str,
)
def test_encrypted_payload_as_another_record_does_not_open(change: dict[str, Any]) -> None:
    entry = _entry()
    wrong = entry._replace(**change)
    assert PackCipher(_NAME, _HEAD, _KEYS).decrypt(wrong, _stored(entry)) is None


def test_encrypted_payload_in_another_pack_or_under_another_key_does_not_open() -> None:
    entry = _entry()
    stored = _stored(entry)
    others = (
        PackCipher("packs/aa/aaaaaaaaaa-000002", _HEAD, _KEYS),
        PackCipher(_NAME, replace(_HEAD, salt=bytes(32)), _KEYS),
        PackCipher(_NAME, replace(_HEAD, key_version=1), _KEYS),
        PackCipher(_NAME, _HEAD, ring_keys(next_ring(new_ring()))),
    )
    for cipher in others:
        assert cipher.decrypt(entry, stored) is None


def test_pack_of_an_unknown_key_version_or_plain_is_refused() -> None:
    for head in (PackHead(3, bytes(32)), PackHead()):
        with pytest.raises(IntegrityError) as caught:
            PackCipher(_NAME, head, _KEYS)
        assert caught.value.code == "key-version-unknown"


def test_encrypted_pack_footer_and_records_say_the_same() -> None:
    raw = _pack()
    assert decode_head(_NAME, raw) == _HEAD
    assert read_footer(_NAME, len(raw), partial(_range, raw), _KEYS) == [_entry()]
    assert list(scan_records(_NAME, memoryview(raw))) == [_entry()]


def test_encrypted_pack_under_another_name_is_noticed_by_its_footer() -> None:
    raw = _pack()
    with pytest.raises(IntegrityError):
        read_footer("packs/aa/aaaaaaaaaa-000002", len(raw), partial(_range, raw), _KEYS)


def test_encrypted_pack_any_flipped_bit_outside_the_records_is_noticed_by_the_footer() -> None:
    raw, entry = _pack(), _entry()
    for spot in (*range(MAX_HEAD), *range(entry.end, len(raw))):
        wrong = bytearray(raw)
        wrong[spot] ^= 1 << (spot & 7)
        with pytest.raises(IntegrityError):
            read_footer(_NAME, len(raw), partial(_range, bytes(wrong)), _KEYS)


def test_index_of_an_encrypted_store_says_how_its_packs_are_encrypted() -> None:
    packs = {_NAME: [_entry()], "packs/bb/b-000001": []}
    raw = encode_index("index/i", packs, _KEYS, {_NAME: _HEAD})
    assert decode_index_heads("index/i", raw, _KEYS) == (packs, {_NAME: _HEAD})
    with pytest.raises(IntegrityError):
        decode_index("index/j", raw, _KEYS)
    for spot in range(len(raw)):
        wrong = bytearray(raw)
        wrong[spot] ^= 1 << (spot & 7)
        with pytest.raises(IntegrityError):
            decode_index("index/i", bytes(wrong), _KEYS)
