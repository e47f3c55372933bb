"""What production has changed since the point in time that a placeholder shows."""

from __future__ import annotations

from collections.abc import Iterator

from offload.inventory import InventoryVm
from offload.island import Placeholder
from offload.machine import MachineDisk
from offload.quantity import show_size


def drift(placeholder: Placeholder, now: InventoryVm | None) -> Iterator[str]:
    """A line for each difference; `now` None: the VM is not there any more."""
    if now is None:
        yield f"VM {placeholder.vm} is gone from {placeholder.hypervisor}"
        return
    if now.name != placeholder.vm:
        yield f"VM {placeholder.vm} is called {now.name} now"
    then_by_name = {disk.name: disk for disk in placeholder.disks}
    now_by_name = {disk.name: disk for disk in now.disks}
    for name, disk in now_by_name.items():
        if name not in then_by_name:
            yield f"disk {disk.called} of {show_size(disk.size_bytes)} was added"
    for name, disk in then_by_name.items():
        if name not in now_by_name:
            yield f"disk {disk.called} was removed"
        else:
            yield from _changed(disk, now_by_name[name])


def _changed(then: MachineDisk, now: MachineDisk) -> Iterator[str]:
    if then.size_bytes != now.size_bytes:
        yield (
            f"disk {then.called} was {show_size(then.size_bytes)}, "
            f"it is {show_size(now.size_bytes)} now"
        )
    if sorted(then.luns) != sorted(now.luns):
        yield (
            f"disk {then.called} was on {', '.join(then.luns) or 'no LUN'}, "
            f"it is on {', '.join(now.luns) or 'no LUN'} now"
        )
    elif not {then.path, *then.chain} & {now.path, *now.chain}:  # snapshots come and go
        yield f"disk {then.called} was {then.path}, it is {now.path} now"
