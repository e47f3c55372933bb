"""What a VM's disks are, out of the devices that vSphere tells."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

from offload.hypervisors.vsphere.disks import disks_of, machine_disk
from offload.inventory import Datastore
from offload.machine import DiskKind, MachineDisk

DEVICE = vim.vm.device
DISK = DEVICE.VirtualDisk
LUN1, LUN2, RAW = "naa.6001", "naa.6002", "naa.6009"
STORES = {
    "ds-1": Datastore(id="ds-1", name="ds1", kind="VMFS", luns=(LUN1,)),
    "ds-2": Datastore(id="ds-2", name="ds2", kind="VMFS", luns=(LUN2,)),
}
UUIDS = {"0200": RAW}


def made(backing: Any, **more: Any) -> MachineDisk:
    controller = DEVICE.ParaVirtualSCSIController(key=1001, busNumber=1, sharedBus="noSharing")
    disk = DISK(
        key=2016, controllerKey=1001, unitNumber=3, capacityInKB=1024, backing=backing, **more
    )
    (facts,) = disks_of([disk, DEVICE.VirtualVmxnet3(key=4000), controller])
    return machine_disk(facts, STORES, lambda uuid: UUIDS.get(uuid, ""))


def store(moref: str) -> Any:
    return vim.Datastore(moref)


def test_disk_is_named_as_in_its_vmx() -> None:
    disk = made(
        DISK.FlatVer2BackingInfo(fileName="[ds1] a/a.vmdk", datastore=store("ds-1")),
        deviceInfo=vim.Description(label="Hard disk 7", summary=""),
    )
    assert (disk.name, disk.label, disk.size_bytes) == ("scsi1:3", "Hard disk 7", 1 << 20)
    assert (disk.kind, disk.luns, disk.problem) == (DiskKind.FLAT, (LUN1,), "")


def test_delta_over_an_rdm_is_an_rdm_on_both_luns() -> None:
    base = DISK.RawDiskMappingVer1BackingInfo(
        fileName="[ds1] a/a.vmdk", datastore=store("ds-1"), lunUuid="0200",
        compatibilityMode="virtualMode", diskMode="persistent",
    )  # fmt: skip
    delta = DISK.RawDiskMappingVer1BackingInfo(
        fileName="[ds2] a/a-000001.vmdk", datastore=store("ds-2"), lunUuid="0200",
        compatibilityMode="virtualMode", diskMode="persistent", parent=base,
    )  # fmt: skip
    disk = made(delta)
    assert disk.kind is DiskKind.RDM
    assert disk.luns == (RAW, LUN2)
    assert disk.chain == ("[ds1] a/a.vmdk",)
    assert disk.path == "[ds2] a/a-000001.vmdk"


def test_chain_over_datastores_is_on_the_luns_of_all() -> None:
    base = DISK.SeSparseBackingInfo(fileName="[ds1] t/t.vmdk", datastore=store("ds-1"))
    middle = DISK.SeSparseBackingInfo(
        fileName="[ds1] a/a.vmdk", datastore=store("ds-1"), parent=base
    )
    disk = made(
        DISK.SeSparseBackingInfo(
            fileName="[ds2] a/a-1.vmdk", datastore=store("ds-2"), parent=middle
        )
    )
    assert disk.luns == (LUN2, LUN1)
    assert disk.chain == ("[ds1] a/a.vmdk", "[ds1] t/t.vmdk")


def test_file_on_a_datastore_that_may_not_be_seen_has_no_luns() -> None:
    base = DISK.FlatVer2BackingInfo(fileName="[hidden] a/a.vmdk", datastore=store("ds-9"))
    disk = made(
        DISK.FlatVer2BackingInfo(fileName="[ds1] a/a-1.vmdk", datastore=store("ds-1"), parent=base)
    )
    assert disk.luns == (), "half of where it lies is not where it lies"
    assert "[hidden] a/a.vmdk lies on no datastore that this user may see" in disk.problem


def test_disk_without_a_controller_has_a_name_still() -> None:
    backing = DISK.FlatVer2BackingInfo(fileName="[ds1] a/a.vmdk", datastore=store("ds-1"))
    (facts,) = disks_of([DISK(key=2000, controllerKey=7, capacityInKB=1, backing=backing)])
    assert facts.name == "disk2000"
