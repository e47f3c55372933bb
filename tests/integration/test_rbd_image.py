"""What snapshots of RBD images hold, and what changed between them, on a real Ceph cluster."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import rbd

from offload import compose
from offload.errors import IntegrityError, NotFoundError
from offload.extents import Ranges, data_ranges, total
from offload.image import Image
from offload.images.rbd import RbdImage
from offload.model import ExtentKind, Snapshot, Volume
from offload.testing.ceph import RunningCeph
from offload.testing.rbd_site import MIB, SIZE, RbdSite

KIB = 1 << 10
PLAIN = rbd.RBD_FEATURE_LAYERING
LOCKED = PLAIN | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
MAPPED = LOCKED | rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF
STRIPED = MAPPED | rbd.RBD_FEATURE_STRIPINGV2
ORDER = 16  # 2**16: objects of 64 KiB, so that a small image has many


@pytest.fixture
def site(ceph: RunningCeph) -> Iterator[RbdSite]:
    made = RbdSite(ceph)
    yield made
    made.clear()


@contextmanager
def opened(site: RbdSite, snapshot: Snapshot) -> Iterator[Image]:
    image = compose.open_image(site.provider.source(snapshot))
    try:
        yield image
    finally:
        image.close()


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [PLAIN, MAPPED])
def test_extents_of_a_sparse_image_are_what_was_written(site: RbdSite, features: int) -> None:
    volume = site.image("db", features=features, order=ORDER)
    site.write(volume, 100 * KIB, b"x" * 200)
    site.write(volume, 5 * MIB, b"y" * 64 * KIB)
    (made,) = site.take("t0", volume)
    with opened(site, made) as image:
        extents = list(image.extents(0, SIZE))
        data = data_ranges(extents)
        assert {e.kind for e in extents} == {ExtentKind.DATA, ExtentKind.HOLE}
        assert sum(e.length for e in extents) == SIZE
        assert data[-1] == (5 * MIB, 5 * MIB + 64 * KIB)
        if features == MAPPED:  # whole objects
            assert data[0] == (64 * KIB, 128 * KIB)
        else:
            assert data[0][1] == 100 * KIB + 200
        part = list(image.extents(5 * MIB + 512, 1024))
        assert [(e.offset, e.length, e.kind) for e in part] == [
            (5 * MIB + 512, 1024, ExtentKind.DATA)
        ]
        assert list(image.extents(SIZE, 0)) == []


def test_extents_of_a_clone_have_what_its_parent_holds(site: RbdSite) -> None:
    parent = site.image("golden", features=MAPPED, order=ORDER)
    site.write(parent, 3 * MIB, b"p" * 64 * KIB)
    with site.open(parent) as image:
        image.create_snap("v1")
        image.protect_snap("v1")
    clone = site.clone(parent, "v1", "db")
    site.write(clone, 0, b"c" * 100)
    (made,) = site.take("t0", clone)
    with opened(site, made) as image:
        assert data_ranges(image.extents(0, SIZE)) == [
            (0, 64 * KIB), (3 * MIB, 3 * MIB + 64 * KIB),
        ]  # fmt: skip
        assert image.pread(3 * MIB, 4) == b"pppp"
        assert image.pread(0, 4) == b"cccc"


def test_image_in_many_windows_is_covered_without_a_gap(
    site: RbdSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.images.rbd._WINDOW_OBJECTS", 3)
    volume = site.image("db", features=MAPPED, order=ORDER)
    for at in (0, 190 * KIB, 191 * KIB, 4 * MIB):
        site.write(volume, at, b"z" * 3 * KIB)
    (made,) = site.take("t0", volume)
    with opened(site, made) as image:
        extents = list(image.extents(1000, SIZE - 1000))
    assert extents[0].offset == 1000
    assert all(a.end == b.offset and a.kind is not b.kind for a, b in pairwise(extents))
    assert extents[-1].end == SIZE
    assert data_ranges(extents) == [
        (1000, 64 * KIB), (128 * KIB, 256 * KIB), (4 * MIB, 4 * MIB + 64 * KIB),
    ]  # fmt: skip


def test_image_outside_its_size_is_refused(site: RbdSite) -> None:
    (made,) = site.take("t0", site.image("db"))
    with opened(site, made) as image:
        assert image.pread(SIZE, 0) == b""
        for offset, length in ((SIZE, 1), (-1, 1), (0, SIZE + 1)):
            with pytest.raises(ValueError, match="outside"):
                image.pread(offset, length)


def test_image_that_nobody_closed_is_closed_with_its_last_user(site: RbdSite) -> None:
    (made,) = site.take("t0", site.image("db"))
    image = RbdImage(site.provider.source(made))
    inner = image._image
    del image
    with pytest.raises(rbd.InvalidArgument, match="closed"):
        inner.size()


def test_image_of_another_size_or_snapshot_is_refused(site: RbdSite) -> None:
    volume = site.image("db")
    (made,) = site.take("t0", volume)
    source = site.provider.source(made)
    with pytest.raises(IntegrityError) as wrong:
        RbdImage(replace(source, size_bytes=SIZE + 512))
    assert wrong.value.code == "size-mismatch"
    site.provider.delete(dict(made.ref))
    with pytest.raises(NotFoundError) as gone:
        RbdImage(source)
    assert gone.value.code == "snapshot-missing"
    with pytest.raises(NotFoundError) as never:
        RbdImage(replace(source, image="123"))
    assert never.value.code == "image-missing"


# -- what changed -----------------------------------------------------------------------------


def differences(older: bytes, newer: bytes) -> Ranges:
    return [
        (at, at + 512)
        for at in range(0, len(newer), 512)
        if older[at : at + 512] != newer[at : at + 512]
    ]


def missed(changed: Ranges, older: bytes, newer: bytes) -> Ranges:
    return [
        (a, b)
        for a, b in differences(older, newer)
        if not any(s <= a and b <= e for s, e in changed)
    ]


class Scribbler:
    """Does to an image what guests and administrators do."""

    def __init__(self, site: RbdSite, volume: Volume, seed: int) -> None:
        self.site = site
        self.volume = volume
        self.random = random.Random(seed)
        self.names: list[str] = []

    def turn(self) -> None:
        with self.site.open(self.volume) as image:
            for _ in range(self.random.randrange(1, 6)):
                self._one(image)

    def _one(self, image: Any) -> None:
        unit = self.random.choice([512, 4096, 64 * KIB])
        at = self.random.randrange(SIZE) // unit * unit
        length = min(int(2 ** self.random.uniform(9, 18)) // 512 * 512, SIZE - at)
        if self.random.random() < 0.2:  # to the end of an object
            length = 64 * KIB - at % (64 * KIB)
        dice = self.random.random()
        if dice < 0.5:
            image.write(self.random.randbytes(length), at)
        elif dice < 0.7:
            image.discard(at, length)
        elif dice < 0.8:
            image.write_zeroes(at, length)
        elif dice < 0.9 or not self.names:
            image.resize(max(at, 512))
            image.resize(SIZE)
        else:
            image.rollback_to_snap(self.random.choice(self.names))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "mapped", "striped", "clone", "group"])
def test_changed_after_anything_misses_nothing(site: RbdSite, kind: str, seed: int) -> None:
    """Writes, discards, zeros, resizing there and back, rollbacks; between any two snapshots."""
    volumes = _volumes(site, kind)
    scribbler = Scribbler(site, volumes[0], seed)
    kept: list[tuple[Snapshot, bytes]] = []
    for turn in range(10):
        scribbler.turn()
        made = site.take(f"t{turn}", *volumes)[0]
        scribbler.names.append(_ordinary(made))
        kept.append((made, site.read(made, 0, SIZE)))
        for older, content in kept:
            changed = site.provider.changed(older, made)
            assert changed is not None
            assert missed(changed, content, kept[-1][1]) == [], f"{turn} since {older.ref}"
        if len(kept) > 4:
            old = kept.pop(scribbler.random.randrange(4))[0]
            scribbler.names.remove(_ordinary(old))
            site.provider.delete(dict(old.ref))
    assert total(site.provider.changed(kept[-1][0], kept[-1][0]) or []) == 0


def _volumes(site: RbdSite, kind: str) -> list[Volume]:
    match kind:
        case "plain":
            return [site.image("db", features=PLAIN, order=ORDER)]
        case "striped":
            return [site.image("db", features=STRIPED, order=ORDER, stripe=(8 * KIB, 4))]
        case "clone":
            parent = site.image("golden", features=MAPPED, order=ORDER)
            site.write(parent, 1 * MIB, random.Random(0).randbytes(2 * MIB))
            with site.open(parent) as image:
                image.create_snap("v1")
                image.protect_snap("v1")
            return [site.clone(parent, "v1", "db")]
        case "group":
            return [site.image("db", order=ORDER), site.image("web", order=ORDER)]
    return [site.image("db", features=MAPPED, order=ORDER)]


def _ordinary(made: Snapshot) -> str:
    return made.ref["snapshot"] if "snapshot" in made.ref else made.ref["group"] + ".base"


def test_changed_after_a_rollback_names_what_it_took_back(site: RbdSite) -> None:
    """librbd's fast diff of Ceph 16 says that nothing changed here."""
    volume = site.image("db", features=MAPPED, order=ORDER)
    site.write(volume, 0, b"a" * 64 * KIB)
    site.take("t0", volume)
    (first,) = site.take("t1", volume)
    site.write(volume, 0, b"b" * 64 * KIB)
    (second,) = site.take("t2", volume)
    with site.open(volume) as image:
        image.discard(0, 64 * KIB)
        image.rollback_to_snap(first.ref["snapshot"])
    (third,) = site.take("t3", volume)
    assert site.read(third, 0, 1) == b"a"
    assert site.provider.changed(second, third) == [(0, 64 * KIB)]


def test_changed_is_close_to_what_was_written(site: RbdSite) -> None:
    volume = site.image("db", size=64 * MIB)
    site.write(volume, 0, b"a" * 64 * MIB)
    (older,) = site.take("t0", volume)
    site.write(volume, 9 * MIB, b"b" * 4096)
    site.write(volume, 40 * MIB + 100, b"c" * 10)
    (newer,) = site.take("t1", volume)
    assert site.provider.changed(older, newer) == [
        (9 * MIB, 9 * MIB + 4096), (40 * MIB, 40 * MIB + 512),
    ]  # fmt: skip


def test_changed_of_a_group_has_what_was_written_after_its_base(site: RbdSite) -> None:
    """A little too much, never too little: the base is made before the instant."""
    pair = site.image("db"), site.image("web")
    site.write(pair[0], 0, b"a" * SIZE)
    plan = site.provider.plan("t0", pair)
    site.provider.prepare(plan)
    site.write(pair[0], 1 * MIB, b"between")
    older = site.provider.snapshot(plan)
    site.provider.settle(older)
    site.write(pair[0], 2 * MIB, b"after")
    newer = site.take("t1", *pair)
    assert site.provider.changed(older[0], newer[0]) == [
        (1 * MIB, 1 * MIB + 512), (2 * MIB, 2 * MIB + 512),
    ]  # fmt: skip
    assert site.provider.changed(older[1], newer[1]) == []


def test_changed_between_a_group_and_one_image_is_known(site: RbdSite) -> None:
    pair = site.image("db"), site.image("web")
    site.write(pair[0], 0, b"a" * SIZE)
    grouped = site.take("t0", *pair)
    site.write(pair[0], 3 * MIB, b"x")
    (single,) = site.take("t1", pair[0])
    site.write(pair[0], 5 * MIB, b"y")
    again = site.take("t2", *pair)
    first = (3 * MIB, 3 * MIB + 512)
    assert site.provider.changed(grouped[0], single) == [first]
    assert site.provider.changed(single, again[0]) == [(5 * MIB, 5 * MIB + 512)]


def test_changed_of_a_deleted_snapshot_is_an_error(site: RbdSite) -> None:
    volume = site.image("db")
    (older,), (newer,) = site.take("t0", volume), site.take("t1", volume)
    site.provider.delete(dict(older.ref))
    for pair in ((older, newer), (newer, older)):
        with pytest.raises(NotFoundError) as caught:
            site.provider.changed(*pair)
        assert caught.value.code == "snapshot-missing"


def test_changed_of_a_resized_image_is_unknown(site: RbdSite) -> None:
    volume = site.image("db")
    (older,) = site.take("t0", volume)
    with site.open(volume) as image:
        image.resize(2 * SIZE)
    (newer,) = site.take("t1", volume)
    assert newer.size_bytes == 2 * SIZE
    assert site.provider.changed(older, newer) is None
