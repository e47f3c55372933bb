"""The copy path and back, against images in memory: whatever was written reads back the same."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.engine.chunkindex import ChunkIndex
from offload.engine.packwriter import PackWriter
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.engine.trust import sample_unchanged
from offload.engine.writeimage import Counts, Job, write_image
from offload.errors import IntegrityError, UnavailableError
from offload.extents import Ranges, align, clip, data_ranges, normalize, total, union
from offload.format import layout
from offload.format.layout import encode_parameters, new_parameters
from offload.format.tree import MAX_DELTAS
from offload.images.file import FileImage
from offload.model import RawSource
from offload.quantity import Watermark
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.images import MemoryImage

CHUNK = 4096
_names = count()


def make_repository(folder: Path, **parameters: int) -> Repository:
    """A fresh store with small chunks, pages and packs."""
    folder.mkdir(parents=True, exist_ok=True)
    store = DiskStore(StoreSpec(url=str(folder / "store")))
    store.root.mkdir()
    chosen = {"chunk_bytes": CHUNK, "page_entries": 4, "pack_bytes": 64 << 10, **parameters}
    store.put(layout.STORE_OBJECT, [encode_parameters(new_parameters(**chosen))])
    return Repository.open(store, folder / "cache")


def write(
    repository: Repository,
    data: bytes | bytearray,
    parent: bytes | None = None,
    changed: Ranges | None = None,
) -> tuple[bytes, Counts]:
    """One image through the copy path; returns its root and what happened."""
    shape = repository.shape(len(data))
    tree = None if parent is None else TreeReader(repository, parent, shape)
    job = Job(
        image=MemoryImage(data), shape=shape, parent=tree, changed=changed, advance=lambda _: None
    )
    with PackWriter(repository, f"w{next(_names):09}") as writer:
        made = write_image(job, writer)
        writer.finish()
    return made


def read(repository: Repository, root: bytes, size: int) -> bytes:
    return StoredImage(repository, root, size, 512).pread(0, size)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made = make_repository(tmp_path)
    yield made
    made.close()


@dataclass
class _Saved:
    """A backup of the model: its root, and what it must read back as."""

    root: bytes
    data: bytes


@dataclass
class _Model:
    data: bytearray
    touched: Ranges = field(default_factory=list)  # since the last backup
    backups: list[_Saved] = field(default_factory=list)


class EngineMachine(RuleBasedStateMachine):
    """Random writes and backups; every backup so far reads back identical at every step."""

    @initialize(
        size=st.integers(0, 11 * CHUNK),
        seed=st.integers(0, 1000),
        page_entries=st.sampled_from([2, 4]),
    )
    def start(self, size: int, seed: int, page_entries: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="engine-")
        self.repository = make_repository(
            Path(self.folder.name) / "r", page_entries=page_entries, pack_bytes=16 << 10
        )
        self.random = random.Random(seed)
        self.model = _Model(bytearray(size))

    def teardown(self) -> None:
        if hasattr(self, "repository"):
            self.repository.close()
            self.folder.cleanup()

    def _put(self, start: int, data: bytes) -> None:
        end = min(start + len(data), len(self.model.data))
        if start < end:
            self.model.data[start:end] = data[: end - start]
            self.model.touched = union(self.model.touched, [(start, end)])

    @rule(at=st.integers(0, 11 * CHUNK), length=st.integers(1, 2 * CHUNK))
    def write_random(self, at: int, length: int) -> None:
        self._put(at, self.random.randbytes(length))

    @rule(at=st.integers(0, 11 * CHUNK), length=st.integers(1, 600))
    def write_little(self, at: int, length: int) -> None:
        self._put(at, self.random.randbytes(length))

    @rule(slot=st.integers(0, 10), byte=st.integers(0, 3))
    def write_same_chunks(self, slot: int, byte: int) -> None:
        self._put(slot * CHUNK, bytes((byte,)) * (2 * CHUNK))

    @rule(at=st.integers(0, 11 * CHUNK), length=st.integers(1, 4 * CHUNK))
    def punch(self, at: int, length: int) -> None:
        self._put(at, bytes(length))

    @rule(more=st.integers(1, 3 * CHUNK))
    def grow(self, more: int) -> None:
        if len(self.model.data) < 16 * CHUNK:
            self.model.data += bytes(more)

    @precondition(lambda self: bool(self.model.backups))
    @rule(excess=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 3000)), max_size=2))
    def back_up_changes(self, excess: list[tuple[int, int]]) -> None:
        size, last = len(self.model.data), self.model.backups[-1]
        if size != len(last.data):
            self.back_up_compared()
            return
        more = clip(normalize((s * CHUNK, s * CHUNK + n) for s, n in excess), 0, size)
        self._save(*write(
            self.repository, self.model.data, last.root, union(self.model.touched, more)
        ))  # fmt: skip

    @rule()
    def back_up_compared(self) -> None:
        last = self.model.backups[-1] if self.model.backups else None
        same = last is not None and len(last.data) == len(self.model.data)
        parent = last.root if last is not None and same else None
        self._save(*write(self.repository, self.model.data, parent))

    def _save(self, root: bytes, _counts: Counts) -> None:
        self.model.backups.append(_Saved(root, bytes(self.model.data)))
        self.model.touched = []

    @invariant()
    def every_backup_reads_back(self) -> None:
        if not hasattr(self, "model"):
            return
        for saved in self.model.backups:
            size = len(saved.data)
            image = StoredImage(self.repository, saved.root, size, 512)
            assert image.pread(0, size) == saved.data
            known = data_ranges(image.extents(0, size))
            holes = [i for i in range(0, size, 512) if any(saved.data[i : i + 512])]
            assert all(any(a <= i < b for a, b in known) for i in holes)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=25, stateful_step_count=14, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_read_any_part_is_that_part(repository: Repository) -> None:
    data = random.Random(1).randbytes(9 * CHUNK + 77)
    root, _ = write(repository, data)
    image = StoredImage(repository, root, len(data), 4096)
    chooser = random.Random(2)
    for _ in range(200):
        start = chooser.randrange(len(data) + 1)
        end = chooser.randrange(start, len(data) + 1)
        assert image.pread(start, end - start) == data[start:end]
    for offset, length in ((-1, 2), (len(data), 1), (0, len(data) + 1)):
        with pytest.raises(ValueError, match="outside"):
            image.pread(offset, length)
        with pytest.raises(ValueError, match="outside"):
            list(image.extents(offset, length))


def test_write_zeros_store_nothing_but_a_root(repository: Repository) -> None:
    root, counts = write(repository, bytes(20 * CHUNK))
    assert (counts.chunks_new, counts.read_bytes) == (0, 0)
    assert read(repository, root, 20 * CHUNK) == bytes(20 * CHUNK)
    shape = repository.shape(20 * CHUNK)
    assert list(TreeReader(repository, root, shape).data_pages()) == []


def test_write_the_same_twice_stores_nothing_and_gives_the_same_root(
    repository: Repository,
) -> None:
    data = random.Random(1).randbytes(9 * CHUNK)
    root, first = write(repository, data)
    again, second = write(repository, data)
    assert again == root
    assert first.stored_bytes > len(data)
    assert (second.stored_bytes, second.known_bytes) == (0, len(data))


def test_write_equal_chunks_are_stored_once(repository: Repository) -> None:
    chunk = random.Random(1).randbytes(CHUNK)
    root, counts = write(repository, chunk * 40)
    assert counts.chunks_new == 1
    assert read(repository, root, 40 * CHUNK) == chunk * 40


def test_incremental_reads_and_stores_what_changed_in_sectors(repository: Repository) -> None:
    data = bytearray(random.Random(1).randbytes(64 * CHUNK))
    root, _ = write(repository, data)
    changed = [(7 * CHUNK + 100, 7 * CHUNK + 200), (40 * CHUNK, 40 * CHUNK + 512)]
    for start, end in changed:
        data[start:end] = random.Random(2).randbytes(end - start)
    newer, counts = write(repository, data, root, changed)
    assert read(repository, newer, len(data)) == data
    assert (counts.read_bytes, counts.deltas_new, counts.chunks_new) == (1024, 2, 0)
    sectors = total(align(changed, 512, len(data)))
    assert counts.new_bytes == sectors + 2 * 1  # a chunk of 8 sectors has a map of one byte


def test_incremental_over_zeros_and_to_zeros(repository: Repository) -> None:
    data = bytearray(8 * CHUNK)
    root, _ = write(repository, data)
    data[3 * CHUNK + 5 : 3 * CHUNK + 9] = b"here"
    second, _ = write(repository, data, root, [(3 * CHUNK, 3 * CHUNK + 512)])
    assert read(repository, second, len(data)) == data
    third, _ = write(repository, bytes(8 * CHUNK), second, [(3 * CHUNK, 4 * CHUNK)])
    assert third == root


def _deltas_of(repository: Repository, root: bytes, size: int, slot: int) -> int:
    leaf = TreeReader(repository, root, repository.shape(size)).leaf(slot)
    assert leaf is not None
    return len(leaf.deltas)


def test_delta_chain_is_bounded_by_number_and_starts_again(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, chunk_bytes=256 << 10)
    data = bytearray(random.Random(1).randbytes(256 << 10))
    root, _ = write(repository, data)
    lengths = []
    for turn in range(MAX_DELTAS + 3):
        data[turn * 512 : turn * 512 + 4] = turn.to_bytes(4, "little")
        root, _ = write(repository, data, root, [(turn * 512, turn * 512 + 4)])
        lengths.append(_deltas_of(repository, root, len(data), 0))
        assert read(repository, root, len(data)) == data
    assert lengths == [*range(1, MAX_DELTAS + 1), 0, 1, 2]
    repository.close()


@pytest.mark.parametrize("length", [CHUNK, 2048])
def test_delta_chain_is_bounded_by_the_size_of_its_chunk(
    repository: Repository, length: int
) -> None:
    size = 2 * CHUNK + length  # the last chunk may be short: twice its own length is the bound
    data = bytearray(random.Random(1).randbytes(size))
    root, _ = write(repository, data)
    chains = []
    for turn in range(20):
        data[2 * CHUNK : 2 * CHUNK + 4] = turn.to_bytes(4, "little")
        root, _ = write(repository, data, root, [(2 * CHUNK, 2 * CHUNK + 4)])
        chains.append(_deltas_of(repository, root, size, 2))
        assert read(repository, root, size) == data
    assert max(chains) == 2 * length // 513  # each delta has a byte of map beside its sector
    assert chains.count(0) >= 1


def test_compare_with_parent_keeps_its_entries_where_nothing_changed(
    repository: Repository,
) -> None:
    data = bytearray(random.Random(1).randbytes(9 * CHUNK))
    root, _ = write(repository, data)
    data[0:4] = b"new!"
    second, _ = write(repository, data, root, [(0, 4)])
    third, counts = write(repository, data, second)
    assert third == second
    assert counts.stored_bytes == 0


def _attempt(repository: Repository, job: Job, min_free: Watermark | None = None) -> None:
    with PackWriter(repository, "abcdefghjk", min_free=min_free) as writer:
        write_image(job, writer)
        writer.finish()


def test_write_image_that_cannot_be_read_is_an_error_and_ends(repository: Repository) -> None:
    class Broken(MemoryImage):
        def readinto(self, offset: int, buffer: memoryview) -> None:
            if offset > 3 * CHUNK:
                raise UnavailableError("the disk fails", code="image-unreadable")
            super().readinto(offset, buffer)

    image = Broken(random.Random(1).randbytes(200 * CHUNK))
    shape = repository.shape(image.size_bytes)
    job = Job(image=image, shape=shape, parent=None, changed=None, advance=lambda _: None)
    with pytest.raises(UnavailableError, match="the disk fails"):
        _attempt(repository, job)
    assert list(repository.store.list(layout.INDEXES)) == []


def test_write_file_that_is_cut_while_read_is_an_integrity_error(
    repository: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(random.Random(1).randbytes(50 * CHUNK))
    image = FileImage(RawSource(path=path, size_bytes=50 * CHUNK))
    with path.open("r+b") as out:
        out.truncate(20 * CHUNK)
    shape = repository.shape(image.size_bytes)
    job = Job(image=image, shape=shape, parent=None, changed=None, advance=lambda _: None)
    with pytest.raises(IntegrityError) as caught:
        _attempt(repository, job)
    assert caught.value.code == "image-short"
    image.close()


def test_write_into_a_store_that_must_stay_free_stops_cleanly(repository: Repository) -> None:
    data = random.Random(1).randbytes(100 * CHUNK)
    job = Job(
        image=MemoryImage(data), shape=repository.shape(len(data)), parent=None, changed=None,
        advance=lambda _: None,
    )  # fmt: skip
    with pytest.raises(UnavailableError) as caught:
        _attempt(repository, job, Watermark(fraction=1.0))
    assert caught.value.code == "no-space"
    assert list(repository.store.list(layout.PACKS)) == []


# -- the sample of what the storage calls unchanged ----------------------------------------------


def _sample(
    repository: Repository, root: bytes, data: bytes | bytearray, changed: Ranges
) -> tuple[str, MemoryImage]:
    image = MemoryImage(data)
    tree = TreeReader(repository, root, repository.shape(len(data)))
    found = sample_unchanged(repository, tree, image, changed, random.Random(5))
    assert found.read_bytes == sum(end - start for start, end in image.reads)
    return found.alarm, image


def test_sample_true_change_tracking_passes_and_reads_little(repository: Repository) -> None:
    data = bytearray(random.Random(1).randbytes(400 * CHUNK))
    root, _ = write(repository, data)
    data[:CHUNK] = bytes(CHUNK)
    found, image = _sample(repository, root, data, [(0, CHUNK)])
    assert found == ""
    assert 0 < total(normalize(image.reads)) <= 64 << 10
    assert image.read_of([(0, CHUNK)]) == []


def test_sample_wrong_change_tracking_is_noticed(repository: Repository) -> None:
    data = bytearray(random.Random(1).randbytes(400 * CHUNK))
    root, _ = write(repository, data)
    for at in range(0, len(data), 2 * CHUNK):  # half of all chunks, and nothing is said of it
        data[at] ^= 1
    found, _ = _sample(repository, root, data, [])
    assert "integrity" in found


@pytest.mark.parametrize("chunks", [1, 3, 40])
def test_sample_over_a_parent_of_zeros_does_not_fail(repository: Repository, chunks: int) -> None:
    root, _ = write(repository, bytes(chunks * CHUNK))
    found, _ = _sample(repository, root, bytes(chunks * CHUNK), [(0, 512)])
    assert found == ""
    data = random.Random(1).randbytes(chunks * CHUNK)
    found, _ = _sample(repository, root, data, [(0, 512)])
    assert "integrity" in found


def test_sample_of_nothing_unchanged_reads_nothing(repository: Repository) -> None:
    data = random.Random(1).randbytes(3 * CHUNK)
    root, _ = write(repository, data)
    found, image = _sample(repository, root, bytes(3 * CHUNK), [(0, 3 * CHUNK)])
    assert (found, image.reads) == ("", [])


# -- the local cache of where chunks are ---------------------------------------------------------


def test_cache_thrown_away_or_damaged_is_made_again(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    data = random.Random(1).randbytes(30 * CHUNK)
    root, _ = write(repository, data)
    path = repository.index.path
    for damage in (b"not a database" * 1000, None):
        repository.close()
        for file in path.parent.iterdir():
            file.unlink()
        if damage is not None:
            path.write_bytes(damage)
            path.with_name(path.name + "-wal").write_bytes(damage)
        repository = Repository.open(DiskStore(StoreSpec(url=str(tmp_path / "store"))), path.parent)
        assert read(repository, root, len(data)) == data
    repository.close()


def test_cache_damaged_inside_is_one_clear_error(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    data = random.Random(1).randbytes(400 * CHUNK)
    root, _ = write(repository, data)
    path = repository.index.path
    repository.close()
    raw = bytearray(path.read_bytes())
    raw[8192:] = b"\xff" * (len(raw) - 8192)
    path.write_bytes(raw)
    with pytest.raises(UnavailableError, match="chunk index"):  # noqa: PT012 - either may see it
        again = Repository.open(DiskStore(StoreSpec(url=str(tmp_path / "store"))), path.parent)
        read(again, root, len(data))


def test_cache_shared_by_two_openers_finds_what_either_writes(tmp_path: Path) -> None:
    """One clears it (an index object has gone) while the other goes on reading."""
    one = make_repository(tmp_path)
    data = random.Random(1).randbytes(30 * CHUNK)
    write(one, random.Random(9).randbytes(5 * CHUNK))
    vanished = list(one.store.list(layout.INDEXES))
    root, _ = write(one, data)
    assert read(one, root, len(data)) == data
    one.store.delete(vanished[0])
    two = Repository.open(DiskStore(StoreSpec(url=str(tmp_path / "store"))), tmp_path / "cache")
    assert read(one, root, len(data)) == data
    more, _ = write(two, random.Random(3).randbytes(30 * CHUNK))
    assert read(one, more, 30 * CHUNK) == read(two, more, 30 * CHUNK)
    one.close()
    two.close()


def test_cache_opened_by_many_at_once_waits_for_the_one_that_makes_it(tmp_path: Path) -> None:
    """The change of a fresh database to WAL fails at once, without waiting, while another reads."""

    def opener(path: Path) -> bool:
        index = ChunkIndex(path)
        index.refresh(lambda: ["one"], lambda _: ({}, True))
        index.close()
        return True

    for number in range(40):
        path = tmp_path / f"{number}.db"
        with ThreadPoolExecutor(8) as crew:
            assert all(crew.map(opener, [path] * 16))


def test_cache_refreshed_by_two_at_once_holds_every_index_object(tmp_path: Path) -> None:
    first = make_repository(tmp_path)
    datas = [random.Random(n).randbytes(6 * CHUNK) for n in range(12)]
    roots = [write(first, data)[0] for data in datas]
    path = first.index.path
    first.close()

    def reader(number: int) -> bool:
        mine = Repository.open(DiskStore(StoreSpec(url=str(tmp_path / "store"))), path.parent)
        try:
            return read(mine, roots[number], 6 * CHUNK) == datas[number]
        finally:
            mine.close()

    for _ in range(3):
        for file in path.parent.iterdir():
            file.unlink()
        with ThreadPoolExecutor(6) as crew:
            assert all(crew.map(reader, range(12)))
