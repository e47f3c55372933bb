"""What of a buffer must be written again: where it differs, in whole blocks.

Apart from the copying, because NumPy takes as long to load as 100 MB take to restore.
"""

from __future__ import annotations

import numpy as np

from offload.extents import Ranges, normalize

_BLOCK = 4096  # what is compared and written again as one


def differing(a: memoryview, b: memoryview) -> Ranges:
    """Where two buffers of one length differ."""
    return _blocks(np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8))


def not_zero(a: memoryview) -> Ranges:
    """Where a buffer has other bytes than zeros."""
    return _blocks(np.frombuffer(a, np.uint8) != 0)


def _blocks(different: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Ranges:
    if not different.any():
        return []
    length = len(different)
    hit = np.logical_or.reduceat(different, np.arange(0, length, _BLOCK)).nonzero()[0]
    return normalize((int(n) * _BLOCK, min((int(n) + 1) * _BLOCK, length)) for n in hit)
