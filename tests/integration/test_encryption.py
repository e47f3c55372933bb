"""An encrypted store in the hands of who runs it: no bit, name or place can be changed unnoticed,
nothing of the data shows, and what could not be read back is not written."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from offload import run
from offload.engine import packwriter
from offload.engine.manifests import read_manifest
from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.engine.unlock import open_ring, wrappers
from offload.engine.writeimage import Job, write_image
from offload.errors import IntegrityError, OffloadError
from offload.format import layout
from offload.format.cipher import open_box
from offload.format.index import decode_index
from offload.format.keyfile import (
    Secret,
    WrapperKind,
    key_file_text,
    new_ring,
    next_ring,
    recovery_text,
    unwrap,
    wrap,
)
from offload.format.layout import decode_parameters, encode_parameters, new_parameters
from offload.format.manifest import Manifest, decode_manifest, encode_manifest
from offload.format.pack import MAX_HEAD, PackCipher, read_footer
from offload.model import Backup, BackupId, Consistency, ImageRecord, Instant
from offload.stores.disk import DiskStore
from offload.storespec import KeySource, StoreSpec
from offload.testing.images import MemoryImage

CHUNK = 4096
SECRET = Secret(kind=WrapperKind.FILE, value=bytes(range(32)))
WORDS = b"the ledger of the shop in plain words; "
_caches = count()


def make_store(folder: Path, *, versions: int = 1) -> DiskStore:
    """An encrypted store whose key file is `key`, with small chunks and packs."""
    folder.mkdir(parents=True)
    key = folder / "key"
    key.write_text(key_file_text(SECRET.value) + "\n")
    key.chmod(0o600)
    (folder / "store").mkdir()
    spec = StoreSpec(url=str(folder / "store"), key=KeySource(kind="file", value=(str(key),)))
    store = DiskStore(spec)
    small = new_parameters(chunk_bytes=CHUNK, page_entries=4, pack_bytes=16 << 10)
    parameters = replace(small, id_key=None)
    ring = new_ring()
    for _ in range(versions - 1):
        ring = next_ring(ring)
    raw = wrap(ring, SECRET, ident="wwwwwwwwww", label="", store_id=parameters.store_id)
    store.put(layout.key_name("wwwwwwwwww"), [raw])
    store.put(layout.STORE_OBJECT, [encode_parameters(parameters)])
    return store


@dataclass
class Vault:
    """A store with a full backup and one of deltas over it."""

    folder: Path
    store: DiskStore
    images: dict[str, bytes]

    def open(self) -> Repository:
        """As a process that has never seen it."""
        return Repository.open(self.store, self.folder / f"cache{next(_caches)}")

    def path(self, name: str) -> Path:
        return self.store.root / name

    def names(self, prefix: str) -> list[str]:
        return list(self.store.list(prefix))

    def add_way(self, secret: Secret) -> None:
        """Add a wrapper for this secret."""
        parameters = decode_parameters(self.store.get(layout.STORE_OBJECT), "")
        ring, _ = open_ring(self.store, parameters, SECRET, "the key")
        raw = wrap(ring, secret, ident="zzzzzzzzzz", label="", store_id=parameters.store_id)
        self.store.put(layout.key_name("zzzzzzzzzz"), [raw])

    def contents(self) -> dict[str, bytes]:
        """Every backup, restored."""
        repository = self.open()
        try:
            found = {}
            for name in self.names(layout.MANIFESTS):
                raw = self.store.get(name)
                (image,) = decode_manifest(name, raw, repository.keys, "").backup.images
                stored = StoredImage(
                    repository, bytes.fromhex(image.root), image.size_bytes, image.sector_size
                )
                found[name] = stored.pread(0, image.size_bytes)
            return found
        finally:
            repository.close()


def _write(repository: Repository, ident: str, data: bytes, parent: bytes | None) -> bytes:
    shape = repository.shape(len(data))
    tree = TreeReader(repository, parent, shape) if parent else None
    changed = [(512, 1024), (9000, 9001)] if parent else None
    job = Job(
        image=MemoryImage(bytearray(data)), shape=shape, parent=tree, changed=changed,
        advance=lambda _: None,
    )  # fmt: skip
    with PackWriter(repository, ident) as writer:
        root, _ = write_image(job, writer)
        writer.finish()
    record = ImageRecord(
        volume="db", size_bytes=len(data), sector_size=512, identity="1", root=root.hex(),
        read_bytes=0, stored_bytes=0, mode="full", reason="",
    )  # fmt: skip
    now = datetime.now(UTC)
    backup = Backup(
        id=BackupId(ident), store="main", group="shop", created_at=now, finished_at=now,
        timemark="tttttttttt", consistency=Consistency.CRASH, instant=Instant.ONE,
        images=(record,), parent=None, host="h",
    )  # fmt: skip
    raw = encode_manifest(Manifest(backup=backup), repository.keys)
    repository.store.put(layout.manifest_name(ident), [raw])
    return root


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    chooser = random.Random(7)
    text = (WORDS * 200)[: CHUNK + 1000]
    data = text + chooser.randbytes(CHUNK) + bytes(CHUNK) + chooser.randbytes(700)
    newer = bytearray(data)
    newer[512:1024] = bytes(reversed(range(256))) * 2
    newer[9000] ^= 1
    store = make_store(tmp_path / "v")
    repository = Repository.open(store, tmp_path / "c")
    root = _write(repository, "aaaaaaaaaa", data, None)
    _write(repository, "bbbbbbbbbb", bytes(newer), root)
    sealed = (
        layout.pin_name("pppppppppp", 1), layout.void_name("vvvvvvvvvv"),
        layout.tombstone_name("qqqqqqqqqq"), layout.hold_name("hhhhhhhhhh"),
    )  # fmt: skip
    for name in sealed:
        repository.put_sealed(name, {"images": [], "writer": "vvvvvvvvvv"})
    repository.close()
    images = {"manifests/aaaaaaaaaa": data, "manifests/bbbbbbbbbb": bytes(newer)}
    yield Vault(tmp_path, store, images)
    store.close()


def _overwrite(path: Path, raw: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(raw)


def test_encrypted_store_reads_back_and_shows_nothing_of_its_data(vault: Vault) -> None:
    assert vault.contents() == vault.images
    for path in vault.store.root.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert b"ledger" not in raw
            assert b"shop" not in raw
            assert b'"volume"' not in raw


def _range(raw: bytes, offset: int, length: int) -> bytes:
    return raw[offset : offset + length]


def _flips(raw: bytes) -> Iterator[bytes]:
    for at in range(len(raw)):
        wrong = bytearray(raw)
        wrong[at] ^= 1 << (at % 8)
        yield bytes(wrong)


def test_every_byte_of_sealed_objects_and_wrappers_is_guarded(vault: Vault) -> None:
    repository = vault.open()
    keys = repository.keys
    opened: dict[str, Callable[[str, bytes], object]] = {
        layout.PINS: lambda n, _: repository.get_sealed(n),
        layout.VOIDS: lambda n, _: repository.get_sealed(n),
        layout.TOMBSTONES: lambda n, _: repository.get_sealed(n),
        layout.HOLDS: lambda n, _: repository.get_sealed(n),
        layout.MANIFESTS: lambda n, raw: decode_manifest(n, raw, keys, ""),
        layout.INDEXES: lambda n, raw: decode_index(n, raw, keys),
    }
    for prefix, use in opened.items():
        (name, *_) = vault.names(prefix)
        good = vault.path(name).read_bytes()
        for wrong in _flips(good):
            _overwrite(vault.path(name), wrong)
            vault.store.close()  # no descriptor of the old file
            with pytest.raises(OffloadError):
                use(name, wrong)
        _overwrite(vault.path(name), good)
    (name,) = vault.names(layout.KEYS)
    good = vault.path(name).read_bytes()
    for wrong in _flips(good):
        _overwrite(vault.path(name), wrong)
        vault.store.close()
        (found,) = wrappers(vault.store)
        assert isinstance(found, OffloadError)
    repository.close()


def test_every_byte_of_a_pack_is_guarded(vault: Vault) -> None:
    """Header, salt and footer by the footer's hash; record headers by themselves, payloads by the
    cipher, and so by whoever reads them."""
    repository = vault.open()
    for name in vault.names(layout.PACKS):
        good = vault.path(name).read_bytes()
        entries = repository.pack_entries(name)
        cipher = PackCipher(name, repository.pack_head(name), repository.keys)
        inside = {at: e for e in entries for at in range(e.offset, e.end)}
        for at, wrong in enumerate(_flips(good)):
            entry = inside.get(at)
            if entry is None:
                with pytest.raises(IntegrityError):
                    read_footer(name, len(wrong), partial(_range, wrong), repository.keys)
            elif at < entry.payload_offset:
                head = wrong[entry.offset : entry.payload_offset]
                assert head != repository.record_header(entry, name)
            else:
                stored = wrong[entry.payload_offset : entry.end]
                assert cipher.decrypt(entry, stored) is None
    repository.close()


def test_flipped_bytes_anywhere_give_right_data_or_an_error(vault: Vault) -> None:
    """As a whole, from a fresh cache: a sample of all bytes of all objects that a restore reads."""
    chooser = random.Random(11)
    prefixes = (layout.PACKS, layout.INDEXES, layout.MANIFESTS, layout.KEYS)
    names = [n for prefix in prefixes for n in vault.names(prefix)] + [layout.STORE_OBJECT]
    errors = 0
    for name in names:
        good = vault.path(name).read_bytes()
        for at in chooser.sample(range(len(good)), 12):
            wrong = bytearray(good)
            wrong[at] ^= 1 << chooser.randrange(8)
            _overwrite(vault.path(name), bytes(wrong))
            vault.store.close()
            try:
                assert vault.contents() == vault.images
            except OffloadError:
                errors += 1
        _overwrite(vault.path(name), good)
        vault.store.close()
    assert errors > len(names)
    assert vault.contents() == vault.images


@pytest.mark.parametrize(
    "prefix", [layout.PACKS, layout.MANIFESTS, layout.INDEXES], ids=lambda p: str(p).strip("/")
)
def test_objects_that_change_names_are_noticed(vault: Vault, prefix: str) -> None:
    one, two = vault.names(prefix)[:2]
    first, second = vault.path(one).read_bytes(), vault.path(two).read_bytes()
    _overwrite(vault.path(one), second)
    _overwrite(vault.path(two), first)
    vault.store.close()
    if prefix == layout.INDEXES:  # the packs say the same
        repository = vault.open()
        with pytest.raises(IntegrityError):
            decode_index(one, second, repository.keys)
        repository.close()
        assert vault.contents() == vault.images
        return
    with pytest.raises(IntegrityError):
        vault.contents()


def test_records_that_change_places_are_noticed(vault: Vault) -> None:
    """A payload opens at its own offset of its own pack only."""
    repository = vault.open()
    (name,) = [n for n in vault.names(layout.PACKS) if "aaaaaaaaaa" in n][:1]
    raw = bytearray(vault.path(name).read_bytes())
    entries = repository.pack_entries(name)
    cipher = repository.cipher(name)
    moved = entries[0]._replace(offset=entries[1].offset)
    stored = raw[entries[0].payload_offset : entries[0].end]
    assert cipher.decrypt(entries[0], stored) is not None
    assert cipher.decrypt(moved, stored) is None
    assert open_box(cipher._aead, bytes(12), bytes(stored), b"") is None  # type: ignore[arg-type]
    repository.close()


def test_objects_of_another_store_with_the_same_way_in_do_not_open(
    vault: Vault, tmp_path: Path
) -> None:
    other = make_store(tmp_path / "other")
    for name in vault.names(layout.MANIFESTS):
        other.put(name, [vault.store.get(name)])
    repository = Repository.open(other, tmp_path / "oc")
    for name in vault.names(layout.MANIFESTS):
        with pytest.raises(IntegrityError):
            decode_manifest(name, other.get(name), repository.keys, "")
    repository.close()
    wrapper = vault.path("keys/wwwwwwwwww")
    shutil.copy(wrapper, other.root / "keys" / "x")
    (other.root / "keys" / "wwwwwwwwww").unlink()
    shutil.move(other.root / "keys" / "x", other.root / "keys" / "wwwwwwwwww")
    other.close()
    with pytest.raises(OffloadError) as caught:
        Repository.open(other, tmp_path / "oc2")
    assert caught.value.code == "key-wrong"


def test_salts_come_from_the_index_so_that_no_pack_header_is_read(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[str] = []
    real = vault.store.get_range

    def watched(name: str, offset: int, length: int) -> bytes:
        if name.startswith(layout.PACKS) and (offset, length) == (0, MAX_HEAD):
            heads.append(name)
        return real(name, offset, length)

    monkeypatch.setattr(vault.store, "get_range", watched)
    cache = vault.folder / "kept"
    for _ in range(2):  # by the index objects, then by the local cache of them
        repository = Repository.open(vault.store, cache)
        for pack in repository.index.packs():
            for entry in repository.index.entries(pack):
                repository.read(entry.id)
        repository.index.close()
    assert heads == []


# -- a reader made from the specification alone --------------------------------------------------

READER = Path(__file__).parents[1] / "independent_reader.py"


def _read_alone(vault: Vault, backup: str, *options: str) -> run.Completed:
    out = str(vault.folder / "out")
    argv = [sys.executable, "-I", str(READER), vault.store.url, backup, "db", out, *options]
    return run.run(argv, check=False)


@pytest.mark.parametrize("packs", [[], ["--packs"]], ids=["index", "packs"])
@pytest.mark.parametrize("kind", list(WrapperKind))
def test_independent_reader_opens_each_way_and_reads_deltas(
    vault: Vault, kind: WrapperKind, packs: list[str]
) -> None:
    way, secret = vault.folder / "way", SECRET
    if kind is WrapperKind.FILE:
        way.write_text(key_file_text(SECRET.value) + "\n")
    else:
        text = recovery_text(bytes(32)) if kind is WrapperKind.RECOVERY else "Straße 17"
        way.write_text(text + "\n")
        value = bytes(32) if kind is WrapperKind.RECOVERY else text.encode()
        secret = Secret(kind=kind, value=value)
        vault.add_way(secret)
    for name, data in vault.images.items():
        done = _read_alone(vault, name.removeprefix(layout.MANIFESTS), *packs, f"{kind}:{way}")
        assert (done.status, done.stderr) == (0, "")
        assert (vault.folder / "out").read_bytes() == data
    way.write_text(
        key_file_text(bytes(32)) if kind is WrapperKind.FILE else recovery_text(b"x" * 32)
    )
    done = _read_alone(vault, "aaaaaaaaaa", f"{kind}:{way}")
    assert (done.status, done.stderr) == (1, "damaged: no key fits\n")


def test_independent_reader_follows_folds_and_voids(vault: Vault) -> None:
    key = f"file:{vault.folder / 'v' / 'key'}"
    repository = vault.open()
    raw = vault.store.get("manifests/bbbbbbbbbb")
    (image,) = decode_manifest("manifests/bbbbbbbbbb", raw, repository.keys, "").backup.images
    new = {"aaaaaaaaaa": {"db": image.root}}
    fold = {"format": "offload-fold", "version": 1, "backups": new}
    repository.put_sealed(layout.fold_name("ffffffffff"), {**fold, "sequence": 2})
    lost = {"aaaaaaaaaa": {"db": "00" * 32}}
    older = {**fold, "backups": lost}
    repository.put_sealed(layout.fold_name("eeeeeeeeee"), {**older, "sequence": 1})
    repository.put_sealed(layout.fold_name("vvvvvvvvvv"), {**older, "sequence": 3})  # it is void
    assert _read_alone(vault, "aaaaaaaaaa", key).status == 0
    assert (vault.folder / "out").read_bytes() == vault.images["manifests/bbbbbbbbbb"]
    repository.put_sealed(layout.void_name("bbbbbbbbbb"), {"writer": "bbbbbbbbbb"})
    assert "given up" in _read_alone(vault, "bbbbbbbbbb", key).stderr
    repository.close()


def test_independent_reader_stops_at_damage(vault: Vault) -> None:
    key = f"file:{vault.folder / 'v' / 'key'}"
    for prefix in (layout.PACKS, layout.INDEXES, layout.MANIFESTS, layout.KEYS):
        (name, *_) = vault.names(prefix)
        good = vault.path(name).read_bytes()
        wrong = bytearray(good)
        wrong[len(good) // 2] ^= 1
        _overwrite(vault.path(name), bytes(wrong))
        done = _read_alone(vault, "aaaaaaaaaa", key)
        assert done.status == 1
        assert done.stderr.startswith("damaged")
        _overwrite(vault.path(name), good)
    assert _read_alone(vault, "aaaaaaaaaa", key).status == 0


# -- the check at write time ----------------------------------------------------------------------


class _BrokenCompressor(Compressor):
    """zstd on a machine that flips a bit of its output, or of its input once it was hashed."""

    def compress(self, raw: bytes | bytearray | memoryview) -> tuple[int, bytes]:
        encoding, packed = super().compress(raw)
        wrong = bytearray(packed)
        wrong[len(wrong) // 2] ^= 4
        return encoding, bytes(wrong)


def test_compressor_that_flips_a_bit_is_caught_before_the_pack_is_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "v")
    repository = Repository.open(store, tmp_path / "c")
    monkeypatch.setattr("offload.engine.writeimage.Compressor", _BrokenCompressor)
    with pytest.raises(IntegrityError) as caught:
        _write(repository, "aaaaaaaaaa", WORDS * 4000, None)
    assert caught.value.code == "write-check"
    assert list(store.list(layout.PACKS)) == []
    assert list(store.list(layout.MANIFESTS)) == []
    repository.close()


def test_cipher_that_flips_a_bit_is_caught_before_the_pack_is_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(PackCipher):
        def encrypt(self, entry, payload):  # type: ignore[no-untyped-def]
            stored = bytearray(super().encrypt(entry, payload))
            stored[-1] ^= 1
            return bytes(stored)

    store = make_store(tmp_path / "v")
    repository = Repository.open(store, tmp_path / "c")
    monkeypatch.setattr(packwriter, "PackCipher", Broken)
    with pytest.raises(IntegrityError) as caught:
        _write(repository, "aaaaaaaaaa", WORDS * 4000, None)
    assert caught.value.code == "write-check"
    assert list(store.list(layout.PACKS)) == []
    repository.close()


# -- versions -------------------------------------------------------------------------------------


def test_process_that_opened_before_a_rotation_reads_what_was_written_after_it(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "v")
    early = Repository.open(store, tmp_path / "c1")
    (wrapper,) = [w for w in wrappers(store) if not isinstance(w, OffloadError)]
    ring = unwrap(wrapper, SECRET, early.parameters.store_id)
    assert ring is not None
    raw = wrap(
        next_ring(ring), SECRET, ident="xxxxxxxxxx", label="", store_id=early.parameters.store_id
    )
    store.put(layout.key_name("xxxxxxxxxx"), [raw])
    store.delete(layout.key_name("wwwwwwwwww"))
    late = Repository.open(store, tmp_path / "c2")
    assert late.keys.current.number == 2
    late.put_sealed(layout.pin_name("pppppppppp", 1), {"a": 1})
    root = _write(late, "aaaaaaaaaa", WORDS * 300, None)
    assert early.keys.current.number == 1
    assert read_manifest(early, "aaaaaaaaaa").backup.images[0].root == root.hex()
    early.refresh()
    assert early.get_sealed(layout.pin_name("pppppppppp", 1)) == {"a": 1}
    size = len(WORDS) * 300
    assert StoredImage(early, root, size, 512).pread(0, size) == WORDS * 300
    for repository in (early, late):
        repository.index.close()
    store.close()
