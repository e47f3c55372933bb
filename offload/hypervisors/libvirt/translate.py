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

from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.abilities import Abilities
from offload.hypervisors.libvirt.devices import translate_devices
from offload.hypervisors.libvirt.new_domain import NewDomain, Work

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
_SILENT = ("seclabel", "resource", f"{_QEMU}capabilities", "genid", "idmap")


def translate(root: ET.Element, new: NewDomain, host: Abilities) -> tuple[str, list[str]]:
    """The new definition, and what a person must know of it. `root` is changed."""
    work = Work(root, new, host)
    _identity(work)
    _machine(work)
    _firmware(work)
    _hosts_own(work)
    translate_devices(work)
    return ET.tostring(root, encoding="unicode"), work.notes


def fresh_mac() -> str:
    """Of the range that QEMU and KVM use."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


# -- what it is ---------------------------------------------------------------------------------


def _identity(work: Work) -> None:
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


def _machine(work: Work) -> None:
    root, host = work.root, work.host
    if root.get("type", "kvm") != host.kind:
        work.notes.append(f"this host has no {root.get('type', 'kvm')}: it is emulated")
        _emulated(work)
    root.set("type", host.kind)
    system = root.find("os/type")
    if system is not None and system.get("machine") not in (None, host.machine):
        work.notes.append(
            f"this host has no machine {system.get('machine')}: it is a {host.machine}"
        )
        system.set("machine", host.machine)


def _emulated(work: Work) -> None:
    """Without what only KVM has."""
    root = work.root
    cpu = root.find("cpu")
    if cpu is not None:
        for element in list(cpu):
            if element.tag not in ("topology", "numa"):
                cpu.remove(element)
        cpu.attrib.clear()
        cpu.set("mode", "maximum")
    features = root.find("features")
    if features is not None:
        for tag in ("hyperv", "kvm"):
            work.leave_out(features, tag, f"features of {tag} for its guest")
    clock = root.find("clock")
    for timer in root.findall("clock/timer"):
        if clock is not None and timer.get("name") in ("kvmclock", "hypervclock"):
            clock.remove(timer)


def _firmware(work: Work) -> None:
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
    chosen = system.get("firmware")
    if chosen is None:
        return
    if work.host.has("firmware", chosen):
        _choose_again(work, system)
    elif work.new.placeholder:
        _without_choice(work, system, chosen)
    else:
        _choose_again(work, system)
        work.notes.append(f"this host has no firmware '{chosen}' (ovmf), and cannot start it")


def _choose_again(work: Work, system: ET.Element) -> None:
    """libvirt chooses from what this host has; its choice of the old host may be written beside
    its wish, which only newer ones understand."""
    for loader in system.findall("loader"):
        secure = loader.get("secure")
        if loader.text:
            work.notes.append(f"its firmware is chosen anew by libvirt: it was {loader.text}")
        system.remove(loader)
        if secure is not None:
            ET.SubElement(system, "loader", secure=secure)


def _without_choice(work: Work, system: ET.Element, chosen: str) -> None:
    """Nothing that libvirt is to choose: newer ones refuse a domain for which they find none."""
    del system.attrib["firmware"]
    work.leave_out(system, "firmware")
    loader = system.find("loader")
    if loader is None or not loader.text:
        work.leave_out(system, "loader")
        work.leave_out(system, "nvram")
        work.notes.append(f"this host has no firmware '{chosen}': the placeholder names none")


def _hosts_own(work: Work) -> None:
    root = work.root
    for tag, what in _HOSTS_OWN.items():
        work.leave_out(root, tag, what)
    for tag in _SILENT:
        work.leave_out(root, tag)
    for vcpu in root.findall("vcpu"):
        vcpu.attrib.pop("placement", None)
        if vcpu.attrib.pop("cpuset", None) is not None:
            work.notes.append("left out: pinning to CPUs of its host")
    if not work.new.placeholder and root.find("features/acpi") is not None:
        ET.SubElement(root, "genid")  # tells the guest that it was restored
