"""Folds: the new roots that a prune has made of backups whose deltas it merged.

A sealed object `folds/PRUNE`: `{format, version, sequence, backups: {ID: {volume: root}}}`. For
each image the root in the fold with the greatest sequence stands in for the manifest's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offload.errors import IntegrityError, UnavailableError
from offload.format.keys import HASH_BYTES, Keys
from offload.format.sealed import seal_object, unseal_object

VERSION = 1

Roots = Mapping[str, Mapping[str, str]]  # backup → volume → root in hex


@dataclass(frozen=True, slots=True)
class Fold:
    """One prune's new roots. A greater `sequence` overrides a smaller one, image by image."""

    sequence: int
    backups: Roots


def encode_fold(name: str, fold: Fold, keys: Keys) -> bytes:
    """The bytes of a fold object."""
    value = {
        "format": "offload-fold",
        "version": VERSION,
        "sequence": fold.sequence,
        "backups": {backup: dict(roots) for backup, roots in fold.backups.items()},
    }
    return seal_object(name, value, keys)


def decode_fold(name: str, raw: bytes, keys: Keys) -> Fold:
    """The inverse. IntegrityError (`bad-seal`, `bad-fold`), UnavailableError (`fold-newer`)."""
    value = unseal_object(name, raw, keys)
    if value.get("version", 0) > VERSION:
        raise UnavailableError(
            f"{name} is of a newer version", code="fold-newer", hint="use a newer offload"
        )
    try:
        backups = {
            str(backup): {str(volume): _root(root) for volume, root in roots.items()}
            for backup, roots in value["backups"].items()
        }
        return Fold(int(value["sequence"]), backups)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{name} is no fold: {error}", code="bad-fold") from error


def _root(text: str) -> str:
    if len(bytes.fromhex(text)) != HASH_BYTES:
        raise ValueError(f"{text!r} is no root")
    return text
