"""The simulator's vCenter: sessions, the property collector, tasks, privileges, tags, files."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim, vmodl
from vsphere_sim_lab import client_of, disks_of, done, vcenter_vm

from offload.configs.hypervisors import VsphereConfig
from offload.errors import ConfigError, PrivilegeError, UnavailableError
from offload.vsphere import Vsphere
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.server import PASSWORD, USER, Vcenter, running_vcenter
from tests.vsphere_sim.vms import DiskPlan, VmPlan

pytestmark = pytest.mark.timeout(300)

_KINDS = vmodl.query.PropertyCollector


@pytest.fixture(scope="module")
def vcenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vcenter]:
    with running_vcenter(tmp_path_factory.mktemp("vc")) as started:
        for name in ("esx1", "esx2"):
            started.model.hosts.add(name)
        yield started


@pytest.fixture
def client(vcenter: Vcenter) -> Iterator[Vsphere]:
    with client_of(vcenter) as session:
        yield session


@pytest.fixture
def web(vcenter: Vcenter) -> Iterator[Managed]:
    made = vcenter.model.add_vm(VmPlan(name="web", instance_uuid="5023", host="esx1", folder="a/b"))
    yield made
    vcenter.model.registration.forget(made)


# -- sessions --------------------------------------------------------------------------------------


def test_sim_login_with_another_password_is_refused(vcenter: Vcenter, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong\n")
    wrong.chmod(0o600)
    table = {**vcenter.table(), "password_file": str(wrong)}
    with pytest.raises(ConfigError) as refused:
        Vsphere(VsphereConfig.model_validate(table))
    assert refused.value.code == "vsphere-login"


def test_sim_session_that_has_ended_is_told_in_a_call_and_in_a_wait(
    vcenter: Vcenter, client: Vsphere, web: Managed
) -> None:
    collector = client.content.propertyCollector.CreatePropertyCollector()
    vm = vcenter_vm(vcenter, client, "web")
    collector.CreateFilter(_spec(vm, "name"), partialUpdates=False)
    found = collector.WaitForUpdatesEx("", _KINDS.WaitOptions(maxWaitSeconds=0))
    faults: list[Exception] = []

    def wait() -> None:
        try:
            collector.WaitForUpdatesEx(found.version, _KINDS.WaitOptions(maxWaitSeconds=60))
        except vmodl.MethodFault as error:
            faults.append(error)

    other = threading.Thread(target=wait)
    other.start()
    vcenter.model.end_sessions()
    web.properties.touch("name")
    with vcenter.model.changed:
        vcenter.model.changed.notify_all()
    other.join(60)
    assert [type(fault) for fault in faults] == [vim.fault.NotAuthenticated]
    with pytest.raises(vim.fault.NotAuthenticated):
        _ = vm.name


def test_sim_restart_forgets_sessions_tasks_and_collectors(
    vcenter: Vcenter, client: Vsphere, web: Managed
) -> None:
    task = vcenter_vm(vcenter, client, "web").Rename_Task("web")
    done(client, task)
    collector = client.content.propertyCollector.CreatePropertyCollector()
    vcenter.model.restart()
    with client_of(vcenter) as again:
        for lost in (
            vim.Task(task._moId, again.stub),
            type(collector)(collector._moId, again.stub),
        ):
            with pytest.raises(vmodl.fault.ManagedObjectNotFound):
                again.stub.InvokeAccessor(lost, vim.Task._GetPropertyInfo("info"))
        assert vcenter_vm(vcenter, again, "web").name == "web"


# -- the property collector ------------------------------------------------------------------------


def _spec(managed: Any, *paths: str) -> Any:
    return _KINDS.FilterSpec(
        objectSet=[_KINDS.ObjectSpec(obj=managed)],
        propSet=[_KINDS.PropertySpec(type=type(managed), pathSet=list(paths))],
    )


def _view_spec(view: Any, *paths: str) -> Any:
    step = _KINDS.TraversalSpec(name="v", type=type(view), path="view", skip=False)
    return _KINDS.FilterSpec(
        objectSet=[_KINDS.ObjectSpec(obj=view, skip=True, selectSet=[step])],
        propSet=[_KINDS.PropertySpec(type=vim.VirtualMachine, pathSet=list(paths))],
    )


@pytest.fixture
def many(vcenter: Vcenter) -> Iterator[list[Managed]]:
    made = [
        vcenter.model.add_vm(VmPlan(name=f"many{n}", instance_uuid=f"m{n}", folder="many"))
        for n in range(7)
    ]
    yield made
    for vm in made:
        if vm.moid in vcenter.model.objects:
            vcenter.model.registration.forget(vm)


def test_sim_results_come_in_pages(vcenter: Vcenter, client: Vsphere, many: list[Managed]) -> None:
    view = client.view([vim.VirtualMachine])
    collector = client.content.propertyCollector
    page = collector.RetrievePropertiesEx(
        [_view_spec(view, "name")], _KINDS.RetrieveOptions(maxObjects=3)
    )
    sizes = [len(page.objects)]
    while page.token:
        page = collector.ContinueRetrievePropertiesEx(page.token)
        sizes.append(len(page.objects))
    assert sizes == [3, 3, 1]


def test_sim_view_of_a_folder_has_what_is_in_it(
    vcenter: Vcenter, client: Vsphere, many: list[Managed], web: Managed
) -> None:
    folder = vim.Folder(vcenter.model.inventory.add_folder("many").moid, client.stub)
    view = client.content.viewManager.CreateContainerView(folder, [vim.VirtualMachine], True)
    assert {vm._moId for vm in view.view} == {vm.moid for vm in many}


def test_sim_updates_tell_what_has_changed_and_no_more(
    vcenter: Vcenter, client: Vsphere, many: list[Managed]
) -> None:
    model = vcenter.model
    view = client.view([vim.VirtualMachine])
    collector = client.content.propertyCollector.CreatePropertyCollector()
    collector.CreateFilter(_view_spec(view, "name", "runtime.powerState"), partialUpdates=False)
    no_wait = _KINDS.WaitOptions(maxWaitSeconds=0)
    first = collector.WaitForUpdatesEx("", no_wait)
    assert [u.kind for u in first.filterSet[0].objectSet] == ["enter"] * 7
    assert collector.WaitForUpdatesEx(first.version, no_wait) is None
    model.set_power(many[0], "poweredOff")
    model.registration.forget(many[1])
    second = collector.WaitForUpdatesEx(first.version, no_wait)
    changes = {u.obj._moId: u for u in second.filterSet[0].objectSet}
    assert {moid: u.kind for moid, u in changes.items()} == {
        many[0].moid: "modify", many[1].moid: "leave",
    }  # fmt: skip
    assert [(c.name, c.val) for c in changes[many[0].moid].changeSet] == [
        ("runtime.powerState", "poweredOff")
    ]
    with pytest.raises(vmodl.query.InvalidCollectorVersion):
        collector.WaitForUpdatesEx("4711", no_wait)
    whole = collector.WaitForUpdatesEx("", no_wait)
    assert len(whole.filterSet[0].objectSet) == 6


def test_sim_updates_that_are_too_many_are_truncated(
    vcenter: Vcenter, client: Vsphere, many: list[Managed]
) -> None:
    view = client.view([vim.VirtualMachine])
    collector = client.content.propertyCollector.CreatePropertyCollector()
    collector.CreateFilter(_view_spec(view, "name"), partialUpdates=False)
    options = _KINDS.WaitOptions(maxWaitSeconds=0, maxObjectUpdates=4)
    first = collector.WaitForUpdatesEx("", options)
    rest = collector.WaitForUpdatesEx(first.version, options)
    assert (first.truncated, rest.truncated) == (True, False)
    assert [len(f.filterSet[0].objectSet) for f in (first, rest)] == [4, 3]


# -- tasks -----------------------------------------------------------------------------------------


def test_sim_vm_does_one_task_at_a_time(vcenter: Vcenter, client: Vsphere, web: Managed) -> None:
    may_end = vcenter.model.weather.hold["ReconfigVM_Task"] = threading.Event()
    vm = vcenter_vm(vcenter, client, "web")
    task = vm.ReconfigVM_Task(vim.vm.ConfigSpec(annotation="one"))
    with pytest.raises(vim.fault.TaskInProgress) as refused:
        vm.CreateSnapshot_Task("s", "", False, False)
    assert refused.value.task._moId == task._moId
    may_end.set()
    done(client, task)
    del vcenter.model.weather.hold["ReconfigVM_Task"]
    assert vm.config.annotation == "one"
    assert "one" in vcenter.model.registration.settings(web)["annotation"]


def test_sim_calls_are_recorded_with_who_and_when(vcenter: Vcenter, client: Vsphere) -> None:
    begun = time.monotonic()
    client.clock()
    last = vcenter.model.record[-1]
    assert last.method == "CurrentTime"
    assert last.at >= begun
    assert last.session


# -- privileges ------------------------------------------------------------------------------------


def test_sim_privilege_that_is_missing_is_named_with_its_object(
    vcenter: Vcenter, client: Vsphere, web: Managed
) -> None:
    privileges = vcenter.model.privileges
    folder = vcenter.model.inventory.add_folder("a")
    privileges.deny("VirtualMachine.State.CreateSnapshot", folder)
    vm = vcenter_vm(vcenter, client, "web")
    try:
        with pytest.raises(vim.fault.NoPermission) as refused:
            vm.CreateSnapshot_Task("s", "", False, False)
        manager = client.content.authorizationManager
        asked = ["VirtualMachine.State.CreateSnapshot", "Folder.Create"]
        session = client.read(client.content.sessionManager, "currentSession")["currentSession"]
        assert list(manager.HasPrivilegeOnEntity(vm, session.key, asked)) == [False, True]
    finally:
        privileges.grant("VirtualMachine.State.CreateSnapshot", folder)
    assert refused.value.privilegeId == "VirtualMachine.State.CreateSnapshot"
    assert refused.value.object is not None
    assert refused.value.object._moId == web.moid


def test_sim_read_only_api_refuses_changes(vcenter: Vcenter, client: Vsphere, web: Managed) -> None:
    vcenter.model.privileges.read_only = True
    try:
        with pytest.raises(PrivilegeError), client.translated("a snapshot"):
            vcenter_vm(vcenter, client, "web").CreateSnapshot_Task("s", "", False, False)
    finally:
        vcenter.model.privileges.read_only = False


# -- inventory -------------------------------------------------------------------------------------


def test_sim_vmotion_and_storage_vmotion_move_a_vm(
    vcenter: Vcenter, client: Vsphere, web: Managed
) -> None:
    vm = vcenter_vm(vcenter, client, "web")
    vcenter.model.events.vmotion(web, "esx2")
    assert vm.runtime.host.name == "esx2"
    vcenter.model.events.storage_vmotion(web, "ds-other")
    assert [store.name for store in vm.datastore] == ["ds-other"]
    assert vm.config.files.vmPathName == "[ds-other] web/web.vmx"
    (disk,) = disks_of(vm)
    assert disk.backing.fileName == "[ds-other] web/web.vmdk"
    wanted = vim.event.EventFilterSpec(
        entity=vim.event.EventFilterSpec.ByEntity(entity=vm, recursion="self"),
        eventTypeId=["VmMigratedEvent", "VmRelocatedEvent"],
    )
    events = client.content.eventManager.QueryEvents(wanted)
    assert [type(e) for e in events] == [vim.event.VmMigratedEvent, vim.event.VmRelocatedEvent]


def test_sim_disks_of_all_kinds_are_shown_as_they_are(vcenter: Vcenter, client: Vsphere) -> None:
    naa = "naa.600a0980000000000000000000000042"
    disks = (
        DiskPlan(),
        DiskPlan(kind="rdm", lun=naa),
        DiskPlan(kind="rdm-physical", lun=naa),
        DiskPlan(mode="independent_persistent"),
        DiskPlan(sharing="multi-writer", datastore="ds-second"),
        DiskPlan(shared_bus="physical", place="scsi1:0"),
    )
    plan = VmPlan(
        name="odd", instance_uuid="odd", disks=disks, encrypted=True, firmware="uefi",
        secure_boot=True,
    )  # fmt: skip
    made = vcenter.model.add_vm(plan)
    config = vcenter_vm(vcenter, client, "odd").config
    found = [disk.backing for disk in disks_of(vcenter_vm(vcenter, client, "odd"))]
    assert [b.compatibilityMode for b in found[1:3]] == ["virtualMode", "physicalMode"]
    assert found[1].lunUuid == vcenter.model.storage.lun_uuid(naa)
    assert found[3].diskMode == "independent_persistent"
    assert found[4].sharing == "sharingMultiWriter"
    assert found[4].datastore.name == "ds-second"
    buses = [d.sharedBus for d in config.hardware.device if hasattr(d, "sharedBus")]
    assert buses == ["noSharing", "physicalSharing"]
    assert (config.firmware, config.bootOptions.efiSecureBootEnabled) == ("efi", True)
    assert config.keyId is not None
    vcenter.model.registration.forget(made)


def test_sim_name_that_is_taken_in_a_folder_is_refused(
    vcenter: Vcenter, client: Vsphere, web: Managed
) -> None:
    folder = vim.Folder(vcenter.model.inventory.add_folder("a/b").moid, client.stub)
    with pytest.raises(vim.fault.DuplicateName):
        folder.CreateFolder("web")
    with pytest.raises(vim.fault.InvalidName):
        folder.CreateFolder("x" * 80)


# -- changes of VMs --------------------------------------------------------------------------------


def test_sim_changes_of_devices_are_in_the_vmx(
    vcenter: Vcenter, client: Vsphere, web: Managed
) -> None:
    vm, kinds = vcenter_vm(vcenter, client, "web"), vim.vm.device
    devices = vm.config.hardware.device
    (card,) = [d for d in devices if isinstance(d, kinds.VirtualEthernetCard)]
    (disk,) = disks_of(vm)
    assert card.connectable is not None
    card.connectable.startConnected = False
    disk.capacityInBytes = 4 << 20
    edits = [kinds.VirtualDeviceSpec(operation="edit", device=d) for d in (card, disk)]
    added = kinds.VirtualDisk(
        key=-1, controllerKey=1000, unitNumber=1, capacityInKB=2048,
        backing=kinds.VirtualDisk.FlatVer2BackingInfo(fileName="[ds1]", diskMode="persistent"),
    )  # fmt: skip
    edits.append(kinds.VirtualDeviceSpec(operation="add", fileOperation="create", device=added))
    done(client, vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=edits)))
    settings = vcenter.model.registration.settings(web)
    assert settings["ethernet0.startConnected"] == "FALSE"
    sizes = [d.capacityInBytes for d in vm.config.hardware.device if hasattr(d, "capacityInKB")]
    assert sizes == [4 << 20, 2 << 20]
    last = vm.config.hardware.device[2]
    gone = kinds.VirtualDeviceSpec(operation="remove", device=last)
    done(client, vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[gone])))
    assert "scsi0:1.fileName" not in vcenter.model.registration.settings(web)
    disk.capacityInBytes = 1 << 20
    shrunk = kinds.VirtualDeviceSpec(operation="edit", device=disk)
    with pytest.raises(UnavailableError):
        done(client, vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[shrunk])))


# -- beside SOAP -----------------------------------------------------------------------------------


def _ask(
    client: Vsphere, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = client.connection()
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_sim_files_are_for_sessions_only(vcenter: Vcenter, client: Vsphere, web: Managed) -> None:
    place = "/folder/web/web.vmx?dcPath=DC0&dsName=ds1"
    cookie = client.stub.cookie
    assert _ask(client, "GET", place)[0] == HTTPStatus.UNAUTHORIZED
    status, text = _ask(client, "GET", place, Cookie=cookie)
    assert (status, b'displayName = "web"' in text) == (HTTPStatus.OK, True)
    other = place.replace("dcPath=DC0", "dcPath=Datacenters%2FDC0")
    assert _ask(client, "GET", other, Cookie=cookie)[0] == HTTPStatus.NOT_FOUND
    new = place.replace("web.vmx", "note.txt")
    assert _ask(client, "GET", new, Cookie=cookie)[0] == HTTPStatus.NOT_FOUND
    assert _ask(client, "PUT", new, b"hello", Cookie=cookie)[0] == HTTPStatus.CREATED
    assert _ask(client, "GET", new, Cookie=cookie) == (HTTPStatus.OK, b"hello")
    vcenter.model.privileges.deny("Datastore.FileManagement")
    try:
        assert _ask(client, "PUT", new, b"x", Cookie=cookie)[0] == HTTPStatus.FORBIDDEN
    finally:
        vcenter.model.privileges.grant("Datastore.FileManagement")


@pytest.mark.parametrize("old", [False, True])
def test_sim_tags_are_in_the_rest_api(
    old: bool, vcenter: Vcenter, client: Vsphere, web: Managed
) -> None:
    tags = vcenter.model.tags
    tags.attach("tier:gold", web)
    base = "/rest/com/vmware/cis" if old else "/api"
    tagging = f"{base}/tagging" if old else f"{base}/cis/tagging"
    action = "~action" if old else "action"
    tags.old_only = old
    basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def value(data: bytes) -> Any:
        return json.loads(data)["value"] if old else json.loads(data)

    try:
        assert _ask(client, "GET", f"{tagging}/tag")[0] == HTTPStatus.UNAUTHORIZED
        status, token = _ask(client, "POST", f"{base}/session", Authorization=basic)
        assert status == (HTTPStatus.OK if old else HTTPStatus.CREATED)
        key = {"vmware_api_session_id": value(token)}
        (tag,) = value(_ask(client, "GET", f"{tagging}/tag", **key)[1])
        place = f"{tagging}/tag-association?{action}=list-attached-objects-on-tags"
        body = json.dumps({"tag_ids": [tag]}).encode()
        (found,) = value(_ask(client, "POST", place, body, **key)[1])
        assert found["object_ids"] == [{"id": web.moid, "type": "VirtualMachine"}]
        assert (_ask(client, "GET", "/api/session", **key)[0] == HTTPStatus.NOT_FOUND) == old
        _ask(client, "DELETE", f"{base}/session", **key)
        assert tags.sessions == 0
    finally:
        tags.old_only = False
        tags.detach("tier:gold", web)
