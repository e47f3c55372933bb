"""Settings of a virtual machine, as they go into TimeMarks and backups. No I/O here."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

FILE_MAX = 16 << 20  # bytes; OVMF's variables are half a MiB


class DiskKind(StrEnum):
    """What a VM's disk is, where its hypervisor keeps it."""

    FLAT = "flat"  # vSphere: a file on a VMFS or NFS datastore, and its snapshots
    RDM = "rdm"  # vSphere: a LUN of its own, through a mapping file, in virtual mode
    RDM_PHYSICAL = "rdm-physical"  # the same in physical mode: outside of VM snapshots
    FILE = "file"  # libvirt: a file, raw or qcow2
    BLOCK = "block"  # libvirt: a block device
    NETWORK = "network"  # libvirt: RBD, NBD, iSCSI …
    VSAN = "vsan"  # no LUN
    VVOL = "vvol"  # no LUN
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDisk:
    """One disk of a VM.

    `path`: as the hypervisor names it (`[ds1] web/web.vmdk`, a file, a block device, `rbd:pool/x`),
    the running one where there are snapshots; `chain`: its parents, the nearest first. `luns`: all
    LUNs that it lies on (`naa.…`); for libvirt none. `volume`: the volume of ours that holds it
    whole, "" where none does. `problem`: why no placeholder can have it as it is, or "".
    """

    name: str  # as in the guest's hardware: `scsi0:1`, `vda`; unique in the VM
    label: str = ""  # as people see it: `Hard disk 1`
    kind: DiskKind
    path: str
    size_bytes: int
    volume: str = ""
    datastore: str = ""  # its name
    luns: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    format: str = ""  # libvirt: raw | qcow2
    independent: bool = False  # no part of VM snapshots
    shared: bool = False  # a shared bus, multi-writer, or <shareable/>
    encrypted: bool = False
    problem: str = ""

    @property
    def called(self) -> str:
        """For people: `scsi0:1 (Hard disk 1)`, `vda`."""
        known = self.label and self.name not in self.label
        return f"{self.name} ({self.label})" if known else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The settings of a VM at a point in time: enough to make it again elsewhere.

    `definition`: the domain's XML (libvirt; inactive, with security information left out), or the
    text of the .vmx file (vSphere). `files`: what else belongs to it, by its role (`nvram`), packed
    by `pack_file`.
    `summary`: for people and for checks, JSON values: cpus, memory_bytes, firmware (bios | uefi),
    secure_boot, guest, networks ([{name, mac, model}]), notes, tags, folder; left_out: what of its
    files could not be had.
    """

    name: str
    kind: str  # libvirt | vsphere
    hypervisor: str  # its name in the configuration
    id: str  # moRef, or the domain's UUID
    uuid: str  # what the guest sees; vSphere: the BIOS UUID
    instance_uuid: str = ""  # vSphere: by which a vCenter tells VMs apart
    definition: str
    definition_path: str = ""  # vSphere: `[ds1] web/web.vmx`
    files: Mapping[str, str] = field(default_factory=dict)
    disks: tuple[MachineDisk, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "hypervisor": self.hypervisor,
            "id": self.id,
            "uuid": self.uuid,
            "instance_uuid": self.instance_uuid,
            "definition": self.definition,
            "definition_path": self.definition_path,
            "files": dict(self.files),
            "disks": [disk_to_dict(disk) for disk in self.disks],
            "summary": dict(self.summary),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Machine:
        """The inverse of `to_dict`; unknown fields of newer versions are left out."""
        known = {name: fields[name] for name in cls.__slots__ if name in fields}
        known["disks"] = tuple(disk_from_dict(disk) for disk in known.get("disks", ()))
        return cls(**known)


def pack_file(content: bytes) -> str:
    """A small file for `Machine.files`: zlib (RFC 1950), then base64; firmware variables are mostly
    empty. Raises ValueError for more than FILE_MAX bytes."""
    if len(content) > FILE_MAX:
        raise ValueError(f"a file of {len(content)} bytes is no setting of a VM")
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")


def unpack_file(packed: str) -> bytes:
    """The inverse of `pack_file`. Raises ValueError."""
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(base64.b64decode(packed, validate=True), FILE_MAX + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged file: {error}") from error
    if len(content) > FILE_MAX or not reader.eof:
        raise ValueError("a damaged file, or one that is no setting of a VM")
    return content


def disk_to_dict(disk: MachineDisk) -> dict[str, Any]:
    """As JSON values."""
    found = {name: getattr(disk, name) for name in MachineDisk.__slots__}
    return {**found, "kind": disk.kind.value, "luns": list(disk.luns), "chain": list(disk.chain)}


def disk_from_dict(fields: Mapping[str, Any]) -> MachineDisk:
    """The inverse of `disk_to_dict`."""
    known = {name: fields[name] for name in MachineDisk.__slots__ if name in fields}
    known["kind"] = DiskKind(known["kind"])
    known["luns"] = tuple(known.get("luns", ()))
    known["chain"] = tuple(known.get("chain", ()))
    return MachineDisk(**known)
