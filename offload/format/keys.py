"""Keys of a store, and what is derived from them.

Every key has one purpose. It is made by BLAKE3's `derive_key` from a secret under a context string,
so that no value of one kind can stand for one of another. Ids come from the *id key*, which a store
keeps for ever; what encrypts and authenticates comes from a *version* of the key ring, of which a
rotation adds one. A plain store has version 0 alone, with a MAC key made from the id key, which
stands in `store.json`: there the hashes guard against damage, not against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from blake3 import blake3

from offload.errors import IntegrityError

KEY_BYTES = 32
HASH_BYTES = 32
PLAIN = 0  # the key version of a store without encryption

_CONTEXT = "offload store v1 2026-11-21 "


def derive(secret: bytes, purpose: str) -> bytes:
    """The 32-byte key of one purpose from a secret of 32 bytes."""
    return blake3(secret, derive_key_context=_CONTEXT + purpose).digest()


@dataclass(frozen=True, slots=True, repr=False)
class RingVersion:
    """One generation of the key ring."""

    number: int  # from 1
    secret: bytes
    created_at: datetime


@dataclass(frozen=True, slots=True, repr=False)
class KeyRing:
    """All secrets of an encrypted store: what its wrappers wrap. `versions` oldest first."""

    id_key: bytes
    versions: tuple[RingVersion, ...]

    @property
    def newest(self) -> int:
        """The number of the version that new data is written with."""
        return self.versions[-1].number


@dataclass(frozen=True, slots=True, repr=False)
class VersionKeys:
    """What is derived from one version. The two cipher keys are None in a plain store."""

    number: int
    mac: bytes  # pack footers and index objects; in a plain store all sealed objects too
    pack: bytes | None  # the keys of packs are made of it
    sealed: bytes | None  # the keys of sealed objects are made of it


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """32-byte keys, one a purpose."""

    data: bytes  # ids of data chunks
    delta: bytes  # ids of delta chunks
    page: bytes  # ids of tree pages
    versions: MappingProxyType[int, VersionKeys]
    current: VersionKeys  # for all that is written

    @property
    def mac(self) -> bytes:
        """The MAC key of what is written now."""
        return self.current.mac

    @property
    def encrypted(self) -> bool:
        """Whether the store is."""
        return self.current.number != PLAIN

    def version(self, number: int, what: str) -> VersionKeys:
        """The keys of the version that the object `what` names. IntegrityError
        (`key-version-unknown`)."""
        found = self.versions.get(number)
        if found is None:
            raise IntegrityError(
                f"{what} names version {number} of the store's key, which the key ring lacks",
                code="key-version-unknown",
                hint="it is damaged, or the keys were rotated a moment ago: try again",
            )
        return found


def derive_keys(id_key: bytes) -> Keys:
    """All keys of a plain store from its id key (32 bytes)."""
    plain = VersionKeys(PLAIN, mac=derive(id_key, "mac"), pack=None, sealed=None)
    return _keys(id_key, [plain])


def ring_keys(ring: KeyRing) -> Keys:
    """All keys of an encrypted store."""
    return _keys(
        ring.id_key,
        [
            VersionKeys(
                version.number,
                mac=derive(version.secret, "mac"),
                pack=derive(version.secret, "pack"),
                sealed=derive(version.secret, "sealed"),
            )
            for version in ring.versions
        ],
    )


def _keys(id_key: bytes, versions: Iterable[VersionKeys]) -> Keys:
    table = {version.number: version for version in versions}
    return Keys(
        data=derive(id_key, "data"),
        delta=derive(id_key, "delta"),
        page=derive(id_key, "page"),
        versions=MappingProxyType(table),
        current=table[max(table)],
    )
