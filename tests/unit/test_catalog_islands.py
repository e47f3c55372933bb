"""Islands in the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from offload.catalog.store import Catalog
from offload.errors import BusyError, NotFoundError
from offload.island import Island, IslandId, IslandState, Placeholder, Shown
from offload.machine import DiskKind, MachineDisk

AT = datetime(2026, 11, 20, 22, 0, 1, 250000, tzinfo=UTC)
DISK = MachineDisk(
    name="scsi0:0",
    kind=DiskKind.FLAT,
    path="[ds1] web/web-000001.vmdk",
    size_bytes=1 << 30,
    volume="db",
    luns=("naa.60014050000000000000000000000001",),
    chain=("[ds1] web/web.vmdk",),
)
PLACEHOLDER = Placeholder(
    id="vm-9",
    name="backup-web",
    vm="web",
    hypervisor="vc",
    production="vm-1",
    at=AT,
    shown=Shown.VM,
    consistency="filesystem",
    disks=(DISK,),
    notes=("a disk was left out",),
    record={"datastore": "snap-1"},
)
ISLAND = Island(
    id=IslandId("isl1"),
    name="shop-esx1",
    host="esx1",
    group="shop",
    origin="timemark:k3f9",
    created_at=AT,
    views=("v1", "v2"),
    placeholders=(PLACEHOLDER,),
    record={"mark": "x/y"},
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog.open(tmp_path / "catalog.db")
    yield opened
    opened.close()


def test_island_comes_back_as_it_was(catalog: Catalog) -> None:
    later = replace(
        ISLAND,
        id=IslandId("isl2"),
        name="other",
        created_at=AT + timedelta(seconds=1),
        placeholders=(),
        state=IslandState.BUILDING,
    )
    catalog.add_island(later)
    catalog.add_island(ISLAND)
    assert catalog.islands() == [ISLAND, later]


def test_island_is_updated_and_forgotten(catalog: Catalog) -> None:
    catalog.add_island(ISLAND)
    going = replace(ISLAND, state=IslandState.GOING)
    catalog.update_island(going)
    assert catalog.islands() == [going]
    catalog.delete_island("isl1")
    catalog.delete_island("isl1")
    assert catalog.islands() == []
    with pytest.raises(NotFoundError, match="isl1"):
        catalog.update_island(going)


def test_island_of_a_name_that_is_taken_is_refused(catalog: Catalog) -> None:
    catalog.add_island(ISLAND)
    with pytest.raises(BusyError) as refused:
        catalog.add_island(replace(ISLAND, id=IslandId("isl2")))
    assert refused.value.code == "island-exists"
