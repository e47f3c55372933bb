"""An opened store: its parameters and keys, its chunks by id, its manifests."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import zstandard

from offload.engine.chunkindex import ChunkIndex, Location
from offload.engine.quarantine import Quarantine, read_quarantine
from offload.engine.unlock import unlock
from offload.errors import IntegrityError, NotFoundError, UnavailableError
from offload.format import layout
from offload.format.index import decode_index_heads, encode_index
from offload.format.keys import Keys
from offload.format.layout import Parameters
from offload.format.pack import (
    MAX_HEAD,
    PLAIN_HEAD,
    Encoding,
    Entry,
    Kind,
    PackCipher,
    PackHead,
    chunk_id,
    decode_head,
    read_footer,
    record_header,
    scan_records,
)
from offload.format.sealed import object_hash, seal_object, unseal_object
from offload.format.tree import Shape
from offload.objectlock import Locking
from offload.store import Buffer, Store

log = logging.getLogger(__name__)

_CIPHERS = 1024  # packs whose key is kept

_Result = TypeVar("_Result")


class Repository:
    """Reads chunks and checks every one against its id. Safe from any thread.

    `cache_dir` is where the local chunk index lives (one file a store).
    """

    def __init__(self, store: Store, parameters: Parameters, keys: Keys, cache_dir: Path) -> None:
        self.store = store
        self.parameters = parameters
        self.keys = keys
        self.index = ChunkIndex(cache_dir / f"{parameters.store_id}.index.db")
        self.quarantine = Quarantine()
        self._decoders: list[zstandard.ZstdDecompressor] = []
        self._heads: dict[str, PackHead] = {}
        self._hidden: set[str] = set()  # index objects under object lock that somebody has hidden
        self._ciphers: OrderedDict[str, PackCipher] = OrderedDict()
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, store: Store, cache_dir: Path) -> Repository:
        """Open an initialised store, with the key that its spec names.

        UnavailableError (`store-not-initialised`) if it is none; see `unlock` for errors of keys.
        """
        try:
            raw = store.get(layout.STORE_OBJECT)
        except NotFoundError as error:
            raise UnavailableError(
                f"the store {store.url} is not initialised",
                code="store-not-initialised",
                hint="make it with: offload store init",
            ) from error
        parameters = layout.decode_parameters(raw, store.url)
        repository = cls(store, parameters, unlock(store, parameters), cache_dir)
        try:
            _refuse_older(repository.keys, cache_dir / f"{parameters.store_id}.key-version", store)
            repository.refresh()
        except BaseException:
            repository.index.close()
            raise
        return repository

    def refresh(self) -> None:
        """See what other writers have added or pruned since."""
        self.index.refresh(
            lambda: [*self.store.list(layout.INDEXES), *self._hidden], self._load_index
        )
        if self._heads:
            self.index.note_heads(self._heads)
            self._heads = {}
        noted = self.store.list(layout.QUARANTINE)
        self.quarantine = read_quarantine(noted, self.get_sealed, self.quarantine)
        self.index.bad = self.quarantine.has

    def _load_index(self, name: str) -> tuple[dict[str, list[Entry]], bool]:
        """One index object, and True; where it is damaged, the footers of all packs, and False."""
        try:
            raw = self.store.get(name)
            packs, heads = self.with_keys(lambda keys: decode_index_heads(name, raw, keys))
            self._heads.update(heads)
            return packs, name not in self._hidden
        except IntegrityError as error:
            if isinstance(self.store, Locking) and not self.store.is_locked(name):
                log.warning("%s, and not locked: it is none of ours", error.message)
                return {}, False
            log.warning("%s; reading the packs themselves", error.message)
            return dict(self._all_entries()), False

    def _all_entries(self) -> Iterator[tuple[str, list[Entry]]]:
        """Of all packs that can be read."""
        for pack in self.store.list(layout.PACKS):
            try:
                yield pack, self.pack_entries(pack)
            except IntegrityError as error:
                log.warning("%s", error.message)

    def pack_entries(self, name: str) -> list[Entry]:
        """What is in a pack: by its footer, or, if that is damaged, by its records; under object
        lock by those of its original. IntegrityError (`bad-pack`)."""
        try:
            return self._footer(name)
        except IntegrityError:
            if isinstance(self.store, Locking) and self.store.distrust(name):
                return self.pack_entries(name)
            return list(scan_records(name, memoryview(self.store.get(name))))

    def _footer(self, name: str) -> list[Entry]:
        return read_footer(
            name, self.store.size(name), partial(self.store.get_range, name), self.keys
        )

    def put_index(self, name: str, packs: dict[str, list[Entry]]) -> int:
        """Put an index object; returns its bytes."""
        known = {pack: self._known_head(pack) for pack in packs}
        heads = {pack: head for pack, head in known.items() if head is not None}
        return self.store.put(name, [encode_index(name, packs, self.keys, heads)])

    def put_sealed(self, name: str, value: dict[str, Any]) -> str:
        """Put a sealed object; returns its hash."""
        raw = seal_object(name, value, self.keys)
        self.store.put(name, [raw])
        return object_hash(raw)

    def get_sealed(self, name: str) -> dict[str, Any]:
        """A sealed object. NotFoundError, IntegrityError (`bad-seal`)."""
        raw = self.store.get(name)
        return self.with_keys(lambda keys: unseal_object(name, raw, keys))

    def attests(self, name: str, field: str, ident: str) -> bool:
        """Whether the sealed note `name` is there and names `ident`. One that is damaged or forged
        says nothing."""
        try:
            return self.get_sealed(name).get(field) == ident
        except NotFoundError:
            return False
        except IntegrityError as error:
            log.warning("%s", error.message)
            return False

    def with_keys(self, use: Callable[[Keys], _Result]) -> _Result:
        """Use the keys; once more with the store's own of now, if a version is unknown: they may
        have been rotated since this process opened the store."""
        try:
            return use(self.keys)
        except IntegrityError as error:
            if error.code != "key-version-unknown":
                raise
        self.keys = unlock(self.store, self.parameters)
        return use(self.keys)

    def shape(self, size_bytes: int) -> Shape:
        """The tree geometry of an image of this size."""
        return Shape(size_bytes, self.parameters.chunk_bytes, self.parameters.page_entries)

    def locate(self, ident: bytes) -> Location:
        """Where a chunk is. IntegrityError (`chunk-missing`) if nowhere."""
        location = self.index.find(ident)
        if location is None:  # another host's prune may have moved it since
            self.refresh()
            location = self.index.find(ident)
        if location is None and self._find_hidden():
            location = self.index.find(ident)
        if location is None:
            raise IntegrityError(
                f"chunk {ident.hex()[:16]} is missing from the store {self.store.url}",
                code="chunk-missing",
                hint="see which backups it hits: offload verify --all",
            )
        return location

    def _find_hidden(self) -> bool:
        """Read index objects that are locked and were hidden: once, when a chunk is missing."""
        if self._hidden or not isinstance(self.store, Locking):
            return False
        self._hidden = set(self.store.hidden(layout.INDEXES))
        if self._hidden:
            log.warning("%d index objects are locked and hidden: read", len(self._hidden))
            self.refresh()
        return bool(self._hidden)

    def read(self, ident: bytes) -> bytes:
        """The content of a chunk, checked."""
        return self.read_at(self.locate(ident))

    def read_at(self, location: Location) -> bytes:
        """The content of a chunk, checked: from the place given, or from another where that one
        has gone or is damaged. A prune may move a chunk at any time."""
        try:
            return self._read_stored(location)
        except IntegrityError as error:
            found = self._read_elsewhere(location, refresh=error.code == "pack-missing")
            if found is None:
                raise
            return found

    def _read_stored(self, location: Location) -> bytes:
        """From this place; under object lock, if that was replaced, from what was stored there."""
        try:
            return self.read_place(location)
        except IntegrityError as error:
            if not isinstance(self.store, Locking) or not self.store.distrust(location.pack):
                raise
            log.warning("%s; its original is read", error.message)
            self._heads.pop(location.pack, None)
            self._ciphers.pop(location.pack, None)
            return self.read_place(location)

    def _read_elsewhere(self, location: Location, *, refresh: bool) -> bytes | None:
        tried = {location}
        for look in (None, self.refresh if refresh else None, self._find_hidden):
            if look is not None:
                look()
            for place in self.index.places(location.entry.id):
                if place not in tried:
                    tried.add(place)
                    with contextlib.suppress(IntegrityError):
                        return self._read_stored(place)
        return None

    def read_place(self, location: Location) -> bytes:
        """The content of a chunk at this very place, checked against its id.

        IntegrityError (`pack-missing`, `chunk-damaged`).
        """
        entry = location.entry
        try:
            stored = self.store.get_range(location.pack, entry.payload_offset, entry.stored_length)
            return self.decode(entry, stored, location.pack)
        except NotFoundError as error:
            raise IntegrityError(
                f"pack {location.pack} is missing from the store {self.store.url}",
                code="pack-missing",
                hint="see which backups it hits: offload verify --all",
            ) from error

    # -- packs -----------------------------------------------------------------------------------

    def note_head(self, pack: str, head: PackHead) -> None:
        """Take over what a writer in this process knows of its pack."""
        if head.key_version:
            self._heads[pack] = head

    def _known_head(self, pack: str) -> PackHead | None:
        if not self.keys.encrypted:
            return PLAIN_HEAD
        return self._heads.get(pack) or self.index.head(pack)

    def pack_head(self, pack: str) -> PackHead:
        """How a pack is encrypted: known from an index object, or read from its first bytes."""
        head = self._known_head(pack)
        if head is None:
            head = decode_head(pack, self.store.get_range(pack, 0, MAX_HEAD))
            self._heads[pack] = head
        return head

    def cipher(self, pack: str) -> PackCipher:
        """What decrypts a pack."""
        with self._mutex:
            found = self._ciphers.get(pack)
            if found is not None:
                self._ciphers.move_to_end(pack)
                return found
        head = self.pack_head(pack)
        found = self.with_keys(lambda keys: PackCipher(pack, head, keys))
        with self._mutex:
            self._ciphers[pack] = found
            if len(self._ciphers) > _CIPHERS:
                self._ciphers.popitem(last=False)
        return found

    def record_header(self, entry: Entry, pack: str) -> bytes:
        """The bytes that stand before a payload."""
        return record_header(entry, self.pack_head(pack).key_version)

    def payload(self, entry: Entry, stored: Buffer, pack: str) -> Buffer:
        """Decrypt what is stored for a chunk, still compressed: what `PackWriter.append` takes.

        IntegrityError (`chunk-damaged`).
        """
        found = self.cipher(pack).decrypt(entry, stored) if self.keys.encrypted else stored
        if found is None:
            raise _damaged(entry, pack)
        return found

    def decode(self, entry: Entry, stored: Buffer, pack: str) -> bytes:
        """Decrypt and decompress a payload and check it. IntegrityError (`chunk-damaged`)."""
        payload = self.payload(entry, stored, pack) if self.keys.encrypted else stored
        return self.decompress(entry, payload, pack)

    def decompress(self, entry: Entry, payload: Buffer, pack: str) -> bytes:
        """Decompress a payload and check it against its id. IntegrityError (`chunk-damaged`)."""
        raw = bytes(payload) if entry.encoding == Encoding.RAW else self._unzstd(entry, payload)
        if (
            raw is None
            or len(raw) != entry.raw_length
            or chunk_id(entry.kind, raw, self.keys) != entry.id
        ):
            raise _damaged(entry, pack)
        return raw

    def decode_into(self, entry: Entry, stored: Buffer, pack: str, out: memoryview) -> None:
        """The same as `decode`, into memory of the chunk's length. IntegrityError
        (`chunk-damaged`): then it holds anything."""
        payload = self.payload(entry, stored, pack)
        whole = len(payload) if entry.encoding == Encoding.RAW else entry.raw_length
        if (
            not whole == entry.raw_length == len(out)
            or not self._fill(entry, payload, out)
            or chunk_id(entry.kind, out, self.keys) != entry.id
        ):
            raise _damaged(entry, pack)

    def _fill(self, entry: Entry, payload: Buffer, out: memoryview) -> bool:
        if entry.encoding == Encoding.RAW:
            out[:] = payload
            return True
        decoder = self._decoder()
        try:
            if zstandard.frame_content_size(payload) != len(out):
                return False
            with decoder.stream_reader(payload) as content:
                return content.readinto(out) == len(out)
        except zstandard.ZstdError:
            return False
        finally:
            self._decoders.append(decoder)

    def _decoder(self) -> zstandard.ZstdDecompressor:
        # A pool instead of thread locals: nbdkit's threads get a new Python state at every call.
        return self._decoders.pop() if self._decoders else zstandard.ZstdDecompressor()

    def _unzstd(self, entry: Entry, stored: Buffer) -> bytes | None:
        # A pool instead of thread locals: nbdkit's threads get a new Python state at every call.
        decoder = self._decoders.pop() if self._decoders else zstandard.ZstdDecompressor()
        try:
            if zstandard.frame_content_size(stored) != entry.raw_length:
                return None  # never allocate what a damaged frame header asks for
            return decoder.decompress(stored, max_output_size=entry.raw_length)
        except zstandard.ZstdError:
            return None
        finally:
            self._decoders.append(decoder)

    def read_page(self, ident: bytes) -> bytes:
        """A tree page, checked to be one."""
        location = self.locate(ident)
        if location.entry.kind != Kind.PAGE:
            raise IntegrityError(f"chunk {ident.hex()[:16]} is no tree page", code="bad-page")
        return self.read_at(location)

    def close(self) -> None:
        """Close the index and the store."""
        self.index.close()
        self.store.close()


def _refuse_older(keys: Keys, seen: Path, store: Store) -> None:
    """IntegrityError (`key-rollback`) for an older key version than this machine has seen: whoever
    brings back a wrapper from before a rotation would have new data written under a key that was
    given up."""
    number = keys.current.number
    try:
        known = int(seen.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        known = 0
    if number < known:
        raise IntegrityError(
            f"the store {store.url} opens with version {number} of its key, and this machine has "
            f"seen version {known}: a key from before a rotation was brought back",
            code="key-rollback",
            hint=f"see: offload key list; if the store is right and this is wrong, remove {seen}",
        )
    if number > known:
        seen.write_text(str(number), encoding="ascii")


def _damaged(entry: Entry, pack: str) -> IntegrityError:
    return IntegrityError(
        f"a chunk is damaged: {pack}, {entry.stored_length} bytes at {entry.payload_offset}",
        code="chunk-damaged",
        hint="see which backups it hits: offload verify --all",
    )
