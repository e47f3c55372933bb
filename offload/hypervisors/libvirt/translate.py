"""A production domain's definition as that of a placeholder, or of a VM that was restored.

Left as it is: what the guest sees of its hardware, as far as the host can show it. Taken out: what
is the old host's own (devices of that host, pinning, sockets, labels), what cannot exist on the new
one, and secrets, which the definition does not have to begin with. Each thing that a person could
miss is a note.

| | placeholder | restored |
| --- | --- | --- |
| name, UUID, MAC | new | as given |
| disks | the overlays | what was restored |
| cards | link down; those on a network that is not here are left out | those that are left out are the same |
| screen, sound, TPM, vsock | none | as far as the host has them; the TPM is empty |
| direct boot (kernel, initrd) | stays | stays |
| metadata of other programs | all but libosinfo goes | stays |
"""  # noqa: E501 - a table

from __future__ import annotations

import secrets
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.abilities import Abilities
from offload.hypervisors.libvirt.domain_xml import Mark

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_LIBOSINFO = "{http://libosinfo.org/"
_DOMAIN_NS = f"{{{domain_xml.DOMAIN}}}"

# Of the old host: where it ran there, and on what.
_HOSTS_OWN = {
    "cputune": "pinning to CPUs of its host",
    "numatune": "pinning to memory of its host",
    "memoryBacking": "how its host backs its memory",
    "blkiotune": "limits of its host's disks",
    "launchSecurity": "memory encryption by its host",
    f"{_QEMU}commandline": "options given to QEMU past libvirt",
    f"{_QEMU}override": "device properties given to QEMU past libvirt",
}
_SILENT = ("seclabel", "resource", "iothreadids", f"{_QEMU}capabilities", "genid", "idmap")
_NEVER = {  # devices
    "hostdev": "a device of its host",
    "filesystem": "a folder of its host",
    "shmem": "memory shared with others on its host",
    "lease": "a lease of its host's lock manager",
    "smartcard": "a smart card of its host",
    "redirdev": "",
    "redirfilter": "",
    "emulator": "",
}
_NO_SCREEN = ("graphics", "video", "sound", "audio", "tpm", "vsock")
# what the guest sees
_DISK_KEPT = (
    "target", "address", "boot", "serial", "wwn", "vendor", "product", "alias", "blockio",
    "geometry",
)  # fmt: skip
_DRIVER_KEPT = ("discard", "queues", "queue_size", "packed", "iommu", "ats")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDisk:
    """Where a disk lies now. `source`: attributes of <source>, and elements in it."""

    kind: str  # file | block | network
    form: str  # raw | qcow2
    source: Mapping[str, str]
    inner: Sequence[ET.Element] = ()

    @property
    def unix_socket(self) -> bool:
        """Whether it is reached by a socket of the host."""
        return any(host.get("transport") == "unix" for host in self.inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDomain:
    """What becomes of a definition. `disks` by their names: others are left out. `mac` gives the
    new address of a card for its old one."""

    name: str
    uuid: str
    mark: Mark
    disks: Mapping[str, NewDisk]
    mac: Callable[[str], str]
    nvram: str = ""  # path of its own variables
    title: str = ""
    description: str = ""  # "": as it was

    @property
    def placeholder(self) -> bool:
        """Whether it never starts."""
        return self.mark.kind == domain_xml.PLACEHOLDER


@dataclass(slots=True)
class _Work:
    root: ET.Element
    new: NewDomain
    host: Abilities
    notes: list[str] = field(default_factory=list)

    @property
    def devices(self) -> ET.Element:
        found = self.root.find("devices")
        return found if found is not None else ET.SubElement(self.root, "devices")


def translate(root: ET.Element, new: NewDomain, host: Abilities) -> tuple[str, list[str]]:
    """The new definition, and what a person must know of it. `root` is changed."""
    work = _Work(root, new, host)
    _identity(work)
    _machine(work)
    _firmware(work)
    _hosts_own(work)
    _disks(work)
    _drives(work)
    _cards(work)
    _channels(work)
    _ports(work)
    _screen(work)
    _sources(work)
    return ET.tostring(root, encoding="unicode"), work.notes


def fresh_mac() -> str:
    """Of the range that QEMU and KVM use."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


# -- what it is ---------------------------------------------------------------------------------


def _identity(work: _Work) -> None:
    new, root = work.new, work.root
    _put(root, "name", new.name)
    _put(root, "uuid", new.uuid)
    if new.title:
        _put(root, "title", new.title)
    if new.description:
        _put(root, "description", new.description)
    root.attrib.pop("id", None)
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(root, "metadata")
    for element in list(metadata):
        foreign = not element.tag.startswith(_LIBOSINFO)
        if element.tag.startswith(_DOMAIN_NS) or (new.placeholder and foreign):
            metadata.remove(element)
    metadata.append(new.mark.element())


def _put(root: ET.Element, name: str, text: str) -> None:
    found = root.find(name)
    if found is None:
        found = ET.SubElement(root, name)
    found.text = text


def _machine(work: _Work) -> None:
    root, host = work.root, work.host
    if root.get("type", "kvm") != host.kind:
        work.notes.append(f"this host has no {root.get('type', 'kvm')}: it is emulated")
        cpu = root.find("cpu")
        if cpu is not None:
            root.remove(cpu)
            ET.SubElement(root, "cpu", mode="maximum")
    root.set("type", host.kind)
    system = root.find("os/type")
    if system is not None and system.get("machine") not in (None, host.machine):
        work.notes.append(
            f"this host has no machine {system.get('machine')}: it is a {host.machine}"
        )
        system.set("machine", host.machine)


def _firmware(work: _Work) -> None:
    """Its variables are its own. A placeholder keeps what its loader was, there or not."""
    system = work.root.find("os")
    if system is None:
        return
    had = domain_xml.nvram_of(work.root)
    nvram = system.find("nvram")
    if nvram is not None:
        system.remove(nvram)
    if work.new.nvram:
        ET.SubElement(system, "nvram").text = work.new.nvram
    elif had:
        work.notes.append("the variables of its firmware were not kept: they are the defaults")
    if work.new.placeholder:
        _without_choice(work, system)
    elif system.get("firmware"):
        _choose_again(work, system)


def _without_choice(work: _Work, system: ET.Element) -> None:
    """No firmware that libvirt is to choose: it would refuse a placeholder where it finds none."""
    chosen = system.attrib.pop("firmware", "")
    for wish in system.findall("firmware"):
        system.remove(wish)
    loader = system.find("loader")
    if chosen == "efi" and (loader is None or not loader.text):
        for element in [*system.findall("loader"), *system.findall("nvram")]:
            system.remove(element)
        work.notes.append("UEFI that libvirt chose at its start: the placeholder names none")


def _choose_again(work: _Work, system: ET.Element) -> None:
    """libvirt chooses from what this host has; its choice of the old host may be written beside
    its wish, which only newer ones understand."""
    for loader in system.findall("loader"):
        secure = loader.get("secure")
        if loader.text:
            work.notes.append(f"its firmware is chosen anew by libvirt: it was {loader.text}")
        system.remove(loader)
        if secure is not None:
            ET.SubElement(system, "loader", secure=secure)


def _hosts_own(work: _Work) -> None:
    root = work.root
    for tag, what in _HOSTS_OWN.items():
        for element in root.findall(tag):
            root.remove(element)
            work.notes.append(f"left out: {what}")
    for tag in _SILENT:
        for element in root.findall(tag):
            root.remove(element)
    if not work.new.placeholder and root.find("features/acpi") is not None:
        ET.SubElement(root, "genid")  # tells the guest that it was restored
    for tag, what in _NEVER.items():
        for element in work.devices.findall(tag):
            work.devices.remove(element)
            if what:
                work.notes.append(f"left out: {what}")
    for memory in work.devices.findall("memory"):
        if memory.find("source/path") is not None:
            work.devices.remove(memory)
            work.notes.append("left out: memory that is a file of its host")


# -- disks --------------------------------------------------------------------------------------


def _disks(work: _Work) -> None:
    for disk in list(domain_xml.disk_elements(work.root)):
        name = domain_xml.disk_name(disk)
        new = work.new.disks.get(name)
        if new is None:
            work.devices.remove(disk)
            continue
        if disk.get("device") == "lun":
            work.notes.append(f"{name}: SCSI commands are not passed through to a LUN any more")
        driver = disk.find("driver")
        options = dict(driver.attrib) if driver is not None else {}
        seen = {key: value for key, value in options.items() if key in _DRIVER_KEPT}
        for element in list(disk):
            if element.tag not in _DISK_KEPT:
                disk.remove(element)
        disk.attrib.clear()
        disk.attrib.update({"type": new.kind, "device": "disk"})
        ET.SubElement(disk, "driver", {"name": "qemu", "type": new.form, **seen})
        source = ET.SubElement(disk, "source", dict(new.source))
        source.extend(new.inner)


def _drives(work: _Work) -> None:
    """Drives of CDs and floppies are there, and empty."""
    for drive in work.devices.findall("disk"):
        if drive.get("device", "disk") in ("disk", "lun"):
            continue
        for element in list(drive):
            if element.tag not in ("target", "address", "readonly", "alias", "boot"):
                drive.remove(element)
                if element.tag == "source":
                    name = domain_xml.disk_name(drive)
                    work.notes.append(f"{name}: the drive is empty")
        drive.set("type", "file")


# -- network and ports ----------------------------------------------------------------------------


def _cards(work: _Work) -> None:
    for card in work.devices.findall("interface"):
        source, mac = card.find("source"), card.find("mac")
        where = source.get("network", "") if source is not None else ""
        old = mac.get("address", "") if mac is not None else ""
        if card.get("type") == "network" and where not in work.host.networks:
            work.devices.remove(card)
            work.notes.append(f"left out: card {old}, as this host has no network '{where}'")
            continue
        if card.get("type") in ("hostdev", "vhostuser", "vdpa"):
            work.devices.remove(card)
            work.notes.append(f"left out: card {old}, a device of its host")
            continue
        if mac is None:
            mac = ET.SubElement(card, "mac")
        mac.attrib.clear()
        mac.set("address", work.new.mac(old))
        for tag in ("bandwidth", "port", "backend"):
            for element in card.findall(tag):
                card.remove(element)
        for target in card.findall("target"):
            card.remove(target)  # the name of the host's side
        if work.new.placeholder:
            for element in [*card.findall("link"), *card.findall("filterref")]:
                card.remove(element)
            ET.SubElement(card, "link", state="down")


def _channels(work: _Work) -> None:
    """That of the guest agent stays; libvirt chooses where its socket is."""
    for channel in work.devices.findall("channel"):
        target = channel.find("target")
        name = target.get("name", "") if target is not None else ""
        if channel.get("type") == "unix" and (not work.new.placeholder or name == domain_xml.AGENT):
            _without_source(channel)
            continue
        work.devices.remove(channel)
        if channel.get("type") != "spicevmc":
            work.notes.append(f"left out: channel {name}".rstrip())


def _ports(work: _Work) -> None:
    """Serial ports and consoles lead to terminals that libvirt makes, wherever they led."""
    devices = work.devices
    for console in devices.findall("console"):
        target = console.find("target")
        if target is None or target.get("type", "serial") == "serial":
            devices.remove(console)  # the first serial port once more: libvirt adds it itself
    for port in devices.findall("parallel"):
        devices.remove(port)
        work.notes.append("left out: parallel port")
    for port in [*devices.findall("serial"), *devices.findall("console")]:
        if port.get("type") != "pty":
            what = "serial port" if port.tag == "serial" else "console"
            work.notes.append(f"its {what} is a terminal, no {port.get('type')} any more")
        port.set("type", "pty")
        port.attrib.pop("tty", None)
        _without_source(port)


def _without_source(port: ET.Element) -> None:
    for tag in ("source", "protocol", "log"):
        for element in port.findall(tag):
            port.remove(element)


# -- what people see and hear ----------------------------------------------------------------------


def _screen(work: _Work) -> None:
    devices = work.devices
    if work.new.placeholder:
        for tag in _NO_SCREEN:
            for element in devices.findall(tag):
                devices.remove(element)
                if tag == "tpm":
                    work.notes.append("left out: TPM")
        return
    for screen in devices.findall("graphics"):
        kind = screen.get("type", "")
        if not work.host.has("graphics", kind):
            devices.remove(screen)
            work.notes.append(f"left out: screen by {kind}, which this host has not")
            continue
        screen.clear()  # ports and addresses are the old host's
        screen.attrib.update({"type": kind, "autoport": "yes"})
        ET.SubElement(screen, "listen", type="address", address="127.0.0.1")
    spice = any(screen.get("type") == "spice" for screen in devices.iterfind("graphics"))
    for audio in devices.findall("audio"):
        if audio.get("type") != "none" and not (audio.get("type") == "spice" and spice):
            devices.remove(audio)
    for model in devices.iterfind("video/model"):
        if not work.host.has("video", model.get("type", "")):
            work.notes.append(f"this host has no {model.get('type')} graphics: it is vga")
            model.attrib.clear()
            model.set("type", "vga")
    _tpm_and_vsock(work)


def _tpm_and_vsock(work: _Work) -> None:
    devices = work.devices
    for tpm in devices.findall("tpm"):
        backend = tpm.find("backend")
        if backend is None or not _has_tpm(work.host, tpm, backend):
            devices.remove(tpm)
            work.notes.append("left out: TPM, which this host has not")
            continue
        for inner in list(backend):
            backend.remove(inner)  # how its old host encrypted it
        work.notes.append("its TPM is new and empty: what was sealed to it needs its other key")
    for vsock in devices.findall("vsock"):
        for cid in vsock.findall("cid"):
            cid.attrib.clear()
            cid.set("auto", "yes")


def _has_tpm(host: Abilities, tpm: ET.Element, backend: ET.Element) -> bool:
    """Whether one that is emulated, and empty, can take its place."""
    return (
        backend.get("type") == "emulator"
        and host.has("tpm", tpm.get("model", ""))
        and host.has("tpm.backendModel", "emulator")
        and host.has("tpm.backendVersion", backend.get("version", "2.0"))
    )


def _sources(work: _Work) -> None:
    """Randomness and input come from this host's own."""
    for rng in work.devices.findall("rng"):
        backend = rng.find("backend")
        if backend is None or backend.get("model") != "random":
            work.devices.remove(rng)
            work.notes.append("left out: a source of randomness outside of the host")
    for each in work.devices.findall("input"):
        if each.get("type") in ("passthrough", "evdev"):
            work.devices.remove(each)
            work.notes.append("left out: an input device of its host")
