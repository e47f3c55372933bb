"""What a domain's definition says: disks, cards, firmware, and what is ours in its metadata.

Format: https://libvirt.org/formatdomain.html. Two metadata elements are ours, each by its namespace:

| namespace | element | by |
| --- | --- | --- |
| `https://offload.internal/libvirt/tags` | `<tags><tag>backup:gold</tag>…</tags>` | people: groups choose by it |
| `https://offload.internal/libvirt/domain` | `<placeholder instance= island= vm= production= origin= at=/>` or `<restored instance= mark= …/>` | the driver: whose domain it is |

A tag is given with
`virsh metadata web https://offload.internal/libvirt/tags --key offload --set '<tags><tag>gold</tag></tags>' --config`.
"""  # noqa: E501 - a table

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from offload.errors import IntegrityError
from offload.machine import DiskKind

TAGS = "https://offload.internal/libvirt/tags"
DOMAIN = "https://offload.internal/libvirt/domain"
PLACEHOLDER = "placeholder"
RESTORED = "restored"
AGENT = "org.qemu.guest_agent.0"
_LIBOSINFO = "{http://libosinfo.org/xmlns/libvirt/domain/1.0}"

_KINDS = {"file": DiskKind.FILE, "block": DiskKind.BLOCK, "network": DiskKind.NETWORK}

ET.register_namespace("offload", DOMAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """That a domain is ours, and what it is."""

    kind: str  # placeholder | restored
    fields: Mapping[str, str]

    @property
    def instance(self) -> str:
        """Whose."""
        return self.fields.get("instance", "")

    @property
    def island(self) -> str:
        """The island that it belongs to; "" for one that was restored."""
        return self.fields.get("island", "")

    @property
    def restore(self) -> str:
        """The restore that made it; "" for a placeholder."""
        return self.fields.get("mark", "")

    def element(self) -> ET.Element:
        """As metadata."""
        return ET.Element(f"{{{DOMAIN}}}{self.kind}", dict(self.fields))


def parse(text: str) -> ET.Element:
    """A definition. Raises IntegrityError (`bad-definition`)."""
    try:
        found = ET.fromstring(text)  # noqa: S314 - of libvirt, or of a manifest that was verified
    except ET.ParseError as error:
        raise IntegrityError(
            f"the definition of a domain is no XML: {error}", code="bad-definition"
        ) from error
    if found.tag != "domain":
        raise IntegrityError(
            f"the definition of a domain is a <{found.tag}>", code="bad-definition"
        )
    return found


def text_of(root: ET.Element, path: str) -> str:
    """The text of an element, "" where there is none."""
    return (root.findtext(path) or "").strip()


def mark_of(root: ET.Element) -> Mark | None:
    """Whether the domain is ours."""
    for kind in (PLACEHOLDER, RESTORED):
        found = root.find(f"metadata/{{{DOMAIN}}}{kind}")
        if found is not None:
            return Mark(kind=kind, fields=dict(found.attrib))
    return None


def tags_of(root: ET.Element) -> tuple[str, ...]:
    """Those that people gave it, sorted. Inner elements may have a namespace or none."""
    whole = root.find(f"metadata/{{{TAGS}}}tags")
    inner = list(whole) if whole is not None else []
    found = {(e.text or "").strip() for e in inner if e.tag.rpartition("}")[2] == "tag"}
    return tuple(sorted(found - {""}))


def disk_elements(root: ET.Element) -> Iterator[ET.Element]:
    """Of disks; not of drives for CDs and floppies."""
    for disk in root.iterfind("devices/disk"):
        if disk.get("device", "disk") in ("disk", "lun"):
            yield disk


def disk_name(disk: ET.Element) -> str:
    """As in the guest's hardware: `vda`."""
    target = disk.find("target")
    return target.get("dev", "") if target is not None else ""


def disk_kind(disk: ET.Element) -> DiskKind:
    """Where it lies. A disk of a storage pool is a file, until the pool says otherwise."""
    if disk.get("type") == "volume":
        return DiskKind.FILE
    return _KINDS.get(disk.get("type", ""), DiskKind.OTHER)


def disk_path(disk: ET.Element) -> str:
    """A file, a block device, `PROTOCOL:NAME`, `POOL/VOLUME` of a storage pool; "" for none."""
    source = disk.find("source")
    if source is None:
        return ""
    match disk.get("type"):
        case "file":
            return source.get("file", "")
        case "block":
            return source.get("dev", "")
        case "network":
            return f"{source.get('protocol', '')}:{source.get('name', '')}"
        case "volume":
            return f"{source.get('pool', '')}/{source.get('volume', '')}"
        case _:
            return ""


def disk_chain(disk: ET.Element) -> tuple[str, ...]:
    """Its parents, the nearest first, where the definition tells them: of a running domain."""
    found = []
    below = disk.find("backingStore")
    while below is not None and below.find("source") is not None:
        found.append(disk_path(below))
        below = below.find("backingStore")
    return tuple(found)


def disk_format(disk: ET.Element) -> str:
    """As the hypervisor is told: it must not be guessed from the disk's content."""
    driver = disk.find("driver")
    return driver.get("type", "raw") if driver is not None else "raw"


def is_encrypted(disk: ET.Element) -> bool:
    """By QEMU: what lies on the storage is no guest's disk then."""
    return disk.find("encryption") is not None or disk.find("source/encryption") is not None


def firmware_of(root: ET.Element) -> str:
    """`bios` or `uefi`."""
    loader = root.find("os/loader")
    flash = loader is not None and loader.get("type") == "pflash"
    return "uefi" if flash or _os(root).get("firmware") == "efi" else "bios"


def nvram_of(root: ET.Element) -> str:
    """The path of its firmware's variables, "" where it has none."""
    nvram = root.find("os/nvram")
    if nvram is None:
        return ""
    source = nvram.find("source")
    return source.get("file", "") if source is not None else (nvram.text or "").strip()


def tools_of(root: ET.Element) -> str:
    """Whether the guest agent is connected: of a running domain's definition."""
    for target in root.iterfind("devices/channel/target"):
        if target.get("name") == AGENT:
            return "running" if target.get("state") == "connected" else "not-running"
    return "not-installed"


def networks_of(root: ET.Element) -> list[dict[str, str]]:
    """Its cards: name of the network, bridge or device, MAC, model."""
    found = []
    for card in root.iterfind("devices/interface"):
        source, mac, model = (card.find(name) for name in ("source", "mac", "model"))
        where = dict(source.attrib) if source is not None else {}
        kind = card.get("type", "")
        found.append(
            {
                "name": where.get(kind) or where.get("dev") or kind,
                "mac": mac.get("address", "") if mac is not None else "",
                "model": model.get("type", "") if model is not None else "",
            }
        )
    return found


def summary_of(root: ET.Element) -> dict[str, Any]:
    """See `offload.machine.Machine.summary`."""
    return {
        "cpus": int(text_of(root, "vcpu") or 1),
        "memory_bytes": _memory_bytes(root),
        "firmware": firmware_of(root),
        "secure_boot": _secure_boot(root),
        "guest": _guest(root),
        "networks": networks_of(root),
        "notes": text_of(root, "description") or text_of(root, "title"),
        "tags": list(tags_of(root)),
        "folder": "",
    }


def _os(root: ET.Element) -> ET.Element:
    found = root.find("os")
    return found if found is not None else ET.Element("os")


def _memory_bytes(root: ET.Element) -> int:
    """libvirt itself always answers in KiB."""
    return int(text_of(root, "memory") or 0) * 1024


def _secure_boot(root: ET.Element) -> bool:
    loader = root.find("os/loader")
    if loader is not None and loader.get("secure") == "yes":
        return True
    features = root.iterfind("os/firmware/feature")
    return any(f.get("name") == "secure-boot" and f.get("enabled") == "yes" for f in features)


def _guest(root: ET.Element) -> str:
    """As its installer noted it: `http://debian.org/debian/12`."""
    found = root.find(f"metadata/{_LIBOSINFO}libosinfo/{_LIBOSINFO}os")
    return found.get("id", "") if found is not None else ""
