"""What FIEMAP names as changed between two clones, against a comparison of all their bytes."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from offload import fiemap
from offload.extents import Ranges, total
from offload.model import Snapshot, Volume
from offload.run import run
from offload.snapshots.reflink import ReflinkProvider
from offload.testing.pools import loop_pool
from offload.testing.snapshot_provider import taken

pytestmark = pytest.mark.needs_root

_SIZE = 24 << 20
_BLOCK = 4096
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16  # linux/falloc.h
_KINDS = {
    "xfs": ("xfs", "", ()),
    "xfs-1k-blocks": ("xfs", "", ("-b", "size=1024")),
    "btrfs": ("btrfs", "", ()),
    "btrfs-compressed": ("btrfs", "compress-force=zstd", ()),
    "btrfs-nodatacow": ("btrfs", "nodatacow", ()),
}
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(params=list(_KINDS))
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    kind, mount_options, mkfs_options = _KINDS[request.param]
    with loop_pool(tmp_path, kind, mount_options=mount_options, mkfs_options=mkfs_options) as point:
        yield point


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    done = _libc.fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length))
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _payload(chance: random.Random, length: int) -> bytes:
    """Random bytes, bytes that compress well, or zeros."""
    kind = chance.random()
    if kind < 0.4:
        return chance.randbytes(length)
    if kind < 0.8:
        return (chance.randbytes(16) * (length // 16 + 1))[:length]
    return bytes(length)


def _churn(path: Path, chance: random.Random, steps: int) -> None:
    """What a production host and its administrator do to an image file."""
    fd = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(fd).st_size
        for _ in range(steps):
            offset = chance.randrange(0, size - 1)
            length = min(chance.choice((1, 512, 4096, 5000, 65536, 300_000)), size - offset)
            action = chance.random()
            if action < 0.75:
                os.pwrite(fd, _payload(chance, length), offset)
            elif action < 0.85:
                _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
            elif action < 0.92:
                _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)
            else:
                _fallocate(fd, 0, offset, length)
    finally:
        os.close(fd)


def _differing_blocks(older: Path, newer: Path) -> set[int]:
    a, b = older.read_bytes(), newer.read_bytes()
    a = a.ljust(len(b), b"\0")
    return {at for at in range(0, len(b), _BLOCK) if a[at : at + _BLOCK] != b[at : at + _BLOCK]}


def _blocks(ranges: Ranges) -> set[int]:
    return {at for start, end in ranges for at in range(start // _BLOCK * _BLOCK, end, _BLOCK)}


@contextmanager
def _two_clones(path: Path, chance: random.Random, steps: int) -> Iterator[tuple[Snapshot, ...]]:
    provider = ReflinkProvider("ichurn0000")
    volume = Volume(name="db", provider="reflink", path=path)
    with ExitStack() as stack:
        (older,) = stack.enter_context(taken(provider, "told000000", volume))
        _churn(path, chance, steps)
        (newer,) = stack.enter_context(taken(provider, "tnew000000", volume))
        yield older, newer


@contextmanager
def _writers(path: Path) -> Iterator[None]:
    """Three threads that write to a file until the end of the block, a third of it each.

    Direct and cached writes to one page at once are an error of the writer (EIO at the next fsync).
    """
    stop = threading.Event()
    failed: list[OSError] = []

    def _run(number: int) -> None:
        chance, blocks = random.Random(number), _SIZE // _BLOCK // 3
        flags = os.O_RDWR | (os.O_DIRECT if number == 1 else 0)
        fd = os.open(path, flags)
        mapped = mmap.mmap(fd, _SIZE) if number == 2 else None
        block = mmap.mmap(-1, _BLOCK)  # aligned, as O_DIRECT wants it
        try:
            while not stop.wait(0.001):
                at = (number * blocks + chance.randrange(blocks)) * _BLOCK
                block[:] = chance.randbytes(_BLOCK)
                if mapped is not None:
                    mapped[at : at + _BLOCK] = block[:]
                else:
                    os.pwrite(fd, block, at)
        except OSError as error:
            failed.append(error)
        finally:
            if mapped is not None:
                mapped.close()
            block.close()
            os.close(fd)

    threads = [threading.Thread(target=_run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []


def _fresh(path: Path, chance: random.Random, size: int = _SIZE) -> Path:
    with path.open("xb") as out:
        os.ftruncate(out.fileno(), size)
    _churn(path, chance, 250)
    return path


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_changed_after_random_changes_misses_no_byte(pool: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = _fresh(pool / "db.img", chance)
    for _ in range(3):
        with _two_clones(path, chance, 80) as (older, newer):
            changed = ReflinkProvider("ichurn0000").changed(older, newer)
            assert changed is not None
            paths = Path(older.ref["path"]), Path(newer.ref["path"])
            missed = _differing_blocks(*paths) - _blocks(changed)
            assert missed == set()


def test_changed_under_live_writers_misses_no_byte(pool: Path) -> None:
    """Buffered, O_DIRECT and mapped writes go on while clones are taken and compared."""
    path = _fresh(pool / "db.img", random.Random(7))
    provider = ReflinkProvider("ilive00000")
    volume = Volume(name="db", provider="reflink", path=path)
    with _writers(path), ExitStack() as stack:
        (older,) = stack.enter_context(taken(provider, "t0", volume))
        differing = 0
        for at in range(1, 6):
            time.sleep(0.05)
            (newer,) = stack.enter_context(taken(provider, f"t{at}", volume))
            changed = provider.changed(older, newer)
            assert changed is not None
            found = _differing_blocks(Path(older.ref["path"]), Path(newer.ref["path"]))
            assert found - _blocks(changed) == set()
            differing += len(found)
            older = newer
    assert differing > 5  # they did write


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_changed_few_small_writes_names_little_more(tmp_path: Path, kind: str) -> None:
    with loop_pool(tmp_path, kind) as point:
        path = point / "db.img"
        path.write_bytes(random.Random(4).randbytes(_SIZE))
        provider = ReflinkProvider("ichurn0000")
        volume = Volume(name="db", provider="reflink", path=path)
        with taken(provider, "told000000", volume) as (older,):
            fd = os.open(path, os.O_WRONLY)
            for at in range(64):
                os.pwrite(fd, b"new", at * 100 * _BLOCK % _SIZE)
            os.close(fd)
            with taken(provider, "tnew000000", volume) as (newer,):
                changed = provider.changed(older, newer)
                assert changed is not None
                differing = _differing_blocks(Path(older.ref["path"]), Path(newer.ref["path"]))
                assert len(differing) == 64
                assert differing <= _blocks(changed)
                assert total(changed) <= 1.1 * len(differing) * _BLOCK


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_changed_ranges_grown_file_names_what_was_behind_its_end(tmp_path: Path, kind: str) -> None:
    with loop_pool(tmp_path, kind) as point:
        path, clone = point / "db.img", point / "clone.img"
        path.write_bytes(b"a" * 100_001)  # an end inside a block
        run(["cp", "--reflink=always", str(path), str(clone)])
        os.truncate(path, 1 << 20)
        with path.open("r+b") as out:
            out.seek(500_000)
            out.write(b"b" * 10)
        with clone.open("rb") as older, path.open("rb") as newer:
            changed = fiemap.changed_ranges(older.fileno(), newer.fileno(), 1 << 20)
        assert _differing_blocks(clone, path) - _blocks(changed) == set()
        assert any(start <= 500_000 < end for start, end in changed)
        assert total(changed) < 100_000


def test_changed_btrfs_rewrite_and_dedupe_of_compressed_extents_misses_nothing(
    tmp_path: Path,
) -> None:
    """Encoded extents can keep their address while what a range reads from them changes."""
    with loop_pool(tmp_path, "btrfs", mount_options="compress-force=zstd") as point:
        path = point / "db.img"
        pattern = b"".join(bytes([n]) * _BLOCK for n in range(32))
        path.write_bytes(pattern)
        os.sync()
        provider = ReflinkProvider("ichurn0000")
        volume = Volume(name="db", provider="reflink", path=path)
        with taken(provider, "told000000", volume) as (older,):
            clone_range = f"reflink {path} {16 * _BLOCK} 0 {4 * _BLOCK}"  # inside one extent
            run(["xfs_io", "-c", clone_range, str(path)])
            with taken(provider, "tnew000000", volume) as (newer,):
                old_path, new_path = Path(older.ref["path"]), Path(newer.ref["path"])
                with old_path.open("rb") as a, new_path.open("rb") as b:
                    first = next(fiemap.file_extents(a.fileno()))
                    second = next(fiemap.file_extents(b.fileno()))
                assert first.physical == second.physical  # the trap is set
                changed = provider.changed(older, newer)
                assert changed is not None
                differing = _differing_blocks(old_path, new_path)
                assert differing == {0, 4096, 8192, 12288}
                assert differing <= _blocks(changed)


def test_file_extents_many_pages_give_each_extent_once(xfs_pool: Path) -> None:
    """More extents than two calls return."""
    path = xfs_pool / "many.img"
    count = 9000
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        for at in range(count):
            os.pwrite(fd, b"x", at * 2 * _BLOCK)
        extents = list(fiemap.file_extents(fd))  # some are unwritten: XFS allocates ahead
        assert len(extents) == fiemap.count_extents(path) > 8192
        assert all(a.logical + a.length <= b.logical for a, b in pairwise(extents))
        written = [e.logical for e in extents if not e.flags & fiemap.UNWRITTEN]
        assert written == [at * 2 * _BLOCK for at in range(count)]
        assert fiemap.changed_ranges(fd, fd, os.fstat(fd).st_size) == []
    finally:
        os.close(fd)
