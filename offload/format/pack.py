"""Packs: many chunks in one object. See docs/store-format.md for the byte layout.

A pack is a header, records (each a header and a payload), a footer with one entry a record, and a
trailer of fixed size. The record headers repeat what the footer says, so that a pack whose end is
lost can still be read from its start. In an encrypted store each payload is encrypted by itself,
under a key of its pack alone.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from offload.errors import IntegrityError
from offload.format.cipher import (
    SALT_BYTES,
    TAG_BYTES,
    Bytes,
    object_cipher,
    open_box,
    record_nonce,
)
from offload.format.keys import HASH_BYTES, PLAIN, Keys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER = struct.Struct("<8sII")  # magic version key-version; 32 bytes of salt follow if that is > 0
RECORD = struct.Struct("<4sBBHII32sI4x")  # magic kind encoding key-version raw stored id crc
ENTRY = struct.Struct("<32sBBHIIQ")  # id kind encoding key-version raw stored offset
TRAILER = struct.Struct("<8sQII32s8s")  # magic footer-offset count version mac end
_MAGIC = b"OFFLPACK"
_RECORD_MAGIC = b"CHNK"
_FOOT_MAGIC = b"OFFLFOOT"
_END_MAGIC = b"OFFLEND\n"
_VERSION = 1
_AAD = 48  # bytes of a record header before its checksum


class Kind(IntEnum):
    """What a chunk is."""

    DATA = 1
    DELTA = 2
    PAGE = 3


_DATA, _DELTA = int(Kind.DATA), int(Kind.DELTA)  # looked up for each chunk


class Encoding(IntEnum):
    """How the payload is stored."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class PackHead:
    """How a pack is encrypted: the version of the store's key and its salt; 0 and none: plain."""

    key_version: int = PLAIN
    salt: bytes = b""

    def encode(self) -> bytes:
        """The first bytes of the pack."""
        return HEADER.pack(_MAGIC, _VERSION, self.key_version) + self.salt

    @property
    def length(self) -> int:
        """How many bytes that is: where the first record begins."""
        return HEADER.size + len(self.salt)

    @property
    def overhead(self) -> int:
        """What encryption adds to a payload."""
        return TAG_BYTES if self.key_version else 0


PLAIN_HEAD = PackHead()
FILE_HEADER = PLAIN_HEAD.encode()
MAX_HEAD = HEADER.size + SALT_BYTES  # enough to read one


class Entry(NamedTuple):
    """One record of a pack; `offset` is that of its header, lengths are of the payload.

    A tuple: a restore of deltas makes so many that a dataclass took a tenth of its time.
    """

    id: bytes
    kind: int
    encoding: int
    raw_length: int
    stored_length: int
    offset: int

    @property
    def payload_offset(self) -> int:
        """Where the payload begins in the pack."""
        return self.offset + RECORD.size

    @property
    def end(self) -> int:
        """The first byte behind the record."""
        return self.offset + RECORD.size + self.stored_length


def decode_head(name: str, raw: bytes | memoryview) -> PackHead:
    """The head of a pack from its first bytes (`MAX_HEAD`, or all). IntegrityError (`bad-pack`)."""
    if len(raw) >= HEADER.size:
        magic, version, key_version = HEADER.unpack(raw[: HEADER.size])
        salt = bytes(raw[HEADER.size : MAX_HEAD]) if key_version else b""
        if magic == _MAGIC and version == _VERSION and len(salt) in (0, SALT_BYTES):
            return PackHead(key_version, salt)
    raise IntegrityError(f"{name} is no pack of this version", code="bad-pack")


def record_header(entry: Entry, key_version: int = PLAIN) -> bytes:
    """The bytes before a payload."""
    head = RECORD.pack(
        _RECORD_MAGIC, entry.kind, entry.encoding, key_version, entry.raw_length,
        entry.stored_length, entry.id, 0,
    )  # fmt: skip
    return head[:_AAD] + struct.pack("<I4x", zlib.crc32(head[:_AAD]))


class PackCipher:
    """Encrypts and decrypts the payloads of one pack. Safe from any thread.

    What a payload is (its record header up to the checksum) and where it lies are authenticated
    with it.
    """

    def __init__(self, name: str, head: PackHead, keys: Keys) -> None:
        key = keys.version(head.key_version, name).pack
        self._version = head.key_version
        self._aead: AESGCM | None = object_cipher(key, head.salt, name) if key else None

    def encrypt(self, entry: Entry, payload: Bytes) -> Bytes:
        """What is stored for a payload; `entry.stored_length` counts the tag."""
        if self._aead is None:
            return payload
        aad = record_header(entry, self._version)[:_AAD]
        return self._aead.encrypt(record_nonce(entry.offset), payload, aad)

    def decrypt(self, entry: Entry, stored: Bytes) -> Bytes | None:
        """The inverse; None if it is not what was stored there."""
        if self._aead is None:
            return stored
        aad = record_header(entry, self._version)[:_AAD]
        return open_box(self._aead, record_nonce(entry.offset), stored, aad)


def footer(
    name: str, entries: Sequence[Entry], footer_offset: int, keys: Keys, head: PackHead = PLAIN_HEAD
) -> bytes:
    """Footer and trailer of a pack whose records end at `footer_offset`."""
    body = encode_entries(entries, head.key_version)
    fields = struct.pack("<8sQII", _FOOT_MAGIC, footer_offset, len(entries), _VERSION)
    return body + fields + _footer_mac(name, head, body + fields, keys) + _END_MAGIC


def _footer_mac(name: str, head: PackHead, covered: bytes, keys: Keys) -> bytes:
    key = keys.version(head.key_version, name).mac
    return blake3(head.encode() + covered + name.encode(), key=key).digest()


def pack_bytes(entries: Sequence[Entry], head: PackHead = PLAIN_HEAD) -> int:
    """The size of a pack that holds just these records."""
    records = sum(entry.end - entry.offset for entry in entries)
    return head.length + records + ENTRY.size * len(entries) + TRAILER.size


def encode_entries(entries: Sequence[Entry], key_version: int = PLAIN) -> bytes:
    """Entries as they stand in footers and index objects."""
    return b"".join(
        ENTRY.pack(e.id, e.kind, e.encoding, key_version, e.raw_length, e.stored_length, e.offset)
        for e in entries
    )


def decode_entries(raw: bytes | memoryview) -> list[Entry]:
    """The inverse of `encode_entries`; the key version is that of the pack."""
    return [
        Entry(ident, kind, encoding, raw_length, stored, offset)
        for ident, kind, encoding, _, raw_length, stored, offset in ENTRY.iter_unpack(raw)
    ]


def read_footer(
    name: str, size: int, get_range: Callable[[int, int], bytes], keys: Keys
) -> list[Entry]:
    """The entries of a pack, by reads of its two ends. IntegrityError (`bad-footer`)."""
    if size < HEADER.size + TRAILER.size:
        raise IntegrityError(f"pack {name} is only {size} bytes long", code="bad-footer")
    trailer = get_range(size - TRAILER.size, TRAILER.size)
    magic, at, count, version, mac, end = TRAILER.unpack(trailer)
    length = count * ENTRY.size
    good = magic == _FOOT_MAGIC and end == _END_MAGIC and version == _VERSION
    if not good or at + length + TRAILER.size != size:
        raise IntegrityError(f"pack {name} has no valid end", code="bad-footer")
    body = get_range(at, length)
    head = decode_head(name, get_range(0, min(MAX_HEAD, size)))
    if _footer_mac(name, head, body + trailer[:24], keys) != mac:
        raise IntegrityError(f"pack {name}: the footer is damaged", code="bad-footer")
    return decode_entries(body)


def scan_records(name: str, raw: memoryview) -> Iterator[Entry]:
    """Records from the start of a pack whose footer is lost; stops at the first bad one."""
    at = decode_head(name, raw[:MAX_HEAD]).length
    while at + RECORD.size <= len(raw):
        head = bytes(raw[at : at + RECORD.size])
        magic, kind, encoding, _, raw_length, stored, ident, crc = RECORD.unpack(head)
        if magic != _RECORD_MAGIC or crc != zlib.crc32(head[:_AAD]):
            return
        entry = Entry(ident, kind, encoding, raw_length, stored, at)
        if entry.end > len(raw):
            return
        yield entry
        at = entry.end


def chunk_id(kind: int, raw: bytes | bytearray | memoryview, keys: Keys) -> bytes:
    """The 32-byte id of a chunk of this kind with this content."""
    key = keys.data if kind == _DATA else keys.delta if kind == _DELTA else keys.page
    return blake3(raw, key=key).digest()


assert RECORD.size == 56  # noqa: S101 - the layout of the format, not a check of input
assert ENTRY.size == 52  # noqa: S101
assert TRAILER.size == 64  # noqa: S101
assert HASH_BYTES == 32  # noqa: S101
