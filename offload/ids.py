"""Short readable ids, and finding one by an unambiguous prefix."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from offload.errors import NotFoundError

# Crockford's base 32 in lower case: no i, l, o, u, so that an id can be read out on the phone.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_LENGTH = 10  # 50 random bits: 2**25 ids before a repeat is likely


def new_id() -> str:
    """A fresh random id of ten characters that starts with a letter."""
    head = secrets.choice(_ALPHABET[10:])
    return head + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH - 1))


def match_prefix(kind: str, prefix: str, ids: Iterable[str]) -> str:
    """The one id that equals or starts with `prefix`.

    Raises NotFoundError (codes `unknown-<kind>` and `ambiguous-<kind>`).
    """
    found = sorted({i for i in ids if i.startswith(prefix)})
    if prefix in found:
        return prefix
    slug = kind.lower().replace(" ", "-")
    if not prefix or not found:
        raise NotFoundError(
            f"no {kind} '{prefix}'",
            code=f"unknown-{slug}",
            hint=f"list what there is with: offload {slug} list",
        )
    if len(found) > 1:
        shown = ", ".join(found[:5]) + (" …" if len(found) > 5 else "")
        raise NotFoundError(
            f"{kind} '{prefix}' is ambiguous: {shown}",
            code=f"ambiguous-{slug}",
            hint="give more characters of the id",
        )
    return found[0]
