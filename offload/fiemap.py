"""FS_IOC_FIEMAP: where a file's bytes lie on the medium, and what two clones no longer share.

Two clones of one file differ at most where they map a byte to different places: both pin their
blocks, so a block that both still name has not been written in between. That holds for extents
whose place is exact. It does not for encoded (btrfs compression names the start of the whole
compressed extent), inline, delayed or unknown ones: those always count as changed.

Not guaranteed: that both files still hold what they held when they were cloned (nothing else may
write to them), and anything on file systems where an address does not name one block for good
(several devices behind one address space of their own each). Ask for XFS and btrfs only.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from offload.extents import Ranges

# linux/fiemap.h and linux/fs.h
FS_IOC_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap)
FLAG_SYNC = 0x1  # write dirty pages first
LAST = 0x1
UNKNOWN = 0x2
DELALLOC = 0x4
ENCODED = 0x8
DATA_ENCRYPTED = 0x80
NOT_ALIGNED = 0x100
DATA_INLINE = 0x200
DATA_TAIL = 0x400
UNWRITTEN = 0x800
MERGED = 0x1000
SHARED = 0x2000

_INEXACT = UNKNOWN | DELALLOC | ENCODED | DATA_ENCRYPTED | NOT_ALIGNED | DATA_INLINE | DATA_TAIL

_HEAD = struct.Struct("=QQIIII")  # start, length, flags, mapped_extents, extent_count, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_PAGE_EXTENTS = 4096  # 224 KiB of answers a call
_MAX_OFFSET = (1 << 64) - 1


class MappedExtent(NamedTuple):
    """`length` bytes of a file from `logical` lie at `physical` (all in bytes)."""

    logical: int
    physical: int
    length: int
    flags: int


def file_extents(fd: int) -> Iterator[MappedExtent]:
    """All extents of an open file in file order, after its dirty pages were written.

    Raises OSError (EOPNOTSUPP where the file system has no FIEMAP).
    """
    page = bytearray(_HEAD.size + _PAGE_EXTENTS * _EXTENT.size)
    start, flags = 0, FLAG_SYNC
    while True:
        _HEAD.pack_into(page, 0, start, _MAX_OFFSET - start, flags, 0, _PAGE_EXTENTS, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, page)
        mapped = _HEAD.unpack_from(page)[3]
        if not mapped:
            return
        answers = memoryview(page)[_HEAD.size : _HEAD.size + mapped * _EXTENT.size]
        extents = [MappedExtent._make(fields) for fields in _EXTENT.iter_unpack(answers)]
        yield from extents
        last = extents[-1]
        start = last.logical + last.length
        if last.flags & LAST:
            return
        flags = 0  # flushed once; the next pages describe the same map


def count_extents(path: Path) -> int:
    """How many extents a file has, without fetching them. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return count_extents_of(fd)
    finally:
        os.close(fd)


def count_extents_of(fd: int) -> int:
    """The same of an open file. Dirty pages that have no place yet are not counted."""
    head = bytearray(_HEAD.pack(0, _MAX_OFFSET, 0, 0, 0, 0))
    fcntl.ioctl(fd, FS_IOC_FIEMAP, head)
    count: int = _HEAD.unpack(head)[3]
    return count


def changed_ranges(older_fd: int, newer_fd: int, size_bytes: int) -> Ranges:
    """Where `newer` may differ from `older` inside `[0, size_bytes)`; never too little.

    What `older` lacks behind its end counts as zeros. Raises OSError.
    """
    older_size = min(os.fstat(older_fd).st_size, size_bytes)
    newer_size = min(os.fstat(newer_fd).st_size, size_bytes)
    return compare_maps(
        clip_extents(file_extents(older_fd), older_size),
        clip_extents(file_extents(newer_fd), newer_size),
        size_bytes,
    )


def clip_extents(extents: Iterable[MappedExtent], size_bytes: int) -> Iterator[MappedExtent]:
    """The extents inside `[0, size_bytes)`, each beginning behind the end of the one before.

    A map is fetched in pages, and a page may begin with an extent that the last one ended with.
    """
    at = 0
    for extent in extents:
        start = max(extent.logical, at)
        end = min(extent.logical + extent.length, size_bytes)
        if start < end:
            shift = start - extent.logical
            yield MappedExtent(start, extent.physical + shift, end - start, extent.flags)
            at = end


def compare_maps(
    older: Iterable[MappedExtent], newer: Iterable[MappedExtent], size_bytes: int
) -> Ranges:
    """The merge of two maps: the ranges that are not surely equal, in normal form.

    Both maps are in file order without overlaps and end inside `size_bytes`.
    """
    changed: Ranges = []
    a_map, b_map = iter(older), iter(newer)
    a, b = next(a_map, None), next(b_map, None)
    at = 0
    while a is not None or b is not None:
        a_start = a.logical if a is not None else size_bytes
        b_start = b.logical if b is not None else size_bytes
        a_end = a.logical + a.length if a is not None else size_bytes
        b_end = b.logical + b.length if b is not None else size_bytes
        in_a, in_b = a_start <= at, b_start <= at
        end = min(a_end if in_a else a_start, b_end if in_b else b_start)
        if end > at and _differs(a if in_a else None, b if in_b else None):
            if changed and changed[-1][1] == at:
                changed[-1] = (changed[-1][0], end)
            else:
                changed.append((at, end))
        at = end
        if a is not None and a_end <= at:
            a = next(a_map, None)
        if b is not None and b_end <= at:
            b = next(b_map, None)
    return changed


def _differs(a: MappedExtent | None, b: MappedExtent | None) -> bool:
    """Whether a byte that both extents cover (None: a hole) may differ."""
    flags = (a.flags if a is not None else 0) | (b.flags if b is not None else 0)
    if flags & _INEXACT:
        return True
    a_zero = a is None or bool(a.flags & UNWRITTEN)
    b_zero = b is None or bool(b.flags & UNWRITTEN)
    if a is None or b is None or a_zero or b_zero:
        return not (a_zero and b_zero)
    return a.physical - a.logical != b.physical - b.logical
