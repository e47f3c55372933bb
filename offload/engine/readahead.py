"""Read-ahead for stores that are far: what a reader will want next is on its way when it asks.

Access is watched slot by slot. A reader that goes on from where one was read before is a stream,
and each step of a stream doubles how far is read ahead of it, up to a bound; several streams go on
beside each other (a boot reads a few files at once). Access without a pattern reads nothing ahead.

Jobs run on a few threads that are there only while there is work, so that hundreds of idle views
cost none. What a reader waits for never queues behind them: it fetches what nobody has begun to
fetch, and waits for what somebody has. A job takes neighbours of one pack with one request.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from offload.errors import OffloadError

Chunk = bytes | bytearray | None  # None: zeros

_STREAMS = 8
_FIRST = 2  # slots ahead after the second step of a stream
_BATCH = 8  # slots a job
_THREADS = 4
_IDLE_S = 2.0  # how long a thread waits for another job


class Slots(Protocol):
    """What fetches decoded chunks by their slot numbers."""

    def fetch(self, slot: int) -> Chunk:
        """One, for a reader that waits."""
        ...

    def fetch_many(self, slots: Sequence[int], put: Callable[[int, Chunk], None]) -> None:
        """Several, each given to `put` when it is there; those that cannot be read are left out."""
        ...


class Streams:
    """Which slots to read ahead. `bound` is in slots. Not safe from several threads."""

    def __init__(self, slots: int, bound: int) -> None:
        self._slots = slots
        self._bound = bound
        # next slot of a stream → (how far is read ahead of it, where that has come to)
        self._streams: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def touch(self, slot: int) -> range:
        """A reader is at a slot now; what to fetch ahead."""
        known = self._streams.pop(slot, None)
        if known is None and slot + 1 in self._streams:
            self._streams.move_to_end(slot + 1)  # still in the slot that it was in
            return range(0)
        if known is None:
            self._note(slot + 1, 0, slot + 1)
            return range(0)
        depth, upto = known
        depth = min(max(_FIRST, depth * 2), self._bound)
        begin = max(upto, slot + 1)
        end = min(slot + 1 + depth, self._slots)
        # whole batches: a request a slot would be read-ahead without its point
        if end - begin < min(_BATCH, depth) and end < self._slots and upto > slot + 1:
            end = begin
        self._note(slot + 1, depth, max(end, upto))
        return range(begin, max(begin, end))

    def _note(self, following: int, depth: int, upto: int) -> None:
        self._streams[following] = depth, upto
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)


class ReadAhead:
    """Slots through a bounded memory, each fetched once however many want it. `ahead` and `memory`
    are in slots. Safe from any thread; `close` it."""

    def __init__(self, source: Slots, slots: int, *, ahead: int, memory: int) -> None:
        self._source = source
        self._streams = Streams(slots, min(ahead, memory // 2))
        self._memory = memory
        self._known: OrderedDict[int, Chunk] = OrderedDict()
        self._coming: dict[int, Future[Chunk]] = {}
        self._jobs: deque[list[int]] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False
        self._mutex = threading.Lock()
        self._work = threading.Condition(self._mutex)
        self._ended = threading.Condition(self._mutex)

    def get(self, slot: int) -> Chunk:
        """The chunk of a slot. Raises what fetching it raises."""
        with self._mutex:
            self._queue(self._streams.touch(slot))
            if slot in self._known:
                self._known.move_to_end(slot)
                return self._known[slot]
            coming = self._coming.get(slot)
            mine = coming is None
            if coming is None:
                coming = self._coming[slot] = Future()
        if mine:
            self._fetch(slot, coming)
        try:
            return coming.result()
        except _NotFetchedError:
            return self.get(slot)

    def _fetch(self, slot: int, coming: Future[Chunk]) -> None:
        try:
            chunk = self._source.fetch(slot)
        except BaseException as error:  # noqa: BLE001 - whoever waits for it gets the same
            with self._mutex:
                del self._coming[slot]
            coming.set_exception(error)
        else:
            self._put(slot, chunk, coming)

    def _put(self, slot: int, chunk: Chunk, coming: Future[Chunk]) -> None:
        with self._mutex:
            self._known[slot] = chunk
            while len(self._known) > self._memory:
                self._known.popitem(last=False)
            self._coming.pop(slot, None)
        coming.set_result(chunk)

    # -- jobs, with the lock held ----------------------------------------------------------------

    def _queue(self, ahead: range) -> None:
        if self._closed or not ahead:
            return
        wanted = [slot for slot in ahead if slot not in self._known and slot not in self._coming]
        self._jobs += (wanted[at : at + _BATCH] for at in range(0, len(wanted), _BATCH))
        while len(self._jobs) > self._memory // _BATCH:  # a stream that has gone elsewhere
            self._jobs.popleft()
        for _ in range(min(len(self._jobs) - self._idle, _THREADS - self._threads)):
            self._threads += 1
            threading.Thread(target=self._run, name="read-ahead", daemon=True).start()
        self._work.notify(len(self._jobs))

    # -- on a thread of its own ------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            self._do(job)

    def _next_job(self) -> dict[int, Future[Chunk]] | None:
        """Slots that are this thread's to fetch; None to end."""
        with self._mutex:
            while not self._closed:
                while self._jobs:
                    slots = [slot for slot in self._jobs.popleft() if slot not in self._known]
                    mine: dict[int, Future[Chunk]] = {
                        slot: Future() for slot in slots if slot not in self._coming
                    }
                    if mine:
                        self._coming.update(mine)
                        return mine
                self._idle += 1
                called = self._work.wait(_IDLE_S)
                self._idle -= 1
                if not called and not self._jobs:
                    break
            self._threads -= 1
            self._ended.notify_all()
            return None

    def _do(self, job: dict[int, Future[Chunk]]) -> None:
        left = dict(job)
        try:
            self._source.fetch_many(
                list(job), lambda slot, chunk: self._put(slot, chunk, left.pop(slot))
            )
        except OffloadError:
            pass  # whoever wants one of them fetches it, and gets the error
        finally:
            with self._mutex:
                for slot in left:
                    self._coming.pop(slot, None)
            for coming in left.values():
                coming.set_exception(_NotFetchedError())

    def close(self) -> None:
        """Give up what is queued and wait for what runs. Idempotent."""
        with self._mutex:
            self._closed = True
            self._jobs.clear()
            self._work.notify_all()
            while self._threads:
                self._ended.wait()
            self._known.clear()


class _NotFetchedError(Exception):
    """A job has ended without this slot."""
