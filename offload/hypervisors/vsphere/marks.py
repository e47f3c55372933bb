"""Which VMs are placeholders of ours: by a mark in their settings, without any catalog."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyVmomi import vim

from offload.hypervisors.vsphere.properties import read_each
from offload.hypervisors.vsphere.record import MARK
from offload.vsphere import Vsphere


def islands_of(vsphere: Vsphere, ids: Sequence[str]) -> dict[str, str]:
    """The island that each of these VMs belongs to; those without a mark are left out.

    The mark's value is INSTANCE/ISLAND. Raises PrivilegeError, UnavailableError.
    """
    if not ids:
        return {}
    with vsphere.translated("the marks of placeholders"):
        found = read_each(vsphere, [vsphere.vm(moref) for moref in ids], "config.extraConfig")
    marks = {
        moref: _mark(fields.get("config.extraConfig") or ()) for moref, fields in found.items()
    }
    return {moref: mark.rpartition("/")[2] for moref, mark in marks.items() if mark}


def _mark(options: Sequence[Any]) -> str:
    return next((str(option.value) for option in options if option.key == MARK), "")


def vm_ids(vsphere: Vsphere, wanted: str) -> list[tuple[str, str]]:
    """Ids and instance UUIDs of the VMs of this name, UUID or instance UUID, templates left out."""
    keys = ("config.uuid", "config.instanceUuid")
    plain = wanted.lower()
    with vsphere.translated(f"the VM {wanted}"):
        return [
            (str(vm._moId), fields.get("config.instanceUuid", ""))  # noqa: SLF001 - its name there
            for vm, fields in vsphere.collect(
                vim.VirtualMachine, ("name", "config.template", *keys)
            )
            if not fields.get("config.template", False)
            and (wanted == fields.get("name") or plain in (fields.get(k, "").lower() for k in keys))
        ]
