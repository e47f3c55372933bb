"""What has changed in an inventory, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.inventory import Datastore, InventoryVm
from offload.machine import DiskKind, MachineDisk
from offload.services.inventory_changes import differences

GIB = 1 << 30
DISK = MachineDisk(
    name="scsi0:0", kind=DiskKind.FLAT, path="[ds1] web/web.vmdk", size_bytes=GIB,
    datastore="ds1", luns=("naa.1",),
)  # fmt: skip
MORE = replace(DISK, name="scsi0:1", path="[ds2] web/web_1.vmdk", datastore="ds2")
WEB = InventoryVm(id="vm-1", name="web", power="on", host="esx1", disks=(DISK,), tags=("a:b",))


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (WEB, []),
        (replace(WEB, host="esx2", power="off"), ["power: on → off", "host: esx1 → esx2"]),
        (replace(WEB, folder="/DC0/vm"), ["folder: - → /DC0/vm"]),
        (replace(WEB, tags=("a:c",)), ["tag a:c was added", "tag a:b was removed"]),
        (replace(WEB, template=True), ["is a template now"]),
        (replace(WEB, disks=(DISK, MORE)), ["disk scsi0:1 was added (1.0 GiB, ds2)"]),
        (replace(WEB, disks=()), ["disk scsi0:0 was removed"]),
        (
            replace(WEB, disks=(replace(DISK, size_bytes=2 * GIB),)),
            ["disk scsi0:0 was resized: 1.0 GiB → 2.0 GiB"],
        ),
        (
            replace(WEB, disks=(replace(DISK, datastore="ds2", luns=("naa.2",)),)),
            ["disk scsi0:0 was moved: ds1 → ds2"],
        ),
        (
            replace(WEB, disks=(replace(DISK, luns=("naa.1", "naa.2")),)),
            ["disk scsi0:0 is on naa.1, naa.2 now"],
        ),
        (
            replace(WEB, disks=(replace(DISK, path="[ds1] web/web-000001.vmdk"),)),
            ["disk scsi0:0 is [ds1] web/web-000001.vmdk now"],
        ),
    ],
)
def test_changes_of_a_vm_are_told(after: InventoryVm, said: list[str]) -> None:
    assert differences(WEB, after) == said


def test_changes_of_a_datastore_leave_out_its_free_space() -> None:
    store = Datastore(id="d", name="ds1", kind="VMFS", luns=("naa.1",), capacity_bytes=GIB)
    assert differences(store, replace(store, free_bytes=9)) == []
    grown = replace(store, luns=("naa.1", "naa.2"), capacity_bytes=2 * GIB, accessible=False)
    assert differences(store, grown) == [
        "LUN naa.2 was added", "is not accessible any more", "size: 1.0 GiB → 2.0 GiB",
    ]  # fmt: skip


def test_what_was_not_there_is_new() -> None:
    assert differences(None, WEB) == ["is new"]
