"""Threads over a stream of work, with one rule for failures.

The work is CPU in C code that releases the GIL (read, hash, zstd), so threads scale; more than the
machine has cores gain nothing and cost a buffer each.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Tool = TypeVar("Tool")

MAX_WORKERS = 8


def worker_count() -> int:
    """One a usable core, at most MAX_WORKERS: memory is bounded by their buffers."""
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0))))


def run_workers(
    items: Iterator[Item],
    make_tool: Callable[[], AbstractContextManager[Tool]],
    job: Callable[[Item, Tool], None],
) -> None:
    """Run `job(item, tool)` for every item, each thread with a tool (buffers, codecs) of its own.

    Items are taken one by one, in order, under a lock. The first failure stops all threads and is
    raised here; an interrupt of the calling thread stops them too.
    """
    crew = _Crew(items, make_tool, job)
    threads = [
        threading.Thread(target=crew.loop, name=f"worker-{i}", daemon=True)
        for i in range(worker_count())
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.5)  # wakes up for signals
    finally:
        crew.stop.set()
        for thread in threads:
            thread.join()
    if crew.failures:
        raise crew.failures[0]


class _Crew(Generic[Item, Tool]):
    def __init__(
        self,
        items: Iterator[Item],
        make_tool: Callable[[], AbstractContextManager[Tool]],
        job: Callable[[Item, Tool], None],
    ) -> None:
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self._items = items
        self._make_tool = make_tool
        self._job = job
        self._mutex = threading.Lock()

    def loop(self) -> None:
        """One thread: take and work until nothing is left or somebody failed."""
        try:
            with self._make_tool() as tool:
                for item in iter(self._take, None):
                    self._job(item.value, tool)
        except BaseException as error:  # noqa: BLE001 - raised again by run_workers
            self.failures.append(error)
            self.stop.set()

    def _take(self) -> _Taken[Item] | None:
        with self._mutex:
            if self.stop.is_set():
                return None
            for item in self._items:
                return _Taken(item)
            return None


@dataclass(slots=True)
class _Taken(Generic[Item]):
    """An item, told apart from the end of the work."""

    value: Item
