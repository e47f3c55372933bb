"""Small JSON objects with a hash: `store.json` and the manifests.

Two lines: the JSON (UTF-8, sorted keys, no spaces), and `blake3:` with 64 hex digits over the
first line (without its end), keyed with the store's MAC key; `store.json`, which holds the key,
has a plain hash.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from offload.errors import IntegrityError

_PREFIX = b"blake3:"


def seal(value: dict[str, Any], key: bytes | None) -> bytes:
    """The bytes of a sealed object."""
    body = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return body + b"\n" + _PREFIX + _hash(body, key) + b"\n"


def unseal(name: str, raw: bytes, key: bytes | None) -> dict[str, Any]:
    """The value of a sealed object. IntegrityError (`bad-seal`) if a single bit is wrong."""
    body, _, rest = raw.partition(b"\n")
    if rest != _PREFIX + _hash(body, key) + b"\n":
        raise IntegrityError(
            f"{name} is damaged: its content does not match its hash",
            code="bad-seal",
            hint="see: offload store check",
        )
    value = json.loads(body)
    if not isinstance(value, dict):
        raise IntegrityError(f"{name} holds no object", code="bad-seal")
    return value


def seal_hash(raw: bytes) -> str:
    """The hash that stands on the second line, in hex: what names this very object."""
    return raw.partition(b"\n")[2][len(_PREFIX) :].strip().decode()


def _hash(body: bytes, key: bytes | None) -> bytes:
    return (blake3(body, key=key) if key else blake3(body)).hexdigest().encode()
