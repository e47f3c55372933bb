"""Index objects: the footers of many packs in one object, so that a rebuild is few requests.

Layout: `OFFLIDX1`, u16 key version of its MAC, u16 zero, u32 number of packs; for each pack: u16
length of its name, the name, u16 key version, 32 bytes of salt (zeros: a plain pack, or one whose
writer did not say: its first bytes do), u32 number of entries, the entries as in a footer; last a
32-byte keyed hash over all before it and the object's name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from blake3 import blake3

from offload.errors import IntegrityError
from offload.format.cipher import SALT_BYTES
from offload.format.keys import HASH_BYTES, Keys
from offload.format.pack import ENTRY, PLAIN_HEAD, Entry, PackHead, decode_entries, encode_entries

_MAGIC = b"OFFLIDX1"
_HEAD = struct.Struct("<8sHHI")
_PACK = struct.Struct(f"<H{SALT_BYTES}sI")


def encode_index(
    name: str,
    packs: Mapping[str, list[Entry]],
    keys: Keys,
    heads: Mapping[str, PackHead] | None = None,
) -> bytes:
    """The bytes of the index object `name` for these packs.

    `heads` saves readers of an encrypted store a look at each pack's first bytes.
    """
    known = heads or {}
    parts = [_HEAD.pack(_MAGIC, keys.current.number, 0, len(packs))]
    for pack, entries in packs.items():
        head = known.get(pack, PLAIN_HEAD)
        raw = pack.encode()
        parts += (struct.pack("<H", len(raw)), raw)
        parts.append(_PACK.pack(head.key_version, head.salt, len(entries)))
        parts.append(encode_entries(entries, head.key_version))
    body = b"".join(parts)
    return body + blake3(body + name.encode(), key=keys.mac).digest()


def decode_index(name: str, raw: bytes, keys: Keys) -> dict[str, list[Entry]]:
    """The entries of each pack. IntegrityError (`bad-index`)."""
    return decode_index_heads(name, raw, keys)[0]


def decode_index_heads(
    name: str, raw: bytes, keys: Keys
) -> tuple[dict[str, list[Entry]], dict[str, PackHead]]:
    """The entries, and the heads of those packs of which they are said."""
    body, mac = raw[:-HASH_BYTES], raw[-HASH_BYTES:]
    if not body.startswith(_MAGIC) or len(body) < _HEAD.size:
        raise _damaged(name)
    _, number, _, count = _HEAD.unpack_from(body)
    if blake3(body + name.encode(), key=keys.version(number, name).mac).digest() != mac:
        raise _damaged(name)
    view = memoryview(body)
    at = _HEAD.size
    packs: dict[str, list[Entry]] = {}
    heads: dict[str, PackHead] = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", body, at)
        pack = bytes(view[at + 2 : at + 2 + length]).decode()
        at += 2 + length
        key_version, salt, entries = _PACK.unpack_from(body, at)
        at += _PACK.size
        if key_version:
            heads[pack] = PackHead(key_version, salt)
        packs[pack] = decode_entries(view[at : at + entries * ENTRY.size])
        at += entries * ENTRY.size
    return packs, heads


def _damaged(name: str) -> IntegrityError:
    return IntegrityError(
        f"the index object {name} is damaged",
        code="bad-index",
        hint="packs are not touched by this; see: offload store check",
    )
