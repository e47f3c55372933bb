"""Legal holds: sealed objects `holds/BACKUP`. While one is there, its backup stays."""

from __future__ import annotations

from datetime import datetime

from offload.errors import IntegrityError, UnavailableError
from offload.format.keys import Keys
from offload.format.sealed import seal_object, unseal_object
from offload.model import BackupId, LegalHold

VERSION = 1


def encode_hold(name: str, hold: LegalHold, keys: Keys) -> bytes:
    """The bytes of a hold object."""
    value = {
        "format": "offload-hold",
        "version": VERSION,
        "backup": hold.backup,
        "placed_at": hold.placed_at.isoformat(),
        "host": hold.host,
        "reason": hold.reason,
    }
    return seal_object(name, value, keys)


def decode_hold(name: str, raw: bytes, keys: Keys) -> LegalHold:
    """The inverse. IntegrityError (`bad-seal`, `bad-hold`), UnavailableError (`hold-newer`)."""
    value = unseal_object(name, raw, keys)
    if value.get("version", 0) > VERSION:
        raise UnavailableError(
            f"{name} is of a newer version", code="hold-newer", hint="use a newer offload"
        )
    try:
        return LegalHold(
            backup=BackupId(value["backup"]),
            placed_at=datetime.fromisoformat(value["placed_at"]),
            host=value["host"],
            reason=value["reason"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{name} is no legal hold: {error}", code="bad-hold") from error
