"""What is read ahead, and that each slot is fetched once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from offload.engine.readahead import Chunk, ReadAhead, Streams
from offload.errors import IntegrityError

SLOTS = 400


def ahead_of(streams: Streams, *slots: int) -> list[int]:
    return [found for slot in slots for found in streams.touch(slot)]


def test_streams_sequential_reads_ahead_further_each_step_up_to_the_bound() -> None:
    streams = Streams(SLOTS, 16)
    assert ahead_of(streams, 0) == []
    assert ahead_of(streams, 1) == [2, 3]
    fetched = {2, 3} | set(ahead_of(streams, *range(2, 60)))
    assert fetched == set(range(2, max(fetched) + 1))  # nothing left out, nothing twice as far
    assert 59 < max(fetched) <= 59 + 16


def test_streams_never_name_a_slot_twice_or_one_behind_the_end() -> None:
    streams = Streams(50, 16)
    found = ahead_of(streams, *range(50))
    assert len(found) == len(set(found))
    assert max(found) == 49


def test_streams_random_access_reads_nothing_ahead() -> None:
    assert ahead_of(Streams(SLOTS, 16), *(n * 37 % SLOTS for n in range(300))) == []


def test_streams_several_at_once_are_told_apart() -> None:
    streams = Streams(SLOTS, 16)
    steps = [start + n for n in range(20) for start in (0, 100, 200, 300)]
    found = set(ahead_of(streams, *steps))
    for start in (0, 100, 200, 300):
        assert set(range(start + 2, start + 20)) <= found
        assert max(slot for slot in found if slot < start + 100) <= start + 19 + 16


def test_streams_small_reads_within_a_slot_are_one_step() -> None:
    streams = Streams(SLOTS, 16)
    assert ahead_of(streams, 5, 5, 5, 5) == []
    assert ahead_of(streams, 6, 6) == [7, 8]


class Source:
    """Slots that count who fetched them, and wait when they are told to."""

    def __init__(self) -> None:
        self.alone: list[int] = []
        self.many: list[int] = []
        self.broken: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self._mutex = threading.Lock()

    def fetch(self, slot: int) -> Chunk:
        with self._mutex:
            self.alone.append(slot)
        if slot in self.broken:
            raise IntegrityError("damaged")
        return content(slot)

    def fetch_many(self, slots: Sequence[int], put: Callable[[int, Chunk], None]) -> None:
        with self._mutex:
            self.many += slots
        self.began.set()
        assert self.gate.wait(30)
        for slot in slots:
            if slot not in self.broken:
                put(slot, content(slot))


def content(slot: int) -> Chunk:
    return None if slot % 5 == 0 else bytes((slot % 256,)) * 8


@pytest.fixture
def source() -> Source:
    return Source()


@contextmanager
def reading(source: Source) -> Iterator[ReadAhead]:
    made = ReadAhead(source, SLOTS, ahead=16, memory=64)
    try:
        yield made
    finally:
        source.gate.set()
        made.close()


def test_readahead_gives_every_slot_as_it_is_and_fetches_each_once(source: Source) -> None:
    with reading(source) as ahead:
        assert [ahead.get(slot) for slot in range(SLOTS)] == [content(s) for s in range(SLOTS)]
        assert sorted(source.alone + source.many) == list(range(SLOTS))


def test_readahead_many_readers_of_one_slot_fetch_it_once(source: Source) -> None:
    with reading(source) as ahead:
        ahead.get(10)
        source.gate.clear()
        ahead.get(11)  # 12 and 13 are on their way, and held up
        assert source.began.wait(30)
        found: list[Chunk] = []
        crew = [threading.Thread(target=lambda: found.append(ahead.get(12))) for _ in range(6)]
        for thread in crew:
            thread.start()
        source.gate.set()
        for thread in crew:
            thread.join()
        assert found == [content(12)] * 6
        assert 12 not in source.alone
        assert source.many.count(12) == 1


def test_readahead_that_hangs_delays_no_other_read(source: Source) -> None:
    with reading(source) as ahead:
        ahead.get(10)
        source.gate.clear()
        ahead.get(11)
        assert source.began.wait(30)
        assert ahead.get(300) == content(300)  # from this thread itself
        assert source.alone[-1] == 300


def test_readahead_of_a_damaged_slot_is_an_error_for_its_reader_only(source: Source) -> None:
    source.broken = {13}
    with reading(source) as ahead:
        for slot in (10, 11, 12):
            assert ahead.get(slot) == content(slot)
        with pytest.raises(IntegrityError):
            ahead.get(13)
        assert ahead.get(14) == content(14)
        source.broken = set()
        assert ahead.get(13) == content(13)  # the error is not kept


def test_readahead_memory_is_bounded_and_threads_end(source: Source) -> None:
    before = threading.active_count()
    with reading(source) as ahead:
        for slot in range(300):
            ahead.get(slot)
        assert len(ahead._known) <= 64
    assert threading.active_count() == before


def test_readahead_closed_reads_no_more_ahead(source: Source) -> None:
    with reading(source) as ahead:
        ahead.get(0)
        ahead.close()
        ahead.get(1)
        assert source.many == []
