"""The document of the store format says what the code does."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from argon2.low_level import Type, hash_secret_raw

from offload.format.delta import encode_delta
from offload.format.keyfile import key_file_text, recovery_text
from offload.format.keys import KeyRing, Keys, RingVersion, derive, derive_keys, ring_keys
from offload.format.pack import (
    FILE_HEADER,
    PLAIN_HEAD,
    Encoding,
    Entry,
    Kind,
    PackCipher,
    PackHead,
    chunk_id,
    footer,
    record_header,
)
from offload.format.sealed import object_hash, seal_object
from offload.format.tree import MAX_DELTAS, Leaf, encode_leaf_page

_TEXT = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
_PACK = "packs/aa/aaaaaaaaaa-000001"
_DATA = bytes(i % 251 for i in range(4096))


def _documented() -> dict[str, str]:
    section = _TEXT.partition("## 8. Test vectors")[2]
    return dict(re.findall(r"^\| (.+?) \| `([0-9a-f]+)` \|$", section, re.MULTILINE))


def plain_vectors() -> dict[str, str]:
    keys = derive_keys(bytes(range(32)))
    newer = _DATA[:512] + b"\xff" * 512 + _DATA[1024:]
    delta = encode_delta([(512, 1024)], newer)
    base, change = chunk_id(Kind.DATA, _DATA, keys), chunk_id(Kind.DELTA, delta, keys)
    page = encode_leaf_page([Leaf(base, (change,)), None])
    entry = Entry(base, Kind.DATA, Encoding.RAW, 4096, 4096, len(FILE_HEADER))
    return {
        "key `data`": keys.data.hex(),
        "key `delta`": keys.delta.hex(),
        "key `page`": keys.page.hex(),
        "key `mac` of version 0": keys.mac.hex(),
        "id of the data chunk": base.hex(),
        "first 4 bytes of the delta": delta[:4].hex(),
        "id of the delta": change.hex(),
        "id of the page": chunk_id(Kind.PAGE, page, keys).hex(),
        "record header": record_header(entry).hex(),
        "hash in the trailer": _trailer_hash(entry, keys, PLAIN_HEAD),
        'hash of `pins/a.1` holding `{"a":1}`': object_hash(
            seal_object("pins/a.1", {"a": 1}, keys)
        ),
    }


def encrypted_vectors() -> dict[str, str]:
    version = RingVersion(1, bytes(range(32, 64)), datetime(2026, 11, 21, tzinfo=UTC))
    keys = ring_keys(KeyRing(id_key=bytes(range(32)), versions=(version,)))
    head = PackHead(1, bytes(range(64, 96)))
    base = chunk_id(Kind.DATA, _DATA, keys)
    entry = Entry(base, Kind.DATA, Encoding.RAW, 4096, 4096 + head.overhead, head.length)
    stored = bytes(PackCipher(_PACK, head, keys).encrypt(entry, _DATA))
    assert keys.current.pack is not None
    assert keys.current.sealed is not None
    phrase = hash_secret_raw(b"correct horse", bytes(range(16)), 3, 65536, 4, 32, Type.ID)
    sealed = seal_object("pins/a.1", {"a": 1}, keys, salt=bytes(range(96, 128)))
    return {
        "MAC key of version 1": keys.mac.hex(),
        "pack master of version 1": keys.current.pack.hex(),
        "seal master of version 1": keys.current.sealed.hex(),
        "record header, encrypted": record_header(entry, 1).hex(),
        "first 16 bytes of the payload, encrypted": stored[:16].hex(),
        "tag of the payload": stored[-16:].hex(),
        "hash in the trailer, encrypted": _trailer_hash(entry, keys, head),
        'the object `pins/a.1` holding `{"a":1}`': sealed.hex(),
        "key of the passphrase's wrapper": phrase.hex(),
        "key of the key file's wrapper": derive(bytes(range(32)), "wrap file").hex(),
        "key of the recovery key's wrapper": derive(bytes(range(32)), "wrap recovery").hex(),
    }


def _trailer_hash(entry: Entry, keys: Keys, head: PackHead) -> str:
    return footer(_PACK, [entry], entry.end, keys, head)[-40:-8].hex()


def test_document_test_vectors_are_those_of_the_code() -> None:
    assert _documented() == {**plain_vectors(), **encrypted_vectors()}
    assert f"`{key_file_text(bytes(range(32)))}`" in _TEXT
    assert f"`{recovery_text(bytes(range(32)))}`" in _TEXT


def test_document_names_the_bound_of_deltas() -> None:
    assert f"at most {MAX_DELTAS})" in _TEXT
