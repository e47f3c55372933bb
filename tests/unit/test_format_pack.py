"""Packs: footers, record headers, and reading one whose end is lost."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import IntegrityError
from offload.format.keys import derive_keys
from offload.format.pack import (
    FILE_HEADER,
    RECORD,
    TRAILER,
    Encoding,
    Entry,
    Kind,
    chunk_id,
    decode_entries,
    encode_entries,
    footer,
    read_footer,
    record_header,
    scan_records,
)

_KEYS = derive_keys(bytes(range(32)))


def _pack(payloads: list[tuple[Kind, bytes]]) -> tuple[bytes, list[Entry]]:
    raw, entries = bytearray(FILE_HEADER), []
    for kind, payload in payloads:
        ident = chunk_id(kind, payload, _KEYS)
        entry = Entry(ident, kind, Encoding.RAW, len(payload), len(payload), len(raw))
        entries.append(entry)
        raw += record_header(entry) + payload
    return bytes(raw) + footer("p", entries, len(raw), _KEYS), entries


def _range(raw: bytes, offset: int, length: int) -> bytes:
    return raw[offset : offset + length]


def _footer_of(raw: bytes) -> list[Entry]:
    return read_footer("p", len(raw), partial(_range, raw), _KEYS)


_payloads = st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=40)), max_size=6)


@given(_payloads)
def test_pack_footer_and_records_say_the_same(payloads: list[tuple[Kind, bytes]]) -> None:
    raw, entries = _pack(payloads)
    assert _footer_of(raw) == entries
    assert list(scan_records("p", memoryview(raw))) == entries
    assert decode_entries(encode_entries(entries)) == entries
    for entry, (_, payload) in zip(entries, payloads, strict=True):
        assert raw[entry.payload_offset : entry.end] == payload


@given(_payloads, st.data())
def test_pack_cut_anywhere_loses_only_what_is_cut(
    payloads: list[tuple[Kind, bytes]], data: st.DataObject
) -> None:
    raw, entries = _pack(payloads)
    cut = data.draw(st.integers(len(FILE_HEADER), len(raw) - 1))
    with pytest.raises(IntegrityError):
        _footer_of(raw[:cut])
    assert list(scan_records("p", memoryview(raw[:cut]))) == [e for e in entries if e.end <= cut]


def test_pack_any_flipped_bit_outside_the_records_is_noticed_by_the_footer() -> None:
    raw, entries = _pack([(Kind.DATA, b"one"), (Kind.PAGE, b"two")])
    spots = [*range(len(FILE_HEADER)), *range(entries[-1].end, len(raw))]
    for bit in (8 * spot + n for spot in spots for n in range(8)):
        wrong = bytearray(raw)
        wrong[bit >> 3] ^= 1 << (bit & 7)
        with pytest.raises(IntegrityError):
            _footer_of(bytes(wrong))


def test_pack_any_flipped_bit_in_a_record_header_stops_the_scan_or_shows() -> None:
    raw, entries = _pack([(Kind.DATA, b"one"), (Kind.PAGE, b"two")])
    first, second = entries
    for bit in range(second.offset * 8, second.payload_offset * 8):
        wrong = bytearray(raw)
        wrong[bit >> 3] ^= 1 << (bit & 7)
        header = bytes(wrong[second.offset : second.payload_offset])
        assert header != record_header(second)
        if bit // 8 - second.offset < RECORD.size - 4:  # the last four bytes are filling
            assert list(scan_records("p", memoryview(bytes(wrong)))) == [first]


def test_pack_shorter_than_its_frame_is_damaged() -> None:
    for length in (0, 15, len(FILE_HEADER) + TRAILER.size - 1):
        with pytest.raises(IntegrityError):
            _footer_of(bytes(length))


def test_scan_of_something_else_is_no_pack() -> None:
    with pytest.raises(IntegrityError) as caught:
        list(scan_records("p", memoryview(b"x" * 100)))
    assert caught.value.code == "bad-pack"


def test_chunk_id_differs_by_kind() -> None:
    assert len({chunk_id(kind, b"same", _KEYS) for kind in Kind}) == 3
