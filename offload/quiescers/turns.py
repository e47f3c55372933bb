"""Turns at something that takes only so many at once: first come, first served."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator


class Turns:
    """So many turns at once. Who waits longest is next: VM snapshots that were made first go
    first, so none is carried longer than the others."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one(self, until: float) -> Iterator[bool]:
        """Whether it was one's turn before `until` (of `time.monotonic`); the block runs anyway."""
        got = self._take(until)
        try:
            yield got
        finally:
            if got:
                self._give()

    def _take(self, until: float) -> bool:
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                while not (self._free and self._waiting[0] is me):
                    left = until - time.monotonic()
                    if left <= 0:
                        return False
                    self._changed.wait(left)
                self._free -= 1
                return True
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()  # the next one may be at the head now

    def _give(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()
