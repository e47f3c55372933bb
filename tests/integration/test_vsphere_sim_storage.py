"""The simulator's hosts at real iSCSI targets: what they find, write, and refuse."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyVmomi import vim, vmodl
from vsphere_sim_lab import ADAPTER, NAA, Copies, Esx, client_of, make_lun

from offload.errors import UnavailableError
from offload.testing.libiscsi import Initiator
from offload.vsphere import Vsphere
from tests.vsphere_sim import vmdks
from tests.vsphere_sim.disks import FileDisk, IscsiDisk, canonical_name
from tests.vsphere_sim.server import Vcenter, running_vcenter
from tests.vsphere_sim.vmfs import Volume, read_header
from tests.vsphere_sim.vms import VmPlan

pytestmark = pytest.mark.timeout(300)

MakeEsx = Callable[[], Esx]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sim")


@pytest.fixture(scope="module")
def vcenter(folder: Path) -> Iterator[Vcenter]:
    """With datastore ds1 on a LUN of host esx1, and VM web on it: `before` at 4096 on its disk."""
    with running_vcenter(folder / "vcenter") as started:
        model = started.model
        model.hosts.add("esx1")
        disk = model.storage.give("esx1", make_lun(folder / "lun1.raw"), NAA)
        store = model.datastores.make("ds1", [disk], ["esx1"])
        model.add_vm(VmPlan(name="web", instance_uuid="5023-web", host="esx1"))
        vmdks.write(store.volume, "web/web.vmdk", b"before", 4096)
        yield started


@pytest.fixture(scope="module")
def lun(vcenter: Vcenter, folder: Path) -> Path:
    return folder / "lun1.raw"


@pytest.fixture(scope="module")
def copies(folder: Path) -> Iterator[Copies]:
    made = Copies(folder)
    yield made
    made.close()


@pytest.fixture
def client(vcenter: Vcenter) -> Iterator[Vsphere]:
    with client_of(vcenter) as session:
        yield session


@pytest.fixture
def esx(vcenter: Vcenter, client: Vsphere) -> Iterator[Esx]:
    """A fresh host; what it still has at the end is taken from it."""
    model = vcenter.model
    host = model.hosts.add(f"backup{len(model.hosts.all)}")
    yield Esx(client, host, model)
    host.targets = []
    for store in [s for s in model.datastores._all.values() if host.name in s.hosts]:
        for vm in model.datastores.vms(store):
            model.registration.forget(vm)
        store.hosts[host.name] = False
    model.storage.rescan(host)
    model.datastores.rescan(host)
    model.storage.losses.clear()


# -- what a host finds -----------------------------------------------------------------------------


def test_sim_target_that_nobody_serves_gives_no_lun(esx: Esx, copies: Copies) -> None:
    esx.add(
        vim.host.InternetScsiHba.StaticTarget(
            address="127.0.0.1", port=copies.port, iScsiName="iqn.2026-11.test:nobody"
        )
    )
    assert esx.luns() == {}
    assert len(esx.host.refused) == 1


def test_sim_host_names_a_lun_by_what_it_says_of_itself(
    esx: Esx, copies: Copies, lun: Path
) -> None:
    target = copies.export(lun)
    esx.add(target)
    with Initiator(copies.uri(target)) as other:
        assert list(esx.luns()) == [canonical_name(other.inquiry(0x83))]
        assert esx.luns().popitem()[1].capacity.block == other.blocks
    assert copies.clients(target) == 1  # the host stays
    esx.remove(target)
    assert esx.luns() == {}
    copies.wait_without_clients(target)


def test_sim_host_without_adapter_has_no_targets(vcenter: Vcenter, client: Vsphere) -> None:
    bare = Esx(client, vcenter.model.hosts.add("bare", adapter=""), vcenter.model)
    device = bare.storage.storageDeviceInfo
    assert not device.softwareInternetScsiEnabled
    with pytest.raises(vim.fault.NotFound):
        bare.add(vim.host.InternetScsiHba.StaticTarget(address="127.0.0.1", iScsiName="iqn.x"))


def test_sim_removal_of_targets_removes_those_that_are_there_first(
    esx: Esx, copies: Copies, lun: Path
) -> None:
    target = copies.export(lun)
    esx.add(target)
    unknown = vim.host.InternetScsiHba.StaticTarget(address="127.0.0.1", iScsiName="iqn.unknown")
    with pytest.raises(vim.fault.NotFound):
        esx.storage.RemoveInternetScsiStaticTargets(ADAPTER, [unknown, target])
    assert esx.host.targets == []


@pytest.mark.parametrize("right", [True, False])
def test_sim_target_with_chap_takes_its_secret_only(
    right: bool, esx: Esx, folder: Path, lun: Path
) -> None:
    secret = os.urandom(8).hex()
    file = folder / f"secret-{right}"
    file.write_text(secret + "\n")
    file.chmod(0o600)
    table = {"chap": {"user": "backup", "secret_file": str(file)}}
    site = Copies(folder / f"chap-{right}", table)
    try:
        target = site.export(lun)
        target.authenticationProperties = vim.host.InternetScsiHba.AuthenticationProperties(
            chapAuthEnabled=True,
            chapName="backup",
            chapSecret=secret if right else "wrong-" + secret,
            chapAuthenticationType="chapRequired",
        )
        esx.add(target)
        assert bool(esx.luns()) == right
        (adapter,) = [
            a
            for a in esx.storage.storageDeviceInfo.hostBusAdapter
            if isinstance(a, vim.host.InternetScsiHba)
        ]
        shown = adapter.configuredStaticTarget[0].authenticationProperties
        assert shown is not None
        assert (shown.chapName, shown.chapSecret) == ("backup", None)
        esx.remove(target)
    finally:
        site.close()


# -- copies of a datastore -------------------------------------------------------------------------


def test_sim_resignature_writes_to_the_lun_it_was_asked_for(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    original = lun.read_bytes()
    target = copies.export(lun)
    esx.add(target)
    (copy,) = esx.unresolved()
    (extent,) = copy.extent
    assert copy.vmfsLabel == "ds1"
    assert [extent.device.diskName] == list(esx.luns())
    made = esx.resignature(extent.devicePath)
    assert made.name.startswith("snap-")
    assert made.name.endswith("-ds1")
    assert made.info.vmfs.uuid != copy.vmfsUuid
    assert esx.unresolved() == []
    (disk,) = esx.host.sessions
    other = IscsiDisk(disk.target, disk.lun)  # a session of its own
    found = read_header(other)
    other.close()
    assert found is not None
    assert (found.uuid, found.label) == (made.info.vmfs.uuid, made.name)
    assert found.device == extent.device.diskName
    assert lun.read_bytes() == original


def test_sim_read_only_lun_cannot_be_resignatured(esx: Esx, copies: Copies, lun: Path) -> None:
    esx.add(copies.export(lun, read_only=True))
    (copy,) = esx.unresolved()
    with pytest.raises(UnavailableError) as refused:
        esx.resignature(copy.extent[0].devicePath)
    assert isinstance(refused.value.__cause__, vim.fault.HostConfigFault)
    assert len(esx.unresolved()) == 1


def test_sim_resignature_of_a_lun_that_is_not_there_is_refused(esx: Esx) -> None:
    with pytest.raises(UnavailableError) as refused:
        esx.resignature("/vmfs/devices/disks/naa.6000:1")
    assert isinstance(refused.value.__cause__, vim.fault.NotFound)


def test_sim_copies_of_one_datastore_are_told_apart_by_their_luns(
    esx: Esx, copies: Copies, lun: Path
) -> None:
    esx.add(copies.export(lun), copies.export(lun))
    (both,) = esx.unresolved()  # one UUID, one label
    assert both.resolveStatus.multipleCopies
    paths = [extent.devicePath for extent in both.extent]
    assert len(paths) == 2
    with pytest.raises(UnavailableError) as refused:
        esx.resignature(*paths)
    assert isinstance(refused.value.__cause__, vim.fault.VmfsAmbiguousMount)
    first, second = esx.resignature(paths[0]), esx.resignature(paths[1])
    assert first.info.vmfs.uuid != second.info.vmfs.uuid


def test_sim_copy_of_several_extents_needs_all(
    esx: Esx, copies: Copies, folder: Path, vcenter: Vcenter
) -> None:
    model = vcenter.model
    files = [make_lun(folder / f"extent{n}.raw") for n in range(2)]
    naas = [f"naa.600a0980000000000000010{n}" for n in range(2)]
    disks = [model.storage.give("esx1", file, naa) for file, naa in zip(files, naas, strict=True)]
    model.datastores.make("wide", disks, ["esx1"])
    head, tail = (copies.export(file) for file in files)
    esx.add(tail)
    (half,) = esx.unresolved()
    assert half.resolveStatus.incompleteExtents
    esx.add(head)
    (copy,) = esx.unresolved()
    assert copy.resolveStatus.resolvable
    assert [extent.ordinal for extent in copy.extent] == [0, 1]
    made = esx.resignature(*[extent.devicePath for extent in copy.extent])
    assert {part.diskName for part in made.info.vmfs.extent} == set(esx.luns())


def test_sim_copy_has_the_files_and_disks_of_its_time(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    model = vcenter.model
    target = copies.export(lun)
    store = model.datastores.ensure("ds1")
    vmdks.write(store.volume, "web/web.vmdk", b"after!", 4096)
    model.add_vm(VmPlan(name="later", instance_uuid="5023-later", host="esx1"))
    made = esx.adopt(target)
    placeholder = esx.register(f"[{made.name}] web/web.vmx", "backup-web")
    assert placeholder.config.uuid == "564d0000-0000-4000-8000-000000000001"
    assert placeholder.runtime.host._moId == esx.host.managed.moid
    with pytest.raises(UnavailableError) as refused:
        esx.register(f"[{made.name}] later/later.vmx", "backup-later")
    assert isinstance(refused.value.__cause__, vim.fault.NotFound)
    volume = model.datastores.ensure(made.name).volume
    assert vmdks.read(volume, "web/web.vmdk", 6, 4096) == b"before"
    vmdks.write(store.volume, "web/web.vmdk", b"before", 4096)


def test_sim_datastore_appears_when_the_inventory_hears_of_it(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    esx.add(copies.export(lun))
    disk = esx.host.sessions[0]
    Volume([disk]).resignature("bound")  # by another host, say
    may_know = vcenter.model.weather.inventory_hold = threading.Event()
    try:
        esx.rescan()
        assert vcenter.model.datastores.by_name("bound") is None
    finally:
        vcenter.model.weather.inventory_hold = None
        may_know.set()
    until = time.monotonic() + 60
    while vcenter.model.datastores.by_name("bound") is None:
        assert time.monotonic() < until
        time.sleep(0.01)


# -- and the way back ------------------------------------------------------------------------------


def test_sim_island_that_is_taken_down_in_order_leaves_nothing(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    target = copies.export(lun)
    made = esx.adopt(target)
    uuid, (naa,) = made.info.vmfs.uuid, list(esx.luns())
    placeholder = esx.register(f"[{made.name}] web/web.vmx", "backup-web")
    with pytest.raises(vim.fault.ResourceInUse, match="backup-web"):
        esx.storage.UnmountVmfsVolume(uuid)
    placeholder.UnregisterVM()
    with pytest.raises(vim.fault.ResourceInUse):
        esx.storage.DetachScsiLun(esx.luns()[naa].uuid)
    esx.storage.UnmountVmfsVolume(uuid)
    with pytest.raises(vim.fault.InvalidState):
        esx.storage.UnmountVmfsVolume(uuid)
    esx.storage.DetachScsiLun(esx.luns()[naa].uuid)
    with pytest.raises(vim.fault.InvalidState):
        esx.storage.DetachScsiLun(esx.luns()[naa].uuid)
    esx.remove(target)
    esx.storage.DeleteScsiLunState(naa)
    esx.storage.DeleteVmfsVolumeState(uuid)
    with pytest.raises(vim.fault.NotFound):
        esx.storage.DeleteScsiLunState(naa)
    with pytest.raises(vim.fault.NotFound):
        esx.storage.DeleteVmfsVolumeState(uuid)
    with pytest.raises(vim.fault.NotFound):
        esx.storage.UnmountVmfsVolume(uuid)
    assert vcenter.model.datastores.by_uuid(uuid) is None
    copies.wait_without_clients(target)
    copies.withdraw(target)
    assert vcenter.model.storage.all_paths_down() == []


def test_sim_lun_that_is_pulled_first_is_all_paths_down(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    target = copies.export(lun)
    made = esx.adopt(target)
    esx.register(f"[{made.name}] web/web.vmx", "backup-pulled")
    copies.withdraw(target)
    (loss,) = vcenter.model.storage.all_paths_down()
    assert (loss.host, loss.vms) == (esx.host.name, ("backup-pulled",))
    assert not made.summary.accessible


def test_sim_detached_and_unmounted_stay_so_over_rescans_and_reboots(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    made = esx.adopt(copies.export(lun))
    uuid, (naa,) = made.info.vmfs.uuid, list(esx.luns())
    esx.storage.UnmountVmfsVolume(uuid)
    esx.rescan()
    assert not made.host[0].mountInfo.mounted
    esx.storage.DetachScsiLun(esx.luns()[naa].uuid)
    vcenter.model.hosts.reboot(esx.host.name)
    assert list(esx.luns()[naa].operationalState) == ["off"]
    assert esx.unresolved() == []
    esx.storage.AttachScsiLun(esx.luns()[naa].uuid)
    assert list(esx.luns()[naa].operationalState) == ["ok"]


def test_sim_placeholder_outlives_a_reboot_of_its_host(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    made = esx.adopt(copies.export(lun))
    placeholder = esx.register(f"[{made.name}] web/web.vmx", "backup-rebooted")
    vcenter.model.hosts.reboot(esx.host.name)
    assert placeholder.name == "backup-rebooted"
    assert made.summary.accessible
    assert vcenter.model.storage.all_paths_down() == []


def test_sim_host_that_is_disconnected_does_nothing(esx: Esx, vcenter: Vcenter) -> None:
    vcenter.model.hosts.set_state(esx.host.name, "disconnected")
    with pytest.raises(vmodl.fault.HostNotConnected):
        esx.storage.RescanAllHba()


def test_sim_datastore_that_is_destroyed_is_gone_from_its_lun(
    esx: Esx, copies: Copies, lun: Path, vcenter: Vcenter
) -> None:
    made = esx.adopt(copies.export(lun))
    name, disk = made.name, esx.host.sessions[0]
    esx.stores.RemoveDatastore(made)
    assert vcenter.model.datastores.destroyed[-1] == name
    assert read_header(disk) is None


# -- the layout on the LUN -------------------------------------------------------------------------


def test_sim_tree_that_is_torn_is_read_as_before_the_change(folder: Path) -> None:
    disk = FileDisk(make_lun(folder / "torn.raw"), "naa.6000000000000077")
    volume = Volume.make([disk], "torn")
    volume.write_text("a/a.vmx", "one")
    volume.write_text("a/a.vmx", "two")
    newest = (1 << 20) + (0x1400000, 0x1800000)[volume._sequence % 2]
    assert Volume([disk]).text("a/a.vmx") == "two"
    disk.pwrite(b"\xff" * 512, newest + 512)
    assert Volume([disk]).text("a/a.vmx") == "one"


def test_sim_page_83_gives_the_name_that_hosts_prefer() -> None:
    def designator(kind: int, data: bytes, association: int = 0) -> bytes:
        return bytes((1, association << 4 | kind, 0, len(data))) + data

    naa = designator(3, bytes.fromhex("6001405aabbccdd0"))
    t10, port = designator(1, b"OFFLOAD abc"), designator(3, bytes(8), association=1)
    head = b"\0\x83\0\0"
    assert canonical_name(head + port + t10 + naa) == "naa.6001405aabbccdd0"
    assert canonical_name(head + port + t10) == "t10.OFFLOAD_abc"
