"""Folding: whatever is merged, every kept image reads back the same, in fewer pieces and bytes."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.engine.fold import FoldImage, FoldReport, FoldRule, fold, publish
from offload.engine.manifests import Folds, read_folds
from offload.engine.packwriter import PackWriter
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader, walk_pages
from offload.engine.writeimage import Job, write_image
from offload.errors import BusyError, IntegrityError
from offload.extents import Ranges
from offload.format import layout
from offload.format.fold import Fold, decode_fold, encode_fold
from offload.format.layout import encode_parameters, new_parameters
from offload.format.tree import Leaf
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.images import MemoryImage

CHUNK = 8192
_names = count()


def _repository(folder: Path, page_entries: int = 4) -> Repository:
    folder.mkdir(parents=True, exist_ok=True)
    store = DiskStore(StoreSpec(url=str(folder / "store")))
    store.root.mkdir()
    made = new_parameters(chunk_bytes=CHUNK, page_entries=page_entries, pack_bytes=64 << 10)
    store.put(layout.STORE_OBJECT, [encode_parameters(made)])
    return Repository.open(store, folder / "cache")


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made = _repository(tmp_path)
    yield made
    made.close()


def _write(
    repository: Repository,
    data: bytes | bytearray,
    parent: bytes | None = None,
    changed: Ranges | None = None,
) -> bytes:
    shape = repository.shape(len(data))
    tree = None if parent is None else TreeReader(repository, parent, shape)
    job = Job(
        image=MemoryImage(data), shape=shape, parent=tree, changed=changed, advance=lambda _: None
    )
    with PackWriter(repository, f"w{next(_names):09}") as writer:
        root, _ = write_image(job, writer)
        writer.finish()
    return root


def _read(repository: Repository, root: bytes, size: int) -> bytes:
    return StoredImage(repository, root, size, 512).pread(0, size)


class _Nights:
    """An image, its nightly backups, and what each must read back as."""

    def __init__(self, repository: Repository, size: int, seed: int = 1) -> None:
        self.repository = repository
        self.random = random.Random(seed)
        self.data = bytearray(self.random.randbytes(size))
        self.roots = [_write(repository, self.data)]
        self.contents = [bytes(self.data)]

    def night(self, writes: list[tuple[int, int]], parent: int = -1) -> None:
        """Overwrite ranges of the parent's content with random bytes, and back up."""
        self.data = bytearray(self.contents[parent])
        for start, end in writes:
            self.data[start:end] = self.random.randbytes(end - start)
        self.roots.append(_write(self.repository, self.data, self.roots[parent], writes))
        self.contents.append(bytes(self.data))

    def image(self, number: int) -> FoldImage:
        return FoldImage(
            backup=f"b{number}",
            volume="v",
            size_bytes=len(self.data),
            root=self.roots[number],
        )

    def fold(
        self,
        kept: list[int],
        rule: FoldRule | None = None,
        pinned: list[bytes] | None = None,
        locked: set[str] | None = None,
    ) -> FoldReport:
        """Fold, and take the new roots over."""
        with PackWriter(self.repository, f"w{next(_names):09}") as writer:
            report = fold(
                self.repository,
                writer,
                [self.image(n) for n in kept],
                pinned=[(root, len(self.data)) for root in pinned or []],
                locked=locked or set(),
                rule=rule,
            )
            writer.finish()
        for number in kept:
            root = report.roots.get(f"b{number}", {}).get("v")
            self.roots[number] = bytes.fromhex(root) if root else self.roots[number]
        return report

    def same(self, numbers: list[int]) -> bool:
        size = len(self.data)
        return all(_read(self.repository, self.roots[n], size) == self.contents[n] for n in numbers)

    def leaf(self, number: int, slot: int = 0) -> Leaf:
        shape = self.repository.shape(len(self.data))
        found = TreeReader(self.repository, self.roots[number], shape).leaf(slot)
        assert found is not None
        return found

    def used_bytes(self, kept: list[int]) -> int:
        """The stored bytes of all chunks that the kept images need."""
        shape = self.repository.shape(len(self.data))
        ids: set[bytes] = set()
        for number in kept:
            for _, _, page, leaves in walk_pages(self.repository, self.roots[number], shape, set()):
                ids.add(page)
                ids |= {i for leaf in leaves if leaf for i in (leaf.base, *leaf.deltas)}
        return sum(
            place.entry.stored_length for place in self.repository.index.find_many([*ids]).values()
        )


_writes = st.lists(st.tuples(st.integers(0, 9 * CHUNK), st.integers(1, 3000)), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.integers(1, 9 * CHUNK),
    nights=st.lists(st.tuples(_writes, st.integers(0, 100)), min_size=1, max_size=10),
    rounds=st.lists(st.tuples(st.integers(0, 2**11 - 1), st.booleans()), min_size=1, max_size=3),
    rule=st.builds(
        FoldRule,
        gain=st.sampled_from([0.0, 0.1, 0.5]),
        dead_steps=st.sampled_from([1, 2, 4]),
        pages=st.sampled_from([0.5, 1e9]),
    ),
)
def test_fold_of_any_kept_nights_leaves_every_content_as_it_was(
    size: int,
    nights: list[tuple[list[tuple[int, int]], int]],
    rounds: list[tuple[int, bool]],
    rule: FoldRule,
) -> None:
    with tempfile.TemporaryDirectory(prefix="fold-") as folder:
        repository = _repository(Path(folder), page_entries=2)
        made = _Nights(repository, size)
        for writes, parent in nights:
            ranges = [(a, min(a + n, size)) for a, n in writes if a < size]
            made.night(ranges, parent % len(made.roots))
        alive = list(range(len(made.roots)))
        for mask, go_on in rounds:
            kept = [n for n in alive if mask >> n & 1] or alive[-1:]
            pinned = [made.roots[alive[0]]] if go_on else []
            made.fold(kept, rule, pinned)
            assert made.same(kept)
            assert all(_read(repository, root, size) == made.contents[alive[0]] for root in pinned)
            alive = kept
            if go_on:  # an incremental over a parent that may be folded
                made.night([(0, min(700, size))], alive[-1])
                alive.append(len(made.roots) - 1)
                assert made.same(alive)
        repository.close()


def test_fold_where_only_the_last_night_is_kept_makes_a_new_base(repository: Repository) -> None:
    made = _Nights(repository, 4 * CHUNK)
    for _ in range(3):
        made.night([(0, 2048)])
    before = made.used_bytes([3])
    report = made.fold([3])
    assert (report.bases, report.merged) == (1, 3)
    assert made.leaf(3).deltas == ()
    assert made.same([3])
    assert made.used_bytes([3]) < before


def test_fold_whose_dead_steps_are_smaller_than_the_share_waits(repository: Repository) -> None:
    made = _Nights(repository, 4 * CHUNK)
    for _ in range(3):
        made.night([(0, 1024)])
    old = made.roots[3]
    assert made.fold([3]).roots == {}
    assert made.roots[3] == old


def test_fold_of_many_small_dead_steps_makes_one_delta_of_them(repository: Repository) -> None:
    made = _Nights(repository, 4 * CHUNK)
    for _ in range(9):
        made.night([(0, 512)])
    before = made.used_bytes([8, 9])
    made.fold([8, 9], FoldRule(gain=5))
    assert len(made.leaf(8).deltas) == 1
    assert made.leaf(9).deltas[0] == made.leaf(8).deltas[0]
    assert len(made.leaf(9).deltas) == 2
    assert made.same([8, 9])
    assert made.used_bytes([8, 9]) < before - 6 * 512


def test_fold_between_two_kept_nights_merges_the_steps_between_alone(
    repository: Repository,
) -> None:
    made = _Nights(repository, 2 * CHUNK)
    for _ in range(5):
        made.night([(0, 100), (4000, 4090)])
    assert len(made.leaf(5).deltas) == 5
    made.fold([0, 5], FoldRule(dead_steps=4))
    assert made.leaf(0) == Leaf(made.leaf(5).base)
    assert len(made.leaf(5).deltas) == 1
    assert made.same([0, 5])


def test_fold_that_would_write_more_pages_than_it_merges_waits(repository: Repository) -> None:
    made = _Nights(repository, 4 * CHUNK)
    for _ in range(9):
        made.night([(0, 512)])
    rule = FoldRule(gain=5, pages=0.01)
    assert made.fold([8, 9], rule).roots == {}
    assert made.fold([8, 9], FoldRule(gain=5)).merged == 8


def test_fold_of_two_branches_keeps_what_they_share(repository: Repository) -> None:
    made = _Nights(repository, 2 * CHUNK)
    for _ in range(3):
        made.night([(0, 512)])
    for branch in ((512, 1024), (1024, 1536)):
        made.night([branch], parent=3)
        made.night([branch])
    made.fold([5, 7], FoldRule(gain=5, dead_steps=2))
    assert made.leaf(5).deltas[0] == made.leaf(7).deltas[0]
    assert [len(made.leaf(n).deltas) for n in (5, 7)] == [2, 2]
    assert made.same([5, 7])


def test_fold_of_what_a_pin_needs_or_a_lock_holds_does_not_pay(repository: Repository) -> None:
    made = _Nights(repository, 2 * CHUNK)
    for _ in range(2):
        made.night([(0, 3072)])
    newest = made.roots[2]
    assert made.fold([2], pinned=[newest]).roots == {}
    assert made.fold([2], locked=set(repository.index.packs())).roots == {}
    assert made.fold([2]).bases == 1


def test_fold_while_an_incremental_ran_leaves_both_chains_whole(repository: Repository) -> None:
    made = _Nights(repository, 2 * CHUNK)
    for _ in range(2):
        made.night([(0, 3072)])
    unfolded = made.roots[2]
    made.fold([2])
    assert made.roots[2] != unfolded
    made.roots.append(unfolded)  # the parent as the writer saw it before
    made.contents.append(made.contents[2])
    made.night([(512, 1024)])
    made.night([(512, 1024)], parent=2)
    assert made.same([2, 4, 5])
    made.fold([2, 4, 5])
    assert made.same([2, 4, 5])


def test_fold_of_a_base_that_turns_to_zeros_keeps_the_old_one(repository: Repository) -> None:
    made = _Nights(repository, CHUNK)
    for start in (0, CHUNK // 4, CHUNK // 2, 3 * CHUNK // 4):
        made.data = bytearray(made.contents[-1])
        made.data[start : start + CHUNK // 4] = bytes(CHUNK // 4)
        changed = [(start, start + CHUNK // 4)]
        made.roots.append(_write(repository, made.data, made.roots[-1], changed))
        made.contents.append(bytes(made.data))
    assert made.contents[4] == bytes(CHUNK)
    made.fold([4], FoldRule(gain=0))
    assert made.same([4])


def test_fold_with_a_page_missing_stops(repository: Repository) -> None:
    made = _Nights(repository, 2 * CHUNK)
    made.roots[0] = b"\x07" * 32
    with pytest.raises(IntegrityError):
        made.fold([0])


# -- the object ----------------------------------------------------------------------------------


def _put_fold(repository: Repository, prune: str, sequence: int, root: str) -> None:
    name = layout.fold_name(prune)
    raw = encode_fold(name, Fold(sequence, {"b1": {"v": root}}), repository.keys)
    repository.store.put(name, [raw])


def test_folds_the_greatest_sequence_counts_image_by_image(repository: Repository) -> None:
    first, second = "01" * 32, "02" * 32
    old = Fold(1, {"b1": {"v": first, "w": first}})
    new = Fold(2, {"b1": {"v": second}, "b2": {"v": second}})
    for objects in ({"folds/a": old, "folds/b": new}, {"folds/a": new, "folds/b": old}):
        folds = Folds(objects)
        assert folds.root("b1", "v") == folds.root("b2", "v") == second
        assert folds.root("b1", "w") == first
        assert folds.root("b3", "v") is None
        assert folds.next_sequence == 3


def test_read_folds_of_a_prune_that_was_given_up_does_not_exist(repository: Repository) -> None:
    _put_fold(repository, "aprune0001", 1, "01" * 32)
    _put_fold(repository, "aprune0002", 2, "02" * 32)
    repository.store.put("voids/aprune0002", [b"{}"])
    assert read_folds(repository).root("b1", "v") == "01" * 32


def test_read_folds_with_a_damaged_one_stops(repository: Repository) -> None:
    _put_fold(repository, "aprune0001", 1, "01" * 32)
    raw = repository.store.get("folds/aprune0001")
    repository.store.put("folds/aprune0002", [raw.replace(b'"v"', b'"w"')])
    with pytest.raises(IntegrityError) as caught:
        read_folds(repository)
    assert caught.value.code == "bad-seal"


def test_decode_fold_with_a_root_that_is_none_is_refused(repository: Repository) -> None:
    name = layout.fold_name("aprune0001")
    raw = encode_fold(name, Fold(1, {"b1": {"v": "0102"}}), repository.keys)
    with pytest.raises(IntegrityError) as caught:
        decode_fold(name, raw, repository.keys)
    assert caught.value.code == "bad-fold"


def test_publish_takes_along_what_earlier_folds_say_of_kept_backups(
    repository: Repository,
) -> None:
    old = Fold(4, {"b1": {"v": "01" * 32, "w": "02" * 32}, "gone": {"v": "03" * 32}})
    raw = encode_fold("folds/aprune0001", old, repository.keys)
    repository.store.put("folds/aprune0001", [raw])
    replaced = publish(
        repository,
        "aprune0002",
        read_folds(repository),
        {"b1", "b2"},
        {"b1": {"v": "0a" * 32}, "b2": {"v": "0b" * 32}},
    )
    assert replaced == ["folds/aprune0001"]
    repository.store.delete("folds/aprune0001")
    (now,) = read_folds(repository).objects.values()
    assert now == Fold(5, {"b1": {"v": "0a" * 32, "w": "02" * 32}, "b2": {"v": "0b" * 32}})


@pytest.mark.parametrize(
    "name", [layout.fence_name("aprune0001", "bprune0001"), layout.void_name("aprune0001")]
)
def test_publish_by_a_prune_that_was_given_up_takes_it_back(
    repository: Repository, name: str
) -> None:
    repository.store.put(name, [b"{}"])
    with pytest.raises(BusyError) as caught:
        publish(repository, "aprune0001", Folds({}), {"b1"}, {"b1": {"v": "0a" * 32}})
    assert caught.value.code == "prune-given-up"
    assert list(repository.store.list("folds/")) == []


def test_publish_without_new_roots_writes_nothing(repository: Repository) -> None:
    assert publish(repository, "aprune0001", Folds({}), {"b1"}, {}) == []
    assert list(repository.store.list("folds/")) == []
