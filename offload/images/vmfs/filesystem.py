"""Files of a VMFS: descriptors, addresses of blocks, and where in the logical volume they lead.

A file's descriptor has its content, or addresses of blocks, or of pointer blocks full of such, or
of pointer blocks of pointer blocks. An address names its kind in three bits, then a block, or a
cluster and a resource in the system file of that kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from offload.errors import IntegrityError
from offload.images.vmfs import geometry
from offload.images.vmfs.geometry import Geometry, read_geometry
from offload.images.vmfs.lun import LogicalVolume

_RESOURCE_SIGNATURE = 0x72666D64
_SMALL_MAX = 64 << 20  # of a file that is read whole: directories, descriptors of disks
_POINTER_BLOCKS = 256  # kept decoded
_FILE_MAX = 1 << 50

Addresses = npt.NDArray[np.uint64]


class Kind(IntEnum):
    """Of an address."""

    BLOCK = 1
    SUB_BLOCK = 2
    POINTERS = 3
    DESCRIPTOR = 4
    POINTERS_2 = 5
    LARGE_BLOCK = 7


class Level(IntEnum):
    """How a descriptor's addresses are meant."""

    BLOCKS = 1
    SUB_BLOCKS = 2
    POINTERS = 3
    POINTERS_2 = 5
    DOUBLE = 0x10D0
    RESIDENT = 0x10D1


class NodeType(IntEnum):
    """What a descriptor describes."""

    DIRECTORY = 2
    FILE = 3
    SYMLINK = 4
    SYSTEM = 5
    RDM = 6


@dataclass(frozen=True, slots=True)
class Node:
    """A file. `raw` is its descriptor."""

    address: int
    type: int
    mode: int
    size_bytes: int
    block: int
    level: int
    raw: bytes

    @property
    def is_directory(self) -> bool:
        """System directories, too."""
        return self.type == NodeType.DIRECTORY or (
            self.type == NodeType.SYSTEM and self.mode & 0o170000 == 0o040000
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes of a file from `offset`: in the volume from `place`, or None: zeros that are
    not stored."""

    offset: int
    place: int | None
    length: int


@dataclass(frozen=True, slots=True)
class _Resources:
    """A system file that holds resources: clusters of them, in groups."""

    node: Node
    per_cluster: int
    clusters_per_group: int
    first_group: int
    resource_bytes: int
    group_bytes: int


class Vmfs:
    """A file system. Thread safe; it keeps nothing but decoded pointer blocks."""

    def __init__(self, volume: LogicalVolume) -> None:
        """Raises IntegrityError (`not-vmfs`, `bad-vmfs`), UnavailableError (`vmfs-version`)."""
        self.volume = volume
        self.geometry: Geometry = read_geometry(volume)
        self._six = self.geometry.six
        self._resources: dict[Kind, _Resources] = {}
        self._blocks_per_cluster = self.geometry.sfb_per_cluster  # version 6; until it is read
        self._pointers = lru_cache(_POINTER_BLOCKS)(self._read_pointers)
        pb2 = geometry.PB2 if self._six or self.geometry.dense else self.geometry.pb2[0]
        if self.geometry.pb2[1] or self._six:
            self._open(Kind.POINTERS_2, pb2)
        self._open(Kind.POINTERS, geometry.PBC)
        self._open(Kind.DESCRIPTOR, geometry.FDC)
        self._open(Kind.SUB_BLOCK, geometry.SBC)
        if self._six:
            self._blocks_per_cluster = self._cluster_of_blocks()

    # -- descriptors -----------------------------------------------------------------------------

    def node(self, address: int) -> Node:
        """A file by the address of its descriptor. Raises IntegrityError (`bad-vmfs`)."""
        if address & 7 != Kind.DESCRIPTOR:
            raise _bad(f"{address:#x} is no address of a file")
        return self._decoded(address, self._resource(Kind.DESCRIPTOR, address))

    def _decoded(self, address: int, place: int) -> Node:
        raw = self.volume.pread(place, self.geometry.fd_bytes)
        at = self.geometry.fd_metadata

        def number(offset: int, size: int) -> int:
            return int.from_bytes(raw[at + offset : at + offset + size], "little")

        if number(0, 4) != address:
            raise _bad(f"the descriptor of file {address:#x} is that of {number(0, 4):#x}")
        found = Node(
            address=address,
            type=number(0x0C, 4),
            size_bytes=number(0x14, 8),
            block=number(0x1C, 8),
            mode=number(0x40, 4),
            level=number(0x44, 4),
            raw=raw,
        )
        if found.level != Level.RESIDENT and (
            found.block & (found.block - 1) or not 512 <= found.block <= 1 << 30
        ):
            raise _bad(f"file {address:#x} has blocks of {found.block} bytes")
        if found.size_bytes > _FILE_MAX:
            raise _bad(f"file {address:#x} has {found.size_bytes} bytes")
        return found

    # -- content ---------------------------------------------------------------------------------

    def read(self, node: Node) -> bytes:
        """A small file whole. Raises IntegrityError (`bad-vmfs`: also where it is not small)."""
        if node.size_bytes > _SMALL_MAX:
            raise _bad(f"file {node.address:#x} of {node.size_bytes} bytes is no small file")
        return self.pread(node, 0, node.size_bytes)

    def pread(self, node: Node, offset: int, length: int) -> bytes:
        """These bytes of a file, of which zeros are not stored."""
        if node.level == Level.RESIDENT:
            start = self.geometry.fd_data
            held = node.raw[start : start + node.size_bytes]
            if len(held) < node.size_bytes:
                raise _bad(f"file {node.address:#x} is larger than its descriptor")
            return held[offset : offset + length]
        return b"".join(
            bytes(piece.length)
            if piece.place is None
            else self.volume.pread(piece.place, piece.length)
            for piece in self.pieces(node, offset, length)
        )

    def pieces(self, node: Node, offset: int, length: int) -> Iterator[Piece]:
        """Where these bytes lie; what lies together comes as one. Not of small content."""
        end = offset + length
        if offset < 0 or length < 0 or end > node.size_bytes:
            raise _bad(f"file {node.address:#x} has no {length} bytes at {offset}")
        last: Piece | None = None
        for piece in self._blocks(node, offset, end):
            if last is not None and _follows(last, piece):
                last = Piece(last.offset, last.place, last.length + piece.length)
                continue
            if last is not None:
                yield last
            last = piece
        if last is not None:
            yield last

    def _blocks(self, node: Node, offset: int, end: int) -> Iterator[Piece]:
        """Block by block, but for what a pointer block that is not there leaves out."""
        while offset < end:
            number = offset // node.block
            addresses, first = self._addresses(node, number)
            if addresses is None:
                count = min(first * node.block, end) - offset
                yield Piece(offset, None, count)
                offset += count
                continue
            for address in addresses:
                if offset >= end:
                    return
                count = min(node.block - offset % node.block, end - offset)
                yield Piece(offset, self._place(node, int(address), offset), count)
                offset += count

    def _addresses(self, node: Node, number: int) -> tuple[Addresses | None, int]:
        """Addresses of blocks from `number` on, as many as lie together; or None, and the number of
        the block up to which there are none."""
        per = self.geometry.pointers
        match node.level:
            case Level.BLOCKS | Level.SUB_BLOCKS:
                return self._own(node, number), 0
            case Level.POINTERS | Level.POINTERS_2:
                top, low = divmod(number, per)
                pointer = int(self._own(node, top)[0])
                if pointer == 0:
                    return None, (top + 1) * per
                return self._pointers(pointer)[low:], 0
            case Level.DOUBLE:
                top, rest = divmod(number, per * per)
                middle, low = divmod(rest, per)
                pointer = int(self._own(node, top)[0])
                if pointer == 0:
                    return None, (top + 1) * per * per
                pointer = int(self._pointers(pointer)[middle])
                if pointer == 0:
                    return None, (top * per + middle + 1) * per
                return self._pointers(pointer)[low:], 0
            case _:
                raise _bad(f"file {node.address:#x} has addresses of level {node.level:#x}")

    def _own(self, node: Node, number: int) -> Addresses:
        """Addresses in the descriptor itself."""
        found = self._decode(node.raw[self.geometry.fd_addresses :])
        if number >= len(found):
            raise _bad(f"file {node.address:#x} has no block {number}")
        return found[number:]

    def _decode(self, raw: bytes) -> Addresses:
        size = self.geometry.address_bytes
        return np.frombuffer(raw, f"<u{size}").astype(np.uint64)

    def _read_pointers(self, address: int) -> Addresses:
        place = self._resolve(address)
        size = self.geometry.pointers * self.geometry.address_bytes
        return self._decode(self.volume.pread(place, size))

    def _place(self, node: Node, address: int, offset: int) -> int | None:
        """Where a byte of a file lies whose block has this address. Blocks that are still to be
        zeroed count as zeros, whole."""
        if address == 0:
            return None
        kind = address & 7
        if self._six:
            to_be_zeroed = kind in (Kind.BLOCK, Kind.LARGE_BLOCK) and address >> 7 & 0xFF
        else:
            to_be_zeroed = kind == Kind.BLOCK and address & 0x20
        if to_be_zeroed:
            return None
        return self._resolve(address) + offset % self._unit(node, kind)

    def _unit(self, node: Node, kind: int) -> int:
        """Bytes that one address stands for."""
        if not self._six:
            return node.block
        match kind:
            case Kind.BLOCK:
                return self.geometry.file_block
            case Kind.LARGE_BLOCK:
                return self.geometry.file_block << self.geometry.lfb_shift
            case Kind.SUB_BLOCK:
                return self.geometry.sub_block
            case _:
                raise _bad(f"file {node.address:#x} has a block of kind {kind}")

    # -- addresses -------------------------------------------------------------------------------

    def _resolve(self, address: int) -> int:
        """Where in the volume what an address names begins."""
        kind = address & 7
        if kind == Kind.BLOCK and not self._six:
            return (address >> 6 & 0x3FFFFFF) * self.geometry.file_block
        if kind == Kind.BLOCK:
            cluster, number = address >> 15 & 0x7FFFFFFF, address >> 51 & 0x1FFF
            return (cluster * self._blocks_per_cluster + number) * self.geometry.file_block
        if kind == Kind.LARGE_BLOCK and self._six:
            return (address >> 15 & 0x7FFFFFFF) * (
                self.geometry.file_block << self.geometry.lfb_shift
            )
        if kind in (Kind.SUB_BLOCK, Kind.POINTERS, Kind.POINTERS_2):
            return self._resource(Kind(kind), address)
        raise _bad(f"the address {address:#x} is of no kind that holds data")

    def _resource(self, kind: Kind, address: int) -> int:
        known = self._resources.get(kind)
        if known is None or 0 in (known.resource_bytes, known.clusters_per_group):
            raise _bad(f"the address {address:#x} is of a kind without a system file")
        cluster, number = self._parsed(kind, address)
        if number >= known.per_cluster:
            raise _bad(f"the address {address:#x} is past the end of its cluster")
        group, cluster = divmod(cluster, known.clusters_per_group)
        offset = (
            known.first_group
            + group * known.group_bytes
            + known.clusters_per_group * self.geometry.cluster_header
            + (cluster * known.per_cluster + number) * known.resource_bytes
        )
        try:
            piece = next(self.pieces(known.node, offset, min(known.resource_bytes, 512)))
        except RecursionError:
            raise _bad(f"the address {address:#x} leads back to itself") from None
        if piece.place is None:
            raise _bad(f"the address {address:#x} leads into a hole")
        return piece.place

    def _parsed(self, kind: Kind, address: int) -> tuple[int, int]:
        """Cluster and resource."""
        if kind is Kind.DESCRIPTOR:
            return address >> 6 & 0xFFFF, address >> 22 & 0x3FF
        if self._six:
            return address >> 6 & 0xFFFFFFFFF, address >> 56 & 0xFF
        number = address >> 28 & 0xF
        if kind is Kind.SUB_BLOCK and self.geometry.dense:
            number |= (address & 0x18) << 1
        return address >> 6 & 0x3FFFFF, number

    # -- system files ----------------------------------------------------------------------------

    def _open(self, kind: Kind, address: int) -> None:
        node = self._decoded(address, self.geometry.system_fd(address))
        raw = self.pread(node, 0, 0x58)

        def number(at: int) -> int:
            return int.from_bytes(raw[at : at + 4], "little")

        if self._six and number(0x20) != _RESOURCE_SIGNATURE:
            raise _bad(f"the system file {address:#x} has no signature")
        found = _Resources(
            node=node,
            per_cluster=number(0),
            clusters_per_group=number(4),
            first_group=number(8),
            resource_bytes=number(0x0C),
            group_bytes=number(0x10),
        )
        self._resources[kind] = found

    def _cluster_of_blocks(self) -> int:
        """File blocks of a cluster, as the system file of large blocks says."""
        node = self._decoded(geometry.FBB, self.geometry.system_fd(geometry.FBB))
        child = int.from_bytes(self.pread(node, 0x34, 4), "little")
        raw = self.pread(node, child, 0x24)
        count = int.from_bytes(raw[:4], "little")
        if int.from_bytes(raw[0x20:0x24], "little") != _RESOURCE_SIGNATURE or count == 0:
            raise _bad("the system file of file blocks has no signature")
        return count


def _follows(one: Piece, two: Piece) -> bool:
    """Whether the second continues the first, in the volume too."""
    if one.place is None or two.place is None:
        return one.place is two.place
    return one.place + one.length == two.place


def _bad(what: str) -> IntegrityError:
    return IntegrityError(f"the VMFS is damaged: {what}", code="bad-vmfs")
