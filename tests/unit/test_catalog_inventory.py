"""Inventories in the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from offload.catalog.store import Catalog
from offload.errors import NotFoundError
from offload.inventory import Datastore, HypervisorHost, Inventory, InventoryChange, InventoryVm
from offload.machine import DiskKind, MachineDisk

AT = datetime(2026, 11, 20, 22, 0, 1, 250000, tzinfo=UTC)
DISK = MachineDisk(
    name="scsi0:0",
    label="Hard disk 1",
    kind=DiskKind.FLAT,
    path="[ds1] web/web-000001.vmdk",
    size_bytes=1 << 30,
    datastore="ds1",
    luns=("naa.60014050000000000000000000000001", "naa.60014050000000000000000000000002"),
    chain=("[ds1] web/web.vmdk",),
)
WEB = InventoryVm(
    id="vm-1",
    name="web",
    power="on",
    uuid="564d",
    instance_uuid="5023",
    host="esx1",
    folder="/DC0/vm/web",
    tags=("backup:nightly",),
    tools="running",
    firmware="uefi",
    disks=(DISK,),
)
DS1 = Datastore(id="ds-1", name="ds1", kind="VMFS", luns=DISK.luns, capacity_bytes=9, free_bytes=3)
ESX1 = HypervisorHost(id="host-1", name="esx1", state="maintenance")
ALL = Inventory(hypervisor="vc", taken_at=AT, vms=(WEB,), datastores=(DS1,), hosts=(ESX1,))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog.open(tmp_path / "catalog.db")
    yield opened
    opened.close()


def test_inventory_comes_back_as_it_was(catalog: Catalog) -> None:
    catalog.set_inventory(ALL)
    other = replace(ALL, hypervisor="other", vms=(), tags_problem="no REST API")
    catalog.set_inventory(other)
    assert catalog.inventory("vc") == ALL
    assert catalog.inventory("other") == other
    assert catalog.inventory("never-asked") is None


def test_inventory_takes_the_place_of_the_one_before(catalog: Catalog) -> None:
    catalog.set_inventory(ALL)
    empty = Inventory(hypervisor="vc", taken_at=AT + timedelta(hours=1))
    catalog.set_inventory(empty)
    assert catalog.inventory("vc") == empty


def test_inventory_change_adds_replaces_and_forgets(catalog: Catalog) -> None:
    catalog.set_inventory(ALL)
    later = AT + timedelta(minutes=1)
    moved = replace(WEB, host="esx2")
    db = InventoryVm(id="vm-2", name="db", power="off")
    catalog.change_inventory("vc", InventoryChange(at=later, vms=(moved, db), gone=("host-1",)))
    expected = Inventory(hypervisor="vc", taken_at=later, vms=(db, moved), datastores=(DS1,))
    assert catalog.inventory("vc") == expected
    catalog.change_inventory("vc", InventoryChange(at=later))
    assert catalog.inventory("vc") == expected


def test_inventory_change_of_one_that_was_never_read_is_refused(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError) as refused:
        catalog.change_inventory("vc", InventoryChange(at=AT, vms=(WEB,)))
    assert refused.value.code == "unknown-inventory"
