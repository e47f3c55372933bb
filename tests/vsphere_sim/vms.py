"""Virtual machines: how a test plans one, its .vmx, and what the API makes of a .vmx."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pyVmomi import vim

from tests.vsphere_sim import vmx

_DEVICE = vim.vm.device
_DISK = re.compile(r"(scsi|sata|nvme|ide)(\d+):(\d+)\.fileName")
# key of the first controller of a kind, and of its disks; the numbers that vSphere uses
_CONTROLLERS: dict[str, tuple[int, Any]] = {
    "ide": (200, _DEVICE.VirtualIDEController),
    "scsi": (1000, _DEVICE.ParaVirtualSCSIController),
    "sata": (15000, _DEVICE.VirtualAHCIController),
    "nvme": (31000, _DEVICE.VirtualNVMEController),
}
_SCSI = {
    "pvscsi": _DEVICE.ParaVirtualSCSIController,
    "lsilogic": _DEVICE.VirtualLsiLogicController,
    "lsisas1068": _DEVICE.VirtualLsiLogicSASController,
}
_CARDS = {"vmxnet3": _DEVICE.VirtualVmxnet3, "e1000e": _DEVICE.VirtualE1000e}
# what the API shows elsewhere than in extraConfig
_SHOWN = re.compile(
    r"\.encoding|config\.version|virtualHW\.|displayName|guestOS|numvcpus|memSize|uuid\.bios|"
    r"vc\.uuid|firmware|uefi\.|annotation|encryption\.|(scsi|sata|nvme|ide|ethernet)\d"
)
_MODES = {"independent-persistent": "independent_persistent"}  # in a .vmx, in the API


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """A disk. `datastore`: another than the VM's own; `lun`: of an RDM, its `naa.…`; `bus`: what
    sharedBus of its controller is; each bus of SCSI has its own controller."""

    size_bytes: int = 1 << 20
    kind: str = "flat"  # flat | rdm | rdm-physical
    datastore: str = ""
    lun: str = ""
    mode: str = "persistent"
    sharing: str = ""  # multi-writer
    shared_bus: str = "none"  # none | virtual | physical
    place: str = ""  # e.g. scsi1:0; else the next of scsi0


@dataclass(frozen=True, slots=True, kw_only=True)
class VmPlan:
    """A virtual machine. `windows`: with VSS, and disks that are told apart in the guest."""

    name: str
    instance_uuid: str
    bios_uuid: str = "564d0000-0000-4000-8000-000000000001"
    mac: str = "00:50:56:00:00:01"
    addresses: tuple[str, ...] = ()
    host_name: str = ""
    windows: bool = False
    enable_uuid: bool = True
    tools: bool = True
    power: str = "poweredOn"
    clean_power_off: bool = True
    independent_disk: bool = False
    disks: tuple[DiskPlan, ...] = (DiskPlan(),)
    datastore: str = "ds1"  # in which its files lie; one that is not there has none
    host: str = ""  # that runs it; else the first one
    folder: str = ""  # below the datacenter's VM folder: `web/shop`
    firmware: str = "bios"
    secure_boot: bool = False
    encrypted: bool = False
    template: bool = False
    annotation: str = ""
    network: str = "VM Network"

    @property
    def all_disks(self) -> tuple[DiskPlan, ...]:
        """With the independent one."""
        more = (DiskPlan(mode="independent_persistent"),) if self.independent_disk else ()
        return (*self.disks, *more)

    def disk_files(self) -> Iterator[tuple[str, DiskPlan, str]]:
        """Each disk's place, plan, and file name: NAME.vmdk, NAME_1.vmdk, …"""
        for number, disk in enumerate(self.all_disks):
            suffix = f"_{number}" if number else ""
            # unit 7 of a SCSI bus is the controller itself
            unit = number + (number >= 7)
            yield disk.place or f"scsi0:{unit}", disk, f"{self.name}{suffix}.vmdk"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What is known of a disk's file: of itself, then of its parents (`chain`, their paths)."""

    path: str  # `[ds1] web/web.vmdk`
    datastore: Any = None
    size_bytes: int = 0
    rdm: str = ""  # virtualMode | physicalMode
    lun_uuid: str = ""
    device_name: str = ""
    chain: tuple[str, ...] = ()


def vmx_of(plan: VmPlan, names: dict[str, str]) -> dict[str, str]:
    """Its settings; `names` has the file name of each disk by its place."""
    values = {
        ".encoding": "UTF-8",
        "config.version": "8",
        "virtualHW.version": "13",
        "displayName": plan.name,
        "guestOS": "windows9srv-64" if plan.windows else "debian11-64",
        "numvcpus": "1",
        "memSize": "64",
        "uuid.bios": vmx.uuid_to_vmx(plan.bios_uuid),
        "vc.uuid": plan.instance_uuid,
        "disk.EnableUUID": str(plan.enable_uuid).upper(),
        "nvram": f"{plan.name}.nvram",
    }
    if plan.firmware == "uefi":
        values |= {"firmware": "efi", "uefi.secureBoot.enabled": str(plan.secure_boot).upper()}
    if plan.encrypted:
        values["encryption.keySafe"] = "vmware:key/list/(pair/(fqid/<VMWARE-NULL>/kms/key-1))"
    if plan.annotation:
        values["annotation"] = plan.annotation
    for place, disk, _ in plan.disk_files():
        bus = place.partition(":")[0]
        values[f"{bus}.present"] = "TRUE"
        if bus.startswith("scsi"):
            values[f"{bus}.virtualDev"] = "pvscsi"
            if disk.shared_bus != "none":
                values[f"{bus}.sharedBus"] = disk.shared_bus
        values[f"{place}.present"] = "TRUE"
        values[f"{place}.deviceType"] = "scsi-hardDisk"
        values[f"{place}.fileName"] = names[place]
        if disk.mode != "persistent":
            values[f"{place}.mode"] = disk.mode.replace("_", "-")
        if disk.sharing:
            values[f"{place}.sharing"] = disk.sharing
    card = "ethernet0"
    return values | {
        f"{card}.present": "TRUE",
        f"{card}.virtualDev": "vmxnet3",
        f"{card}.networkName": plan.network,
        f"{card}.addressType": "static",
        f"{card}.address": plan.mac,
        f"{card}.startConnected": "TRUE",
    }


def config_of(
    values: dict[str, str],
    path: str,
    facts: Callable[[str], DiskFacts],
    *,
    name: str = "",
    template: bool = False,
    modified: datetime,
) -> Any:
    """The ConfigInfo of a .vmx at `path` (`[ds1] web/web.vmx`); `facts` of a disk's file name."""
    devices = [*_controllers(values), *_disks(values, facts), *_cards(values)]
    secure = values.get("uefi.secureBoot.enabled", "FALSE").upper() == "TRUE"
    found = vim.vm.ConfigInfo(
        name=name or values.get("displayName", ""),
        uuid=vmx.uuid_from_vmx(values.get("uuid.bios", "")),
        instanceUuid=values.get("vc.uuid", ""),
        template=template,
        changeVersion="1",
        modified=modified,
        version=f"vmx-{int(values.get('virtualHW.version', 13)):02d}",
        guestId=_guest_id(values.get("guestOS", "")),
        guestFullName=values.get("guestOS", ""),
        annotation=values.get("annotation", ""),
        firmware=values.get("firmware", "bios"),
        bootOptions=vim.vm.BootOptions(efiSecureBootEnabled=secure),
        files=vim.vm.FileInfo(vmPathName=path),
        flags=vim.vm.FlagInfo(),
        defaultPowerOps=vim.vm.DefaultPowerOpInfo(),
        hardware=vim.vm.VirtualHardware(
            numCPU=int(values.get("numvcpus", 1)),
            memoryMB=int(values.get("memSize", 64)),
            device=devices,
        ),
        extraConfig=[
            vim.option.OptionValue(key=key, value=value)
            for key, value in values.items()
            if not _SHOWN.match(key)
        ],
    )
    if "encryption.keySafe" in values:
        provider = vim.encryption.KeyProviderId(id="kms")
        found.keyId = vim.encryption.CryptoKeyId(keyId="key-1", providerId=provider)
    return found


def _guest_id(name: str) -> str:
    return {"windows9srv-64": "windows9Server64Guest"}.get(name, "otherGuest64")


def _controllers(values: dict[str, str]) -> Iterator[Any]:
    buses = sorted({f"{m[1]}{m[2]}" for m in map(_DISK.match, values) if m})
    for bus in buses:
        kind, number = bus.rstrip("0123456789"), int(re.sub(r"\D", "", bus))
        first, type_ = _CONTROLLERS[kind]
        made = type_(key=first + number, busNumber=number)
        if kind == "scsi":
            made = _SCSI[values.get(f"{bus}.virtualDev", "pvscsi")](
                key=first + number,
                busNumber=number,
                sharedBus={"virtual": "virtualSharing", "physical": "physicalSharing"}.get(
                    values.get(f"{bus}.sharedBus", ""), "noSharing"
                ),
            )
        yield made


def _disks(values: dict[str, str], facts: Callable[[str], DiskFacts]) -> Iterator[Any]:
    number = 0
    for key, file in values.items():
        match = _DISK.match(key)
        if match is None or values.get(f"{match[1]}{match[2]}:{match[3]}.present") != "TRUE":
            continue
        bus, unit = int(match[2]), int(match[3])
        place = f"{match[1]}{bus}:{unit}"
        known = facts(file)
        mode = values.get(f"{place}.mode", "persistent")
        sharing = values.get(f"{place}.sharing", "")
        number += 1
        backing = None
        for path in reversed((known.path, *known.chain)):
            below = _backing(known, path, _MODES.get(mode, mode))
            below.parent, backing = backing, below
            if sharing == "multi-writer":
                backing.sharing = "sharingMultiWriter"
        yield _DEVICE.VirtualDisk(
            key=_CONTROLLERS[match[1]][0] * 2 + 16 * bus + unit,
            unitNumber=unit,
            controllerKey=_CONTROLLERS[match[1]][0] + bus,
            capacityInKB=known.size_bytes >> 10,
            capacityInBytes=known.size_bytes,
            deviceInfo=vim.Description(label=f"Hard disk {number}", summary=""),
            backing=backing,
        )


def _backing(known: DiskFacts, path: str, mode: str) -> Any:
    if known.rdm:
        return _DEVICE.VirtualDisk.RawDiskMappingVer1BackingInfo(
            fileName=path,
            datastore=known.datastore,
            diskMode=mode,
            compatibilityMode=known.rdm,
            lunUuid=known.lun_uuid,
            deviceName=known.device_name,
        )
    return _DEVICE.VirtualDisk.FlatVer2BackingInfo(
        fileName=path, datastore=known.datastore, diskMode=mode, thinProvisioned=True
    )


def _cards(values: dict[str, str]) -> Iterator[Any]:
    for number in range(10):
        card = f"ethernet{number}"
        if values.get(f"{card}.present") == "TRUE":
            connected = values.get(f"{card}.startConnected", "TRUE") == "TRUE"
            yield _CARDS.get(values.get(f"{card}.virtualDev", ""), _DEVICE.VirtualE1000e)(
                key=4000 + number,
                unitNumber=7 + number,
                macAddress=values.get(f"{card}.address", ""),
                addressType="manual",
                deviceInfo=vim.Description(label=f"Network adapter {number + 1}", summary=""),
                backing=_DEVICE.VirtualEthernetCard.NetworkBackingInfo(
                    deviceName=values.get(f"{card}.networkName", "")
                ),
                connectable=_DEVICE.VirtualDevice.ConnectInfo(
                    startConnected=connected, allowGuestControl=True, connected=connected
                ),
            )
