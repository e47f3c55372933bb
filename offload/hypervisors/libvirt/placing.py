"""One placeholder: its disks, its firmware's variables, its definition."""

from __future__ import annotations

import json
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.errors import IntegrityError, PolicyError, UnavailableError
from offload.hypervisor import IslandRequest, IslandView, Step
from offload.hypervisors.libvirt import abilities, domain_xml, overlay_disk, translate
from offload.hypervisors.libvirt.domain_xml import Mark
from offload.hypervisors.libvirt.host_files import HostFiles
from offload.hypervisors.libvirt.new_domain import NewDisk, NewDomain
from offload.hypervisors.libvirt.preflight import left_out, why_not
from offload.instance import Instance
from offload.island import Placeholder, Shown
from offload.libvirtd import Libvirt
from offload.machine import Machine, MachineDisk, unpack_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where placeholders of one island are made. `prefix`: of the names of their files."""

    folder: Path
    prefix: str
    instance: Instance


class Placing:
    """The making of the placeholder of one VM, the `number`th of its island."""

    def __init__(
        self, link: Libvirt, request: IslandRequest, machine: Machine, site: Site, number: int
    ) -> None:
        self._link = link
        self._request = request
        self._machine = machine
        self._site = site
        self._number = number
        self._views = {view.volume: view for view in request.views}
        self._notes = left_out(machine, request)

    def build(self, name: str, step: Step) -> Placeholder:
        """Overlays, variables, domain. Raises what libvirt and QEMU refuse."""
        machine = self._machine
        root = domain_xml.parse(machine.definition)
        host = abilities.abilities(self._link, root)
        overlays = self._make_overlays(self._disks(root), step)
        nvram = self._copy_nvram(step)
        number = str(uuid.uuid4())
        text, notes = translate.translate(
            root,
            NewDomain(
                name=name,
                uuid=number,
                mark=self._mark(),
                disks={
                    disk: NewDisk(kind="file", form="qcow2", source={"file": path})
                    for disk, path in overlays.items()
                },
                mac=lambda _old: translate.fresh_mac(),
                nvram=nvram,
                title=f"offload: placeholder of {machine.name}",
                description=self._description(),
            ),
            host,
        )
        with self._link.translated(f"does not take the placeholder {name}"):
            self._link.connection.defineXML(text)
        step(f"define-{self._number}")
        return self._placeholder(name, number, overlays, notes)

    def _disks(self, root: ET.Element) -> list[tuple[MachineDisk, IslandView]]:
        """Those that are shown, and by which view."""
        defined = {domain_xml.disk_name(disk) for disk in domain_xml.disk_elements(root)}
        found = []
        for disk in self._machine.disks:
            if why_not(disk, set(self._views)):
                continue  # noted already
            if disk.name not in defined:
                self._notes.append(
                    f"disk {disk.name} is left out: it is plugged in until the VM's next stop only"
                )
                continue
            if disk.shared:
                self._notes.append(
                    f"disk {disk.name} is shared with other VMs: what is written here is not"
                )
            found.append((disk, self._views[disk.volume]))
        there = {disk.name for disk in self._machine.disks}
        self._notes += [
            f"disk {name} is left out: the VM gets it at its next start"
            for name in sorted(defined - there)
        ]
        return found

    def _make_overlays(
        self, disks: Sequence[tuple[MachineDisk, IslandView]], step: Step
    ) -> dict[str, str]:
        """The path of each disk's overlay, by the disk's name."""
        found = {}
        for disk, shown in disks:
            form, size = self._inside(disk, shown)
            path = self._file(f"{disk.name}.qcow2")
            HostFiles(self._link).write(path, overlay_disk.content(shown.view.uri, form, size))
            step(f"overlay-{self._number}-{disk.name}")
            problem = overlay_disk.check(path)
            if problem:
                raise UnavailableError(
                    f"disk {disk.name} of VM {self._machine.name} cannot be read: {problem}",
                    code="overlay-unreadable",
                )
            found[disk.name] = path
        return found

    def _inside(self, disk: MachineDisk, shown: IslandView) -> tuple[str, int]:
        """The format of what the view shows, and the size of the guest's disk in it.

        It is never told by the content, which is the guest's to write: the provider qcow2 shows
        guests' disks, all others show the file as it lies.
        """
        view = shown.view
        if disk.format == "raw":
            return "raw", view.size_bytes
        volume = self._site.instance.config.volumes.get(shown.volume)
        if volume is None:
            raise PolicyError(
                f"volume {shown.volume} is in the configuration no more: whether it shows the "
                f"qcow2 file of disk {disk.name} or what is in it cannot be known",
                code="volume-unknown",
            )
        if volume.provider == "qcow2":
            return "raw", view.size_bytes
        size, parents = overlay_disk.look_inside(view.uri)
        if parents:
            raise PolicyError(
                f"disk {disk.name} of VM {self._machine.name} needs another file, {parents}, "
                "which this view does not show",
                code="image-has-parents",
                hint=f"set volumes.{shown.volume}.provider to qcow2, or merge: virsh blockcommit",
            )
        return "qcow2", size

    def _copy_nvram(self, step: Step) -> str:
        packed = self._machine.files.get("nvram")
        if packed is None:
            return ""
        path = self._file("nvram")
        HostFiles(self._link).write(path, unpacked(self._machine, packed))
        step(f"nvram-{self._number}")
        return path

    def _file(self, tail: str) -> str:
        return str(self._site.folder / f"{self._site.prefix}{self._number}.{tail}")

    def _mark(self) -> Mark:
        request, machine = self._request, self._machine
        return Mark(
            kind=domain_xml.PLACEHOLDER,
            fields={
                "instance": self._site.instance.id,
                "island": request.id,
                "name": request.name,
                "vm": machine.name,
                "production": machine.id,
                "hypervisor": machine.hypervisor,
                "origin": request.origin,
                "at": request.at.isoformat(),
            },
        )

    def _consistency(self) -> str:
        return self._request.consistency.get(self._machine.name, "crash")

    def _description(self) -> str:
        request, machine = self._request, self._machine
        what = (
            f"A placeholder, made by offload: it shows the disks of VM {machine.name} "
            f"({machine.id}) of {machine.hypervisor} as of {request.at.isoformat()}, "
            f"{self._consistency()}-consistent."
        )
        warning = (
            "It is there to be backed up. Do not start it: it would write while a backup reads it, "
            "and what it writes goes with it."
        )
        lines = [what, warning, f"Island {request.name}, origin {request.origin}."]
        return "\n".join([*lines, *self._notes])

    def _placeholder(
        self, name: str, number: str, overlays: dict[str, str], notes: list[str]
    ) -> Placeholder:
        machine = self._machine
        return Placeholder(
            id=number,
            name=name,
            vm=machine.name,
            hypervisor=machine.hypervisor,
            production=machine.id,
            at=self._request.at,
            shown=Shown.GROUP,
            consistency=self._consistency(),
            disks=machine.disks,
            notes=(*self._notes, *notes),
            record={"overlays": json.dumps(sorted(overlays.values()))},
        )


def unpacked(machine: Machine, packed: str) -> bytes:
    """A file of a VM. Raises IntegrityError (`bad-file`)."""
    try:
        return unpack_file(packed)
    except ValueError as error:
        raise IntegrityError(
            f"the firmware variables of VM {machine.name} are damaged: {error}", code="bad-file"
        ) from error
