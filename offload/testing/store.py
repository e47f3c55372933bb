"""The contract suite of stores. Subclass `StoreContract` and give it its fixtures.

class TestMyStore(StoreContract):
    @pytest.fixture
    def url(self, tmp_path) -> str: ...     # an empty store
    def open(self, url: str) -> Store: ...
"""
# ruff: noqa: S101 - assertions are what a test suite is made of

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest

from offload.errors import BusyError, IntegrityError, NotFoundError
from offload.store import Buffer, Exclusive, Filling, Store

_BAD_NAMES = (
    "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", ".a", "a/.b", "A", "a b", "a\n", "ä",
    "a\0b",
)  # fmt: skip


class StoreContract(ABC):
    """What every store does."""

    refuses_taken_names = True  # False: the store cannot tell (S3 with versions)
    reads_a_thread = 400  # where many threads read: fewer where each is a request

    @abstractmethod
    def open(self, url: str) -> Store:
        """An opened store."""

    @pytest.fixture
    def store(self, url: str) -> Iterator[Store]:
        """An empty store, opened."""
        made = self.open(url)
        yield made
        made.close()

    def test_put_parts_are_stored_in_one_piece(self, store: Store) -> None:
        """Any kind of buffer, many parts, empty ones, and none."""
        parts: list[Buffer] = [b"one", bytearray(b"two"), memoryview(b"three"), b""]
        assert store.put("packs/ab/x", parts * 700) == 11 * 700
        assert store.get("packs/ab/x") == b"onetwothree" * 700
        assert store.put("empty", []) == 0
        assert store.get("empty") == b""
        assert store.size("packs/ab/x") == 11 * 700

    def test_put_taken_name_is_refused_and_the_first_stays(self, store: Store) -> None:
        """Nothing is ever overwritten, where the store can tell; names are unique all the same."""
        if not self.refuses_taken_names:
            pytest.skip("this kind of store cannot tell")
        store.put("a/b", [b"first"])
        with pytest.raises(BusyError) as caught:
            store.put("a/b", [b"second"])
        assert caught.value.code == "object-exists"
        assert store.get("a/b") == b"first"
        assert list(store.list("a/")) == ["a/b"]

    def test_put_one_name_from_many_threads_one_wins(self, store: Store) -> None:
        """And the object is the winner's."""
        if not self.refuses_taken_names:
            pytest.skip("this kind of store cannot tell")

        def attempt(number: int) -> int | None:
            try:
                store.put("race", [bytes((number,)) * 100_000])
            except BusyError:
                return None
            return number

        with ThreadPoolExecutor(8) as crew:
            winners = [n for n in crew.map(attempt, range(8)) if n is not None]
        assert len(winners) == 1
        assert store.get("race") == bytes((winners[0],)) * 100_000

    def test_put_is_seen_by_another_opener_at_once_and_whole(self, url: str, store: Store) -> None:
        """Read after write."""
        other = self.open(url)
        try:
            assert not other.exists("late")
            store.put("late", [b"x" * 1000])
            assert other.exists("late")
            assert other.get("late") == b"x" * 1000
        finally:
            other.close()

    def test_get_range_gives_exactly_what_was_asked_for(self, store: Store) -> None:
        """From the start, the middle, the end; nothing at all."""
        data = os.urandom(5000)
        store.put("o", [data])
        for offset, length in ((0, 5000), (17, 1000), (4999, 1), (5000, 0), (0, 0)):
            assert store.get_range("o", offset, length) == data[offset : offset + length]
            if isinstance(store, Filling):
                buffer = bytearray(b"x" * length)
                store.get_into("o", offset, memoryview(buffer))
                assert buffer == data[offset : offset + length]

    @pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (500, 1)])
    def test_get_range_past_the_end_is_an_integrity_error(
        self, store: Store, offset: int, length: int
    ) -> None:
        """Never fewer bytes."""
        store.put("o", [bytes(10)])
        with pytest.raises(IntegrityError) as caught:
            store.get_range("o", offset, length)
        assert caught.value.code == "object-short"
        if isinstance(store, Filling):
            with pytest.raises(IntegrityError) as caught:
                store.get_into("o", offset, memoryview(bytearray(length)))
            assert caught.value.code == "object-short"

    def test_missing_object_is_not_found(self, store: Store) -> None:
        """By each way of asking."""
        assert not store.exists("no/such")
        for ask in (store.get, store.size, lambda name: store.get_range(name, 0, 1)):
            with pytest.raises(NotFoundError) as caught:
                ask("no/such")
            assert caught.value.code == "no-object"
        if isinstance(store, Filling):
            with pytest.raises(NotFoundError):
                store.get_into("no/such", 0, memoryview(bytearray(1)))

    def test_list_is_in_name_order_and_of_the_folder_only(self, store: Store) -> None:
        """Files and folders mixed; a folder that is not there has nothing in it."""
        names = ["p/b", "p/a/z", "p/a-b", "p/c/a/x", "p/a/b/c", "px/a", "q", "p/c.d"]
        for name in names:
            store.put(name, [b"x"])
        assert list(store.list("p/")) == sorted(n for n in names if n.startswith("p/"))
        assert list(store.list("p/a/")) == ["p/a/b/c", "p/a/z"]
        assert list(store.list("nothing/")) == []

    def test_infos_say_what_list_and_size_say(self, store: Store) -> None:
        """In the same order, stamped by the store's own clock."""
        before = store.now()
        for name, size in (("p/b", 3), ("p/a/z", 0), ("p/a-b", 5000)):
            store.put(name, [bytes(size)])
        after = store.now()
        found = list(store.infos("p/"))
        assert [info.name for info in found] == list(store.list("p/"))
        assert [info.size_bytes for info in found] == [5000, 0, 3]
        second = timedelta(seconds=1)  # S3 cuts to whole seconds
        assert all(before - second <= info.modified <= after + second for info in found)
        assert list(store.infos("nothing/")) == []

    def test_delete_removes_and_may_be_repeated(self, store: Store) -> None:
        """Also while it had been read before, and the name is still free for nobody else."""
        store.put("a/b", [b"x"])
        assert store.get("a/b") == b"x"
        for _ in range(2):
            store.delete("a/b")
        assert not store.exists("a/b")
        assert list(store.list("a/")) == []
        with pytest.raises(NotFoundError):
            store.get_range("a/b", 0, 1)

    @pytest.mark.parametrize("name", _BAD_NAMES)
    def test_names_outside_the_alphabet_are_refused_everywhere(
        self, store: Store, name: str
    ) -> None:
        """Whoever passes one has a bug: a ValueError."""
        for ask in (
            lambda: store.put(name, [b"x"]),
            lambda: store.get(name),
            lambda: store.get_range(name, 0, 1),
            lambda: store.size(name),
            lambda: store.exists(name),
            lambda: store.delete(name),
            lambda: list(store.list(f"{name}/")),
        ):
            with pytest.raises(ValueError, match="no object name"):
                ask()

    def test_many_threads_read_many_objects_at_once(self, store: Store) -> None:
        """More objects than any cache of descriptors holds, and one is deleted meanwhile."""
        objects = {f"p/{n:03}": bytes((n,)) * 4096 for n in range(120)}
        for name, data in objects.items():
            store.put(name, [data])
        store.put("p/gone", [bytes(4096)])
        wrong: list[str] = []

        def reader(start: int) -> None:
            for turn in range(self.reads_a_thread):
                name = f"p/{(start * 31 + turn * 7) % 120:03}"
                if store.get_range(name, 0, 4096) != objects[name]:
                    wrong.append(name)

        threads = [threading.Thread(target=reader, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        store.get_range("p/gone", 0, 10)
        store.delete("p/gone")
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_close_may_be_repeated(self, url: str) -> None:
        """Also after reads."""
        store = self.open(url)
        store.put("a", [b"x"])
        store.get("a")
        store.close()
        store.close()


class ExclusiveStoreContract(StoreContract):
    """What a store does that can be held alone."""

    @pytest.mark.parametrize(
        ("theirs", "mine", "refused"),
        [(False, False, False), (False, True, True), (True, False, True), (True, True, True)],
    )
    def test_lock_against_another_process(
        self, url: str, store: Store, theirs: bool, mine: bool, refused: bool
    ) -> None:
        """Shared with shared only, and it goes with the process that has it."""
        context = multiprocessing.get_context("spawn")
        ours, child_end = context.Pipe()
        child = context.Process(target=_hold, args=(self, url, theirs, child_end))
        child.start()
        try:
            assert ours.recv() == "locked"
            if refused:
                with pytest.raises(BusyError) as caught, _lockable(store).lock(exclusive=mine):
                    pass
                assert caught.value.code == "store-busy"
            else:
                with _lockable(store).lock(exclusive=mine):
                    pass
            child.kill()
            child.join()
            with _lockable(store).lock(exclusive=mine, wait_s=5):
                pass
        finally:
            child.kill()
            child.join()

    def test_lock_waits_for_its_turn(self, store: Store) -> None:
        """As long as it was told to."""
        entered, release = threading.Event(), threading.Event()

        def holder() -> None:
            with _lockable(store).lock(exclusive=True):
                entered.set()
                release.wait(60)

        thread = threading.Thread(target=holder)
        thread.start()
        entered.wait(60)
        began = time.monotonic()
        with pytest.raises(BusyError), _lockable(store).lock(exclusive=False, wait_s=0.2):
            pass
        assert time.monotonic() - began >= 0.2
        threading.Timer(0.2, release.set).start()
        with _lockable(store).lock(exclusive=False, wait_s=10):
            pass
        thread.join()


def _lockable(store: Store) -> Exclusive:
    assert isinstance(store, Exclusive)
    return store


def _hold(suite: StoreContract, url: str, exclusive: bool, pipe: Connection) -> None:
    """In a process of its own: take the lock, say so, and wait to be killed."""
    with _lockable(suite.open(url)).lock(exclusive=exclusive):
        pipe.send("locked")
        time.sleep(60)
