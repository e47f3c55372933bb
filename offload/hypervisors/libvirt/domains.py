"""Domains of a libvirt daemon as the inventory shows them, and their settings."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from offload.errors import OffloadError
from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.host_files import HostFiles
from offload.inventory import Datastore, HypervisorHost, InventoryVm
from offload.libvirtd import Libvirt
from offload.machine import DiskKind, Machine, MachineDisk, pack_file

# of virDomainState, libvirt/libvirt-domain.h
_POWER = {1: "on", 2: "on", 3: "suspended", 4: "on", 5: "off", 6: "off", 7: "suspended"}
_INACTIVE = 2  # VIR_DOMAIN_XML_INACTIVE; without VIR_DOMAIN_XML_SECURE no secrets come along
_POOL_STATE_RUNNING = 2
_CHAIN_MAX = 64
_NVRAM = "libvirt/qemu/nvram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A storage pool, and its folder ("" for one without)."""

    datastore: Datastore
    folder: str


class DomainReader:
    """Reads domains, pools and the host of one connection. Methods raise what `translated` does."""

    def __init__(self, link: Libvirt) -> None:
        self._link = link
        self._pools: Sequence[Pool] = ()
        with link.translated("does not say what host it is"):
            self._host = str(link.connection.getHostname())

    # -- the host ------------------------------------------------------------------------------

    def host(self) -> HypervisorHost:
        """The only one that a daemon has."""
        with self._link.translated("does not say what it can do"):
            caps = ET.fromstring(self._link.connection.getCapabilities())  # noqa: S314 - libvirt's
        return HypervisorHost(id=caps.findtext("host/uuid") or self._host, name=self._host)

    def read_pools(self) -> tuple[Datastore, ...]:
        """Storage pools; from now on disks know in which they lie."""
        what = "cannot list its storage pools"
        every = self._link.connection.listAllStoragePools
        handles: list[Any] = self._link.optional(what, lambda: every(0), [])
        with self._link.translated(what):
            found = [_pool(handle) for handle in handles]
        self._pools = sorted(found, key=lambda pool: pool.datastore.name)
        return tuple(pool.datastore for pool in self._pools)

    # -- domains -------------------------------------------------------------------------------

    def handles(self) -> list[Any]:
        """All domains, running or not."""
        with self._link.translated("cannot list its domains"):
            return list(self._link.connection.listAllDomains(0))

    def vm(self, handle: Any) -> InventoryVm:
        """One domain. Raises NotFoundError (`unknown-domain`) where it is gone."""
        with self._link.about(handle.name()):
            state = handle.state()[0]
            active = bool(handle.isActive())
            root = domain_xml.parse(handle.XMLDesc(0))
        mark = domain_xml.mark_of(root)
        disks = self.disks(handle, root)
        return InventoryVm(
            id=handle.UUIDString(),
            name=handle.name(),
            power=_POWER.get(state, "off"),
            uuid=handle.UUIDString(),
            host=self._host,
            tags=domain_xml.tags_of(root),
            tools=domain_xml.tools_of(root) if active else _off(domain_xml.tools_of(root)),
            encrypted=any(disk.encrypted for disk in disks),
            firmware=domain_xml.firmware_of(root),
            placeholder=mark.island if mark is not None else "",
            disks=disks,
        )

    def disks(self, handle: Any, root: ET.Element) -> tuple[MachineDisk, ...]:
        """By its definition `root`."""
        return tuple(self._disk(handle, disk) for disk in domain_xml.disk_elements(root))

    def _disk(self, handle: Any, disk: ET.Element) -> MachineDisk:
        kind, path = domain_xml.disk_kind(disk), domain_xml.disk_path(disk)
        if disk.get("type") == "volume":
            kind, path = self._pool_volume(path)
        encrypted = domain_xml.is_encrypted(disk)
        name, form = domain_xml.disk_name(disk), domain_xml.disk_format(disk)
        target = disk.find("target")
        bus = target.get("bus", "") if target is not None else ""
        return MachineDisk(
            name=name,
            label=f"{bus} disk {name}".strip(),
            kind=kind,
            path=path,
            size_bytes=self._size(handle, name),
            datastore=self._datastore(path),
            chain=domain_xml.disk_chain(disk) or self._chain(path, form),
            format=form,
            shared=disk.find("shareable") is not None,
            encrypted=encrypted,
            problem=_problem(kind, path, disk, encrypted=encrypted),
        )

    def _size(self, handle: Any, name: str) -> int:
        """As the guest sees it; 0 where libvirt cannot tell: a network disk of one that is off."""
        try:
            return int(handle.blockInfo(name, 0)[0])
        except self._link.api.libvirtError:
            return 0

    def _chain(self, path: str, form: str) -> tuple[str, ...]:
        """The parents of an image, as its storage pool knows them; libvirt tells those of running
        domains only."""
        if form == "raw" or not path.startswith("/"):
            return ()
        found: list[str] = []
        below = path
        while len(found) < _CHAIN_MAX:
            try:
                volume = self._link.connection.storageVolLookupByPath(below)
                xml = ET.fromstring(volume.XMLDesc(0))  # noqa: S314 - libvirt's own
            except self._link.api.libvirtError:  # in no pool
                break
            below = xml.findtext("backingStore/path") or ""
            if not below:
                break
            found.append(below)
        return tuple(found)

    def _pool_volume(self, name: str) -> tuple[DiskKind, str]:
        """What `POOL/VOLUME` is."""
        pool, _, volume = name.partition("/")
        try:
            found = self._link.connection.storagePoolLookupByName(pool)
            handle = found.storageVolLookupByName(volume)
            kind = DiskKind.BLOCK if handle.info()[0] == 1 else DiskKind.FILE
            return kind, str(handle.path())
        except self._link.api.libvirtError:
            return DiskKind.OTHER, name

    def _datastore(self, path: str) -> str:
        if not path.startswith("/"):
            return ""
        parents = {str(parent) for parent in PurePosixPath(path).parents}
        within = [pool for pool in self._pools if pool.folder in parents]
        return max(within, key=lambda p: len(p.folder)).datastore.name if within else ""

    # -- settings ------------------------------------------------------------------------------

    def machine(self, handle: Any, hypervisor: str) -> Machine:
        """What it will be at its next start; its disks as they are now."""
        with self._link.about(handle.name()):
            text = str(handle.XMLDesc(_INACTIVE))
            now = domain_xml.parse(handle.XMLDesc(0))
        root = domain_xml.parse(text)
        files, left_out = self._files(self._nvram(handle, root, now))
        return Machine(
            name=handle.name(),
            kind="libvirt",
            hypervisor=hypervisor,
            id=handle.UUIDString(),
            uuid=handle.UUIDString(),
            definition=text,
            files=files,
            disks=self.disks(handle, now),
            summary={**domain_xml.summary_of(root), "left_out": left_out},
        )

    def _nvram(self, handle: Any, root: ET.Element, now: ET.Element) -> str:
        """Where its firmware's variables are. Of a firmware that libvirt chose at its start only a
        running domain tells; else they are where libvirt puts them."""
        known = domain_xml.nvram_of(root) or domain_xml.nvram_of(now)
        if known or domain_xml.firmware_of(root) != "uefi":
            return known
        session = urlsplit(self._link.uri).path == "/session"
        folder = Path.home() / ".config" / _NVRAM if session else Path("/var/lib") / _NVRAM
        return str(folder / f"{handle.name()}_VARS.fd")

    def _files(self, nvram: str) -> tuple[dict[str, str], list[str]]:
        """What else belongs to it, and what of that could not be had."""
        files: dict[str, str] = {}
        left_out: list[str] = []
        if nvram:
            try:
                files["nvram"] = pack_file(HostFiles(self._link).read(nvram))
            except (OffloadError, ValueError) as error:
                left_out.append(f"nvram: {error}")
        return files, left_out


def _off(tools: str) -> str:
    return "not-installed" if tools == "not-installed" else "not-running"


def _pool(handle: Any) -> Pool:
    root = ET.fromstring(handle.XMLDesc(0))  # noqa: S314 - libvirt's own
    state, capacity, _, free = handle.info()
    folder = root.findtext("target/path") or ""
    return Pool(
        datastore=Datastore(
            id=handle.UUIDString(),
            name=handle.name(),
            kind=root.get("type", ""),
            capacity_bytes=int(capacity),
            free_bytes=int(free),
            accessible=state == _POOL_STATE_RUNNING,
        ),
        folder=str(PurePosixPath(folder)) if folder else "",
    )


def _problem(kind: DiskKind, path: str, disk: ET.Element, *, encrypted: bool) -> str:
    if encrypted:
        return "QEMU encrypts it: what lies on the storage cannot be read without the guest's key"
    if kind is DiskKind.OTHER or not path:
        return f"a disk of type '{disk.get('type', '')}' is on no storage that can be snapshot here"
    return ""
