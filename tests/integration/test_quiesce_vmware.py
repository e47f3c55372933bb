"""The VMware part against the vSphere simulator: no ESXi runs here."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from pyVmomi import vim

from offload import run
from offload.catalog.store import Catalog
from offload.configs.quiesce import VmwareFreeze
from offload.errors import (
    CleanupError,
    ConfigError,
    NotFoundError,
    OffloadError,
    PolicyError,
    PrivilegeError,
    UnavailableError,
)
from offload.instance import Instance
from offload.journal import CRASH_ENV, Journal
from offload.model import Consistency
from offload.quiescers import vmware
from offload.quiescers.vmware import VmwarePart, undo_remove
from offload.services import vm_snapshots
from offload.testing.certificates import Wanted, issue
from offload.testing.instances import free_port, make_instance
from offload.vsphere import Vsphere
from tests.vsphere_sim.model import VmPlan
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.server import PASSWORD, Vcenter, running_vcenter

pytestmark = pytest.mark.timeout(120)

NO_CATALOG = cast("Catalog", None)
UUID = "50230000-1111-4222-8333-444455556666"
SHOP = VmPlan(name="shop", instance_uuid=UUID, addresses=("10.1.0.9",))


@pytest.fixture
def vcenter(tmp_path: Path) -> Iterator[Vcenter]:
    with running_vcenter(tmp_path / "vcenter") as started:
        yield started
        assert started.model.sessions == 0


@pytest.fixture
def shop(vcenter: Vcenter) -> Managed:
    vcenter.model.add_vm(VmPlan(name="web", instance_uuid="5023-web"))
    return vcenter.model.add_vm(SHOP)


Make = Callable[..., VmwarePart]
Command = Callable[..., run.Completed]

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[volumes.lun1]
provider = "reflink"
path = "{pool}/lun1.raw"
[volumes.lun2]
provider = "reflink"
path = "{pool}/lun2.raw"
[groups.strict]
volumes = ["lun1", "lun2"]
consistency = "filesystem"
[groups.loose]
volumes = ["lun1", "lun2"]
consistency = "filesystem"
atomic = "record"
[vms.shop]
volumes = ["lun1", "lun2"]
[vms.shop.freeze]
kind = "vmware"
hypervisor = "vc"
vm = "shop"
[hypervisors.vc]
{vc}
"""


def instance_of(folder: Path, table: dict[str, Any]) -> Instance:
    return make_instance(folder, {"hypervisors": {"vc": table}})


@pytest.fixture
def make(vcenter: Vcenter, tmp_path: Path) -> Iterator[Make]:
    made: list[VmwarePart] = []

    def part(vm: str = "shop", **changed: Any) -> VmwarePart:
        entry = VmwareFreeze(kind="vmware", hypervisor="vc", vm=vm)
        table = vcenter.table(**changed)
        made.append(VmwarePart("shop", entry, instance_of(tmp_path, table)))
        return made[-1]

    yield part
    for each in made:
        each.close()


def freeze(part: VmwarePart, within_s: float = 30.0) -> Consistency:
    return part.freeze(time.monotonic() + within_s)


# -- what it is for --------------------------------------------------------------------------------


def test_vmware_snapshot_lives_from_freeze_to_thaw(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    part = make()
    part.check()
    part.arm(30)
    assert vcenter.model.snapshot_names(shop) == []
    assert freeze(part) is Consistency.FILESYSTEM
    assert vcenter.model.snapshot_names(shop) == [part.snapshot_name]
    assert part.still_frozen()
    part.thaw()
    part.thaw()
    assert vcenter.model.snapshot_names(shop) == []
    assert part.unbroken
    assert part.holds_nothing
    assert part.what == ("[ds1] shop/shop.vmdk",)
    assert "[ds1] shop/shop-000001.vmdk" in part.output
    assert part.snapshot_name in part.output
    assert part.snapshot_name.startswith(f"offload.{part._instance.id}.")


def test_vmware_vm_is_found_by_its_instance_uuid(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    part = make(UUID.upper())
    part.check()
    freeze(part)
    assert vcenter.model.snapshot_names(shop) == [part.snapshot_name]


def test_vmware_placeholder_of_a_vm_is_not_taken_for_it(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    copy = vcenter.model.add_vm(VmPlan(name="backup-shop", instance_uuid=UUID, datastore="copy"))
    mark = vim.option.OptionValue(key="offload.island", value="inst/isl1")
    copy.properties["config"].extraConfig = [mark]
    part = make(UUID)
    part.check()
    freeze(part)
    assert vcenter.model.snapshot_names(shop) == [part.snapshot_name]
    assert vcenter.model.snapshot_names(copy) == []
    with pytest.raises(NotFoundError):
        make("backup-shop").check()


def test_vmware_vm_whose_id_is_known_is_not_searched_for(
    vcenter: Vcenter, shop: Managed, make: Make, tmp_path: Path
) -> None:
    vcenter.model.add_vm(VmPlan(name="shop", instance_uuid="another", datastore="ds2"))
    entry = VmwareFreeze(kind="vmware", hypervisor="vc", vm="shop", moref=shop.moid)
    part = VmwarePart("shop", entry, instance_of(tmp_path, vcenter.table()))
    part.check()
    freeze(part)
    assert vcenter.model.snapshot_names(shop) == [part.snapshot_name]
    assert "CreateContainerView" not in vcenter.model.calls
    part.close()
    assert vcenter.model.snapshot_names(shop) == []


def test_vmware_vm_among_many_is_found(vcenter: Vcenter, shop: Managed, make: Make) -> None:
    """More than one page of them."""
    for number in range(600):
        vcenter.model.add_vm(VmPlan(name=f"vm{number}", instance_uuid=f"u{number}"))
    make("vm599").check()
    assert "ContinueRetrievePropertiesEx" in vcenter.model.calls


def test_vmware_image_time_is_by_our_clock(vcenter: Vcenter, shop: Managed, make: Make) -> None:
    vcenter.model.weather.clock_ahead = timedelta(hours=3)
    part = make()
    part.check()
    before = datetime.now(UTC)
    freeze(part)
    assert part.image_at is not None
    assert before - timedelta(seconds=5) < part.image_at < datetime.now(UTC) + timedelta(seconds=5)


@pytest.mark.parametrize(
    ("enable_uuid", "reached"),
    [(True, Consistency.APPLICATION), (False, Consistency.FILESYSTEM)],
)
def test_vmware_windows_reaches_application_with_vss_writers(
    enable_uuid: bool, reached: Consistency, vcenter: Vcenter, make: Make
) -> None:
    plan = VmPlan(name="win", instance_uuid="w", windows=True, enable_uuid=enable_uuid)
    vcenter.model.add_vm(plan)
    part = make("win")
    part.check()
    assert freeze(part) is reached
    (spec,) = vcenter.model.specs
    assert isinstance(spec, vim.vm.WindowsQuiesceSpec)
    assert (spec.vssBackupContext, spec.vssBackupType) == ("ctx_backup", 5)


def test_vmware_independent_disk_is_not_quiesced_and_said(vcenter: Vcenter, make: Make) -> None:
    vcenter.model.add_vm(VmPlan(name="ind", instance_uuid="i", independent_disk=True))
    part = make("ind")
    part.check()
    assert freeze(part) is Consistency.CRASH
    assert "as a power cut leaves them: Hard disk 2 (independent persistent)" in part.output


def test_vmware_snapshots_of_others_stay_and_are_said(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    vcenter.model.add_snapshot(shop, "before-upgrade")
    shop.properties["runtime"].consolidationNeeded = True
    part = make()
    part.check()
    freeze(part)
    vcenter.model.add_snapshot(shop, "on-top")
    assert part.still_frozen()
    part.thaw()
    assert vcenter.model.snapshot_names(shop) == ["before-upgrade", "on-top"]
    assert "before-upgrade" in part.output
    assert "consolidation" in part.output
    assert not shop.properties["runtime"].consolidationNeeded


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vm", "code"), [("shoop", "unknown-vm"), ("twin", "ambiguous-vm"), ("shared", "ambiguous-vm")]
)
def test_vmware_vm_that_is_not_one_is_refused(
    vm: str, code: str, vcenter: Vcenter, make: Make
) -> None:
    for number in range(2):
        vcenter.model.add_vm(VmPlan(name="twin", instance_uuid=f"t{number}"))
        vcenter.model.add_vm(VmPlan(name=f"s{number}", instance_uuid="shared"))
    with pytest.raises(NotFoundError) as refused:
        make(vm).check()
    assert refused.value.code == code


def test_vmware_without_tools_is_unavailable(vcenter: Vcenter, make: Make) -> None:
    vcenter.model.add_vm(VmPlan(name="bare", instance_uuid="b", tools=False))
    with pytest.raises(UnavailableError) as refused:
        make("bare").check()
    assert refused.value.code == "tools-not-running"
    assert "CreateSnapshotEx_Task" not in vcenter.model.calls


def test_vmware_wrong_password_is_refused_and_nowhere_shown(
    vcenter: Vcenter, shop: Managed, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "Pa55-of-another-server"
    (vcenter.folder / "password").write_text(wrong)
    with pytest.raises(ConfigError) as refused:
        make().check()
    assert refused.value.code == "vsphere-login"
    shown = refused.value.message + refused.value.hint + caplog.text + repr(refused.value.__cause__)
    assert wrong not in shown
    assert PASSWORD not in shown


def test_vmware_server_of_an_unknown_authority_is_refused(shop: Managed, make: Make) -> None:
    with pytest.raises(ConfigError) as refused:
        make(certificates=None).check()
    assert refused.value.code == "vsphere-certificate"


def test_vmware_server_of_another_name_is_refused(
    vcenter: Vcenter, shop: Managed, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.2 is this machine, and not in the certificate; the server listens on 127.0.0.1."""
    import socket

    real = socket.create_connection

    def redirected(address: tuple[str, int], *args: Any, **more: Any) -> socket.socket:
        return real(("127.0.0.1", address[1]), *args, **more)

    monkeypatch.setattr(socket, "create_connection", redirected)
    with pytest.raises(ConfigError) as refused:
        make(server="vcenter.example.com").check()
    assert refused.value.code == "vsphere-certificate"


def test_vmware_thumbprint_is_enough_and_exact(vcenter: Vcenter, shop: Managed, make: Make) -> None:
    make(certificates=None, thumbprint=vcenter.thumbprint).check()
    other = issue("other", Wanted()).certificate.fingerprint
    from cryptography.hazmat.primitives import hashes

    with pytest.raises(ConfigError) as refused:
        make(certificates=None, thumbprint=other(hashes.SHA256()).hex(":")).check()
    assert refused.value.code == "vsphere-certificate"
    assert vcenter.thumbprint in refused.value.message


def test_vmware_thumbprint_is_looked_at_on_each_connection(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    """A connection that was lost is made again, perhaps by somebody between."""
    part = make(certificates=None, thumbprint=vcenter.thumbprint)
    part.check()
    session = part._connected()
    context = session.stub.schemeArgs["context"]
    session.stub.DropConnections()
    right, context.sha256 = context.sha256, bytes(32)
    with pytest.raises(ConfigError, match="thumbprint"):
        session.clock()
    context.sha256 = right


def test_vmware_server_that_does_not_listen_is_unavailable(shop: Managed, make: Make) -> None:
    part = make(port=free_port())
    with pytest.raises(UnavailableError) as refused:
        part.check()
    assert refused.value.code == "vsphere-unavailable"
    assert part.undos()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (vim.fault.NoPermission(privilegeId="VirtualMachine.State.CreateSnapshot"),
         (PrivilegeError, "vsphere-privilege")),
        (vim.fault.RestrictedVersion(), (PrivilegeError, "vsphere-read-only")),
        (vim.fault.ApplicationQuiesceFault(), (UnavailableError, "quiesce-failed")),
    ],
)  # fmt: skip
def test_vmware_faults_are_told_in_words(
    fault: Any,
    expected: tuple[type[OffloadError], str],
    vcenter: Vcenter,
    shop: Managed,
    make: Make,
) -> None:
    kind, code = expected
    vcenter.model.weather.fault = lambda m: fault if m == "CreateSnapshotEx_Task" else None
    part = make()
    part.check()
    with pytest.raises(kind) as refused:
        freeze(part)
    assert refused.value.code == code
    part.close()
    assert vcenter.model.snapshot_names(shop) == []


@pytest.mark.parametrize("privilege", ["CreateSnapshot", "RemoveSnapshot"])
def test_vmware_without_a_privilege_is_refused_before_anything_is_made(
    privilege: str, vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    name = f"VirtualMachine.State.{privilege}"
    vcenter.model.privileges.deny(name, shop)
    with pytest.raises(PrivilegeError, match=f"on VM shop: {name}$"):
        make().check()
    assert "CreateSnapshotEx_Task" not in vcenter.model.calls


def test_vmware_vm_that_is_this_machine_is_refused(
    vcenter: Vcenter, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.quiescers import ourselves

    here = ourselves.Machine(macs=frozenset({"00:50:56:00:00:77"}), uuid="", boot_id="b")
    monkeypatch.setattr(ourselves, "this_machine", lambda: here)
    vcenter.model.add_vm(VmPlan(name="me", instance_uuid="m", mac="00:50:56:00:00:77"))
    with pytest.raises(PolicyError) as refused:
        make("me").check()
    assert refused.value.code == "would-freeze-ourselves"


def test_vmware_vm_that_is_the_vcenter_is_refused(
    vcenter: Vcenter, tmp_path: Path, make: Make
) -> None:
    vcenter.model.add_vm(VmPlan(name="vc", instance_uuid="v", addresses=("10.9.8.7",)))
    tables = {"vc": vcenter.table(), "other": vcenter.table(server="10.9.8.7")}
    entry = VmwareFreeze(kind="vmware", hypervisor="vc", vm="vc")
    part = VmwarePart("vc", entry, make_instance(tmp_path, {"hypervisors": tables}))
    with pytest.raises(PolicyError, match=r"the hypervisor other is on 10\.9\.8\.7"):
        part.check()
    part.close()


# -- what goes wrong -------------------------------------------------------------------------------


def test_vmware_snapshot_that_is_not_quiesced_is_refused_and_removed(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    vcenter.model.weather.quiesces = False
    part = make()
    part.check()
    with pytest.raises(UnavailableError) as refused:
        freeze(part)
    assert refused.value.code == "not-quiesced"
    part.close()
    assert vcenter.model.snapshot_names(shop) == []


def test_vmware_snapshot_that_is_late_is_removed_when_it_comes(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    """A deadline does not end the server's task."""
    may_end = vcenter.model.weather.hold["CreateSnapshotEx_Task"] = threading.Event()
    part = make()
    part.check()
    with pytest.raises(UnavailableError) as refused:
        freeze(part, 0.5)
    assert refused.value.code == "vsphere-late"
    closing = threading.Thread(target=part.close)
    closing.start()
    assert vcenter.model.snapshot_names(shop) == []
    may_end.set()
    closing.join(60)
    assert not closing.is_alive()
    assert vcenter.model.snapshot_names(shop) == []
    assert "RemoveSnapshot_Task" in vcenter.model.calls


def test_vmware_vm_busy_with_another_task_is_tried_again(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    busy = [vim.fault.TaskInProgress(task=vim.Task("t")) for _ in range(2)]
    vcenter.model.weather.fault = lambda m: (
        busy.pop() if m == "CreateSnapshotEx_Task" and busy else None
    )
    part = make()
    part.check()
    freeze(part)
    assert busy == []
    assert vcenter.model.snapshot_names(shop) == [part.snapshot_name]


def test_vmware_snapshot_removed_by_others_is_noticed(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    part = make()
    part.check()
    freeze(part)
    vcenter.model.drop_snapshot(shop, part.snapshot_name)
    assert not part.still_frozen()
    assert not part.unbroken
    part.thaw()


def test_vmware_session_that_has_expired_is_made_anew(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    part = make()
    part.check()
    freeze(part)
    vcenter.model.end_sessions()
    part.thaw()
    assert vcenter.model.snapshot_names(shop) == []


def test_vmware_server_that_is_away_for_a_while_is_waited_for(
    vcenter: Vcenter, shop: Managed, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmware, "_PAUSE_S", 0.0)
    part = make()
    part.check()
    freeze(part)
    away = [vim.fault.NotAuthenticated(privilegeId="System.View") for _ in range(4)]
    vcenter.model.weather.fault = lambda m: away.pop() if m == "Login" and away else None
    vcenter.model.restart()
    part.thaw()
    assert away == []
    assert vcenter.model.snapshot_names(shop) == []


def test_vmware_server_that_stays_away_is_said(
    vcenter: Vcenter, shop: Managed, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmware, "_PATIENCE_S", 0.0)
    part = make()
    part.check()
    freeze(part)
    away = vim.fault.NotAuthenticated(privilegeId="System.View")
    vcenter.model.weather.fault = lambda m: away if m == "Login" else None
    vcenter.model.end_sessions()
    with pytest.raises(UnavailableError, match=part.snapshot_name) as failed:
        part.thaw()
    assert failed.value.code == "thaw-failed"
    vcenter.model.weather.fault = lambda _m: None


def test_vmware_removal_waits_for_a_vm_that_is_busy(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    part = make()
    part.check()
    freeze(part)
    busy = [vim.fault.TaskInProgress(task=vim.Task("t")) for _ in range(2)]
    vcenter.model.weather.fault = lambda m: (
        busy.pop() if m == "RemoveSnapshot_Task" and busy else None
    )
    part.thaw()
    assert busy == []
    assert vcenter.model.snapshot_names(shop) == []


def test_vmware_delta_that_a_removal_left_is_consolidated(
    vcenter: Vcenter, shop: Managed, make: Make
) -> None:
    part = make()
    part.check()
    freeze(part)
    vcenter.model.weather.consolidation_fails = True
    part.thaw()
    assert vcenter.model.calls.count("ConsolidateVMDisks_Task") == 1
    assert not shop.properties["runtime"].consolidationNeeded


def test_vmware_removal_that_fails_is_said(vcenter: Vcenter, shop: Managed, make: Make) -> None:
    part = make()
    part.check()
    freeze(part)
    vcenter.model.weather.fault = lambda m: (
        vim.fault.SnapshotFault() if m == "RemoveSnapshot_Task" else None
    )
    with pytest.raises(UnavailableError, match=part.snapshot_name) as failed:
        part.thaw()
    assert failed.value.code == "thaw-failed"
    with pytest.raises(CleanupError):
        part.close()


def test_vmware_removal_that_is_late_is_said(
    vcenter: Vcenter, shop: Managed, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmware, "_REMOVE_S", 0.5)
    may_end = vcenter.model.weather.hold["RemoveSnapshot_Task"] = threading.Event()
    part = make()
    part.check()
    freeze(part)
    with pytest.raises(UnavailableError) as failed:
        part.thaw()
    assert failed.value.code == "thaw-failed"
    may_end.set()
    monkeypatch.setattr(vmware, "_REMOVE_S", 30)
    part.close()
    assert vcenter.model.snapshot_names(shop) == []


def test_vmware_vms_beyond_a_servers_share_wait_for_their_turn(
    vcenter: Vcenter, make: Make, tmp_path: Path
) -> None:
    """Not more than five creations at once, whatever the number of VMs."""
    model = vcenter.model
    may_end = model.weather.hold["CreateSnapshotEx_Task"] = threading.Event()
    parts = []
    for number in range(7):
        model.add_vm(VmPlan(name=f"vm{number}", instance_uuid=f"u{number}"))
        parts.append(make(f"vm{number}"))
        parts[-1].check()
    threads = [threading.Thread(target=freeze, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while model.calls.count("CreateSnapshotEx_Task") < 5:
        assert time.monotonic() < until
        time.sleep(0.01)
    last = make("vm0")
    last.check()
    with pytest.raises(UnavailableError) as late:
        freeze(last, 0.2)
    assert late.value.code == "freeze-late"
    assert model.calls.count("CreateSnapshotEx_Task") == 5
    may_end.set()
    for thread in threads:
        thread.join()
    assert model.calls.count("CreateSnapshotEx_Task") == 7


# -- a VM without writers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power", "clean", "reached"),
    [
        ("poweredOff", True, Consistency.FILESYSTEM),
        ("poweredOff", False, Consistency.CRASH),
        ("suspended", False, Consistency.CRASH),
    ],
)
def test_vmware_vm_without_writers_counts_as_held(
    power: str, clean: bool, reached: Consistency, vcenter: Vcenter, make: Make
) -> None:
    vcenter.model.add_vm(
        VmPlan(name="off", instance_uuid="o", power=power, clean_power_off=clean, tools=False)
    )
    part = make("off")
    part.check()
    part.arm(10)
    assert freeze(part) is reached
    assert part.still_frozen()
    part.thaw()
    assert part.unbroken
    assert not part.holds_nothing
    assert part.image_at is None
    assert "CreateSnapshotEx_Task" not in vcenter.model.calls


def test_vmware_vm_started_meanwhile_was_not_held(vcenter: Vcenter, make: Make) -> None:
    vm = vcenter.model.add_vm(VmPlan(name="off", instance_uuid="o", power="poweredOff"))
    part = make("off")
    part.check()
    freeze(part)
    vcenter.model.set_power(vm, "poweredOn")
    assert not part.still_frozen()
    assert not part.unbroken
    with pytest.raises(UnavailableError, match="started just now"):
        freeze(part)


# -- after a kill ----------------------------------------------------------------------------------


def test_vmware_undo_removes_what_a_dead_process_left(
    vcenter: Vcenter, shop: Managed, make: Make, tmp_path: Path
) -> None:
    part = make()
    part.check()
    ((action, args),) = part.undos()
    assert action == "remove-vm-snapshot"
    assert PASSWORD not in str(args)
    freeze(part)
    vcenter.model.add_snapshot(shop, "of-a-user")
    part._asked = False  # as if its process had died
    for _ in range(2):
        undo_remove(instance_of(tmp_path, vcenter.table()), NO_CATALOG, args)
    assert vcenter.model.snapshot_names(shop) == ["of-a-user"]


def test_vmware_undo_waits_for_a_snapshot_that_is_being_made(
    vcenter: Vcenter, shop: Managed, make: Make, tmp_path: Path
) -> None:
    may_end = vcenter.model.weather.hold["CreateSnapshotEx_Task"] = threading.Event()
    part = make()
    part.check()
    ((_, args),) = part.undos()
    with pytest.raises(UnavailableError):
        freeze(part, 0.3)
    part._asked = False
    undoing = threading.Thread(
        target=undo_remove, args=(instance_of(tmp_path, vcenter.table()), NO_CATALOG, args)
    )
    undoing.start()
    may_end.set()
    undoing.join(60)
    assert vcenter.model.snapshot_names(shop) == []


def test_vmware_undo_of_a_vm_that_is_gone_succeeds(vcenter: Vcenter, tmp_path: Path) -> None:
    args = {"hypervisor": "vc", "vm": "gone", "moref": "", "snapshot": "offload.x.y"}
    for moref in ("", "vm-4711"):
        undo_remove(instance_of(tmp_path, vcenter.table()), NO_CATALOG, {**args, "moref": moref})


def test_vmware_undo_without_the_server_is_a_cleanup_error(
    vcenter: Vcenter, tmp_path: Path
) -> None:
    args = {"hypervisor": "vc", "vm": "shop", "moref": "vm-1", "snapshot": "offload.x.y"}
    with pytest.raises(CleanupError, match=r"offload\.x\.y of VM shop"):
        undo_remove(instance_of(tmp_path, vcenter.table(port=free_port())), NO_CATALOG, args)


# -- what nobody has announced ---------------------------------------------------------------------


def site_of(folder: Path, vcenter: Vcenter) -> tuple[Instance, Journal]:
    instance = instance_of(folder, vcenter.table())
    return instance, Journal(instance.journal_dir, lambda _action, _args: None)


def test_vm_snapshots_that_nobody_announced_are_swept(
    vcenter: Vcenter, shop: Managed, tmp_path: Path
) -> None:
    instance, journal = site_of(tmp_path, vcenter)
    model = vcenter.model
    ours = f"offload.{instance.id}."
    for name in (f"{ours}one", "before-upgrade", "offload.another.two", f"{ours}three"):
        model.add_snapshot(shop, name)
    found = vm_snapshots.find(instance, journal)
    assert [(s.vm, s.name) for s in found.found] == [
        ("shop", f"{ours}one"), ("shop", f"{ours}three"),
    ]  # fmt: skip
    assert len(model.snapshot_names(shop)) == 4
    assert vm_snapshots.sweep(instance, journal) == found
    assert model.snapshot_names(shop) == ["before-upgrade", "offload.another.two"]
    assert vm_snapshots.sweep(instance, journal) == vm_snapshots.Sweep()


def test_vm_snapshot_of_a_living_operation_is_not_swept(
    vcenter: Vcenter, shop: Managed, tmp_path: Path
) -> None:
    instance, journal = site_of(tmp_path, vcenter)
    name = f"offload.{instance.id}.living"
    with journal.operation("timemark", "shop") as op:
        op.intend("freeze-0", "remove-vm-snapshot", {"snapshot": name})
        vcenter.model.add_snapshot(shop, name)
        assert vm_snapshots.sweep(instance, journal).found == ()
        assert vcenter.model.snapshot_names(shop) == [name]


def test_vm_snapshot_of_a_placeholder_is_not_swept(vcenter: Vcenter, tmp_path: Path) -> None:
    """It is in what the placeholder shows."""
    instance, journal = site_of(tmp_path, vcenter)
    plan = VmPlan(name="backup-shop", instance_uuid="p", datastore="copy")
    vm = vcenter.model.add_vm(plan)
    vcenter.model.add_snapshot(vm, f"offload.{instance.id}.shown")
    mark = vim.option.OptionValue(key="offload.island", value=f"{instance.id}/isl1")
    vm.properties["config"].extraConfig = [mark]
    assert vm_snapshots.sweep(instance, journal) == vm_snapshots.Sweep()


def test_sweep_without_the_server_is_a_warning(vcenter: Vcenter, tmp_path: Path) -> None:
    instance = instance_of(tmp_path, vcenter.table(port=free_port()))
    journal = Journal(instance.journal_dir, lambda _action, _args: None)
    swept = vm_snapshots.sweep(instance, journal)
    assert swept.found == ()
    assert "VM snapshots of vc could not be removed" in swept.warnings[0]


@pytest.mark.needs_root
def test_doctor_names_a_vm_snapshot_and_recover_removes_it(
    offload: Command, vcenter: Vcenter, shop: Managed, tmp_path: Path
) -> None:
    assert offload("status").status == 0  # the instance has its id now
    name = f"offload.{(tmp_path / 'state' / 'instance').read_text().strip()}.lost"
    vcenter.model.add_snapshot(shop, name)
    checks = {c["name"]: c for c in json.loads(offload("--json", "doctor").stdout)}
    assert checks["hypervisor vc"]["status"] == "ok"
    assert name in checks["VM snapshots"]["detail"]
    shown = json.loads(offload("--json", "recover", "--dry-run").stdout)
    assert [s["name"] for s in shown["vm_snapshots"]] == [name]
    assert vcenter.model.snapshot_names(shop) == [name]
    assert f"removed: VM snapshot {name} of shop" in offload("recover").stdout
    assert vcenter.model.snapshot_names(shop) == []


def test_vsphere_session_ends_with_its_block(vcenter: Vcenter, tmp_path: Path) -> None:
    config = instance_of(tmp_path, vcenter.table()).config.hypervisors["vc"]
    with Vsphere(config) as session:  # type: ignore[arg-type]
        assert vcenter.model.sessions == 1
        assert abs(session.clock() - datetime.now(UTC)) < timedelta(seconds=10)
    assert vcenter.model.sessions == 0


# -- a whole TimeMark ------------------------------------------------------------------------------


@pytest.fixture
def offload(vcenter: Vcenter, shop: Managed, xfs_pool: Path, tmp_path: Path) -> Command:
    """The command, with a group whose datastore is two volumes."""
    for name in ("lun1", "lun2"):
        (xfs_pool / f"{name}.raw").write_bytes(name.encode() * 4096)
    vc = "\n".join(f"{k} = {json.dumps(v)}" for k, v in vcenter.table().items())
    config = tmp_path / "offload.toml"
    config.write_text(CONFIG.format(folder=tmp_path, pool=xfs_pool, vc=vc))
    config.chmod(0o600)

    def command(*words: str, **env: str) -> run.Completed:
        argv = [str(Path(sys.executable).with_name("offload")), "--config", str(config), *words]
        return run.run(argv, check=False, timeout_s=100, env=env)

    return command


@pytest.mark.needs_root
def test_vmware_timemark_says_of_when_its_images_are(
    offload: Command, vcenter: Vcenter, shop: Managed
) -> None:
    done = offload("--json", "timemark", "create", "loose")
    assert done.status == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["instant"] == "none"  # its writers go on
    assert made["consistency"] == "filesystem"
    (report,) = made["reports"]
    assert report["frozen"]
    assert report["image_at"] is not None
    assert "their parents are quiesced" in report["detail"]
    assert vcenter.model.snapshot_names(shop) == []
    assert vcenter.model.sessions == 0


@pytest.mark.needs_root
def test_vmware_vm_over_volumes_that_are_no_instant_is_refused(
    offload: Command, vcenter: Vcenter
) -> None:
    refused = offload("--json", "timemark", "create", "strict")
    assert json.loads(refused.stderr)["code"] == "not-atomic"
    assert "CreateSnapshotEx_Task" not in vcenter.model.calls


@pytest.mark.needs_root
@pytest.mark.parametrize("step", ["timemark.armed", "timemark.frozen", "timemark.checked"])
def test_vmware_timemark_killed_leaves_nothing_after_recover(
    step: str, offload: Command, vcenter: Vcenter, shop: Managed
) -> None:
    killed = offload("timemark", "create", "loose", **{CRASH_ENV: step})
    assert killed.status == -signal.SIGKILL
    assert bool(vcenter.model.snapshot_names(shop)) == (step != "timemark.armed")
    recovered = offload("recover")
    assert recovered.status == 0, recovered.stderr
    assert vcenter.model.snapshot_names(shop) == []
    assert json.loads(offload("--json", "timemark", "list").stdout) == []
    vcenter.model.end_sessions()  # that of the killed one would expire in half an hour
