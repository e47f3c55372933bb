"""What is to become of a domain's definition, while it is worked on."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.abilities import Abilities
from offload.hypervisors.libvirt.domain_xml import Mark


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
class Work:
    """A definition that is being changed: for whom, for which host. `notes`: what a person must
    know of it."""

    root: ET.Element
    new: NewDomain
    host: Abilities
    notes: list[str] = field(default_factory=list)

    @property
    def devices(self) -> ET.Element:
        """The element that has them."""
        found = self.root.find("devices")
        return found if found is not None else ET.SubElement(self.root, "devices")

    def leave_out(self, parent: ET.Element, tag: str, what: str = "") -> None:
        """All elements of this name; `what` they are, for people."""
        for element in parent.findall(tag):
            parent.remove(element)
            if what:
                self.notes.append(f"left out: {what}")
