"""Bulk reading: the same bytes as chunk by chunk, with few requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from offload.engine import bulkread
from offload.engine.bulkread import BulkReader
from offload.engine.packwriter import PackWriter
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.engine.writeimage import Job, write_image
from offload.errors import IntegrityError
from offload.extents import align, data_ranges, normalize, union
from offload.format import layout
from offload.format.layout import encode_parameters, new_parameters
from offload.format.pack import Kind
from offload.store import Buffer
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.images import MemoryImage

CHUNK = 4096
SIZE = 256 * CHUNK + 512
WINDOW = 64 * CHUNK
_names = count()


class CountingStore(DiskStore):
    """Counts what is asked of packs."""

    requests = 0

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        self.requests += name.startswith(layout.PACKS)
        return super().get_range(name, offset, length)

    def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.requests += name.startswith(layout.PACKS)
        super().get_into(name, offset, buffer)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    monkeypatch.setattr(bulkread, "window_bytes", lambda _: WINDOW)
    store = CountingStore(StoreSpec(url=str(tmp_path / "store")))
    store.root.mkdir()
    chosen: Any = {"chunk_bytes": CHUNK, "page_entries": 16, "pack_bytes": 1 << 20}
    store.put(layout.STORE_OBJECT, [encode_parameters(new_parameters(**chosen))])
    made = Repository.open(store, tmp_path / "cache")
    yield made
    made.close()


def nights(repository: Repository, number: int) -> tuple[StoredImage, bytearray]:
    """A full backup and nights of 512-byte changes over it; the last one, and what it holds."""
    pick = random.Random(number)
    data = bytearray(pick.randbytes(SIZE))
    data[20 * CHUNK : 90 * CHUNK] = bytes(70 * CHUNK)
    data[-CHUNK:] = data[:CHUNK]  # one chunk at two places
    root = None
    changed = [(0, SIZE)]
    for _ in range(number + 1):
        shape = repository.shape(SIZE)
        parent = None if root is None else TreeReader(repository, root, shape)
        job = Job(
            image=MemoryImage(data),
            shape=shape,
            parent=parent,
            changed=None if root is None else changed,
            advance=lambda _: None,
        )
        with PackWriter(repository, f"w{next(_names):09}") as writer:
            root, _ = write_image(job, writer)
            writer.finish()
        wanted = bytearray(data)
        changed = []
        for _ in range(40):
            at = pick.randrange(SIZE // 512) * 512
            data[at : at + 512] = pick.randbytes(512)
            changed = union(changed, [(at, at + 512)])
    assert root is not None
    return StoredImage(repository, root, SIZE, 512), wanted


def read_all(image: StoredImage) -> bytearray:
    out = bytearray(SIZE)
    reader = BulkReader(image)
    try:
        for at in range(0, SIZE, reader.window_bytes):
            length = min(reader.window_bytes, SIZE - at)
            reader.read(data_ranges(image.extents(at, length)), into(out))
    finally:
        reader.close()
    return out


def into(out: bytearray) -> Callable[[int, Buffer], None]:
    """Puts what is read into its place, which must be empty."""

    def put(offset: int, content: Buffer) -> None:
        assert not any(out[offset : offset + len(content)])
        out[offset : offset + len(content)] = content

    return put


@pytest.mark.parametrize("number", [0, 1, 9])
def test_bulk_read_gives_what_was_written(repository: Repository, number: int) -> None:
    image, wanted = nights(repository, number)
    assert read_all(image) == wanted


def test_bulk_read_asks_once_a_window_and_night(repository: Repository) -> None:
    image, wanted = nights(repository, 9)
    store = repository.store
    assert isinstance(store, CountingStore)
    pages = 2 * image.shape.entries(1, 0)  # read one by one, by either way
    store.requests = 0
    assert read_all(image) == wanted
    bulk, store.requests = store.requests, 0
    assert image.pread(0, SIZE) == wanted
    windows = -(-SIZE // WINDOW)
    assert bulk <= windows * 11 + pages
    assert bulk * 5 < store.requests


def test_bulk_read_of_parts_of_chunks_is_right(repository: Repository) -> None:
    image, wanted = nights(repository, 3)
    reader = BulkReader(image)
    ranges = normalize([(100, 5000), (3 * CHUNK, 4 * CHUNK), (6 * CHUNK + 1, 7 * CHUNK)])
    assert ranges != align(ranges, CHUNK, SIZE)
    out = bytearray(SIZE)
    reader.read(ranges, into(out))
    reader.close()
    for start, end in ranges:
        assert out[start:end] == wanted[start:end]
    assert not any(out[5000 : 3 * CHUNK])


def test_bulk_read_of_a_pack_that_is_gone_is_an_error_never_other_bytes(
    repository: Repository,
) -> None:
    image, _ = nights(repository, 1)
    packs = list(repository.store.list(layout.PACKS))
    repository.store.delete(packs[0])
    with pytest.raises(IntegrityError):
        read_all(image)


def test_bulk_read_of_damaged_packs_is_right_or_an_error(repository: Repository) -> None:
    image, wanted = nights(repository, 3)
    pick = random.Random(5)
    raised = 0
    for pack in list(repository.store.list(layout.PACKS)):
        path = Path(repository.store.url) / pack
        entries = [e for e in repository.index.entries(pack) if e.kind != Kind.PAGE]
        entry = pick.choice(entries)
        whole = path.read_bytes()
        wrong = bytearray(whole)
        wrong[pick.randrange(entry.payload_offset, entry.end)] ^= 0x10
        path.chmod(0o600)
        path.write_bytes(wrong)
        try:
            assert read_all(image) == wanted  # it may be in no leaf of this night
        except IntegrityError:
            raised += 1
        path.write_bytes(whole)
    assert raised
    assert read_all(image) == wanted
