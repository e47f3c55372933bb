"""Disks of a lab guest: virtio-blk devices, plugged in and pulled out while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from offload.errors import OffloadError
from offload.testing.lab.channel import GuestError
from offload.testing.lab.monitor import Monitor

_PULL_S = 60.0

# prints the device of the disk with serial $1, when there is one
_FIND = """
until [[ -b ${device:=} ]]; do
    file=$(grep -lx -- "$1" /sys/block/vd*/serial 2>/dev/null) || { sleep 0.02; continue; }
    device=/dev/$(basename "$(dirname "$file")")
done
echo "$device"
"""
_WAIT_GONE = """
while [[ -e $1 ]]; do sleep 0.02; done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A raw image file, or a block device, of the host."""

    serial: str
    path: Path
    read_only: bool
    sector_size: int  # bytes, logical and physical


class Disks:
    """The disks of one guest, over its reboots. `shell(script, argument)` runs in the guest."""

    def __init__(self, shell: Callable[[str, str], str]) -> None:
        self._shell = shell
        self._by_device: dict[str, Disk] = {}
        self._count = 0

    def attach(self, monitor: Monitor, path: Path, *, read_only: bool, sector_size: int) -> str:
        """Plug one in; its device in the guest. Raises OffloadError."""
        self._count += 1
        disk = Disk(
            serial=f"lab{self._count}", path=path, read_only=read_only, sector_size=sector_size
        )
        device = self._plug(monitor, disk)
        self._by_device[device] = disk
        return device

    def detach(self, monitor: Monitor, device: str) -> None:
        """Pull one out, in use or not. GuestError where the guest does not let go of it."""
        _pull(monitor, self._by_device[device].serial)
        del self._by_device[device]
        self._shell(_WAIT_GONE, device)

    def attach_again(self, monitor: Monitor) -> None:
        """All disks, after a reboot, each as the device that it was.

        The kernel gives names in the order of plugging; where one is to stay free, something is
        plugged in for the while.
        """
        held: list[str] = []
        for device in sorted(self._by_device, key=lambda name: (len(name), name)):
            while (found := self._plug(monitor, self._by_device[device])) != device:
                _pull(monitor, self._by_device[device].serial)
                self._shell(_WAIT_GONE, found)
                held.append(f"gap{len(held)}")
                gap = {"driver": "null-co", "node-name": held[-1], "size": 512}
                if self._plug_node(monitor, gap, {}) != found:
                    raise GuestError(f"the disk {device} did not come back under its name")
        for serial in held:
            _pull(monitor, serial)

    def _plug(self, monitor: Monitor, disk: Disk) -> str:
        driver = "host_device" if disk.path.is_block_device() else "file"
        node = {
            "driver": "raw",
            "node-name": disk.serial,
            "read-only": disk.read_only,
            "discard": "unmap",
            "file": {"driver": driver, "filename": str(disk.path), "discard": "unmap"},
        }
        size = disk.sector_size
        sectors = {"logical_block_size": size, "physical_block_size": size}
        return self._plug_node(monitor, node, sectors)

    def _plug_node(
        self, monitor: Monitor, node: Mapping[str, object], sectors: Mapping[str, int]
    ) -> str:
        serial = str(node["node-name"])
        monitor.ask("blockdev-add", dict(node))
        try:
            names = {"id": f"disk-{serial}", "drive": serial, "serial": serial}
            monitor.ask("device_add", {"driver": "virtio-blk-pci", **names, **sectors})
        except OffloadError:
            with contextlib.suppress(OffloadError):  # the first error is the one to tell
                monitor.ask("blockdev-del", {"node-name": serial})
            raise
        return self._shell(_FIND, serial).strip()


def _pull(monitor: Monitor, serial: str) -> None:
    monitor.delete_device(f"disk-{serial}", _PULL_S)
    monitor.ask("blockdev-del", {"node-name": serial})
