"""The cache on disk: bounded, private, and never other bytes than were put."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from offload.engine.blockcache import BlockCache

PACK = "packs/ab/cdef"


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "blocks", 1 << 20)


def files(cache: BlockCache) -> list[Path]:
    return [path for path in cache.folder.rglob("*") if path.is_file()]


def test_cache_gives_back_what_was_put_by_its_place(cache: BlockCache) -> None:
    cache.put(PACK, 100, b"some bytes")
    assert cache.get(PACK, 100, 10) == b"some bytes"
    assert cache.get(PACK, 101, 10) is None
    assert cache.get(PACK, 100, 9) is None
    assert cache.get("packs/ab/other", 100, 10) is None
    assert BlockCache(cache.folder, 1 << 20).get(PACK, 100, 10) == b"some bytes"


def test_cache_is_open_to_its_owner_alone(cache: BlockCache) -> None:
    cache.put(PACK, 100, b"some bytes")
    assert [path.stat().st_mode & 0o777 for path in files(cache)] == [0o600]
    assert cache.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("how", ["torn", "flipped", "empty", "longer"])
def test_cache_damaged_entry_is_not_given_and_goes(cache: BlockCache, how: str) -> None:
    cache.put(PACK, 100, b"some bytes" * 50)
    (path,) = files(cache)
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[200] ^= 1
    changed = {"torn": raw[:100], "flipped": raw, "empty": b"", "longer": raw + b"x"}[how]
    path.write_bytes(bytes(changed))
    assert cache.get(PACK, 100, 500) is None
    assert files(cache) == []


def test_cache_stays_near_its_bound_and_keeps_what_was_used_last(cache: BlockCache) -> None:
    block = os.urandom(16 << 10)
    for number in range(200):
        cache.put(PACK, number, block)
        (path,) = {cache._path(PACK, number, len(block))}
        os.utime(path, (1000 + number, 1000 + number))
    total = sum(path.stat().st_size for path in files(cache))
    assert total <= cache.bound_bytes * (1 + 1 / 16) + len(block)
    assert cache.get(PACK, 199, len(block)) == block
    assert cache.get(PACK, 0, len(block)) is None


def test_cache_of_several_users_at_once_never_gives_wrong_bytes(cache: BlockCache) -> None:
    """Each has its own object, as processes have; the bound makes them evict all the time."""
    wrong: list[int] = []

    def user(seed: int) -> None:
        own = BlockCache(cache.folder, 256 << 10)
        choose = random.Random(seed)
        for _ in range(400):
            number = choose.randrange(60)
            expected = bytes((number,)) * (8 << 10)
            found = own.get(PACK, number, len(expected))
            if found is None:
                own.put(PACK, number, expected)
            elif found != expected:
                wrong.append(number)

    crew = [threading.Thread(target=user, args=(seed,)) for seed in range(4)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert wrong == []
    assert len(files(cache)) <= 60


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "blocks").write_bytes(b"no folder")
    cache = BlockCache(tmp_path / "blocks", 1 << 20)
    cache.put(PACK, 0, b"x")
    assert cache.get(PACK, 0, 1) is None


def test_cache_leftover_of_a_crash_goes_when_it_is_old(cache: BlockCache) -> None:
    cache.put(PACK, 0, b"x")
    old, new = cache.folder / "00/old.part", cache.folder / "00/new.part"
    for path in (old, new):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    for number in range(40):
        cache.put(PACK, number, bytes(16 << 10))
    assert not old.exists()
    assert new.exists()
