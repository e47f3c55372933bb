"""Sealed objects: a JSON object that cannot be changed, or given another name, unnoticed.

`store.json` and `keys/ID` have a plain hash: two lines, the JSON (UTF-8, sorted keys, no spaces)
and `blake3:` with 64 hex digits over the first line without its end. All others depend on the
store. In a plain one: the same two lines, the hash keyed with the MAC key and taken over the first
line with its end and the object's name. In an encrypted one: `OFFLSEAL`, u16 1, u16 key version,
32 bytes of salt, the JSON under AES-256-GCM (see `format/cipher.py`), authenticated together with
all before it and the name.
"""

from __future__ import annotations

import json
import secrets
import struct
from typing import Any

from blake3 import blake3

from offload.errors import IntegrityError
from offload.format.cipher import SALT_BYTES, close_object, object_cipher, open_object
from offload.format.keys import Keys

_PREFIX = b"blake3:"
_MAGIC = b"OFFLSEAL"
_VERSION = 1
_HEAD = struct.Struct(f"<8sHH{SALT_BYTES}s")


def canonical(value: dict[str, Any]) -> bytes:
    """The one JSON text of a value that all seals and hashes are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def seal(value: dict[str, Any]) -> bytes:
    """The bytes of an object with a plain hash."""
    body = canonical(value)
    return body + b"\n" + _PREFIX + blake3(body).hexdigest().encode() + b"\n"


def unseal(name: str, raw: bytes) -> dict[str, Any]:
    """The inverse. IntegrityError (`bad-seal`) if a single bit is wrong."""
    body, _, rest = raw.partition(b"\n")
    return _checked(name, body, rest, blake3(body).hexdigest())


def seal_object(
    name: str, value: dict[str, Any], keys: Keys, *, salt: bytes | None = None
) -> bytes:
    """The bytes of the sealed object `name`; `salt` for test vectors alone."""
    body = canonical(value)
    current = keys.current
    if current.sealed is None:
        return body + b"\n" + _PREFIX + _mac(body, name, current.mac).encode() + b"\n"
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    head = _HEAD.pack(_MAGIC, _VERSION, current.number, salt)
    cipher = object_cipher(current.sealed, salt, name)
    return head + close_object(cipher, body, head + name.encode())


def unseal_object(name: str, raw: bytes, keys: Keys) -> dict[str, Any]:
    """The inverse. IntegrityError (`bad-seal`, `key-version-unknown`)."""
    if not keys.encrypted:
        body, _, rest = raw.partition(b"\n")
        return _checked(name, body, rest, _mac(body, name, keys.mac))
    magic, version, number, salt = _HEAD.unpack(raw[: _HEAD.size].ljust(_HEAD.size, b"\0"))
    if magic != _MAGIC or version != _VERSION:
        raise IntegrityError(
            f"{name} is damaged: it is no sealed object of an encrypted store", code="bad-seal"
        )
    key = keys.version(number, name).sealed
    if key is None:
        raise IntegrityError(f"{name} is damaged: its key is none", code="bad-seal")
    head = raw[: _HEAD.size]
    cipher = object_cipher(key, salt, name)
    return _object(name, open_object(cipher, name, raw[_HEAD.size :], head + name.encode()))


def object_hash(raw: bytes) -> str:
    """The plain BLAKE3 of a whole object, in hex: what names this very object in a chain."""
    return blake3(raw).hexdigest()


def _mac(body: bytes, name: str, key: bytes) -> str:
    return blake3(body + b"\n" + name.encode(), key=key).hexdigest()


def _checked(name: str, body: bytes, rest: bytes, digest: str) -> dict[str, Any]:
    if rest != _PREFIX + digest.encode() + b"\n":
        raise IntegrityError(
            f"{name} is damaged, or was copied or renamed: its content does not match its hash",
            code="bad-seal",
            hint="see: offload store check",
        )
    return _object(name, body)


def _object(name: str, body: bytes) -> dict[str, Any]:
    value = json.loads(body)
    if not isinstance(value, dict):
        raise IntegrityError(f"{name} holds no object", code="bad-seal")
    return value
