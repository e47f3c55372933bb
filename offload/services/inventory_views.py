"""Parts of an inventory, and orders of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.inventory import Inventory, InventoryVm


def fits(
    vm: InventoryVm,
    *,
    tag: str | None = None,
    folder: str | None = None,
    datastore: str | None = None,
    host: str | None = None,
) -> bool:
    """Whether a VM has all that is named. A folder: with all below."""
    inside = folder is None or f"{vm.folder}/".startswith(f"{folder.rstrip('/')}/")
    stores = {disk.datastore for disk in vm.disks}
    return (
        inside
        and (tag is None or tag in vm.tags)
        and (datastore is None or datastore in stores)
        and (host is None or host == vm.host)
    )


def tree_of(found: Inventory, by: str) -> dict[str, Any]:
    """Names of folders, hosts, datastores or tags (`by`) → what is below them; a VM has its power
    state there."""
    made: dict[str, Any] = {}
    for vm in found.vms:
        for path in _places(vm, by):
            below = made
            for part in path:
                below = below.setdefault(part, {})
            below[_free(vm, below)] = vm.power
    return made


def _places(vm: InventoryVm, by: str) -> list[list[str]]:
    match by:
        case "folder":
            return [[f"{part}/" for part in vm.folder.split("/") if part]]
        case "host":
            return [[vm.host or "(no host)"]]
        case "datastore":
            stores = dict.fromkeys(d.datastore or "(no datastore)" for d in vm.disks)
            return [[store] for store in stores] or [["(no disks)"]]
        case _:
            return [[tag] for tag in vm.tags] or [["(no tag)"]]


def _free(vm: InventoryVm, taken: Mapping[str, Any]) -> str:
    """Names are not unique on all hypervisors."""
    return vm.name if vm.name not in taken else f"{vm.name} ({vm.id})"
