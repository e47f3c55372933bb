"""What a libvirt host can run: kinds of virtualisation, machine types, models of devices.

Formats: https://libvirt.org/formatcaps.html, https://libvirt.org/formatdomaincaps.html.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

from offload.errors import ConfigError
from offload.libvirtd import Libvirt

_KINDS = ("type", "modelType", "model")
_ENUMS = (
    ("graphics", "type"), ("video", "modelType"), ("tpm", "model"), ("tpm", "backendModel"),
    ("tpm", "backendVersion"),
)  # fmt: skip
_UNKNOWN = frozenset({8, 67})  # INVALID_ARG, CONFIG_UNSUPPORTED: of a machine type, an emulator


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """For one architecture and machine type. `models`: by device (of a TPM also
    `tpm.backendModel`, `tpm.backendVersion`; `firmware` that libvirt can choose), what there is."""

    kind: str  # kvm | qemu
    machine: str
    models: dict[str, frozenset[str]]
    networks: frozenset[str]
    user: int  # as whom QEMU runs

    def has(self, device: str, model: str) -> bool:
        """Whether there is this model of a device; those that libvirt lists nowhere are."""
        return device not in self.models or model in self.models[device]


def abilities(link: Libvirt, root: ET.Element) -> Abilities:
    """What the host can do for a domain, as near to its definition as can be had.

    Raises ConfigError (`wrong-architecture`), UnavailableError.
    """
    system = root.find("os/type")
    arch = (system.get("arch") if system is not None else None) or "x86_64"
    machine = (system.get("machine") if system is not None else None) or "pc"
    with link.translated("does not say what it can do"):
        caps = ET.fromstring(link.connection.getCapabilities())  # noqa: S314 - libvirt's own
        kinds = {
            domain.get("type", "")
            for guest in caps.iterfind("guest/arch")
            if guest.get("name") == arch
            for domain in guest.iterfind("domain")
        }
        if not kinds:
            raise ConfigError(
                f"the host of {link.uri} runs no machine of the architecture {arch}",
                code="wrong-architecture",
                hint=f"on that host: apt-get install a qemu-system package for {arch}",
            )
    every = link.connection.listAllNetworks
    found: list[Any] = link.optional("cannot list its networks", lambda: every(0), [])
    networks = frozenset(network.name() for network in found)
    wanted = root.get("type", "kvm")
    kind = wanted if wanted in kinds else "qemu"
    for candidate in (machine, _family(machine), "virt"):
        models = _models(link, arch, candidate, kind)
        if models is not None:
            return Abilities(
                kind=kind, machine=candidate, models=models, networks=networks, user=_user(caps)
            )
    raise ConfigError(
        f"the host of {link.uri} has no machine like '{machine}'", code="wrong-architecture"
    )


def _user(caps: ET.Element) -> int:
    """By libvirt's own rule for files (`+UID:+GID`); root where it has none."""
    for model in caps.iterfind("host/secmodel"):
        if model.findtext("model") == "dac":
            label = model.findtext("baselabel") or ""
            return int(label.partition(":")[0].removeprefix("+") or 0)
    return 0


def _family(machine: str) -> str:
    """`pc-q35-rhel9.4.0` is a q35."""
    return "q35" if "q35" in machine else "pc"


def _models(link: Libvirt, arch: str, machine: str, kind: str) -> dict[str, frozenset[str]] | None:
    """None where the host has no such machine type."""
    with link.translated("does not say what it can do"):
        try:
            text = link.connection.getDomainCapabilities(None, arch, machine, kind)
        except link.api.libvirtError as error:
            if error.get_error_code() in _UNKNOWN:
                return None
            raise
    root = ET.fromstring(text)  # noqa: S314 - libvirt's own
    firmware = root.iterfind("os/enum[@name='firmware']/value")
    found = {"firmware": frozenset(value.text or "" for value in firmware)}
    for device, name in _ENUMS:
        place = root.find(f"devices/{device}")
        if place is not None:
            values = place.iterfind(f"enum[@name='{name}']/value")
            there = place.get("supported") == "yes"
            named = frozenset(v.text or "" for v in values) if there else frozenset()
            found[device if name in _KINDS else f"{device}.{name}"] = named
    return found
