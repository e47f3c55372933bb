"""The inventory of vSphere, against the simulator: no vCenter runs here."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim

from offload import compose
from offload.errors import (
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)
from offload.hypervisor import Hypervisor
from offload.hypervisors.vsphere import following, hypervisor
from offload.inventory import InventoryVm
from offload.machine import DiskKind, MachineDisk
from offload.testing.certificates import Wanted, issue, make_authority, write_server
from offload.testing.instances import free_port, make_instance
from tests.vsphere_sim.model import Model
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.server import Vcenter, running_vcenter
from tests.vsphere_sim.soap import served
from tests.vsphere_sim.vms import DiskPlan, VmPlan

pytestmark = pytest.mark.timeout(120)

LUN1, LUN2, LUN9 = (f"naa.6001405{n:025x}" for n in (1, 2, 9))
PLANS = (
    VmPlan(name="web", instance_uuid="5001-web", folder="web/shop", host="esx1", firmware="uefi"),
    VmPlan(
        name="wide", instance_uuid="5001-wide", host="esx2", datastore="wide", tools=False,
        disks=(
            DiskPlan(size_bytes=8 << 20),
            DiskPlan(datastore="ds1", mode="independent_persistent"),
            DiskPlan(place="scsi1:0", shared_bus="physical"),
            DiskPlan(place="sata0:3", sharing="multi-writer"),
        ),
    ),
    VmPlan(
        name="mapped", instance_uuid="5001-mapped", host="esx2",
        disks=(
            DiskPlan(kind="rdm", lun=LUN9),
            DiskPlan(kind="rdm-physical", lun=LUN9),
            DiskPlan(kind="rdm", lun="naa.6001405fffffffffffffffffffffffff"),
        ),
    ),
    VmPlan(name="nas", instance_uuid="5001-nas", datastore="nas1", power="poweredOff"),
    VmPlan(name="hci", instance_uuid="5001-hci", datastore="vsan1", power="suspended"),
    VmPlan(name="vvol", instance_uuid="5001-vvol", datastore="vvol1"),
    VmPlan(name="golden", instance_uuid="5001-golden", template=True, power="poweredOff"),
    VmPlan(name="sealed", instance_uuid="5001-sealed", encrypted=True),
)  # fmt: skip


def fill(model: Model, folder: Path) -> None:
    """Two hosts, one of which sees the LUN of the RDMs; datastores of all kinds; VMs."""
    for name in ("esx1", "esx2"):
        model.hosts.add(name)
    lun = folder / "lun9"
    lun.write_bytes(bytes(1 << 20))
    model.storage.give("esx2", lun, LUN9)
    model.datastores.add("ds1", luns=[LUN1])
    model.datastores.add("wide", luns=[LUN1, LUN2])
    for name, kind in (("nas1", "NFS"), ("vsan1", "vsan"), ("vvol1", "VVOL")):
        model.datastores.add(name, kind)
    for plan in PLANS:
        model.add_vm(plan)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vcenter]:
    """For tests that change nothing."""
    folder = tmp_path_factory.mktemp("vc")
    with running_vcenter(folder / "vcenter") as started:
        fill(started.model, folder)
        yield started
        assert started.model.sessions == 0


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Vcenter]:
    with running_vcenter(tmp_path / "vcenter") as started:
        fill(started.model, tmp_path)
        yield started


def connect(folder: Path, table: dict[str, Any]) -> Hypervisor:
    return compose.hypervisor("vc", make_instance(folder, {"hypervisors": {"vc": table}}))


@pytest.fixture(scope="module")
def vms(site: Vcenter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, InventoryVm]:
    with connect(tmp_path_factory.mktemp("inst"), site.table()) as opened:
        return {vm.name: vm for vm in opened.inventory().vms}


# -- what is read ----------------------------------------------------------------------------------


def test_inventory_has_all_that_there_is(site: Vcenter, tmp_path: Path) -> None:
    with connect(tmp_path, site.table()) as opened:
        found = opened.inventory()
    assert {vm.name for vm in found.vms} == {plan.name for plan in PLANS}
    stores = {store.name: store for store in found.datastores}
    assert stores["wide"].luns == (LUN1, LUN2)
    assert (stores["nas1"].kind, stores["nas1"].luns) == ("NFS", ())
    assert stores["ds1"].capacity_bytes > stores["ds1"].free_bytes > 0
    assert {(host.name, host.state) for host in found.hosts} == {
        ("esx1", "connected"), ("esx2", "connected"),
    }  # fmt: skip
    assert found.hypervisor == "vc"


def test_inventory_in_many_pages_is_whole(
    site: Vcenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_PAGE", 3)
    with connect(tmp_path, site.table()) as opened:
        found = opened.inventory()
    assert {vm.name for vm in found.vms} == {plan.name for plan in PLANS}


def test_vm_has_its_place_and_what_it_is(vms: dict[str, InventoryVm]) -> None:
    web = vms["web"]
    assert (web.folder, web.host, web.power) == ("/DC0/vm/web/shop", "esx1", "on")
    assert (web.tools, web.firmware, web.instance_uuid) == ("running", "uefi", "5001-web")
    assert (vms["nas"].power, vms["hci"].power) == ("off", "suspended")
    assert vms["wide"].tools == "not-installed"
    assert vms["golden"].template
    assert vms["sealed"].encrypted
    assert (web.template, web.encrypted, web.placeholder) == (False, False, "")


def test_disk_lies_on_all_extents_of_its_datastore(vms: dict[str, InventoryVm]) -> None:
    disk = vms["wide"].disks[0]
    assert disk == MachineDisk(
        name="scsi0:0",
        label="Hard disk 1",
        kind=DiskKind.FLAT,
        path="[wide] wide/wide.vmdk",
        size_bytes=8 << 20,
        datastore="wide",
        luns=(LUN1, LUN2),
    )


def test_disks_out_of_the_ordinary_are_marked(vms: dict[str, InventoryVm]) -> None:
    disks = {disk.name: disk for disk in vms["wide"].disks}
    assert disks["scsi0:1"].independent
    assert disks["scsi0:1"].luns == (LUN1,)
    assert disks["scsi1:0"].shared
    assert disks["sata0:3"].shared
    assert (disks["scsi0:0"].independent, disks["scsi0:0"].shared) == (False, False)


def test_rdm_is_on_the_lun_that_it_maps(vms: dict[str, InventoryVm]) -> None:
    virtual, physical, unknown = vms["mapped"].disks
    assert (virtual.kind, virtual.luns) == (DiskKind.RDM, (LUN9,))
    assert (physical.kind, physical.luns) == (DiskKind.RDM_PHYSICAL, (LUN9,))
    assert unknown.luns == ()
    assert "no host knows the LUN" in unknown.problem


@pytest.mark.parametrize(
    ("name", "kind", "store"),
    [
        ("nas", DiskKind.FLAT, "nas1 (NFS)"),
        ("hci", DiskKind.VSAN, "vsan1 (vsan)"),
        ("vvol", DiskKind.VVOL, "vvol1 (VVOL)"),
    ],
)
def test_disk_without_a_lun_says_why(
    name: str, kind: DiskKind, store: str, vms: dict[str, InventoryVm]
) -> None:
    (disk,) = vms[name].disks
    assert (disk.kind, disk.luns) == (kind, ())
    assert f"{store}: there is no LUN" in disk.problem


def test_vm_with_snapshots_has_the_chain_of_its_disks(own: Vcenter, tmp_path: Path) -> None:
    disk = own.model.objects[vm_of(own, "web").moid].properties["config"].hardware.device[-2]
    base = disk.backing
    disk.backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
        fileName="[wide] web/web-000001.vmdk",
        diskMode="persistent",
        parent=base,
        datastore=own.model.datastores.by_name("wide").managed.ref,  # type: ignore[union-attr]
    )
    with connect(tmp_path, own.table()) as opened:
        (web,) = [vm for vm in opened.inventory().vms if vm.name == "web"]
    assert web.disks[0].path == "[wide] web/web-000001.vmdk"
    assert web.disks[0].chain == ("[ds1] web/web.vmdk",)
    assert set(web.disks[0].luns) == {LUN1, LUN2}


def test_placeholder_is_known_by_its_mark(own: Vcenter, tmp_path: Path) -> None:
    plan = VmPlan(name="backup-web", instance_uuid="5001-web", annotation="Placeholder of offload")
    made = own.model.add_vm(plan)
    mark = vim.option.OptionValue(key="offload.island", value="inst1/isl1")
    made.properties["config"].extraConfig = [*made.properties["config"].extraConfig, mark]
    with connect(tmp_path, own.table()) as opened:
        found = {vm.name: vm.placeholder for vm in opened.inventory().vms}
        assert found["backup-web"] == "isl1"
        assert found["web"] == ""
        assert opened.find("5001-WEB") == vm_of(own, "web").moid


# -- one VM ----------------------------------------------------------------------------------------


def test_vm_is_found_by_name_and_uuid(site: Vcenter, tmp_path: Path) -> None:
    with connect(tmp_path, site.table()) as opened:
        moref = opened.find("web")
        assert opened.find("5001-WEB") == moref
        for unknown in ("golden", "no-such-vm"):
            with pytest.raises(NotFoundError) as refused:
                opened.find(unknown)
            assert refused.value.code == "unknown-vm"


def test_vm_that_is_one_of_two_is_refused(own: Vcenter, tmp_path: Path) -> None:
    own.model.add_vm(VmPlan(name="web", instance_uuid="5001-other"))
    with connect(tmp_path, own.table()) as opened:
        with pytest.raises(NotFoundError) as refused:
            opened.find("web")
        assert refused.value.code == "ambiguous-vm"
        assert "5001-other, 5001-web" in refused.value.hint
        opened.find("5001-other")


def test_settings_are_the_vmx_the_nvram_and_a_summary(site: Vcenter, tmp_path: Path) -> None:
    with connect(tmp_path, site.table()) as opened:
        machine = opened.machine(opened.find("web"))
        assert machine.disks == next(v for v in opened.inventory().vms if v.name == "web").disks
    assert machine.definition_path == "[ds1] web/web.vmx"
    assert 'displayName = "web"' in machine.definition
    assert base64.b64decode(machine.files["nvram"]) == b"nvram of web\n"
    assert (machine.uuid, machine.instance_uuid) == (PLANS[0].bios_uuid, "5001-web")
    assert machine.summary["firmware"] == "uefi"
    assert machine.summary["folder"] == "/DC0/vm/web/shop"
    assert machine.summary["networks"] == [
        {"name": "VM Network", "mac": PLANS[0].mac, "model": "vmxnet3"}
    ]
    assert machine.summary["memory_bytes"] == 64 << 20


def test_settings_leave_out_what_would_let_somebody_in(own: Vcenter, tmp_path: Path) -> None:
    store = own.model.datastores.by_name("ds1")
    assert store is not None
    text = store.volume.text("web/web.vmx")
    store.volume.write_text(
        "web/web.vmx", f'{text}RemoteDisplay.vnc.password = "Pa55"\nvnc.key = "Pa55"\nx = "y"\n'
    )
    with connect(tmp_path, own.table()) as opened:
        machine = opened.machine(opened.find("web"))
    assert "Pa55" not in str(machine.to_dict())
    assert 'x = "y"' in machine.definition


def test_settings_of_a_vm_that_is_gone_are_not_found(site: Vcenter, tmp_path: Path) -> None:
    with connect(tmp_path, site.table()) as opened, pytest.raises(NotFoundError) as refused:
        opened.machine("vm-4711")
    assert refused.value.code == "unknown-vm"


def test_settings_need_a_privilege_that_is_named(own: Vcenter, tmp_path: Path) -> None:
    own.model.privileges.deny("Datastore.Browse")
    with connect(tmp_path, own.table()) as opened, pytest.raises(PrivilegeError) as refused:
        opened.machine(opened.find("web"))
    assert "[ds1] web/web.vmx" in refused.value.message


# -- tags ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_tags_of_vms_are_known(old: bool, own: Vcenter, tmp_path: Path) -> None:
    tags = own.model.tags
    tags.old_only = old
    tags.attach("backup:nightly", vm_of(own, "web"), vm_of(own, "wide"))
    tags.attach("tier:gold", vm_of(own, "web"), own.model.hosts.all["esx1"].managed)
    tags.attach("unused:by-vms", own.model.hosts.all["esx1"].managed)
    with connect(tmp_path, own.table()) as opened:
        found = opened.inventory()
        settings = opened.machine(opened.find("web"))
    by_name = {vm.name: vm.tags for vm in found.vms}
    assert by_name["web"] == ("backup:nightly", "tier:gold")
    assert by_name["wide"] == ("backup:nightly",)
    assert by_name["nas"] == ()
    assert found.tags_problem == ""
    assert settings.summary["tags"] == ["backup:nightly", "tier:gold"]
    assert tags.sessions == 0


def test_tags_that_change_are_followed(
    opened: Hypervisor, own: Vcenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.model.tags.attach("backup:nightly", vm_of(own, "web"))
    assert not opened.changes(0), "nothing tells of them: they are read now and then"
    monkeypatch.setattr(hypervisor, "_TAGS_S", 0.0)
    assert [vm.tags for vm in opened.changes(0).vms] == [("backup:nightly",)]
    own.model.tags.detach("backup:nightly", vm_of(own, "web"))
    assert [vm.tags for vm in opened.changes(0).vms] == [()]


def test_tags_that_cannot_be_read_are_a_problem_of_the_inventory(
    own: Vcenter, tmp_path: Path
) -> None:
    own.model.web._served = []  # its services for REST do not run
    with connect(tmp_path, own.table()) as opened:
        found = opened.inventory()
    assert "has no REST API" in found.tags_problem
    assert len(found.vms) == len(PLANS)


def test_tags_that_cannot_be_read_again_are_not_taken_for_gone(
    own: Vcenter, tmp_path: Path
) -> None:
    own.model.tags.attach("backup:nightly", vm_of(own, "web"))
    with connect(tmp_path, own.table()) as opened:
        opened.inventory()
        own.model.web._served = []
        own.model.restart()
        own.model.set_power(vm_of(own, "web"), "poweredOff")
        change = opened.changes(30)
    assert [(vm.name, vm.tags) for vm in change.vms] == [("web", ("backup:nightly",))]
    assert "has no REST API" in change.tags_problem


def test_single_host_has_no_tags_and_is_not_asked_for_them(own: Vcenter, tmp_path: Path) -> None:
    own.model.inventory.content.about.apiType = "HostAgent"
    own.model.web._served = []
    with connect(tmp_path, own.table()) as opened:
        assert opened.inventory().tags_problem == ""


# -- what changes ----------------------------------------------------------------------------------


def vm_of(vcenter: Vcenter, name: str) -> Managed:
    return next(
        found
        for found in vcenter.model.objects.values()
        if isinstance(found.ref, vim.VirtualMachine) and found.properties["name"] == name
    )


@pytest.fixture
def opened(own: Vcenter, tmp_path: Path) -> Iterator[Hypervisor]:
    with connect(tmp_path, own.table()) as hypervisor:
        hypervisor.inventory()
        yield hypervisor


def test_changes_are_empty_where_nothing_changed(opened: Hypervisor) -> None:
    assert not opened.changes(0)


def test_vmotion_is_followed(opened: Hypervisor, own: Vcenter) -> None:
    own.model.events.vmotion(vm_of(own, "web"), "esx2")
    change = opened.changes(30)
    assert [(vm.name, vm.host) for vm in change.vms] == [("web", "esx2")]
    assert change.gone == ()


def test_storage_vmotion_is_followed(opened: Hypervisor, own: Vcenter) -> None:
    own.model.events.storage_vmotion(vm_of(own, "web"), "wide")
    (web,) = opened.changes(30).vms
    assert (web.disks[0].datastore, web.disks[0].luns) == ("wide", (LUN1, LUN2))


def test_rdm_that_was_added_is_looked_up(opened: Hypervisor, own: Vcenter) -> None:
    own.model.add_vm(
        VmPlan(name="new", instance_uuid="n", host="esx2", disks=(DiskPlan(kind="rdm", lun=LUN9),))
    )
    (new,) = opened.changes(30).vms
    assert new.disks[0].luns == (LUN9,)


def test_vm_that_went_is_gone(opened: Hypervisor, own: Vcenter) -> None:
    nas = vm_of(own, "nas")
    own.model.forget(nas)
    change = opened.changes(30)
    assert change.gone == (nas.moid,)
    assert change.vms == ()


def test_renamed_folder_shows_in_the_vms_below(opened: Hypervisor, own: Vcenter) -> None:
    folder = vm_of(own, "web").parent
    assert folder is not None
    with own.model.changed:
        folder.properties["name"] = "store"
        own.model.changed.notify_all()
    assert [(vm.name, vm.folder) for vm in opened.changes(30).vms] == [("web", "/DC0/vm/web/store")]


def test_renamed_datastore_shows_in_its_vms(opened: Hypervisor, own: Vcenter) -> None:
    nas = own.model.datastores.by_name("nas1")
    assert nas is not None
    with own.model.changed:
        nas.managed.properties["name"] = "nas2"
        own.model.changed.notify_all()
    change = opened.changes(30)
    assert [store.name for store in change.datastores] == ["nas2"]
    assert [vm.disks[0].datastore for vm in change.vms] == ["nas2"]


def test_host_in_maintenance_is_told(opened: Hypervisor, own: Vcenter) -> None:
    own.model.hosts.set_state("esx1", maintenance=True)
    assert [(host.name, host.state) for host in opened.changes(30).hosts] == [
        ("esx1", "maintenance")
    ]


@pytest.mark.parametrize("lose", [Model.end_sessions, Model.restart])
def test_lost_session_is_made_again_and_the_difference_told(
    lose: Callable[[Model], None], opened: Hypervisor, own: Vcenter
) -> None:
    lose(own.model)
    nas = vm_of(own, "nas")
    own.model.forget(nas)
    own.model.set_power(vm_of(own, "web"), "poweredOff")
    change = opened.changes(30)
    assert [(vm.name, vm.power) for vm in change.vms] == [("web", "off")]
    assert change.gone == (nas.moid,)
    own.model.set_power(vm_of(own, "web"), "poweredOn")
    assert [vm.power for vm in opened.changes(30).vms] == ["on"]
    assert own.model.sessions == 1


def test_server_that_stays_away_is_unavailable(opened: Hypervisor, own: Vcenter) -> None:
    away = vim.fault.HostConnectFault()
    own.model.end_sessions()
    own.model.weather.fault = lambda method: away if method == "Login" else None
    with pytest.raises(UnavailableError):
        opened.changes(0)
    own.model.weather.fault = lambda _method: None
    own.model.set_power(vm_of(own, "web"), "poweredOff")
    assert [vm.name for vm in opened.changes(0).vms] == ["web"]


# -- what is refused, in one line ------------------------------------------------------------------


def refused(folder: Path, table: dict[str, Any]) -> OffloadError:
    with pytest.raises(OffloadError) as caught, connect(folder, table) as opened:
        opened.inventory()
    assert "\n" not in caught.value.message
    return caught.value


def test_wrong_password_is_told(own: Vcenter, tmp_path: Path) -> None:
    (own.folder / "password").write_text("Pa55-of-another-server\n")
    error = refused(tmp_path, own.table())
    assert (error.code, error.exit_code) == ("vsphere-login", ConfigError.exit_code)
    assert "Pa55" not in error.message


def test_thumbprint_that_changed_is_told_with_both(site: Vcenter, tmp_path: Path) -> None:
    other = ":".join(["AB"] * 32)
    error = refused(tmp_path, site.table(certificates=None, thumbprint=other))
    assert error.code == "vsphere-certificate"
    assert site.thumbprint in error.message
    assert other in error.message


def test_certificate_that_has_expired_is_told(own: Vcenter, tmp_path: Path) -> None:
    authority = make_authority()
    folder = write_server(tmp_path / "old", authority, issue("s", Wanted(days=(-9, -1)), authority))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    with served(own.model, context) as port:
        authorities = str(folder / "ca-cert.pem")
        error = refused(tmp_path, own.table(port=port, certificates=authorities))
    assert error.code == "vsphere-certificate"
    assert "certificate has expired" in error.message


def test_server_that_does_not_listen_is_told(site: Vcenter, tmp_path: Path) -> None:
    error = refused(tmp_path, site.table(port=free_port()))
    assert (error.code, error.exit_code) == ("vsphere-unavailable", UnavailableError.exit_code)


def test_missing_privilege_is_told_with_its_object(own: Vcenter, tmp_path: Path) -> None:
    fault = vim.fault.NoPermission(object=vim.VirtualMachine("vm-7"), privilegeId="System.Read")
    own.model.weather.fault = lambda method: fault if method == "WaitForUpdatesEx" else None
    error = refused(tmp_path, own.table())
    assert (error.code, error.exit_code) == ("vsphere-privilege", PrivilegeError.exit_code)
    assert "the privilege System.Read on VirtualMachine vm-7" in error.message
