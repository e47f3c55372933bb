"""Index objects: the footers of many packs in one object, so that a rebuild is few requests.

Layout: `OFFLIDX1`, u32 number of packs; for each pack: u16 length of its name, the name, u32 number
of entries, the entries as in a footer; last a 32-byte keyed hash over all before it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from blake3 import blake3

from offload.errors import IntegrityError
from offload.format.keys import HASH_BYTES, Keys
from offload.format.pack import ENTRY, Entry, decode_entries, encode_entries

_MAGIC = b"OFFLIDX1"


def encode_index(packs: Mapping[str, list[Entry]], keys: Keys) -> bytes:
    """The bytes of an index object for these packs."""
    parts = [_MAGIC, struct.pack("<I", len(packs))]
    for name, entries in packs.items():
        raw = name.encode()
        parts += (struct.pack("<H", len(raw)), raw, struct.pack("<I", len(entries)))
        parts.append(encode_entries(entries))
    body = b"".join(parts)
    return body + blake3(body, key=keys.mac).digest()


def decode_index(name: str, raw: bytes, keys: Keys) -> dict[str, list[Entry]]:
    """The inverse. IntegrityError (`bad-index`)."""
    body, mac = raw[:-HASH_BYTES], raw[-HASH_BYTES:]
    if not body.startswith(_MAGIC) or blake3(body, key=keys.mac).digest() != mac:
        raise IntegrityError(
            f"the index object {name} is damaged",
            code="bad-index",
            hint="packs are not touched by this; see: offload store check",
        )
    view = memoryview(body)
    (count,) = struct.unpack_from("<I", body, len(_MAGIC))
    at = len(_MAGIC) + 4
    packs: dict[str, list[Entry]] = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", body, at)
        pack = bytes(view[at + 2 : at + 2 + length]).decode()
        at += 2 + length
        (entries,) = struct.unpack_from("<I", body, at)
        at += 4
        packs[pack] = decode_entries(view[at : at + entries * ENTRY.size])
        at += entries * ENTRY.size
    return packs
