"""A pack read from start to end: any damage is found, and only chunks that it hits are bad."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from offload.engine.packcheck import check_footer, check_pack
from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.repository import Repository
from offload.engine.room import Room
from offload.errors import IntegrityError
from offload.format import layout
from offload.format.keyfile import Secret, WrapperKind, key_file_text, new_ring, wrap
from offload.format.layout import encode_parameters, new_parameters
from offload.format.pack import Kind
from offload.stores.disk import DiskStore
from offload.storespec import KeySource, StoreSpec

SECRET = Secret(kind=WrapperKind.FILE, value=bytes(range(32)))
CHUNKS = [b"in plain words; " * 40, random.Random(1).randbytes(700), b"\x07" * 512]


@pytest.fixture(params=["plain", "encrypted"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    """A store with one small pack, known to the index."""
    (tmp_path / "store").mkdir()
    spec = StoreSpec(url=str(tmp_path / "store"))
    parameters = new_parameters(chunk_bytes=4096, page_entries=4)
    if request.param == "encrypted":
        key = tmp_path / "key"
        key.write_text(key_file_text(SECRET.value) + "\n")
        key.chmod(0o600)
        spec = replace(spec, key=KeySource(kind="file", value=(str(key),)))
        parameters = replace(parameters, id_key=None)
    store = DiskStore(spec)
    if parameters.encrypted:
        raw = wrap(new_ring(), SECRET, ident="wwwwwwwwww", label="", store_id=parameters.store_id)
        store.put(layout.key_name("wwwwwwwwww"), [raw])
    store.put(layout.STORE_OBJECT, [encode_parameters(parameters)])
    made = Repository.open(store, tmp_path / "cache")
    with PackWriter(made, "aaaaaaaaaa") as writer:
        for kind, raw in zip(Kind, CHUNKS, strict=True):
            writer.add(kind, raw, Compressor(1).compress)
        writer.finish()
    yield made
    made.close()


def pack_of(repository: Repository) -> tuple[str, Path]:
    (name,) = repository.store.list(layout.PACKS)
    return name, Path(repository.store.url) / name


def test_check_pack_finds_a_flipped_bit_in_every_byte(repository: Repository) -> None:
    name, path = pack_of(repository)
    assert check_pack(repository, name, Room()).whole
    raw = path.read_bytes()
    entries = repository.index.entries(name)
    chooser = random.Random(2)
    path.chmod(0o600)
    for at in range(len(raw)):
        wrong = bytearray(raw)
        wrong[at] ^= 1 << chooser.randrange(8)
        path.write_bytes(wrong)
        found = check_pack(repository, name, Room())
        assert not found.whole, at
        hit = {entry for entry in entries if entry.payload_offset <= at < entry.end}
        assert {entry for entry in found.bad if entry in entries} == hit, at
    path.write_bytes(raw)
    assert check_pack(repository, name, Room()).whole


def test_check_pack_cut_anywhere_names_the_chunks_behind_the_cut(repository: Repository) -> None:
    name, path = pack_of(repository)
    size = path.stat().st_size
    entries = repository.index.entries(name)
    path.chmod(0o600)
    for length in range(size - 1, 0, -23):
        os.truncate(path, length)
        lost = {entry for entry in entries if entry.end > length}
        assert set(check_pack(repository, name, Room()).bad) == lost
        quick = check_footer(repository, name, length)
        assert set(quick.bad) == lost
        assert not quick.whole


def test_check_pack_that_is_gone_says_so(repository: Repository) -> None:
    name, path = pack_of(repository)
    path.unlink()
    for found in (check_pack(repository, name, Room()), check_footer(repository, name, 10_000)):
        assert found.gone
        assert set(found.bad) == set(repository.index.entries(name))


def test_decode_into_gives_what_decode_gives_and_notices_every_flipped_bit(
    repository: Repository,
) -> None:
    name, path = pack_of(repository)
    raw = path.read_bytes()
    chooser = random.Random(3)
    for entry in repository.index.entries(name):
        stored = raw[entry.payload_offset : entry.end]
        out = memoryview(bytearray(entry.raw_length))
        repository.decode_into(entry, stored, name, out)
        assert out == repository.decode(entry, stored, name)
        for length in (entry.raw_length - 1, entry.raw_length + 1):
            with pytest.raises(IntegrityError):
                repository.decode_into(entry, stored, name, memoryview(bytearray(length)))
        with pytest.raises(IntegrityError):
            repository.decode_into(entry, stored[:-1], name, out)
        for at in range(len(stored)):
            wrong = bytearray(stored)
            wrong[at] ^= 1 << chooser.randrange(8)
            with pytest.raises(IntegrityError):
                repository.decode_into(entry, wrong, name, out)
