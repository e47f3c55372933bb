"""VMs that a restore makes: real domains, on disks that lie where they are to stay.

UUID and MACs are the old ones where nothing else has them, as far as can be seen: no domain of this
daemon, and not the VM itself where its own hypervisor is in the configuration. Else they are fresh:
two machines of one identity on one network do harm.
"""

from __future__ import annotations

import contextlib
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload import endpoint
from offload.configs.hypervisors import LibvirtConfig
from offload.endpoint import NbdEndpoint
from offload.errors import (
    CleanupError,
    ConfigError,
    NotFoundError,
    OffloadError,
    UsageError,
)
from offload.hypervisor import Step
from offload.hypervisors.libvirt import abilities, domain_xml, translate
from offload.hypervisors.libvirt.abilities import Abilities
from offload.hypervisors.libvirt.domain_xml import Mark
from offload.hypervisors.libvirt.host_files import HostFiles
from offload.hypervisors.libvirt.new_domain import NewDisk, NewDomain
from offload.hypervisors.libvirt.owned import owned, undefine
from offload.hypervisors.libvirt.placing import unpacked
from offload.hypervisors.libvirt.preflight import check_name
from offload.instance import Instance
from offload.libvirtd import DomainState, Libvirt
from offload.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to make. `disks`: by name, a file (qcow2 where it is called so, else raw), a block
    device, or the NBD URI of a writable view. `folder`: for its firmware's variables."""

    machine: Machine
    disks: Mapping[str, str]
    name: str
    folder: Path
    instance: Instance


def look(link: Libvirt, order: Order) -> list[str]:
    """What the host cannot have of the settings. Raises what `create` raises before it acts."""
    return _prepare(link, order, "").notes


def create(link: Libvirt, order: Order, mark: str, step: Step) -> str:
    """The UUID of the domain, which is off. The domain comes first: `destroy` finds by it what else
    there is. Raises UsageError, ConfigError, UnavailableError."""
    made = _prepare(link, order, mark)
    if made.host.user != 0 and any(disk.unix_socket for disk in made.disks.values()):
        raise ConfigError(
            f"QEMU runs as user {made.host.user} on {link.uri}, and the socket of a view is for "
            "its owner only",
            code="socket-out-of-reach",
            hint="set address = '127.0.0.1' for the backup host: its views are on TCP then",
        )
    with link.translated(f"does not take the VM {order.name}"):
        link.connection.defineXML(made.text)
    step("define")
    if made.nvram:
        packed = order.machine.files["nvram"]
        if link.local and order.folder == Path(made.nvram).parent:
            order.folder.mkdir(mode=0o700, exist_ok=True)
        HostFiles(link).write(made.nvram, unpacked(order.machine, packed))
        step("nvram")
    return made.uuid


def destroy(link: Libvirt, mark: str, instance: str) -> None:
    """Raises CleanupError (`vm-runs`)."""
    for domain, found in owned(link, instance):
        if found.kind != domain_xml.RESTORED or found.restore != mark:
            continue
        if domain.state() is not DomainState.OFF:
            raise CleanupError(
                f"domain {domain.name} was started and runs",
                code="vm-runs",
                hint=f"shut it down: virsh -c {link.uri} destroy {domain.name}",
            )
        with link.about(domain.name):
            nvram = domain_xml.nvram_of(domain_xml.parse(domain.handle.XMLDesc(0)))
        undefine(link, domain)
        if nvram and _own(nvram, found):
            HostFiles(link).remove(nvram)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    uuid: str
    text: str
    nvram: str  # where its firmware's variables are to be, "" for nowhere
    disks: Mapping[str, NewDisk]
    host: Abilities
    notes: list[str]


def _prepare(link: Libvirt, order: Order, mark: str) -> _Prepared:
    machine = order.machine
    if machine.kind != "libvirt":
        raise UsageError(
            f"VM {machine.name} is of {machine.kind}: libvirt cannot run it as it is",
            code="wrong-hypervisor",
        )
    check_name(order.name)
    root = domain_xml.parse(machine.definition)
    disks, left_out = _disks(root, order)
    host = abilities.abilities(link, root)
    taken_uuids, taken_macs = _taken(link, order)
    kept = machine.uuid and machine.uuid not in taken_uuids
    fields = {"instance": order.instance.id, "mark": mark, "vm": machine.name}
    new = NewDomain(
        name=order.name,
        uuid=machine.uuid if kept else str(uuid.uuid4()),
        mark=Mark(kind=domain_xml.RESTORED, fields={**fields, "production": machine.id}),
        disks=disks,
        mac=lambda old: translate.fresh_mac() if old in taken_macs or not old else old,
        nvram=_nvram(order, mark),
    )
    if new.nvram:
        HostFiles(link).check(new.nvram)
    text, notes = translate.translate(root, new, host)
    if machine.summary.get("left_out"):
        notes += [f"not kept: {what}" for what in machine.summary["left_out"]]
    return _Prepared(
        uuid=new.uuid, text=text, nvram=new.nvram, disks=disks, host=host, notes=left_out + notes
    )


def _disks(root: ET.Element, order: Order) -> tuple[dict[str, NewDisk], list[str]]:
    """Those that it gets, and what is to be said of the others."""
    there = {domain_xml.disk_name(disk) for disk in domain_xml.disk_elements(root)}
    plugged = {disk.name for disk in order.machine.disks} - there
    unknown = sorted(set(order.disks) - there - plugged)
    if unknown:
        raise UsageError(
            f"VM {order.machine.name} has no disk {', '.join(unknown)}",
            code="unknown-disk",
            hint=f"it has: {', '.join(sorted(there)) or 'none'}",
        )
    if not set(order.disks) & there:
        raise UsageError(f"VM {order.machine.name} would have no disk", code="no-disk")
    left_out = [f"left out: disk {name}" for name in sorted(there - set(order.disks))]
    left_out += [
        f"left out: disk {name}, which was plugged in until the VM's next stop only"
        for name in sorted(plugged & set(order.disks))
    ]
    found = {name: _disk(place) for name, place in order.disks.items() if name in there}
    return found, left_out


def _disk(place: str) -> NewDisk:
    """The format goes by the name: a raw disk's content is the guest's, and says nothing."""
    if "://" in place:
        return _view(place)
    path = Path(place)
    if path.is_block_device():
        return NewDisk(kind="block", form="raw", source={"dev": place})
    form = "qcow2" if path.suffix == ".qcow2" else "raw"
    return NewDisk(kind="file", form=form, source={"file": place})


def _view(uri: str) -> NewDisk:
    found = endpoint.parse(uri)
    if not isinstance(found, NbdEndpoint) or found.tls is not None:
        raise UsageError(
            f"a VM cannot run on {uri}",
            code="bad-disk",
            hint="a file, a block device, or a writable view over NBD without TLS",
        )
    source = {"protocol": "nbd", **({"name": found.export} if found.export else {})}
    if isinstance(found.address, Path):
        host = ET.Element("host", transport="unix", socket=str(found.address))
    else:
        host = ET.Element("host", name=found.address[0], port=str(found.address[1]))
    return NewDisk(kind="network", form="raw", source=source, inner=(host,))


def _nvram(order: Order, mark: str) -> str:
    """Beside the first disk that is a file: QEMU gets there."""
    if "nvram" not in order.machine.files:
        return ""
    files = [Path(p) for p in order.disks.values() if "://" not in p and not p.startswith("/dev/")]
    folder = files[0].parent if files else order.folder
    return str(folder / f"offload.{order.instance.id}.{mark}.nvram")


def _own(nvram: str, mark: Mark) -> bool:
    return Path(nvram).name == f"offload.{mark.instance}.{mark.restore}.nvram"


def _taken(link: Libvirt, order: Order) -> tuple[frozenset[str], frozenset[str]]:
    """UUIDs and MACs that are in use."""
    uuids: set[str] = set()
    macs: set[str] = set()
    with link.translated("cannot list its domains"):
        for handle in link.connection.listAllDomains(0):
            uuids.add(handle.UUIDString())
            cards = domain_xml.networks_of(domain_xml.parse(handle.XMLDesc(0)))
            macs |= {card["mac"] for card in cards}
    own = order.instance.config.hypervisors.get(order.machine.hypervisor)
    if isinstance(own, LibvirtConfig) and own.uri != link.uri and not _gone(own, order.machine):
        root = domain_xml.parse(order.machine.definition)
        uuids.add(order.machine.uuid)
        macs |= {card["mac"] for card in domain_xml.networks_of(root)}
    return frozenset(uuids), frozenset(macs)


def _gone(own: LibvirtConfig, machine: Machine) -> bool:
    """Whether its hypervisor says that the VM is no more; one that cannot be asked says nothing."""
    with contextlib.suppress(OffloadError), Libvirt(own.uri) as link:
        try:
            link.domain(machine.id)
        except NotFoundError:
            return True
    return False
