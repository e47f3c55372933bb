"""Packs: many chunks in one object. See docs/store-format.md for the byte layout.

A pack is a header, records (each a header and a payload), a footer with one entry a record, and a
trailer of fixed size. The record headers repeat what the footer says, so that a pack whose end is
lost can still be read from its start.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from blake3 import blake3

from offload.errors import IntegrityError
from offload.format.keys import HASH_BYTES, Keys

FILE_HEADER = b"OFFLPACK" + struct.pack("<II", 1, 0)
RECORD = struct.Struct("<4sBBHII32sI4x")  # magic kind encoding key-version raw stored id crc
ENTRY = struct.Struct("<32sBBHIIQ")  # id kind encoding key-version raw stored offset
TRAILER = struct.Struct("<8sQII32s8s")  # magic footer-offset count version mac end
_RECORD_MAGIC = b"CHNK"
_FOOT_MAGIC = b"OFFLFOOT"
_END_MAGIC = b"OFFLEND\n"
_VERSION = 1


class Kind(IntEnum):
    """What a chunk is."""

    DATA = 1
    DELTA = 2
    PAGE = 3


class Encoding(IntEnum):
    """How the payload is stored."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a pack; `offset` is that of its header, lengths are of the payload."""

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


def record_header(entry: Entry) -> bytes:
    """The bytes before a payload."""
    head = RECORD.pack(
        _RECORD_MAGIC, entry.kind, entry.encoding, 0, entry.raw_length, entry.stored_length,
        entry.id, 0,
    )  # fmt: skip
    return head[:48] + struct.pack("<I4x", zlib.crc32(head[:48]))


def footer(entries: Sequence[Entry], footer_offset: int, keys: Keys) -> bytes:
    """Footer and trailer of a pack whose records end at `footer_offset`."""
    body = encode_entries(entries)
    fields = struct.pack("<8sQII", _FOOT_MAGIC, footer_offset, len(entries), _VERSION)
    mac = blake3(FILE_HEADER + body + fields, key=keys.mac).digest()
    return body + fields + mac + _END_MAGIC


def pack_bytes(entries: Sequence[Entry]) -> int:
    """The size of a pack that holds just these records."""
    records = sum(entry.end - entry.offset for entry in entries)
    return len(FILE_HEADER) + records + ENTRY.size * len(entries) + TRAILER.size


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """Entries as they stand in footers and index objects."""
    return b"".join(
        ENTRY.pack(e.id, e.kind, e.encoding, 0, e.raw_length, e.stored_length, e.offset)
        for e in entries
    )


def decode_entries(raw: bytes | memoryview) -> list[Entry]:
    """The inverse of `encode_entries`."""
    return [
        Entry(ident, kind, encoding, raw_length, stored, offset)
        for ident, kind, encoding, _, raw_length, stored, offset in ENTRY.iter_unpack(raw)
    ]


def read_footer(
    name: str, size: int, get_range: Callable[[int, int], bytes], keys: Keys
) -> list[Entry]:
    """The entries of a pack, by two reads from its end. IntegrityError (`bad-footer`)."""
    if size < len(FILE_HEADER) + TRAILER.size:
        raise IntegrityError(f"pack {name} is only {size} bytes long", code="bad-footer")
    trailer = get_range(size - TRAILER.size, TRAILER.size)
    magic, at, count, version, mac, end = TRAILER.unpack(trailer)
    length = count * ENTRY.size
    good = magic == _FOOT_MAGIC and end == _END_MAGIC and version == _VERSION
    if not good or at + length + TRAILER.size != size:
        raise IntegrityError(f"pack {name} has no valid end", code="bad-footer")
    body = get_range(at, length)
    head = get_range(0, len(FILE_HEADER))
    if blake3(head + body + trailer[:24], key=keys.mac).digest() != mac:
        raise IntegrityError(f"pack {name}: the footer is damaged", code="bad-footer")
    return decode_entries(body)


def scan_records(name: str, raw: memoryview) -> Iterator[Entry]:
    """Records from the start of a pack whose footer is lost; stops at the first bad one."""
    at = len(FILE_HEADER)
    if bytes(raw[:at]) != FILE_HEADER:
        raise IntegrityError(f"{name} is no pack of this version", code="bad-pack")
    while at + RECORD.size <= len(raw):
        head = bytes(raw[at : at + RECORD.size])
        magic, kind, encoding, _, raw_length, stored, ident, crc = RECORD.unpack(head)
        if magic != _RECORD_MAGIC or crc != zlib.crc32(head[:48]):
            return
        entry = Entry(ident, kind, encoding, raw_length, stored, at)
        if entry.end > len(raw):
            return
        yield entry
        at = entry.end


def chunk_id(kind: int, raw: bytes | bytearray | memoryview, keys: Keys) -> bytes:
    """The 32-byte id of a chunk of this kind with this content."""
    key = keys.data if kind == Kind.DATA else keys.delta if kind == Kind.DELTA else keys.page
    return blake3(raw, key=key).digest()


assert RECORD.size == 56  # noqa: S101 - the layout of the format, not a check of input
assert ENTRY.size == 52  # noqa: S101
assert TRAILER.size == 64  # noqa: S101
assert HASH_BYTES == 32  # noqa: S101
