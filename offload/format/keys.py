"""Keys of a store: one random id key, and what is derived from it.

Every hash of the format is BLAKE3 in keyed mode with a key of its own (BLAKE3 `derive_key` of the
id key under a context string), so that no value of one kind can stand for one of another. In a
store without encryption the id key stands in `store.json`: there the hashes guard against damage,
not against forgery.
"""

from __future__ import annotations

from dataclasses import dataclass

from blake3 import blake3

KEY_BYTES = 32
HASH_BYTES = 32

_CONTEXT = "offload store v1 2026-11-21 "


@dataclass(frozen=True, slots=True)
class Keys:
    """32-byte keys, one a purpose."""

    data: bytes  # ids of data chunks
    delta: bytes  # ids of delta chunks
    page: bytes  # ids of tree pages
    mac: bytes  # manifests, pack footers, index objects


def derive_keys(id_key: bytes) -> Keys:
    """All keys of a store from its id key (32 bytes)."""

    def one(purpose: str) -> bytes:
        return blake3(id_key, derive_key_context=_CONTEXT + purpose).digest()

    return Keys(data=one("data"), delta=one("delta"), page=one("page"), mac=one("mac"))
