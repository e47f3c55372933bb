"""How requests to S3 go out: so many at once, so many bytes a second, again when they fail.

A request is tried again while its failure may pass, until `patience_s` after its first failure;
before the server has answered anything at all, for `_FIRST_PATIENCE_S` only: an address that is
wrong is told at once.
"""

from __future__ import annotations

import io
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from offload.store import Buffer
from offload.stores.s3_errors import is_transient

log = logging.getLogger(__name__)

_FIRST_PATIENCE_S = 10.0
_LONGEST_PAUSE_S = 20.0

T = TypeVar("T")


class RateLimit:
    """At most so many bytes a second, over all threads. 0: as many as there are."""

    def __init__(
        self,
        bytes_per_s: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0  # when all that was let through has had its time
        self._mutex = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until `count` more bytes may pass."""
        if not self.bytes_per_s:
            return
        with self._mutex:
            now = self._clock()
            begin = max(self._free_at, now)
            self._free_at = begin + count / self.bytes_per_s
        if begin > now:
            self._sleep(begin - now)


class Body(io.RawIOBase):
    """The concatenation of buffers as a file, without a copy. What is sent is paid for.

    The library also reads it to sign it: only between `sending` and `resting` does it cost.
    """

    def __init__(self, parts: Sequence[Buffer], limit: RateLimit) -> None:
        super().__init__()
        self._parts = [memoryview(part).cast("B") for part in parts if len(part)]
        self._limit = limit
        self._size = sum(len(part) for part in self._parts)
        self._sending = False
        self._at = self._part = self._offset = 0

    def sending(self) -> None:
        """From now on bytes go over the network."""
        self._sending = True

    def resting(self) -> None:
        """From now on they do not."""
        self._sending = False

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes: a request is sent again from its start."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As files do."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = rest = base + offset
        self._part = 0
        while self._part < len(self._parts) and rest >= len(self._parts[self._part]):
            rest -= len(self._parts[self._part])
            self._part += 1
        self._offset = rest
        return self._at

    def readinto(self, buffer: object) -> int:
        """As many bytes as fit and one part still has."""
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if self._part >= len(self._parts):
            return 0
        part = self._parts[self._part]
        count = min(len(target), len(part) - self._offset)
        if self._sending:
            self._limit.take(count)
        target[:count] = part[self._offset : self._offset + count]
        self._at += count
        self._offset += count
        if self._offset == len(part):
            self._part, self._offset = self._part + 1, 0
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What bounds the traffic of a store. 0 bytes a second: no bound."""

    parallel: int
    bytes_per_s: int  # each way
    patience_s: float


class Traffic:
    """Sends the requests of one store. Safe from any thread."""

    def __init__(self, pace: Pace, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.pace = pace
        self.up = RateLimit(pace.bytes_per_s)
        self.down = RateLimit(pace.bytes_per_s)
        self._free = threading.BoundedSemaphore(pace.parallel)
        self._sleep = sleep
        self.answered = False

    def call(self, request: Callable[[int], T]) -> T:
        """What `request` returns; it is told how often it has been tried before."""
        first_failure: list[float] = []
        tries = itertools.count()

        def once() -> T:
            with self._free:
                answer = request(next(tries))
            self.answered = True
            return answer

        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE_S),
            stop=lambda state: self._out_of_patience(state, first_failure),
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(once)

    def _out_of_patience(self, state: RetryCallState, first_failure: list[float]) -> bool:
        now = time.monotonic()
        if not first_failure:
            first_failure.append(now)
        error = state.outcome and state.outcome.exception()
        log.info("S3 request failed, attempt %d: %s", state.attempt_number, error)
        patience = self.pace.patience_s
        if not self.answered:
            patience = min(patience, _FIRST_PATIENCE_S)
        return now - first_failure[0] >= patience
