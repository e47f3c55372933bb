"""What is different between an entry of an inventory and what it was before, in words."""

from __future__ import annotations

from collections.abc import Iterator

from offload.inventory import Datastore, Entry, InventoryVm
from offload.machine import MachineDisk
from offload.quantity import show_size

_PLAIN = {  # of all kinds of entries; what is left out does not show, as a datastore's free space
    "name": "name",
    "power": "power",
    "host": "host",
    "folder": "folder",
    "state": "state",
    "kind": "kind",
    "tools": "tools",
    "firmware": "firmware",
    "placeholder": "placeholder of island",
}


def differences(before: Entry | None, after: Entry) -> list[str]:
    """`host: esx1 → esx2`, `disk scsi0:1 was added (10.0 GiB, ds2)` …"""
    if before is None:
        return ["is new"]
    found = [
        f"{label}: {getattr(before, name) or '-'} → {getattr(after, name) or '-'}"
        for name, label in _PLAIN.items()
        if getattr(before, name, None) != getattr(after, name, None)
    ]
    if isinstance(before, InventoryVm) and isinstance(after, InventoryVm):
        found += _sets("tag", before.tags, after.tags)
        if before.template != after.template:
            found.append("is a template now" if after.template else "is no template any more")
        found += _disks(before, after)
    if isinstance(before, Datastore) and isinstance(after, Datastore):
        found += _sets("LUN", before.luns, after.luns)
        if before.accessible != after.accessible:
            found.append("is accessible" if after.accessible else "is not accessible any more")
        if before.capacity_bytes != after.capacity_bytes:
            sizes = (show_size(before.capacity_bytes), show_size(after.capacity_bytes))
            found.append(f"size: {sizes[0]} → {sizes[1]}")
    return found


def _sets(what: str, before: tuple[str, ...], after: tuple[str, ...]) -> Iterator[str]:
    yield from (f"{what} {each} was added" for each in after if each not in before)
    yield from (f"{what} {each} was removed" for each in before if each not in after)


def _disks(before: InventoryVm, after: InventoryVm) -> Iterator[str]:
    old = {disk.name: disk for disk in before.disks}
    new = {disk.name: disk for disk in after.disks}
    for name, disk in new.items():
        if name not in old:
            where = disk.datastore or disk.path
            yield f"disk {name} was added ({show_size(disk.size_bytes)}, {where})"
        else:
            yield from _disk(old[name], disk)
    yield from (f"disk {name} was removed" for name in old if name not in new)


def _disk(before: MachineDisk, after: MachineDisk) -> Iterator[str]:
    if before.size_bytes != after.size_bytes:
        sizes = f"{show_size(before.size_bytes)} → {show_size(after.size_bytes)}"
        yield f"disk {after.name} was resized: {sizes}"
    if before.datastore != after.datastore:
        yield f"disk {after.name} was moved: {before.datastore} → {after.datastore}"
    elif before.luns != after.luns:
        yield f"disk {after.name} is on {', '.join(after.luns) or 'no LUN'} now"
    elif before.path != after.path:
        yield f"disk {after.name} is {after.path} now"
