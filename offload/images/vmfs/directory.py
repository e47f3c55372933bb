"""Directories of a VMFS.

Version 5: entries of 140 bytes, one behind the other. Version 6: a header of 64 KiB, then blocks
of the metadata's alignment; maps of four bits a block say which hold entries.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from offload.errors import IntegrityError, NotFoundError
from offload.images.vmfs import geometry
from offload.images.vmfs.filesystem import Node, NodeType, Vmfs

_ENTRY_5 = struct.Struct("<II 4x 128s")  # type, address, name
_ENTRY_6 = struct.Struct("<II 16x 256s 8x")
_HEADER_6 = 0x10000
_HEADER_VERSIONS = {0xF50001, 0xFDC001}
_MAPS_AT, _MAPS_MAX = 0x10, 128
_BLOCK_HEADER = 64
_BITMAP_AT, _BITMAP_BYTES = 8, 56
_ENTRIES = 1  # the type of a block that holds them
_DEPTH = 32  # of directories
_FILES_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory; the address of its file's descriptor."""

    name: str
    type: int
    address: int


def entries(vmfs: Vmfs, node: Node) -> list[Entry]:
    """Of a directory, without `.` and `..`. Raises IntegrityError (`bad-vmfs`)."""
    if not node.is_directory:
        raise IntegrityError(f"file {node.address:#x} is no directory", code="bad-vmfs")
    raw = vmfs.read(node)
    found = _entries_6(vmfs, raw) if vmfs.geometry.six else _entries_5(raw)
    return [entry for entry in found if entry.name not in ("", ".", "..")]


def _entries_5(raw: bytes) -> Iterator[Entry]:
    for at in range(0, len(raw) - _ENTRY_5.size + 1, _ENTRY_5.size):
        kind, address, name = _ENTRY_5.unpack_from(raw, at)
        if address:
            yield Entry(_name(name), kind, address)


def _entries_6(vmfs: Vmfs, raw: bytes) -> Iterator[Entry]:
    if len(raw) < _HEADER_6:
        raise IntegrityError("a directory without its header", code="bad-vmfs")
    version, _, _, maps = struct.unpack_from("<IIII", raw)
    if version not in _HEADER_VERSIONS or maps > _MAPS_MAX:
        raise IntegrityError(f"a directory of version {version:#x}", code="bad-vmfs")
    size = vmfs.geometry.md_alignment
    places = struct.unpack_from(f"<{maps}I", raw, _MAPS_AT)
    for number, place in enumerate(places):
        for index, kind in enumerate(_kinds(_block(raw, place, size))):
            if kind != _ENTRIES:
                continue
            first = number * 2 * (size - _BLOCK_HEADER)
            yield from _in_block(_block(raw, first + index, size))


def _kinds(block: bytes) -> Iterator[int]:
    """Of all blocks that a map tells."""
    for byte in block[_BLOCK_HEADER:]:
        yield byte >> 4 & 3
        yield byte & 3


def _in_block(block: bytes) -> Iterator[Entry]:
    (slots,) = struct.unpack_from("<H", block, 4)
    free = block[_BITMAP_AT : _BITMAP_AT + _BITMAP_BYTES]
    most = min((len(block) - _BLOCK_HEADER) // _ENTRY_6.size, _BITMAP_BYTES * 8)
    for slot in range(min(slots, most)):
        if not free[slot // 8] >> slot % 8 & 1:
            kind, address, name = _ENTRY_6.unpack_from(block, _BLOCK_HEADER + slot * _ENTRY_6.size)
            yield Entry(_name(name), kind, address)


def _block(raw: bytes, number: int, size: int) -> bytes:
    at = _HEADER_6 + number * size
    if at + size > len(raw):
        raise IntegrityError("a directory leads outside of itself", code="bad-vmfs")
    return raw[at : at + size]


def _name(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", "surrogateescape")


def find(vmfs: Vmfs, path: str) -> Node:
    """A file by its path from the root. Raises NotFoundError (`no-such-file`), IntegrityError."""
    node = vmfs.node(geometry.ROOT)
    for part in PurePosixPath("/", path).parts[1:]:
        hits = [entry for entry in entries(vmfs, node) if entry.name == part]
        if not hits:
            raise NotFoundError(
                f"there is no {path} on the VMFS {vmfs.geometry.label}",
                code="no-such-file",
                hint="list its disks with: offload volume vmdks",
            )
        node = vmfs.node(hits[0].address)
    return node


def walk(vmfs: Vmfs) -> Iterator[tuple[str, Entry]]:
    """All files with their paths, system files left out. Each directory once."""
    todo: list[tuple[str, int, int]] = [("", geometry.ROOT, 0)]
    seen = {geometry.ROOT}
    count = 0
    while todo:
        path, address, depth = todo.pop()
        for entry in entries(vmfs, vmfs.node(address)):
            if not path and entry.name.endswith(".sf") and entry.name.startswith("."):
                continue
            count += 1
            if count > _FILES_MAX:
                raise IntegrityError(f"more than {_FILES_MAX} files", code="bad-vmfs")
            name = f"{path}/{entry.name}" if path else entry.name
            yield name, entry
            if entry.type == NodeType.DIRECTORY and entry.address not in seen and depth < _DEPTH:
                seen.add(entry.address)
                todo.append((name, entry.address, depth + 1))
