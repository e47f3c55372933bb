"""ReconfigVM_Task, and making and removing disks' files: what clients change of a VM.

Source of the rules: vSphere Web Services API reference, VirtualMachineConfigSpec,
VirtualDeviceConfigSpec, VirtualDiskManager.
"""

from __future__ import annotations

import posixpath
from typing import Any

from pyVmomi import vim, vmodl

from tests.vsphere_sim import vmdks, vmx
from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.datastores import Store
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault

_DEVICE = vim.vm.device
_KINDS = {1000: "scsi", 15000: "sata", 31000: "nvme", 200: "ide"}  # by key of the first controller
_PLAIN = {  # field of a ConfigSpec, key of a .vmx
    "annotation": "annotation",
    "instanceUuid": "vc.uuid",
    "firmware": "firmware",
    "numCPUs": "numvcpus",
    "memoryMB": "memSize",
    "guestId": "guestOS",
}


class Reconfigure(Part):
    """Changes of VMs' settings: all of them end in the .vmx."""

    def ReconfigVM_Task(self, _call: Call, of: Managed, spec: Any) -> None:
        """What is not set in the spec stays as it is; an extraConfig with an empty value goes."""
        values = self.model.registration.settings(of)
        for name, key in _PLAIN.items():
            value = getattr(spec, name)
            if value is not None:
                values[key] = str(value)
        if spec.uuid:
            values["uuid.bios"] = vmx.uuid_to_vmx(spec.uuid)
        for option in spec.extraConfig:
            if option.value:
                values[option.key] = str(option.value)
            else:
                values.pop(option.key, None)
        for change in spec.deviceChange:
            self._change(of, values, change)
        if spec.name is not None:
            self.model.inventory.Rename_Task(_call, of, spec.name)
        self.model.registration.write(of, values)
        self.model.events.post(vim.event.VmReconfiguredEvent, of, configSpec=vim.vm.ConfigSpec())

    def _change(self, vm: Managed, values: dict[str, str], change: Any) -> None:
        device = change.device
        if isinstance(device, _DEVICE.VirtualEthernetCard):
            self._change_card(vm, values, change)
        elif isinstance(device, _DEVICE.VirtualDisk):
            self._change_disk(vm, values, change)
        elif isinstance(device, _DEVICE.VirtualController) and change.operation == "add":
            place = f"{_kind(device.key)}{device.busNumber}"
            values[f"{place}.present"] = "TRUE"
        else:
            raise SoapFault(vim.fault.DeviceUnsupportedForVmPlatform(deviceIndex=0, device="other"))

    def _change_card(self, vm: Managed, values: dict[str, str], change: Any) -> None:
        device, card = change.device, f"ethernet{change.device.key - 4000}"
        if change.operation == "remove":
            for key in [k for k in values if k.startswith(f"{card}.")]:
                del values[key]
            return
        if change.operation == "add":
            taken = [n for n in range(10) if f"ethernet{n}.present" in values]
            card = f"ethernet{next(n for n in range(10) if n not in taken)}"
            values[f"{card}.present"] = "TRUE"
        elif f"{card}.present" not in values:
            raise _bad("deviceChange.device.key")
        if device.connectable is not None:
            values[f"{card}.startConnected"] = str(device.connectable.startConnected).upper()
        if device.macAddress:
            values[f"{card}.address"] = device.macAddress
        if getattr(device.backing, "deviceName", None):
            values[f"{card}.networkName"] = device.backing.deviceName

    def _change_disk(self, vm: Managed, values: dict[str, str], change: Any) -> None:
        """Without a fileOperation the files stay, or are there already."""
        device = change.device
        place = self._place(vm, device)
        known = values.get(f"{place}.fileName", "")
        if change.operation == "remove":
            if not known:
                raise _bad("deviceChange.device.key")
            if change.fileOperation == "destroy":
                store, path = self.model.registration.place(vm, known)
                vmdks.drop(store.volume, path)
            for key in [k for k in values if k.startswith(f"{place}.")]:
                del values[key]
        elif change.operation == "edit":
            self._resize(vm, known, device)
            if device.backing.diskMode:
                values[f"{place}.mode"] = device.backing.diskMode.replace("_", "-")
            self._attach(vm, values, place, device)
        else:
            if known:
                raise _bad("deviceChange.device.unitNumber")
            if change.fileOperation == "create":
                self._create(vm, device)
            self._attach(vm, values, place, device)

    def _place(self, vm: Managed, device: Any) -> str:
        """`scsi0:1` of a disk, by its controller and unit, or by its key."""
        for found in vm.properties["config"].hardware.device:
            if found.key == device.key and isinstance(found, _DEVICE.VirtualDisk):
                device = found
        key = device.controllerKey or 1000
        return f"{_kind(key)}{key - _first(key)}:{device.unitNumber or 0}"

    def _attach(self, vm: Managed, values: dict[str, str], place: str, device: Any) -> None:
        path = device.backing.fileName
        store, inside = self.model.datastores.path(path)
        own, own_path = self.model.registration.files(vm)
        near = store is own and posixpath.dirname(inside) == posixpath.dirname(own_path)
        far = f"/vmfs/volumes/{store.uuid}/{inside}"
        values[f"{place}.fileName"] = posixpath.basename(inside) if near else far
        values[f"{place}.present"] = "TRUE"
        values.setdefault(f"{place}.deviceType", "scsi-hardDisk")

    def _create(self, vm: Managed, device: Any) -> None:
        store, inside = self.model.datastores.path(device.backing.fileName)
        if not inside.endswith(".vmdk"):
            _, path = self.model.registration.files(vm)
            inside = vmdks.beside(path, f"disk-{self.model.number()}.vmdk")
            device.backing.fileName = f"[{store.name}] {inside}"
        size_bytes = device.capacityInBytes or (device.capacityInKB << 10)
        self._make(store, inside, size_bytes)

    def _resize(self, vm: Managed, file: str, device: Any) -> None:
        """A disk grows, never shrinks, and not while the VM has snapshots."""
        store, path = self.model.registration.place(vm, file)
        found = vmdks.descriptor(store.volume, path)
        size_bytes = device.capacityInBytes or (device.capacityInKB << 10)
        if size_bytes == found.size_bytes or not size_bytes:
            return
        if size_bytes < found.size_bytes or found.kind != "VMFS":
            raise SoapFault(
                vim.fault.InvalidDeviceOperation(deviceIndex=0),
                "The disk cannot be shrunk, nor extended under a snapshot.",
            )
        vmdks.resize(store.volume, path, size_bytes)

    # -- files -----------------------------------------------------------------------------------

    def _make(self, store: Store, path: str, size_bytes: int) -> None:
        if path in store.volume.files:
            raise SoapFault(vim.fault.FileAlreadyExists(file=path), f"{path} exists already.")
        vmdks.make_flat(store.volume, path, size_bytes)

    def CreateVirtualDisk_Task(
        self, _call: Call, _of: Managed, name: str, datacenter: Any, spec: Any
    ) -> str:
        """A disk of its own, or a mapping of a device that a host of the datastore sees."""
        store, path = self.model.datastores.path(name)
        if not isinstance(spec, vim.VirtualDiskManager.DeviceBackedVirtualDiskSpec):
            self._make(store, path, spec.capacityKb << 10)
            return name
        if path in store.volume.files:
            raise SoapFault(vim.fault.FileAlreadyExists(file=path), f"{path} exists already.")
        device = posixpath.basename(spec.device)
        hosts = (self.model.hosts.all[host] for host, mounted in store.hosts.items() if mounted)
        disk = next((h.disks[device] for h in hosts if device in h.disks), None)
        if disk is None:
            raise SoapFault(vim.fault.FileNotFound(file=spec.device), f"No device {spec.device}")
        physical = spec.diskType == "rdmp"
        vmdks.make_rdm(store.volume, path, disk.size_bytes, device, physical=physical)
        return name

    def DeleteVirtualDisk_Task(self, _call: Call, _of: Managed, name: str, datacenter: Any) -> None:
        """Of a mapping: the mapping, not its device."""
        store, path = self.model.datastores.path(name)
        if path not in store.volume.files:
            raise SoapFault(vim.fault.FileNotFound(file=name), f"File {name} was not found")
        vmdks.drop(store.volume, path)


def _first(key: int) -> int:
    return max(first for first in _KINDS if first <= key)


def _kind(key: int) -> str:
    return _KINDS[_first(key)]


def _bad(name: str) -> SoapFault:
    return SoapFault(vmodl.fault.InvalidArgument(invalidProperty=name), f"Invalid: {name}")
