"""VM snapshots of the simulator: what is on disks, and what is not done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim
from vsphere_sim_lab import NAA, client_of, disks_of, done, make_lun, vcenter_vm

from offload.errors import UnavailableError
from offload.vsphere import Vsphere
from tests.vsphere_sim import vmdks
from tests.vsphere_sim.disks import FileDisk
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.server import Vcenter, running_vcenter
from tests.vsphere_sim.vmfs import Volume
from tests.vsphere_sim.vms import DiskPlan, VmPlan

pytestmark = pytest.mark.timeout(300)

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def lun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lun(tmp_path_factory.mktemp("lun") / "lun1.raw")


@pytest.fixture(scope="module")
def vcenter(tmp_path_factory: pytest.TempPathFactory, lun: Path) -> Iterator[Vcenter]:
    with running_vcenter(tmp_path_factory.mktemp("vc")) as started:
        started.model.hosts.add("esx1")
        disk = started.model.storage.give("esx1", lun, NAA)
        started.model.datastores.make("ds1", [disk], ["esx1"])
        yield started


@pytest.fixture
def client(vcenter: Vcenter) -> Iterator[Vsphere]:
    with client_of(vcenter) as session:
        yield session


@pytest.fixture
def make(vcenter: Vcenter, client: Vsphere) -> Iterator[Make]:
    made: list[Managed] = []

    def vm(name: str, **plan: Any) -> Any:
        made.append(vcenter.model.add_vm(VmPlan(name=name, instance_uuid=name, **plan)))
        return vcenter_vm(vcenter, client, name)

    yield vm
    for each in made:
        vcenter.model.registration.forget(each)


def _snapshot(client: Vsphere, vm: Any, name: str, *, quiesce: bool = False) -> Any:
    return done(client, vm.CreateSnapshot_Task(name, "", False, quiesce))


def _files(vm: Any) -> list[str]:
    return [disk.backing.fileName.rpartition("/")[2] for disk in disks_of(vm)]


def _write(vcenter: Vcenter, vm: Any, data: bytes) -> None:
    path = disks_of(vm)[0].backing.fileName.partition("] ")[2]
    vmdks.write(vcenter.model.datastores.ensure("ds1").volume, path, data, 100)


def _read(lun: Path, vm: Any) -> bytes:
    """From the LUN's file, as whoever copies it finds it."""
    path = disks_of(vm)[0].backing.fileName.partition("] ")[2]
    return vmdks.read(Volume([FileDisk(lun, NAA)]), path, 3, 100)


def test_sim_snapshot_keeps_what_was_and_its_removal_what_is(
    vcenter: Vcenter, client: Vsphere, make: Make, lun: Path
) -> None:
    vm = make("keep")
    _write(vcenter, vm, b"old")
    snapshot = _snapshot(client, vm, "s")
    _write(vcenter, vm, b"new")
    assert _files(vm) == ["keep-000001.vmdk"]
    volume = Volume([FileDisk(lun, NAA)])
    assert vmdks.read(volume, "keep/keep.vmdk", 3, 100) == b"old"
    assert vmdks.read(volume, "keep/keep-000001.vmdk", 3, 100) == b"new"
    done(client, snapshot.RemoveSnapshot_Task(False, True))
    assert (_files(vm), vm.snapshot) == (["keep.vmdk"], None)
    assert _read(lun, vm) == b"new"
    left = {name for name in Volume([FileDisk(lun, NAA)]).files if name.startswith("keep/")}
    assert left == {f"keep/keep{end}" for end in (".vmx", ".vmsd", ".nvram", ".vmdk", "-flat.vmdk")}


def test_sim_revert_brings_back_disks_and_settings(
    vcenter: Vcenter, client: Vsphere, make: Make, lun: Path
) -> None:
    vm = make("back", annotation="then")
    _write(vcenter, vm, b"old")
    snapshot = _snapshot(client, vm, "s")
    _write(vcenter, vm, b"new")
    done(client, vm.ReconfigVM_Task(vim.vm.ConfigSpec(annotation="now")))
    done(client, snapshot.RevertToSnapshot_Task(None, True))
    assert (_read(lun, vm), vm.config.annotation) == (b"old", "then")
    assert vm.runtime.powerState == "poweredOff"
    done(client, snapshot.RemoveSnapshot_Task(False, True))
    assert (_read(lun, vm), _files(vm)) == (b"old", ["back.vmdk"])


def test_sim_removal_in_the_middle_leaves_the_others(
    vcenter: Vcenter, client: Vsphere, make: Make, lun: Path
) -> None:
    vm = make("chain")
    made = {}
    for name in ("one", "two", "three"):
        _write(vcenter, vm, name[:3].encode())
        made[name] = _snapshot(client, vm, name)
    _write(vcenter, vm, b"end")
    done(client, made["two"].RemoveSnapshot_Task(False, True))
    (root,) = vm.snapshot.rootSnapshotList
    assert (root.name, [c.name for c in root.childSnapshotList]) == ("one", ["three"])
    done(client, made["three"].RevertToSnapshot_Task(None, True))
    assert _read(lun, vm) == b"thr"
    done(client, made["one"].RevertToSnapshot_Task(None, True))
    assert _read(lun, vm) == b"one"
    assert sorted(vcenter.model.snapshot_names(_managed(vcenter, "chain"))) == ["one", "three"]


def _managed(vcenter: Vcenter, name: str) -> Managed:
    found: Managed = next(
        o for o in vcenter.model.objects.values() if o.properties.get("name") == name
    )
    return found


def test_sim_snapshots_are_in_the_files_of_the_vm(
    vcenter: Vcenter, client: Vsphere, make: Make
) -> None:
    """Whoever registers the VM's files elsewhere has them."""
    vm = make("files")
    _snapshot(client, vm, "quiet", quiesce=True)
    vm.UnregisterVM() if vm.runtime.powerState == "poweredOff" else None
    loaded = vcenter.model.registration.load(
        "[ds1] files/files.vmx", "files-2", vcenter.model.inventory.folders["vm"]
    )
    (entry,) = loaded.properties["snapshot"].rootSnapshotList
    assert (entry.name, entry.quiesced) == ("quiet", True)
    vcenter.model.registration.forget(loaded)


def test_sim_quiescing_without_tools_is_ignored_in_silence(client: Vsphere, make: Make) -> None:
    vm = make("toolless", tools=False)
    _snapshot(client, vm, "s", quiesce=True)
    assert not vm.snapshot.rootSnapshotList[0].quiesced


def test_sim_disks_that_are_no_part_of_snapshots_go_on(client: Vsphere, make: Make) -> None:
    disks = (
        DiskPlan(),
        DiskPlan(mode="independent_persistent"),
        DiskPlan(kind="rdm-physical", lun="naa.6000000000000099"),
        DiskPlan(kind="rdm", lun="naa.6000000000000098"),
    )
    vm = make("mixed", disks=disks)
    snapshot = _snapshot(client, vm, "s")
    assert _files(vm) == [
        "mixed-000001.vmdk",
        "mixed_1.vmdk",
        "mixed_2.vmdk",
        "mixed_3-000001.vmdk",
    ]
    done(client, snapshot.RemoveSnapshot_Task(False, True))
    assert _files(vm) == ["mixed.vmdk", "mixed_1.vmdk", "mixed_2.vmdk", "mixed_3.vmdk"]


def test_sim_vm_on_a_shared_bus_has_no_snapshots(client: Vsphere, make: Make) -> None:
    vm = make("clustered", disks=(DiskPlan(shared_bus="virtual", place="scsi1:0"),))
    with pytest.raises(UnavailableError, match="bus sharing"):
        _snapshot(client, vm, "s")


def test_sim_chain_has_an_end(client: Vsphere, make: Make) -> None:
    vm = make("deep", disks=())
    for number in range(32):
        _snapshot(client, vm, f"s{number}")
    with pytest.raises(UnavailableError) as refused:
        _snapshot(client, vm, "one-more")
    assert isinstance(refused.value.__cause__, vim.fault.TooManySnapshotLevels)


def test_sim_delta_that_stays_wants_consolidation(
    vcenter: Vcenter, client: Vsphere, make: Make
) -> None:
    vm = make("stays")
    snapshot = _snapshot(client, vm, "s")
    vcenter.model.weather.consolidation_fails = True
    try:
        done(client, snapshot.RemoveSnapshot_Task(False, True))
    finally:
        vcenter.model.weather.consolidation_fails = False
    assert (vm.snapshot, vm.runtime.consolidationNeeded) == (None, True)
    assert _files(vm) == ["stays-000001.vmdk"]
    done(client, vm.ConsolidateVMDisks_Task())
    assert (_files(vm), vm.runtime.consolidationNeeded) == (["stays.vmdk"], False)
