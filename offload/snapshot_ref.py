"""What a snapshot's ref means: for comparisons of the catalog with what is on the storage."""

from __future__ import annotations

import json
from collections.abc import Mapping


def ref_key(ref: Mapping[str, str]) -> str:
    """Equal for refs of one snapshot. Keys that begin with `hint_` are no part of it: how the
    storage was reached, what something was called; these may change while the snapshot lasts."""
    named = {key: value for key, value in ref.items() if not key.startswith("hint_")}
    return json.dumps(named, sort_keys=True)
