"""AES-256-GCM over what an encrypted store holds: payloads of packs, sealed objects.

A key encrypts one object and no other: it is the keyed BLAKE3 hash of 32 random bytes, which stand
in the object, and of the object's name. So no pair of key and nonce is ever used twice, and an
object under the name of another does not open.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from blake3 import blake3

from offload.errors import IntegrityError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SALT_BYTES = 32
TAG_BYTES = 16
NONCE_BYTES = 12

_OFFSET = struct.Struct("<Q4x")  # a nonce: the offset of a record's header in its pack
Bytes = bytes | bytearray | memoryview


def object_cipher(key: bytes, salt: bytes, name: str) -> AESGCM:
    """The cipher of the object `name`; `key` is one of its version's."""
    return new_cipher(blake3(salt + name.encode(), key=key).digest())


def new_cipher(key: bytes) -> AESGCM:
    """AES-256-GCM. OpenSSL is loaded here: servers of plain stores do without it."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def record_nonce(offset: int) -> bytes:
    """The nonce of the record whose header lies at `offset`."""
    return _OFFSET.pack(offset)


def open_box(cipher: AESGCM, nonce: bytes, box: Bytes, aad: bytes) -> bytes | None:
    """What was encrypted, or None if a single bit of it, of `aad` or of the key is another."""
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(nonce, box, aad)
    except InvalidTag:
        return None


def open_object(cipher: AESGCM, name: str, box: bytes, aad: bytes) -> bytes:
    """The content of a sealed object. IntegrityError (`bad-seal`)."""
    found = open_box(cipher, bytes(NONCE_BYTES), box, aad)
    if found is None:
        raise IntegrityError(
            f"{name} is damaged, or was not written under this name with the store's key",
            code="bad-seal",
            hint="see: offload store check",
        )
    return found


def close_object(cipher: AESGCM, content: bytes, aad: bytes) -> bytes:
    """The inverse; once for a cipher, whose key is of this object alone."""
    return cipher.encrypt(bytes(NONCE_BYTES), content, aad)
