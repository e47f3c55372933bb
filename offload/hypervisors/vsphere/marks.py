"""Which VMs are placeholders of ours: by a mark in their settings, without any catalog."""

from __future__ import annotations

from collections.abc import Sequence

from offload.hypervisors.vsphere.properties import read_each
from offload.vsphere import Vsphere, mark_in


def islands_of(vsphere: Vsphere, ids: Sequence[str]) -> dict[str, str]:
    """The island that each of these VMs belongs to; those without a mark are left out.

    The mark's value is INSTANCE/ISLAND. Raises PrivilegeError, UnavailableError.
    """
    if not ids:
        return {}
    with vsphere.translated("the marks of placeholders"):
        found = read_each(vsphere, [vsphere.vm(moref) for moref in ids], "config.extraConfig")
    marks = {
        moref: mark_in(fields.get("config.extraConfig") or ()) for moref, fields in found.items()
    }
    return {moref: mark.rpartition("/")[2] for moref, mark in marks.items() if mark}
