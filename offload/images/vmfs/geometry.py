"""The superblock of a VMFS, and the sizes that follow from it.

The superblock lies 2 MiB into the logical volume (little endian, packed). Version 6 begins with
major 24. Metadata is aligned to 512 bytes before that, then to `md_alignment`.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.errors import IntegrityError, UnavailableError
from offload.images.vmfs.lun import LogicalVolume

_SUPERBLOCK = 0x200000
_BYTES = 0x170
_MAGICS = {0x2FABF15E, 0x2FABF15F}  # VMFS, and VMFS-L of a host's own disk
_VERSION_6 = 24
_MAJORS = {14, 24}  # 5 and 6
_DENSE = 0x4  # more sub-blocks a cluster
_FIRST_GROUP = 0x3FFFFF

# addresses of file descriptors that are always there
ROOT = 0x00000004
FBB, FDC, PBC, SBC, PB2 = 0x00400004, 0x00800004, 0x00C00004, 0x01000004, 0x01800004


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes in bytes. A file descriptor (FD) is its lock, its metadata and its data: small files,
    or addresses of blocks."""

    six: bool
    label: str
    file_block: int
    sub_block: int
    md_alignment: int
    lfb_shift: int  # a large file block is so many times a file block, as a power of two
    dense: bool
    fdc_group_offset: int
    fdc_clusters: int
    pb2: tuple[int, int]  # address of a descriptor, and where it lies: version 5 without `dense`

    @property
    def fd_bytes(self) -> int:
        """Of a file descriptor."""
        return 2 * self.md_alignment if self.six else 2048

    @property
    def fd_metadata(self) -> int:
        """Where in it the metadata begins."""
        return self.md_alignment if self.six else 512

    @property
    def fd_data(self) -> int:
        """Where in it small content begins."""
        return self.md_alignment + 512 if self.six else 1024

    @property
    def fd_addresses(self) -> int:
        """Where in it addresses of blocks begin; they reach to its end."""
        if not self.six:
            return 1024
        return self.fd_bytes - (2560 if self.md_alignment <= 4096 else self.md_alignment // 2)

    @property
    def address_bytes(self) -> int:
        """Of an address of a block."""
        return 8 if self.six else 4

    @property
    def pointers(self) -> int:
        """Addresses in a pointer block."""
        if not self.six:
            return 1024
        return 8192 if self.md_alignment < 0x10000 else self.md_alignment // 8

    @property
    def cluster_header(self) -> int:
        """In front of each cluster of resources: a lock and a bitmap."""
        return 2 * self.md_alignment if self.six else 1024

    @property
    def sfb_per_cluster(self) -> int:
        """File blocks of a cluster, before its resource file says so: version 6."""
        return min(0x2000, 0x20000000 // self.file_block)

    def system_fd(self, address: int) -> int:
        """Where the descriptor of a system file lies in the volume."""
        number = (address >> 22) & 0x3FF
        if self.six:
            first = (((self.md_alignment << 10) + _FIRST_GROUP) & ~0xFFFFF) + self.fdc_group_offset
            return first + (self.fdc_clusters + number) * self.fd_bytes
        if not self.dense and address == self.pb2[0] and self.pb2[1]:
            return self.pb2[1]
        blocks = (self.file_block + _FIRST_GROUP) // self.file_block
        first = self.file_block * blocks + self.fdc_group_offset
        return first + self.fdc_clusters * 1024 + number * 2048


def read_geometry(volume: LogicalVolume) -> Geometry:
    """Raises IntegrityError (`not-vmfs`, `bad-vmfs`), UnavailableError (`vmfs-version`)."""
    raw = volume.pread(_SUPERBLOCK, _BYTES)

    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    if number(0, 4) not in _MAGICS:
        raise IntegrityError("the logical volume holds no VMFS", code="not-vmfs")
    major = number(4, 4)
    if major not in _MAJORS:
        raise UnavailableError(
            f"a VMFS of version {major} inside is not known: 5 and 6 are", code="vmfs-version"
        )
    found = Geometry(
        six=major >= _VERSION_6,
        label=raw[0x1D:0x9D].split(b"\0")[0].decode("utf-8", "replace"),
        file_block=number(0xA1, 8),
        sub_block=number(0xD9, 4),
        md_alignment=number(0x134, 4) if major >= _VERSION_6 else 512,
        lfb_shift=number(0x138, 2) if major >= _VERSION_6 else 0,
        dense=bool(number(0x19, 4) & _DENSE),
        fdc_group_offset=number(0xD1, 4),
        fdc_clusters=number(0xD5, 4),
        pb2=(number(0xE9, 4), number(0xE1, 8)),
    )
    sizes = {
        "file block": (found.file_block, 1 << 16, 1 << 27),
        "sub-block": (found.sub_block, 512, 1 << 20),
        "metadata alignment": (found.md_alignment, 512, 1 << 20),
    }
    for name, (size, least, most) in sizes.items():
        if size & (size - 1) or not least <= size <= most:
            raise IntegrityError(f"a {name} of {size} bytes", code="bad-vmfs")
    if found.lfb_shift > 16:  # 64 GiB and more
        raise IntegrityError(f"a large file block of 2^{found.lfb_shift}", code="bad-vmfs")
    return found
