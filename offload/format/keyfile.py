"""Wrappers of the key ring (`keys/ID`), and the text of key files and recovery keys.

A wrapper holds the key ring under AES-256-GCM with a key made from what somebody keeps: a
passphrase (argon2id), a key file or a recovery key (32 random bytes each). All other fields of it,
and the store's id, are authenticated with the ring.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from blake3 import blake3

from offload.errors import IntegrityError, UnavailableError
from offload.format.cipher import NONCE_BYTES, new_cipher, open_box
from offload.format.keys import KEY_BYTES, KeyRing, RingVersion, derive
from offload.format.layout import key_name
from offload.format.sealed import canonical, seal, unseal

VERSION = 1
_FORMAT = "offload-key"
_FILE_PREFIX = "offload-key-1:"
_RECOVERY_PREFIX = "offload"
_GROUP = 7
_CHECK_BYTES = 3
_MISREAD = str.maketrans("018", "OIB")  # what base 32 lacks, and what it was meant to be
_LIMITS = {"time_cost": 64, "memory_kib": 4 << 20, "lanes": 64}
# RFC 9106, the second recommended choice
_KDF = {"name": "argon2id", "time_cost": 3, "memory_kib": 64 << 10, "lanes": 4}


class WrapperKind(StrEnum):
    """What opens a wrapper."""

    PASSPHRASE = "passphrase"  # noqa: S105 - a kind of secret, not one
    FILE = "file"
    RECOVERY = "recovery"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Secret:
    """What somebody keeps: the text of a passphrase, or 32 bytes."""

    kind: WrapperKind
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """One way in. `about` is all of it but the wrapped ring."""

    id: str
    kind: WrapperKind
    label: str
    created_at: datetime
    about: Mapping[str, Any]
    wrapped: bytes


def wrap(ring: KeyRing, secret: Secret, *, ident: str, label: str, store_id: str) -> bytes:
    """The bytes of `keys/ident`."""
    about: dict[str, Any] = {
        "format": _FORMAT,
        "version": VERSION,
        "id": ident,
        "kind": secret.kind.value,
        "label": label,
        "created_at": datetime.now(UTC).isoformat(),
        "kdf": None,
    }
    if secret.kind is WrapperKind.PASSPHRASE:
        about["kdf"] = {**_KDF, "salt": secrets.token_bytes(16).hex()}
    nonce = secrets.token_bytes(NONCE_BYTES)
    cipher = new_cipher(_wrapping_key(secret, about["kdf"]))
    box = cipher.encrypt(nonce, canonical(_ring_value(ring)), _bound(about, store_id))
    return seal({**about, "wrapped": (nonce + box).hex()})


def decode_wrapper(name: str, raw: bytes) -> Wrapper:
    """A wrapper, still closed. IntegrityError (`bad-seal`, `bad-key`), UnavailableError
    (`store-newer`)."""
    value = unseal(name, raw)
    if value.get("format") == _FORMAT and value.get("version", 0) > VERSION:
        raise UnavailableError(
            f"{name} is of a newer version", code="store-newer", hint="use a newer offload"
        )
    about = {key: field for key, field in value.items() if key != "wrapped"}
    try:
        found = Wrapper(
            id=value["id"],
            kind=WrapperKind(value["kind"]),
            label=value["label"],
            created_at=datetime.fromisoformat(value["created_at"]),
            about=about,
            wrapped=bytes.fromhex(value["wrapped"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{name} is no wrapper of a key: {error}", code="bad-key") from error
    if key_name(found.id) != name:
        raise IntegrityError(f"{name} is the wrapper {found.id} under another name", code="bad-key")
    return found


def unwrap(wrapper: Wrapper, secret: Secret, store_id: str) -> KeyRing | None:
    """The key ring, or None if this secret (or this store) is not the wrapper's."""
    if wrapper.kind is not secret.kind:
        return None
    key = _wrapping_key(secret, wrapper.about.get("kdf"))
    nonce, box = wrapper.wrapped[:NONCE_BYTES], wrapper.wrapped[NONCE_BYTES:]
    if len(nonce) < NONCE_BYTES:
        return None
    raw = open_box(new_cipher(key), nonce, box, _bound(wrapper.about, store_id))
    return None if raw is None else _ring(json.loads(raw))


def _bound(about: Mapping[str, Any], store_id: str) -> bytes:
    return canonical({**about, "store": store_id})


def _wrapping_key(secret: Secret, kdf: Mapping[str, Any] | None) -> bytes:
    if secret.kind is not WrapperKind.PASSPHRASE:
        return derive(secret.value, f"wrap {secret.kind.value}")
    try:
        costs = {name: int((kdf or {})[name]) for name in _LIMITS}
        salt = bytes.fromhex((kdf or {})["salt"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError("a wrapper lacks what argon2 needs", code="bad-key") from error
    if any(not 0 < costs[name] <= limit for name, limit in _LIMITS.items()) or len(salt) < 8:
        raise IntegrityError(
            "a wrapper asks argon2 for more than is sane: it was tampered with", code="bad-key"
        )
    from argon2.low_level import Type, hash_secret_raw  # not for servers of plain stores

    return hash_secret_raw(
        secret.value, salt, time_cost=costs["time_cost"], memory_cost=costs["memory_kib"],
        parallelism=costs["lanes"], hash_len=KEY_BYTES, type=Type.ID,
    )  # fmt: skip


def _ring_value(ring: KeyRing) -> dict[str, Any]:
    return {
        "id_key": ring.id_key.hex(),
        "versions": [
            {
                "number": version.number,
                "secret": version.secret.hex(),
                "created_at": version.created_at.isoformat(),
            }
            for version in ring.versions
        ],
    }


def _ring(value: Mapping[str, Any]) -> KeyRing:
    return KeyRing(
        id_key=bytes.fromhex(value["id_key"]),
        versions=tuple(
            RingVersion(
                number=version["number"],
                secret=bytes.fromhex(version["secret"]),
                created_at=datetime.fromisoformat(version["created_at"]),
            )
            for version in value["versions"]
        ),
    )


def new_ring(id_key: bytes | None = None) -> KeyRing:
    """The key ring of a new store, with version 1."""
    return next_ring(KeyRing(id_key=id_key or secrets.token_bytes(KEY_BYTES), versions=()))


def next_ring(ring: KeyRing) -> KeyRing:
    """The ring with one version more; ids stay as they are."""
    number = ring.newest + 1 if ring.versions else 1
    fresh = RingVersion(number, secrets.token_bytes(KEY_BYTES), datetime.now(UTC))
    return KeyRing(id_key=ring.id_key, versions=(*ring.versions, fresh))


def _check(value: bytes) -> bytes:
    return blake3(value).digest()[:_CHECK_BYTES]


def key_file_text(value: bytes) -> str:
    """The one line of a key file."""
    return f"{_FILE_PREFIX}{value.hex()}:{_check(value).hex()}"


def parse_key_file(text: str) -> bytes | None:
    """The 32 bytes of a key file, or None if it is none or damaged."""
    digits, _, check = text.strip().removeprefix(_FILE_PREFIX).partition(":")
    try:
        value = bytes.fromhex(digits)
    except ValueError:
        return None
    good = text.startswith(_FILE_PREFIX) and len(value) == KEY_BYTES
    return value if good and check == _check(value).hex() else None


def recovery_text(value: bytes) -> str:
    """A recovery key as it is written down: `offload-` and eight groups of seven letters and
    digits, the last of which hold a check sum."""
    letters = base64.b32encode(value + _check(value)).decode()
    groups = [letters[at : at + _GROUP] for at in range(0, len(letters), _GROUP)]
    return "-".join((_RECOVERY_PREFIX, *groups))


def parse_recovery(text: str) -> bytes | None:
    """The 32 bytes of a recovery key as somebody has typed it, or None if it is mistyped."""
    words = text.strip().lower().removeprefix(_RECOVERY_PREFIX)
    letters = "".join(c for c in words if c.isalnum()).upper().translate(_MISREAD)
    try:
        raw = base64.b32decode(letters)
    except ValueError:
        return None
    value, check = raw[:KEY_BYTES], raw[KEY_BYTES:]
    return value if check == _check(value) and len(value) == KEY_BYTES else None
