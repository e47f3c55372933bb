"""Quiescers in tests."""

from __future__ import annotations

import time

from offload.model import Consistency
from offload.quiesce import Quiescer


def frozen(quiescer: Quiescer, within_s: float = 10.0) -> Consistency:
    """Hold and freeze, as the director does."""
    until = time.monotonic() + within_s
    quiescer.hold(until)
    return quiescer.freeze(until)
