"""The devices of a definition: what the guest sees of them stays, what they lead to is new."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.abilities import Abilities
from offload.hypervisors.libvirt.new_domain import Work

_NEVER = {
    "hostdev": "a device of its host",
    "filesystem": "a folder of its host",
    "shmem": "memory shared with others on its host",
    "lease": "a lease of its host's lock manager",
    "smartcard": "a smart card of its host",
    "redirdev": "",
    "redirfilter": "",
    "emulator": "",
}
_NO_SCREEN = ("graphics", "video", "sound", "audio", "vsock")
# what the guest sees
_DISK_KEPT = (
    "target", "address", "boot", "serial", "wwn", "vendor", "product", "alias", "blockio",
    "geometry",
)  # fmt: skip
_DRIVER_KEPT = ("discard", "queues", "queue_size", "packed", "iommu", "ats")


def translate_devices(work: Work) -> None:
    """All of them."""
    _hosts_own(work)
    _disks(work)
    _drives(work)
    _cards(work)
    _channels(work)
    _ports(work)
    if work.new.placeholder:
        for tag in _NO_SCREEN:
            work.leave_out(work.devices, tag)
        work.leave_out(work.devices, "tpm", "TPM")
    else:
        _screen(work)
        _tpm_and_vsock(work)
    _sources(work)


def _hosts_own(work: Work) -> None:
    for tag, what in _NEVER.items():
        work.leave_out(work.devices, tag, what)
    for memory in work.devices.findall("memory"):
        if memory.find("source/path") is not None:
            work.devices.remove(memory)
            work.notes.append("left out: memory that is a file of its host")


# -- disks --------------------------------------------------------------------------------------


def _disks(work: Work) -> None:
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
        model = {"model": disk.get("model", "")} if disk.get("model") else {}
        disk.attrib.clear()
        disk.attrib.update({"type": new.kind, "device": "disk", **model})
        ET.SubElement(disk, "driver", {"name": "qemu", "type": new.form, **seen})
        source = ET.SubElement(disk, "source", dict(new.source))
        source.extend(new.inner)


def _drives(work: Work) -> None:
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


def _cards(work: Work) -> None:
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


def _channels(work: Work) -> None:
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


def _ports(work: Work) -> None:
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


def _screen(work: Work) -> None:
    devices = work.devices
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


def _tpm_and_vsock(work: Work) -> None:
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


def _sources(work: Work) -> None:
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
