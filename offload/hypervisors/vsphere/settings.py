"""The settings of one VM, as they go into a backup: its .vmx file, its NVRAM, a summary.

Both are read as files of its datastore, which is what another host would register it from.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping
from typing import Any

from pyVmomi import vim

from offload.errors import NotFoundError, OffloadError, UnavailableError
from offload.hypervisors.vsphere.files import read_file
from offload.hypervisors.vsphere.vmx import Vmx
from offload.inventory import InventoryVm
from offload.machine import Machine
from offload.vsphere import Vsphere

log = logging.getLogger(__name__)

PATHS = (
    "config.annotation", "config.bootOptions", "config.files.vmPathName", "config.guestFullName",
    "config.hardware",
)  # fmt: skip
_PLACE = re.compile(r"\[(?P<store>[^\]]+)\] (?P<path>.+)")
_ENCODING = re.compile(rb'^\s*\.encoding\s*=\s*"([^"]+)"', re.MULTILINE | re.IGNORECASE)
# of VNC: the one thing in a .vmx file that lets somebody in
_SECRET = re.compile(r"^\s*[\w.]*(password|vnc\.key)[\w.]*\s*=.*\n?", re.MULTILINE | re.IGNORECASE)


def machine_of(
    vsphere: Vsphere, hypervisor: str, vm: InventoryVm, datacenter: str, seen: Mapping[str, Any]
) -> Machine:
    """`seen`: the properties of PATHS. Raises NotFoundError (`unknown-file`), PrivilegeError,
    UnavailableError."""
    place = seen.get("config.files.vmPathName") or ""
    text = _text(_read(vsphere, datacenter, place))
    return Machine(
        name=vm.name,
        kind="vsphere",
        hypervisor=hypervisor,
        id=vm.id,
        uuid=vm.uuid,
        instance_uuid=vm.instance_uuid,
        definition=text,
        definition_path=place,
        files=_nvram(vsphere, datacenter, place, text),
        disks=vm.disks,
        summary=_summary(vm, seen),
    )


def _read(vsphere: Vsphere, datacenter: str, place: str) -> bytes:
    found = _PLACE.fullmatch(place)
    if found is None:
        raise UnavailableError(f"'{place}' is no path on a datastore", code="vsphere-failed")
    return read_file(vsphere, datacenter, found["store"], found["path"])


def _text(data: bytes) -> str:
    """A .vmx file names its encoding itself; without what would let somebody in."""
    named = _ENCODING.search(data)
    try:
        text = data.decode(named[1].decode("ascii") if named else "utf-8")
    except (LookupError, UnicodeDecodeError) as error:
        raise UnavailableError(
            f"a .vmx file is not in the encoding that it names: {error}", code="vsphere-failed"
        ) from error
    return _SECRET.sub("", text)


def _nvram(vsphere: Vsphere, datacenter: str, place: str, text: str) -> dict[str, str]:
    """Base64. A VM that never ran has none; without it a VM boots by its defaults."""
    name = Vmx(text).get("nvram")
    if not name or "/" in name:  # beside the .vmx file, always
        return {}
    try:
        data = _read(vsphere, datacenter, f"{place.rpartition('/')[0]}/{name}")
    except NotFoundError:
        return {}
    except OffloadError as error:
        log.warning("the NVRAM of %s is not kept: %s", place, error.message)
        return {}
    return {"nvram": base64.b64encode(data).decode()}


def _summary(vm: InventoryVm, seen: Mapping[str, Any]) -> dict[str, Any]:
    hardware = seen.get("config.hardware")
    boot = seen.get("config.bootOptions")
    cards = [
        device
        for device in (hardware.device if hardware is not None else ())
        if isinstance(device, vim.vm.device.VirtualEthernetCard)
    ]
    return {
        "cpus": hardware.numCPU if hardware is not None else 0,
        "memory_bytes": (hardware.memoryMB << 20) if hardware is not None else 0,
        "firmware": vm.firmware,
        "secure_boot": bool(getattr(boot, "efiSecureBootEnabled", False)),
        "guest": seen.get("config.guestFullName") or "",
        "networks": [_network(card) for card in cards],
        "notes": seen.get("config.annotation") or "",
        "tags": list(vm.tags),
        "folder": vm.folder,
    }


def _network(card: Any) -> dict[str, str]:
    port = getattr(card.backing, "port", None)  # of a distributed switch: it has no name here
    return {
        "name": getattr(card.backing, "deviceName", None)
        or getattr(port, "portgroupKey", "")
        or "",
        "mac": card.macAddress or "",
        "model": type(card).__name__.rpartition(".")[2].removeprefix("Virtual").lower(),
    }
