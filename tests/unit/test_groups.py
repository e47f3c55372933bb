"""What the selectors of a group choose from an inventory, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offload.config import Config
from offload.errors import NotFoundError, OffloadError, PolicyError, UnavailableError
from offload.inventory import Datastore, Inventory, InventoryVm
from offload.machine import DiskKind, MachineDisk
from offload.model import Consistency
from offload.services import groups
from offload.services.groups import Resolved

LUN1, LUN2, LUN3 = (f"naa.6001405{n:025x}" for n in (1, 2, 3))
AT = datetime(2026, 11, 20, 22, tzinfo=UTC)


def disk(name: str = "scsi0:0", *, luns: Sequence[str] = (LUN1,), **more: Any) -> MachineDisk:
    fields = {"kind": DiskKind.FLAT, "path": "[ds1] web/web.vmdk", "datastore": "ds1", **more}
    return MachineDisk(name=name, size_bytes=1 << 20, luns=tuple(luns), **fields)


def vm(name: str, *disks: MachineDisk, **more: Any) -> InventoryVm:
    fields = {"id": f"id-{name}", "power": "on", "disks": disks or (disk(),), **more}
    return InventoryVm(name=name, **fields)


def inventory(*vms: InventoryVm, stores: Sequence[Datastore] = ()) -> Inventory:
    return Inventory(hypervisor="vc", taken_at=AT, vms=vms, datastores=tuple(stores))


def config(group: dict[str, Any], **more: Any) -> Config:
    tables = {
        "volumes": {
            "one": {
                "provider": "copy",
                "path": "/srv/one",
                "lun": LUN1.upper().replace("NAA", "naa"),
            },
            "two": {"provider": "copy", "path": "/srv/two", "lun": LUN2},
            "image": {"provider": "rbd", "image": "pool/web"},
        },
        "hypervisors": {
            "vc": {"kind": "vsphere", "server": "vc", "user": "u", "password_file": "/p"},
            "kvm": {"kind": "libvirt"},
        },
        **more,
    }
    return Config.model_validate({**tables, "groups": {"shop": {"hypervisor": "vc", **group}}})


def choose(group: dict[str, Any], *vms: InventoryVm, stores: Sequence[Datastore] = ()) -> Resolved:
    return groups.choose(config(group), "shop", inventory(*vms, stores=stores))


def refused(
    group: dict[str, Any], *vms: InventoryVm, stores: Sequence[Datastore] = ()
) -> OffloadError:
    with pytest.raises(OffloadError) as caught:
        choose(group, *vms, stores=stores)
    return caught.value


def names(found: Resolved) -> list[str]:
    return [vm.name for vm in found.vms]


# -- what is chosen --------------------------------------------------------------------------------

WEB = vm("web", folder="/DC0/vm/web", tags=("backup:gold",), instance_uuid="5001-a")
DB = vm(
    "db", disk(luns=(LUN2,), datastore="ds2"), folder="/DC0/vm/web/sql", tags=("backup:silver",)
)
FAR = vm("far", disk(luns=(LUN3,), datastore="ds3"), folder="/DC0/vm/website")
STORES = (
    Datastore(id="d1", name="ds1", kind="VMFS", luns=(LUN1,)),
    Datastore(id="d2", name="ds2", kind="VMFS", luns=(LUN2, LUN1)),
)


@pytest.mark.parametrize(
    ("group", "chosen", "volumes"),
    [
        ({"vms": ["web"]}, ["web"], ("one",)),
        ({"vms": ["5001-A", "db"]}, ["web", "db"], ("one", "two")),
        ({"tags": ["backup:silver"]}, ["db"], ("two",)),
        ({"folders": ["/DC0/vm/web"]}, ["web", "db"], ("one", "two")),
        ({"folders": ["/DC0/vm/web/sql/"]}, ["db"], ("two",)),
        ({"luns": [LUN2]}, ["db"], ("two",)),
        ({"datastores": ["ds1"]}, ["web"], ("one",)),
        ({"datastores": ["ds2"]}, ["db"], ("one", "two")),  # both extents of it
        ({"vms": ["web"], "tags": ["backup:gold"]}, ["web"], ("one",)),
        ({"volumes": ["two"], "vms": ["web"]}, ["web"], ("two", "one")),
    ],
)
def test_group_chooses_vms_and_their_volumes(
    group: dict[str, Any], chosen: list[str], volumes: tuple[str, ...]
) -> None:
    found = choose(group, WEB, DB, FAR, stores=STORES)
    assert names(found) == chosen
    assert found.config.volumes == volumes
    assert all(disk.volume for vm in found.vms for disk in vm.disks)
    assert found.chosen == {"vc": tuple(f"id-{name}" for name in chosen)}


def test_disk_on_several_luns_brings_all_of_them() -> None:
    spread = vm("spread", disk(luns=(LUN2, LUN1)))
    found = choose({"vms": ["spread"]}, spread)
    assert found.config.volumes == ("one", "two")
    assert found.vms[0].disks[0].volume == "two"  # with the header


def test_lun_without_vms_is_in_the_group_all_the_same() -> None:
    found = choose({"luns": [LUN2]}, WEB)
    assert found.config.volumes == ("two",)
    assert names(found) == []
    assert f"no VM has a disk on {LUN2}" in found.notes


def test_templates_placeholders_and_diskless_vms_are_left_out() -> None:
    found = choose(
        {"tags": ["t:x"]},
        replace(WEB, tags=("t:x",)),
        vm("gold", tags=("t:x",), template=True),
        vm("idle", tags=("t:x",), disks=()),
        vm("backup-web", tags=("t:x",), placeholder="isl1"),
    )
    assert names(found) == ["web"]
    assert found.notes == ("templates are left out: gold", "left out, without disks: idle")


def test_neighbours_that_run_on_the_same_volumes_are_named() -> None:
    others = [vm(f"other{n}") for n in range(5)]
    found = choose({"vms": ["web"]}, WEB, *others, vm("off", power="off"), DB)
    (note,) = found.notes
    assert "not in group shop" in note
    assert note.endswith("other0, other1, other2 and 2 more")


def test_placeholder_of_the_same_name_does_not_hide_the_vm() -> None:
    assert (
        choose({"vms": ["web"]}, vm("web", id="p", placeholder="isl1"), WEB).vms[0].id == "id-web"
    )


def test_libvirt_disks_are_found_by_path_device_and_image(tmp_path: Path) -> None:
    real, link = tmp_path / "real.raw", tmp_path / "link.raw"
    real.touch()
    link.symlink_to(real)
    made = config(
        {"hypervisor": "kvm", "vms": ["web"]},
        volumes={
            "file": {"provider": "copy", "path": str(real)},
            "image": {"provider": "rbd", "image": "pool/web"},
        },
    )
    disks = (
        disk("vda", luns=(), kind=DiskKind.FILE, path=str(link), datastore=""),
        disk("vdb", luns=(), kind=DiskKind.NETWORK, path="rbd:pool/web", datastore=""),
    )
    found = groups.choose(made, "shop", inventory(vm("web", *disks)))
    assert [d.volume for d in found.vms[0].disks] == ["file", "image"]


# -- what is refused -------------------------------------------------------------------------------


def test_vm_that_is_not_there_is_named_with_a_near_one() -> None:
    error = refused({"vms": ["wep"]}, WEB)
    assert (error.code, type(error)) == ("unknown-vm", NotFoundError)
    assert "'web'" in error.hint


def test_two_vms_of_one_name_are_told_apart_by_uuid() -> None:
    twins = [vm("web", id=f"vm-{n}", instance_uuid=f"5001-{n}") for n in (1, 2)]
    error = refused({"vms": ["web"]}, *twins)
    assert error.code == "ambiguous-vm"
    assert "5001-1, 5001-2" in error.hint
    assert choose({"vms": ["5001-2"]}, *twins).vms[0].id == "vm-2"


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (vm("web", template=True), "vm-is-template"),
        (vm("web", placeholder="isl1"), "vm-is-placeholder"),
        (vm("web", disks=()), "vm-without-disks"),
    ],
)
def test_vm_that_cannot_be_in_a_group_is_refused_by_name(found: InventoryVm, code: str) -> None:
    error = refused({"vms": ["web"]}, found)
    assert (error.code, type(error)) == (code, PolicyError)
    assert "web" in error.message


def test_selectors_that_choose_nothing_are_refused() -> None:
    error = refused({"tags": ["backup:gold"], "folders": ["/none"]}, DB)
    assert error.code == "nothing-chosen"
    assert "backup:gold" in error.message
    assert "/none" in error.message


def test_datastore_that_is_not_there_is_refused() -> None:
    assert refused({"datastores": ["ds9"]}, WEB, stores=STORES).code == "unknown-datastore"


def test_lun_that_is_no_volume_is_refused() -> None:
    assert refused({"luns": [LUN3]}, FAR).code == "disk-without-volume"
    assert refused({"luns": [LUN3]}, WEB).code == "unknown-lun"


def test_disk_on_a_lun_that_is_no_volume_says_what_to_configure() -> None:
    error = refused({"vms": ["far"]}, FAR)
    assert error.code == "disk-without-volume"
    assert "far" in error.message
    assert LUN3 in error.message
    assert f'lun = "{LUN3}"' in error.hint


@pytest.mark.parametrize(
    ("kind", "store", "said"),
    [
        (DiskKind.VSAN, "vsanDatastore", "the vSAN datastore vsanDatastore"),
        (DiskKind.VVOL, "vvols", "the vVol datastore vvols"),
        (DiskKind.FLAT, "nas1", "the NFS datastore nas1"),
    ],
)
def test_disk_without_a_lun_says_what_is_possible(kind: DiskKind, store: str, said: str) -> None:
    bad = vm("web", disk(luns=(), kind=kind, datastore=store, label="Hard disk 1"))
    nas = Datastore(id="d9", name="nas1", kind="NFS")
    error = refused({"vms": ["web"]}, bad, stores=[nas])
    assert error.code == "disk-without-lun"
    assert f"disk scsi0:0 (Hard disk 1) of VM web is on {said}" in error.message
    assert "agent in the guest" in error.hint


def test_file_that_is_no_volume_says_what_to_configure() -> None:
    bad = vm("web", disk("vda", luns=(), kind=DiskKind.FILE, path="/srv/web.raw", datastore=""))
    error = refused({"hypervisor": "kvm", "vms": ["web"]}, bad)
    assert error.code == "disk-without-volume"
    assert 'path = "/srv/web.raw"' in error.hint


def test_tags_that_are_not_known_choose_nothing_but_an_error() -> None:
    blind = replace(inventory(WEB), tags_problem="its REST API does not answer")
    with pytest.raises(UnavailableError, match="does not answer") as refusal:
        groups.choose(config({"tags": ["backup:gold"]}), "shop", blind)
    assert refusal.value.code == "tags-unknown"
    assert groups.choose(config({"vms": ["web"]}), "shop", blind).vms


# -- who is quiesced -------------------------------------------------------------------------------


def test_chosen_vms_are_quiesced_by_their_hypervisor() -> None:
    made = config({"vms": ["web", "db"], "consistency": "filesystem"})
    found = groups.choose(made, "shop", inventory(WEB, DB))
    wanted = groups.to_quiesce(made, found, Consistency.FILESYSTEM)
    assert {name: vm.volumes for name, vm in wanted.items()} == {"web": ("one",), "db": ("two",)}
    freeze = wanted["web"].freeze
    assert freeze is not None
    assert freeze.model_dump(exclude_defaults=True) == {
        "kind": "vmware",
        "hypervisor": "vc",
        "vm": "web",
        "moref": WEB.id,
    }
    assert groups.to_quiesce(made, found, Consistency.CRASH) == {}


def test_vm_with_an_entry_is_quiesced_as_that_says() -> None:
    freeze = {"kind": "vmware", "hypervisor": "vc", "vm": "5001-a"}
    entry = {"volumes": ["one"], "freeze": freeze, "consistency": "application"}
    made = config({"vms": ["web"]}, vms={"front": entry})
    found = groups.choose(made, "shop", inventory(WEB))
    wanted = groups.to_quiesce(made, found, Consistency.FILESYSTEM)
    assert list(wanted) == ["front"]
    assert wanted["front"].consistency is Consistency.APPLICATION
    assert groups.entry_of(made, "vc", WEB) == "front"


def test_vms_of_one_name_are_quiesced_each() -> None:
    twins = [vm("web", id=f"vm-{n}", instance_uuid=f"5001-{n}") for n in (1, 2)]
    made = config({"tags": ["t:x"]})
    found = groups.choose(made, "shop", inventory(*(replace(v, tags=("t:x",)) for v in twins)))
    wanted = groups.to_quiesce(made, found, Consistency.FILESYSTEM)
    assert sorted(wanted) == ["web (vm-1)", "web (vm-2)"]


def test_libvirt_vms_are_frozen_by_their_uuid() -> None:
    made = config(
        {"hypervisor": "kvm", "vms": ["web"]},
        volumes={"file": {"provider": "copy", "path": "/srv/web.raw"}},
    )
    bare = vm("web", disk("vda", luns=(), kind=DiskKind.FILE, path="/srv/web.raw"), id="uuid-1")
    found = groups.choose(made, "shop", inventory(bare))
    freeze = groups.to_quiesce(made, found, Consistency.FILESYSTEM)["web"].freeze
    assert freeze is not None
    assert freeze.model_dump(exclude_defaults=True) == {
        "kind": "libvirt", "hypervisor": "kvm", "domain": "uuid-1",
    }  # fmt: skip
