"""The document of the store format says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from offload.format.delta import encode_delta
from offload.format.keys import derive_keys
from offload.format.pack import Encoding, Entry, Kind, chunk_id, footer, record_header
from offload.format.sealed import object_hash, seal_object
from offload.format.tree import MAX_DELTAS, Leaf, encode_leaf_page

_TEXT = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
_PACK = "packs/aa/aaaaaaaaaa-000001"


def _vectors() -> dict[str, str]:
    section = _TEXT.partition("## 8. Test vectors")[2]
    return dict(re.findall(r"^\| (.+?) \| `([0-9a-f]+)` \|$", section, re.MULTILINE))


def test_document_test_vectors_are_those_of_the_code() -> None:
    keys = derive_keys(bytes(range(32)))
    data = bytes(i % 251 for i in range(4096))
    newer = data[:512] + b"\xff" * 512 + data[1024:]
    delta = encode_delta([(512, 1024)], newer)
    base, change = chunk_id(Kind.DATA, data, keys), chunk_id(Kind.DELTA, delta, keys)
    page = encode_leaf_page([Leaf(base, (change,)), None])
    entry = Entry(base, Kind.DATA, Encoding.RAW, 4096, 4096, 16)
    assert _vectors() == {
        "key `data`": keys.data.hex(),
        "key `delta`": keys.delta.hex(),
        "key `page`": keys.page.hex(),
        "key `mac`": keys.mac.hex(),
        "id of the data chunk": base.hex(),
        "first 4 bytes of the delta": delta[:4].hex(),
        "id of the delta": change.hex(),
        "id of the page": chunk_id(Kind.PAGE, page, keys).hex(),
        "record header": record_header(entry).hex(),
        "hash in the trailer": footer(_PACK, [entry], entry.end, keys)[-40:-8].hex(),
        'hash of `pins/a.1` holding `{"a":1}`': object_hash(
            seal_object("pins/a.1", {"a": 1}, keys)
        ),
    }


def test_document_names_the_bound_of_deltas() -> None:
    assert f"at most {MAX_DELTAS})" in _TEXT
