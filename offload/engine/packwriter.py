"""Chunks in, packs out: deduplicates, groups records into packs, puts them in the background."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import zstandard

from offload.engine.repository import Repository
from offload.errors import IntegrityError, UnavailableError
from offload.format import layout
from offload.format.cipher import SALT_BYTES
from offload.format.pack import (
    PLAIN_HEAD,
    Encoding,
    Entry,
    Kind,
    PackCipher,
    PackHead,
    chunk_id,
    footer,
    record_header,
)
from offload.journal import step
from offload.quantity import Watermark, show_size
from offload.store import Buffer, Exclusive

_PACKS = 3  # of memory: one being filled, two that wait or are being put
_USUAL_CHUNK = 256 << 10
_TRIAL_BYTES = 8 << 10
_TRIAL_FROM = 64 << 10
_KEEP_RATIO = 0.97  # what shrinks by less than 3 % is stored as it is: faster to read


class Compressor:
    """zstd with a quick way out for what won't shrink. One a thread.

    Data comes in stretches: only behind a chunk that did not shrink is the next one tried on small
    samples first. A trial before every chunk cost 4 % of a backup.
    """

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(compression_params=_parameters(level))
        self._doubtful = False

    def compress(self, raw: bytes | bytearray | memoryview) -> tuple[int, bytes]:
        """Encoding and payload."""
        length = len(raw)
        if self._doubtful and length >= _TRIAL_FROM and not self._promising(raw):
            return Encoding.RAW, bytes(raw)
        packed = self._zstd.compress(raw)
        self._doubtful = len(packed) >= length * _KEEP_RATIO
        if self._doubtful:
            return Encoding.RAW, bytes(raw)
        return Encoding.ZSTD, packed

    def _promising(self, raw: bytes | bytearray | memoryview) -> bool:
        """Whether one of three samples shrinks: random and compressed data is found out in 5 µs."""
        view = memoryview(raw)
        middle = (len(view) // 2) & ~511
        for at in (middle, 0, len(view) - _TRIAL_BYTES):
            sample = view[at : at + _TRIAL_BYTES]
            if len(self._zstd.compress(sample)) < _TRIAL_BYTES * _KEEP_RATIO:
                return True
        return False


def _parameters(level: int) -> zstandard.ZstdCompressionParameters:
    """zstd's own for this level; at level 1 with a larger table.

    Measured on chunks of 256 KiB of /usr: 1 % fewer bytes and 2 to 3 % more time to compress
    (docs/decisions/0003).
    """
    if level != 1:
        return zstandard.ZstdCompressionParameters.from_level(level, write_content_size=True)
    return zstandard.ZstdCompressionParameters.from_level(
        1, source_size=_USUAL_CHUNK, hash_log=16, min_match=6, write_content_size=True
    )


@dataclass(slots=True)
class _Pack:
    """A pack that is being filled. `size` is what its records take so far."""

    name: str
    head: PackHead
    cipher: PackCipher
    size: int
    entries: list[Entry] = field(default_factory=list)
    parts: list[Buffer] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    open: int = 0  # records that have a place and no bytes yet
    full: bool = False


class PackWriter:
    """Writes the packs of one writer (a backup, a repack). `add` is safe from many threads.

    Every payload is decrypted, decompressed and compared with its id again before its pack is put:
    what was hashed is what can be read.

    Use it as a context manager: an exception inside abandons the packs (those already put stay in
    the store under the writer's id, and the caller's journal removes them).
    """

    def __init__(
        self, repository: Repository, writer: str, min_free: Watermark | None = None
    ) -> None:
        self.repository = repository
        self.writer = writer
        self.stored_bytes = 0
        self.packs: dict[str, list[Entry]] = {}
        self._keys = repository.keys
        self._min_free = min_free or Watermark()
        self._mutex = threading.Lock()
        self._counts = threading.Lock()  # of putters: the mutex is held while a pack is waited for
        self._nothing_known = repository.index.empty()  # the first backup need not ask each time
        self._mine: set[bytes] = set()
        self._pack: _Pack | None = None
        self._count = 0
        self._room = threading.Semaphore(_PACKS)
        self._queue: queue.Queue[_Pack | None] = queue.Queue()
        self._failure: BaseException | None = None
        # a request to a server takes its time: another one goes on meanwhile
        putters = 1 if isinstance(repository.store, Exclusive) else 2
        self._putters = [
            threading.Thread(target=self._put_all, name="pack-put", daemon=True)
            for _ in range(putters)
        ]
        for putter in self._putters:
            putter.start()

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._end_putters()

    def add(
        self,
        kind: Kind,
        raw: bytes | bytearray | memoryview,
        compress: Callable[[bytes | bytearray | memoryview], tuple[int, bytes]],
        ident: bytes | None = None,
    ) -> tuple[bytes, int]:
        """Store a chunk unless the store has it; returns its id and the bytes its record takes
        (0: the store has it)."""
        if ident is None:
            ident = chunk_id(kind, raw, self._keys)
        if not self.claim(ident):
            return ident, 0
        encoding, payload = compress(raw)
        return ident, self.append(ident, kind, encoding, len(raw), payload)

    def claim(self, ident: bytes) -> bool:
        """True for the first to ask for a chunk that the store does not have: it must append it."""
        with self._mutex:
            if ident in self._mine:
                return False
            if not self._nothing_known and self.repository.index.has(ident):
                return False
            self._mine.add(ident)
            return True

    def append(
        self, ident: bytes, kind: int, encoding: int, raw_length: int, payload: Buffer
    ) -> int:
        """Append an encoded chunk, not encrypted; returns its record's bytes.

        Raises IntegrityError (`write-check`) if it does not decode to what its id says, and what a
        background put raised.
        """
        if self._failure is not None:
            raise self._failure
        with self._mutex:
            pack = self._pack or self._new_pack()
            length = len(payload) + pack.head.overhead
            entry = Entry(ident, kind, encoding, raw_length, length, pack.size)
            place = self._reserve(pack, entry)
        try:
            stored = pack.cipher.encrypt(entry, payload)
            self._check(pack, entry, stored)
        except BaseException as error:
            self._failure = error
            self._room.release()  # its pack will never be put
            raise
        self._fill(pack, place, stored)
        return entry.end - entry.offset

    def _new_pack(self) -> _Pack:
        """Begin a pack; waits while too many are in memory. Under the mutex: all wait with it."""
        self._room.acquire()
        if self._failure is not None:
            self._room.release()
            raise self._failure
        version = self._keys.current.number
        head = PackHead(version, secrets.token_bytes(SALT_BYTES)) if version else PLAIN_HEAD
        self._count += 1
        name = layout.pack_name(self.writer, self._count)
        self._pack = _Pack(name, head, PackCipher(name, head, self._keys), head.length)
        self._pack.parts.append(head.encode())
        return self._pack

    def _reserve(self, pack: _Pack, entry: Entry) -> int:
        """Give a record its place in the pack; a pack that is full gets no more."""
        with pack.lock:
            pack.entries.append(entry)
            pack.parts += (record_header(entry, pack.head.key_version), b"")
            pack.open += 1
            pack.size = entry.end
            pack.full = pack.size >= self.repository.parameters.pack_bytes
            if pack.full:
                self._pack = None
            return len(pack.parts) - 1

    def _fill(self, pack: _Pack, place: int, stored: Buffer) -> None:
        with pack.lock:
            pack.parts[place] = stored
            pack.open -= 1
            ready = pack.full and not pack.open
        if ready:
            self._queue.put(pack)

    def _check(self, pack: _Pack, entry: Entry, stored: Buffer) -> None:
        """What is about to be stored can be read, and is what was hashed."""
        payload = pack.cipher.decrypt(entry, stored)
        try:
            if payload is not None:
                self.repository.decompress(entry, payload, pack.name)
                return
        except IntegrityError:
            pass
        raise IntegrityError(
            f"a chunk that was about to be written to {pack.name} cannot be read back: the backup "
            "was stopped",
            code="write-check",
            hint="memory or processor of this machine are not sound: test them before trusting it",
        )

    def _put_all(self) -> None:
        while (pack := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    self._put(pack)
                except BaseException as error:  # noqa: BLE001 - raised again in the writer's thread
                    self._failure = error
            pack.parts.clear()
            self._room.release()  # also after a failure, so that nobody waits for ever

    def _put(self, pack: _Pack) -> None:
        pack.parts.append(footer(pack.name, pack.entries, pack.size, self._keys, pack.head))
        self._check_room(sum(len(part) for part in pack.parts))
        stored = self.repository.store.put(pack.name, pack.parts)
        with self._counts:
            self.stored_bytes += stored
            self.packs[pack.name] = pack.entries
            self.repository.note_head(pack.name, pack.head)

    def _check_room(self, size: int) -> None:
        space = self.repository.store.space_bytes()
        if space is not None and space[0] - size < self._min_free.of(space[1]):
            raise UnavailableError(
                f"the store {self.repository.store.url} has {show_size(space[0])} left, and "
                f"{show_size(self._min_free.of(space[1]))} must stay free",
                code="no-space",
                hint="make room, run offload prune, or lower min_free of the store",
            )

    def _end_putters(self) -> None:
        for _ in self._putters:
            self._queue.put(None)
        for putter in self._putters:
            putter.join()
        self._putters.clear()

    def flush(self) -> dict[str, list[Entry]]:
        """Put the last pack and wait for all; returns what is in the packs. Ends the writer."""
        with self._mutex:
            if self._pack is not None:
                self._queue.put(self._pack)
                self._pack = None
        self._end_putters()
        if self._failure is not None:
            raise self._failure
        return self.packs

    def finish(self) -> str | None:
        """Put what is left and the index object; returns the index object's name, or None if
        nothing new was written. After this every chunk that was added can be read from the store.
        """
        if not self.flush():
            return None
        step("store.packs.written")
        name = layout.index_name(self.writer)
        self.stored_bytes += self.repository.put_index(name, self.packs)
        step("store.index.written")
        self.repository.index.add(name, self.packs)
        return name
