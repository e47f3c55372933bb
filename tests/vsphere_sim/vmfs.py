"""What of VMFS is really on the LUNs: two headers, and behind them a file tree of our own.

The headers are where VMFS5 has them, so that tools know the LUN: layout as in `vmfs_volume.h` and
`vmfs_fs.h` of vmfs-tools (https://github.com/glandium/vmfs-tools). **The rest is no VMFS**: real
file descriptors and allocation are not public enough to be written here. It is a test layout:

| at (bytes from the partition, which begins at 1 MiB) | what |
| --- | --- |
| 0x0100000 | VMFS: LVM header: magic, version, UUID, LVM UUID, number of extents |
| 0x0100300 | ours: this extent's number; NAA of the LUN that it was formatted or resignatured on |
| 0x1300000 | VMFS: file system header: magic, version, UUID, label |
| 0x1400000, 0x1800000 | ours: slots in turn: `OFFLSIM1`, number, length, digest, JSON (4 MiB) |
| 0x1C00000 | ours: contents of disks, in grains of 64 KiB |

The JSON names each file: its text, or where its content lies. The newer whole slot counts, so that
a snapshot of the LUN in the middle of a change has the tree before it. All that the simulator knows
of a datastore's files is read from there: a copy of the LUN has the VMs of its time.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.vsphere_sim.disks import Disk

GRAIN = 1 << 16
MIN_BYTES = 64 << 20  # of a LUN that is worth a datastore
_PARTITION = 1 << 20
_LVM = _PARTITION + 0x100000
_OURS = 0x300  # in the LVM header
_FS = _PARTITION + 0x1300000
_SLOTS = (_PARTITION + 0x1400000, _PARTITION + 0x1800000)
_SLOT_BYTES = 4 << 20
_DATA = _PARTITION + 0x1C00000
_LVM_MAGIC, _FS_MAGIC = 0xC001D00D, 0x2FABF15E
_SLOT = struct.Struct("<8sQQ32s")
_SLOT_MAGIC = b"OFFLSIM1"
_SECTOR = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Who a VMFS says that it is. `device`: the NAA that it believes to be on."""

    uuid: str
    label: str
    device: str
    ordinal: int = 0  # of this extent
    extents: int = 1


@dataclass(slots=True, kw_only=True)
class File:
    """A file: a text; or content on the LUN: `grains` names where each grain of 64 KiB lies (extent
    and offset), 0 being none yet."""

    text: str | None = None
    size_bytes: int = 0
    grains: dict[int, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        if self.text is not None:
            return {"text": self.text}
        return {"size": self.size_bytes, "grains": [[k, *v] for k, v in self.grains.items()]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> File:
        """The inverse."""
        if "text" in fields:
            return cls(text=fields["text"])
        grains = {k: (extent, offset) for k, extent, offset in fields["grains"]}
        return cls(size_bytes=fields["size"], grains=grains)


def uuid_text(raw: bytes) -> str:
    """As VMFS writes it: 8-8-4-12 digits, the first three numbers little-endian."""
    first, second, third = struct.unpack_from("<IIH", raw)
    return f"{first:08x}-{second:08x}-{third:04x}-{raw[10:16].hex()}"


def uuid_bytes(text: str) -> bytes:
    """The inverse."""
    first, second, third, rest = text.split("-")
    numbers = struct.pack("<IIH", int(first, 16), int(second, 16), int(third, 16))
    return numbers + bytes.fromhex(rest)


def new_uuid() -> str:
    """One that no VMFS has."""
    return uuid_text(uuid.uuid4().bytes)


def read_header(disk: Disk) -> Header | None:
    """None where there is no VMFS. Raises DiskError."""
    if disk.size_bytes < _DATA:
        return None
    lvm, fs = disk.pread(1024, _LVM), disk.pread(_SECTOR, _FS)
    if struct.unpack_from("<I", lvm)[0] != _LVM_MAGIC:
        return None
    (extents,) = struct.unpack_from("<I", lvm, 0x290)
    ordinal = lvm[_OURS]
    if ordinal == 0 and struct.unpack_from("<I", fs)[0] != _FS_MAGIC:
        return None
    return Header(
        uuid=uuid_text(lvm[0x254:0x264]),
        label=fs[0x1D : 0x1D + 128].rstrip(b"\0").decode() if ordinal == 0 else "",
        device=lvm[_OURS + 1 : _OURS + 129].rstrip(b"\0").decode(),
        ordinal=ordinal,
        extents=extents,
    )


def write_header(disk: Disk, header: Header) -> None:
    """Both headers. Raises DiskError."""
    lvm, fs = bytearray(1024), bytearray(_SECTOR)
    struct.pack_into("<II", lvm, 0, _LVM_MAGIC, 5)
    lvm[0x12 : 0x12 + 28] = b"offload simulator".ljust(28, b"\0")
    lvm[0x82:0x92] = lvm[0x254:0x264] = uuid_bytes(header.uuid)
    struct.pack_into("<Q", lvm, 0x200, disk.size_bytes)
    lvm[0x214 : 0x214 + len(header.uuid)] = header.uuid.encode()
    struct.pack_into("<I", lvm, 0x290, header.extents)
    lvm[_OURS] = header.ordinal
    lvm[_OURS + 1 : _OURS + 129] = header.device.encode().ljust(128, b"\0")
    disk.pwrite(bytes(lvm), _LVM)
    if header.ordinal == 0:
        struct.pack_into("<IIB", fs, 0, _FS_MAGIC, 14, 5)
        fs[0x09:0x19] = uuid_bytes(header.uuid)
        fs[0x1D : 0x1D + 128] = header.label.encode().ljust(128, b"\0")
        struct.pack_into("<Q", fs, 0xA1, 1 << 20)
        fs[0xB1:0xC1] = uuid_bytes(header.uuid)
        disk.pwrite(bytes(fs), _FS)


def wipe(volume: Volume) -> None:
    """No VMFS any more. Raises DiskError."""
    for disk in volume.disks:
        disk.pwrite(bytes(1024), _LVM)
        disk.pwrite(bytes(_SECTOR), _FS)


class Volume:
    """A VMFS on its extents. Every change of the tree is on the LUN when the call returns."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        """One that is there; see `make`. Raises DiskError, ValueError."""
        self.disks = list(disks)
        head = read_header(self.disks[0])
        if head is None:
            raise ValueError(f"no VMFS on {self.disks[0].naa}")
        self.header = head
        self.files: dict[str, File] = {}
        self.lock = threading.RLock()
        self._sequence = 0
        self._load()

    @classmethod
    def make(cls, disks: Sequence[Disk], label: str) -> Volume:
        """A new one, empty."""
        header = Header(uuid=new_uuid(), label=label, device="", extents=len(disks))
        for ordinal, disk in enumerate(disks):
            write_header(disk, replace(header, device=disk.naa, ordinal=ordinal))
        for slot in _SLOTS:
            disks[0].pwrite(bytes(_SECTOR), slot)
        made = cls(disks)
        made.save()
        return made

    def resignature(self, label: str) -> None:
        """A new UUID and label on all extents, bound to the LUNs that they are on now (vSphere
        Storage, "Managing duplicate VMFS datastores").
        Paths in files are not touched. Raises DiskError."""
        header = replace(self.header, uuid=new_uuid(), label=label)
        for ordinal, disk in enumerate(self.disks):
            write_header(disk, replace(header, device=disk.naa, ordinal=ordinal))
        self.header = replace(header, device=self.disks[0].naa)

    def rename(self, label: str) -> None:
        """Another label. Raises DiskError."""
        write_header(self.disks[0], replace(self.header, label=label))
        self.header = replace(self.header, label=label)

    @property
    def size_bytes(self) -> int:
        """Of all extents."""
        return sum(disk.size_bytes for disk in self.disks)

    # -- files -----------------------------------------------------------------------------------

    def text(self, path: str) -> str:
        """Of a text file. Raises FileNotFoundError."""
        with self.lock:
            found = self.files.get(path)
            if found is None or found.text is None:
                raise FileNotFoundError(path)
            return found.text

    def write_text(self, path: str, text: str) -> None:
        """Made or replaced."""
        self.write_texts({path: text})

    def write_texts(self, texts: dict[str, str]) -> None:
        """Several with one change of the tree."""
        with self.lock:
            self.files |= {path: File(text=text) for path, text in texts.items()}
            self.save()

    def remove(self, *paths: str) -> None:
        """Files that may be gone already."""
        with self.lock:
            for path in paths:
                self.files.pop(path, None)
            self.save()

    def grains(self, path: str) -> dict[int, tuple[int, int]]:
        """Where the content of a file lies. Raises FileNotFoundError."""
        found = self.files.get(path)
        if found is None:
            raise FileNotFoundError(path)
        return found.grains

    def read_grain(self, path: str, number: int) -> bytes | None:
        """One grain of a file; None: it has none."""
        place = self.grains(path).get(number)
        return None if place is None else self.disks[place[0]].pread(GRAIN, place[1])

    def write_grain(self, path: str, number: int, data: bytes) -> None:
        """One grain of a file. A new one gets its place with `save`."""
        with self.lock:
            grains = self.grains(path)
            if number not in grains:
                grains[number] = self._free()
            extent, offset = grains[number]
            self.disks[extent].pwrite(data, offset)

    def _free(self) -> tuple[int, int]:
        used = {place for found in self.files.values() for place in found.grains.values()}
        for extent, disk in enumerate(self.disks):
            for offset in range(_DATA, disk.size_bytes - GRAIN + 1, GRAIN):
                if (extent, offset) not in used:
                    return extent, offset
        raise OSError(28, "No space left on device", self.header.label)

    # -- the tree on the LUN ---------------------------------------------------------------------

    def save(self) -> None:
        """The tree as it is now, into the older slot. Raises DiskError."""
        with self.lock:
            self._sequence += 1
            tree = {path: found.to_json() for path, found in sorted(self.files.items())}
            body = json.dumps(tree).encode()
            head = _SLOT.pack(_SLOT_MAGIC, self._sequence, len(body), _digest(self._sequence, body))
            whole = head.ljust(_SECTOR, b"\0") + body
            if len(whole) > _SLOT_BYTES:
                raise OSError(28, "No space left for names", self.header.label)
            whole = whole.ljust(-(-len(whole) // _SECTOR) * _SECTOR, b"\0")
            self.disks[0].pwrite(whole, _SLOTS[self._sequence % 2])

    def _load(self) -> None:
        for slot in _SLOTS:
            magic, number, length, digest = _SLOT.unpack_from(self.disks[0].pread(_SECTOR, slot))
            if magic != _SLOT_MAGIC or number < self._sequence or length > _SLOT_BYTES - _SECTOR:
                continue
            count = -(-length // _SECTOR) * _SECTOR
            body = self.disks[0].pread(count, slot + _SECTOR)[:length] if count else b""
            if _digest(number, body) == digest:
                self._sequence = number
                tree = json.loads(body)
                self.files = {path: File.from_json(fields) for path, fields in tree.items()}


class NamesOnly(Volume):
    """A datastore without LUNs behind it: files have texts, disks have no content. For what is not
    VMFS, and for inventories of ten thousand VMs. `luns`: NAAs that it says to lie on."""

    def __init__(self, label: str, luns: Sequence[str] = ()) -> None:
        self.disks = []
        self.header = Header(uuid=new_uuid(), label=label, device="")
        self.files = {}
        self.lock = threading.RLock()
        self.luns = tuple(luns)

    def rename(self, label: str) -> None:
        """Another label."""
        self.header = replace(self.header, label=label)

    def save(self) -> None:
        """It is nowhere."""


def _digest(number: int, body: bytes) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little") + body).digest()
