"""Descriptors of virtual disks (VMware, "Virtual Disk Format 1.1"): which file has the bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from offload.errors import IntegrityError, UnavailableError, UsageError
from offload.images.vmfs.directory import find, walk
from offload.images.vmfs.filesystem import Level, Node, NodeType, Vmfs

_MAGIC = b"# Disk DescriptorFile"
_DESCRIPTOR_MAX = 64 << 10
_SECTOR = 512
_EXTENT = re.compile(r'^(RW|RDONLY|NOACCESS)\s+(\d+)\s+(\w+)(?:\s+"([^"]*)")?', re.MULTILINE)
_FIELD = re.compile(r'^(\w+)\s*=\s*"?([^"\n]*)"?\s*$', re.MULTILINE)
_FLAT = {"VMFS", "FLAT"}
_RAW = {"VMFSRDM": "rdm", "VMFSRAW": "rdm-physical"}


@dataclass(frozen=True, slots=True)
class VirtualDisk:
    """A disk as its descriptor at `path` tells it. `extents`: files and their bytes, in order.

    `kind`: flat, delta (`parent` is what it is a delta of), rdm, rdm-physical, or what the
    descriptor calls it.
    """

    path: str
    kind: str
    size_bytes: int
    extents: tuple[tuple[str, int], ...]
    parent: str = ""


def disks(vmfs: Vmfs) -> Iterator[VirtualDisk]:
    """All that have a descriptor. Raises IntegrityError."""
    for path, entry in walk(vmfs):
        if entry.type != NodeType.FILE or not path.endswith(".vmdk"):
            continue
        node = vmfs.node(entry.address)
        if _is_descriptor(vmfs, node):
            yield _parsed(path, vmfs.read(node))


def flat_extents(vmfs: Vmfs, path: str) -> tuple[VirtualDisk, list[tuple[Node, int]]]:
    """The files of a disk that is not a delta, with their bytes; `path` is its descriptor.

    Raises NotFoundError (`no-such-file`), UnavailableError (`vmdk-is-delta`, `vmdk-is-rdm`),
    UsageError (`no-vmdk`), IntegrityError.
    """
    path = path.lstrip("/")
    node = find(vmfs, path)
    if node.type != NodeType.FILE or not _is_descriptor(vmfs, node):
        raise UsageError(
            f"{path} is no descriptor of a disk",
            code="no-vmdk",
            hint="name the .vmdk, not the -flat.vmdk: offload volume vmdks lists them",
        )
    disk = _parsed(path, vmfs.read(node))
    if disk.kind == "delta":
        raise UnavailableError(
            f"{path} is a delta of {disk.parent}: only disks without snapshots are read from a LUN",
            code="vmdk-is-delta",
            hint=f"the disk at its snapshot: {disk.parent}; as it ran: a placeholder on an ESXi "
            "host, offload mount --placeholder",
        )
    if disk.kind in _RAW.values():
        raise UnavailableError(
            f"{path} is the mapping of another LUN: its bytes are not on this one",
            code="vmdk-is-rdm",
            hint="configure that LUN as a volume of the group",
        )
    if disk.kind != "flat":
        raise UnavailableError(f"{path} is of type {disk.kind}", code="vmdk-unknown")
    found = []
    for name, size in disk.extents:
        extent = find(vmfs, name)
        if extent.type != NodeType.FILE or extent.size_bytes < size:
            raise IntegrityError(f"{name} has {extent.size_bytes} bytes of {size}", code="bad-vmdk")
        if extent.level == Level.RESIDENT:
            raise IntegrityError(f"{name} lies in its own descriptor", code="bad-vmdk")
        found.append((extent, size))
    return disk, found


def _is_descriptor(vmfs: Vmfs, node: Node) -> bool:
    if node.size_bytes > _DESCRIPTOR_MAX or node.size_bytes < len(_MAGIC):
        return False
    return vmfs.pread(node, 0, len(_MAGIC)) == _MAGIC


def _parsed(path: str, raw: bytes) -> VirtualDisk:
    text = raw.split(b"\0")[0].decode("utf-8", "replace")
    fields = {key.lower(): value for key, value in _FIELD.findall(text)}
    folder = PurePosixPath(path).parent
    extents = []
    kinds = set()
    for _, sectors, kind, name in _EXTENT.findall(text):
        kinds.add(kind.upper())
        extents.append((_beside(folder, name), int(sectors) * _SECTOR))
    if not extents:
        raise IntegrityError(f"the descriptor {path} names no extent", code="bad-vmdk")
    parent = fields.get("parentfilenamehint", "")
    linked = fields.get("parentcid", "ffffffff").lower() != "ffffffff"
    return VirtualDisk(
        path=path,
        kind="delta" if parent or linked else _kind(kinds),
        size_bytes=sum(size for _, size in extents),
        extents=tuple(extents),
        parent=_beside(folder, parent) if parent else "",
    )


def _kind(kinds: set[str]) -> str:
    if kinds <= _FLAT:
        return "flat"
    (first, *_) = sorted(kinds)
    return _RAW.get(first, first.lower())


def _beside(folder: PurePosixPath, name: str) -> str:
    """A name in a descriptor: of its own folder, or a path on another datastore as it stands."""
    return name if name.startswith("/") else str(folder / name)
