"""What is refused before production is frozen for it, and what a placeholder will lack."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from offload.errors import BusyError, ConfigError, PolicyError, UsageError
from offload.hypervisor import IslandRequest
from offload.hypervisors.libvirt import abilities, domain_xml
from offload.hypervisors.libvirt.abilities import Abilities
from offload.island import Shown
from offload.libvirtd import Libvirt
from offload.machine import Machine, MachineDisk

_FORMATS = ("raw", "qcow2")


def is_remote(uri: str) -> bool:
    """Whether a daemon is of another machine, by its URI."""
    return bool(urlsplit(uri).hostname)


def check_loopback(host: str, address: str) -> None:
    """Raises ConfigError (`not-loopback`)."""
    if not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"backup host {host}: NBD on {address} needs TLS, and an overlay cannot name its keys",
            code="not-loopback",
            hint=f"leave backup_hosts.{host}.address out: placeholders are on this machine",
        )


def names(request: IslandRequest, prefix: str) -> list[str]:
    """Of the placeholders, in the order of the machines.

    Raises UsageError (`no-vm-instant`, `wrong-hypervisor`, `bad-name`), BusyError (`name-taken`).
    """
    if request.shown is Shown.VM:
        raise UsageError(
            "libvirt VMs have no quiesced images of their own: there is the group's instant alone",
            code="no-vm-instant",
            hint="--shows group",
        )
    found: list[str] = []
    for machine in request.machines:
        name = prefix + machine.name
        if machine.kind != "libvirt":
            raise UsageError(
                f"VM {machine.name} is of {machine.kind}: a libvirt host cannot show it",
                code="wrong-hypervisor",
                hint="choose a backup host of its own kind, or mount its volumes without "
                "--placeholder",
            )
        check_name(name)
        if name in found:
            raise BusyError(
                f"two VMs of the group are called {machine.name}",
                code="name-taken",
                hint="choose one of them by its UUID: --vm",
            )
        found.append(name)
    return found


def check_name(name: str) -> None:
    """Raises UsageError (`bad-name`)."""
    if not name or "/" in name or not name.isprintable():
        raise UsageError(f"'{name}' can be no domain's name", code="bad-name")


def left_out(machine: Machine, request: IslandRequest) -> list[str]:
    """What of a VM cannot be shown, for people. Raises PolicyError (`no-disk-to-show`) where that
    is all of it; before there are views, volumes count."""
    known = {view.volume for view in request.views}
    why = [f"VM {machine.name}: {said}" for d in machine.disks if (said := why_not(d, known))]
    if len(why) == len(machine.disks):
        raise PolicyError(
            f"VM {machine.name} has no disk that a placeholder could show"
            + (f": {'; '.join(why)}" if why else ""),
            code="no-disk-to-show",
            hint="back it up by an agent in the guest, or move its disks to a volume of the "
            "configuration",
        )
    return why


def why_not(disk: MachineDisk, known: set[str]) -> str:
    """Why a disk is left out, "" if it is not; `known`: the volumes that have views, empty while
    there are none."""
    if disk.problem:
        return f"disk {disk.name} is left out: {disk.problem}"
    if disk.format not in _FORMATS:
        return f"disk {disk.name} is left out: its format is {disk.format}"
    if not disk.volume:
        return f"disk {disk.name} is left out: {disk.path} is on no volume of the configuration"
    if known and disk.volume not in known:
        return f"disk {disk.name} is left out: volume {disk.volume} is not part of this"
    return ""


def abilities_for(link: Libvirt, machine: Machine) -> Abilities:
    """What the host can do for a VM. Raises ConfigError (`wrong-architecture`)."""
    return abilities.abilities(link, domain_xml.parse(machine.definition))
