"""An opened store: its parameters and keys, its chunks by id, its manifests."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import zstandard

from offload.engine.chunkindex import ChunkIndex, Location
from offload.errors import IntegrityError, NotFoundError, UnavailableError
from offload.format import layout
from offload.format.index import decode_index
from offload.format.layout import Parameters
from offload.format.pack import Encoding, Entry, Kind, chunk_id, read_footer, scan_records
from offload.format.tree import Shape
from offload.store import Store

log = logging.getLogger(__name__)


class Repository:
    """Reads chunks and checks every one against its id. Safe from any thread.

    `cache_dir` is where the local chunk index lives (one file a store).
    """

    def __init__(self, store: Store, parameters: Parameters, cache_dir: Path) -> None:
        self.store = store
        self.parameters = parameters
        self.keys = parameters.keys()
        self.index = ChunkIndex(cache_dir / f"{parameters.store_id}.index.db")
        self._decoders: list[zstandard.ZstdDecompressor] = []

    @classmethod
    def open(cls, store: Store, cache_dir: Path) -> Repository:
        """Open an initialised store; UnavailableError (`store-not-initialised`) if it is none."""
        try:
            raw = store.get(layout.STORE_OBJECT)
        except NotFoundError as error:
            raise UnavailableError(
                f"the store {store.url} is not initialised",
                code="store-not-initialised",
                hint="make it with: offload store init",
            ) from error
        repository = cls(store, layout.decode_parameters(raw, store.url), cache_dir)
        try:
            repository.refresh()
        except BaseException:
            repository.index.close()
            raise
        return repository

    def refresh(self) -> None:
        """See what other writers have added or pruned since."""
        self.index.refresh(lambda: self.store.list(layout.INDEXES), self._load_index)

    def _load_index(self, name: str) -> dict[str, list[Entry]]:
        """One index object; where it is damaged, the footers of all packs instead."""
        try:
            return decode_index(name, self.store.get(name), self.keys)
        except IntegrityError as error:
            log.warning("%s; reading the packs themselves", error.message)
            return {pack: self.pack_entries(pack) for pack in self.store.list(layout.PACKS)}

    def pack_entries(self, name: str) -> list[Entry]:
        """What is in a pack: by its footer, or, if that is damaged, by its records."""
        try:
            return read_footer(
                name, self.store.size(name), partial(self.store.get_range, name), self.keys
            )
        except IntegrityError:
            return list(scan_records(name, memoryview(self.store.get(name))))

    def shape(self, size_bytes: int) -> Shape:
        """The tree geometry of an image of this size."""
        return Shape(size_bytes, self.parameters.chunk_bytes, self.parameters.page_entries)

    def locate(self, ident: bytes) -> Location:
        """Where a chunk is. IntegrityError (`chunk-missing`) if nowhere."""
        location = self.index.find(ident)
        if location is None:
            raise IntegrityError(
                f"chunk {ident.hex()[:16]} is missing from the store {self.store.url}",
                code="chunk-missing",
                hint="see which backups it hits: offload verify --all",
            )
        return location

    def read(self, ident: bytes) -> bytes:
        """The content of a chunk, checked."""
        return self.read_at(self.locate(ident))

    def read_at(self, location: Location) -> bytes:
        """The content of a chunk at a known place, checked against its id."""
        entry = location.entry
        try:
            stored = self.store.get_range(location.pack, entry.payload_offset, entry.stored_length)
        except NotFoundError as error:
            raise IntegrityError(
                f"pack {location.pack} is missing from the store {self.store.url}",
                code="pack-missing",
                hint="see which backups it hits: offload verify --all",
            ) from error
        return self.decode(entry, stored, location.pack)

    def decode(self, entry: Entry, stored: bytes | memoryview, where: str) -> bytes:
        """Decompress a payload and check it. IntegrityError (`chunk-damaged`)."""
        raw = bytes(stored) if entry.encoding == Encoding.RAW else self._unzstd(entry, stored)
        if (
            raw is None
            or len(raw) != entry.raw_length
            or chunk_id(entry.kind, raw, self.keys) != entry.id
        ):
            raise IntegrityError(
                f"a chunk is damaged: {where}, {entry.stored_length} bytes at "
                f"{entry.payload_offset}",
                code="chunk-damaged",
                hint="see which backups it hits: offload verify --all",
            )
        return raw

    def _unzstd(self, entry: Entry, stored: bytes | memoryview) -> bytes | None:
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
