"""What a backup host of vSphere refuses before anything is frozen or made, on the simulator; and
VMs that are made again on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from esx_island import IslandSite, island_site, no_step
from pyVmomi import vim

from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    OffloadError,
    PolicyError,
    PrivilegeError,
    UnavailableError,
    UsageError,
)
from offload.hypervisors.vsphere.preflight import ON_DATACENTER, ON_FOLDER, ON_HOST, ON_POOL
from offload.hypervisors.vsphere.record import MARK
from offload.machine import DiskKind, Machine, MachineDisk
from offload.services.doctor import Status
from offload.services.doctor_vms import look_at_vms

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IslandSite]:
    """For what changes nothing."""
    with island_site(tmp_path_factory.mktemp("s")) as made:
        made.add_vm("web")
        yield made


@pytest.fixture
def site(tmp_path: Path) -> Iterator[IslandSite]:
    with island_site(tmp_path) as made:
        yield made


def _with(site: IslandSite, **changed: Any) -> Any:
    """The driver with other settings of its table."""
    host = site.host()
    host._config = host._config.model_copy(update=changed)
    return host


def test_check_of_a_good_host_has_nothing_to_say_and_changes_nothing(shared: IslandSite) -> None:
    before = len(shared.model.calls)
    assert shared.host().check() == []
    assert not {
        c for c in shared.model.calls[before:] if c.startswith(("Add", "Rescan", "Create"))
    } - {"CreateContainerView"}


def test_export_is_writable_for_the_hosts_own_initiator_alone(shared: IslandSite) -> None:
    target, exposure, may_write = shared.host("backup2").export()
    assert (target, may_write) == ("tgt", True)
    assert exposure.initiators == (shared.model.hosts.all["backup2"].iqn,)
    assert _with(shared, target=None).export()[0] == "lio"


@pytest.mark.parametrize(
    ("state", "kind", "code"),
    [
        ({"connection": "disconnected"}, UnavailableError, "host-disconnected"),
        ({"connection": "notResponding"}, UnavailableError, "host-disconnected"),
        ({"maintenance": True}, UnavailableError, "host-in-maintenance"),
    ],
)
def test_check_of_a_host_out_of_service_is_refused(
    shared: IslandSite, state: dict[str, Any], kind: type[OffloadError], code: str
) -> None:
    shared.model.hosts.set_state("backup1", **state)
    try:
        with pytest.raises(kind) as caught:
            shared.host().check()
        assert caught.value.code == code
        assert "backup1" in caught.value.message
    finally:
        shared.model.hosts.set_state("backup1")


@pytest.mark.parametrize(
    ("changed", "kind", "code", "said"),
    [
        ({"host": "esx9"}, NotFoundError, "unknown-host", "no host esx9"),
        ({"host": None}, ConfigError, "backup-host-unnamed", "has 3 hosts"),
        ({"adapter": "vmhba9"}, ConfigError, "no-software-iscsi", "vmhba9"),
        ({"target": "nbd"}, ConfigError, "target-unfit", "NBD"),
    ],
)
def test_check_of_wrong_settings_is_refused_in_words(
    shared: IslandSite, changed: dict[str, Any], kind: type[OffloadError], code: str, said: str
) -> None:
    with pytest.raises(kind) as caught:
        _with(shared, **changed).check()
    assert caught.value.code == code
    assert said in caught.value.message
    assert caught.value.hint


def test_check_of_a_host_without_software_iscsi_is_refused(shared: IslandSite) -> None:
    host = shared.model.hosts.add("bare", adapter="")
    try:
        with pytest.raises(ConfigError) as caught:
            _with(shared, host="bare").check()
        assert caught.value.code == "no-software-iscsi"
    finally:
        del shared.model.hosts.all["bare"]
        shared.model.forget(host.managed)


@pytest.mark.parametrize("privilege", [*ON_HOST, *ON_POOL, *ON_FOLDER, *ON_DATACENTER])
def test_check_names_the_privilege_that_is_missing_and_where(
    shared: IslandSite, privilege: str
) -> None:
    shared.model.privileges.deny(privilege)
    try:
        with pytest.raises(PrivilegeError) as caught:
            shared.host().check()
        assert caught.value.code == "vsphere-privilege"
        assert f"{privilege} on " in caught.value.message
    finally:
        shared.model.privileges.grant(privilege)


def test_check_names_all_privileges_at_once(shared: IslandSite) -> None:
    for privilege in (*ON_HOST, *ON_POOL):
        shared.model.privileges.deny(privilege)
    try:
        with pytest.raises(PrivilegeError) as caught:
            shared.host().check()
        assert "Host.Config.Storage on host backup1" in caught.value.message
        assert "Resource.AssignVMToPool on the resource pool of backup1" in caught.value.message
    finally:
        for privilege in (*ON_HOST, *ON_POOL):
            shared.model.privileges.grant(privilege)


def test_check_of_a_free_esxi_says_that_its_api_is_read_only(shared: IslandSite) -> None:
    content = shared.model.inventory.content
    manager = shared.model.of(content.licenseManager)
    free = vim.LicenseManager.LicenseInfo(
        licenseKey="0", editionKey="esxBasic", name="vSphere Hypervisor", total=0, costUnit="host"
    )
    manager.properties["licenses"] = [free]
    content.about.apiType = "HostAgent"
    try:
        with pytest.raises(PrivilegeError) as caught:
            shared.host().check()
        assert caught.value.code == "vsphere-read-only"
        assert "is a free ESXi: its API is read-only" in caught.value.message
    finally:
        content.about.apiType = "VirtualCenter"


def test_doctor_says_what_a_backup_host_lacks(shared: IslandSite) -> None:
    config = shared.instance.config
    checks = {c.name: c for c in look_at_vms(config, None)}
    good = checks["backup host backup1"]
    assert good.status is Status.OK
    assert shared.model.hosts.all["backup1"].iqn in good.detail
    shared.model.privileges.deny("Host.Config.Storage")
    try:
        checks = {c.name: c for c in look_at_vms(config, None)}
    finally:
        shared.model.privileges.grant("Host.Config.Storage")
    bad = checks["backup host backup2"]
    assert bad.status is Status.MISSING
    assert "Host.Config.Storage on host backup2" in bad.detail
    assert bad.fix


def test_check_of_a_host_in_a_cluster_warns(shared: IslandSite) -> None:
    shared.model.hosts.add("member", cluster="prod")
    (warning,) = _with(shared, host="member").check()
    assert "cluster prod" in warning


def _machine(shared: IslandSite, **changed: Any) -> Machine:
    return replace(shared.machine("web"), **changed)


def _disk(**changed: Any) -> tuple[MachineDisk, ...]:
    plain = MachineDisk(
        name="scsi0:1", label="Hard disk 2", kind=DiskKind.FLAT, path="[ds1] w/w.vmdk", size_bytes=1
    )
    return (replace(plain, **changed),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: _machine(s, summary={"template": True}), "web is a template"),
        (lambda s: _machine(s, summary={"encrypted": True}), "VM web is encrypted"),
        (lambda s: _machine(s, definition='encryption.keySafe = "x"'), "VM web is encrypted"),
        (lambda s: _machine(s, disks=_disk(encrypted=True)), "Hard disk 2 is encrypted"),
        (lambda s: _machine(s, disks=_disk(kind=DiskKind.VVOL)), "a virtual volume is no LUN"),
        (lambda s: _machine(s, disks=_disk(kind=DiskKind.VSAN)), "a vSAN disk is no LUN"),
        (lambda s: _machine(s, disks=_disk(shared=True)), "on a shared bus"),
        (lambda s: _machine(s, disks=_disk(problem="it lies on NFS")), "it lies on NFS"),
        (lambda s: _machine(s, kind="libvirt"), "is of libvirt"),
    ],
)
def test_refuse_vms_that_can_have_no_placeholder(
    shared: IslandSite, change: Callable[[IslandSite], Machine], said: str
) -> None:
    request = replace(shared.request([]), machines=(change(shared),))
    with pytest.raises(PolicyError) as caught:
        shared.host().refuse(request)
    assert caught.value.code == "no-placeholder"
    assert said in caught.value.message


def test_refuse_names_that_are_taken(site: IslandSite) -> None:
    site.add_vm("web")
    request = site.request([site.view("lun1")])
    site.build(request)
    with pytest.raises(BusyError) as caught:
        site.host().refuse(request)
    assert caught.value.code == "name-taken"
    assert "backup-web" in caught.value.message


def test_build_a_view_that_is_read_only_is_told_and_leaves_nothing(site: IslandSite) -> None:
    site.add_vm("web")
    request = site.request([site.read_only_view("lun1")])
    with pytest.raises(UnavailableError) as caught:
        site.build(request)
    assert "resignature" in caught.value.message
    site.host().take_down(site.host().plan(request), no_step)
    site.assert_bare()


# -- VMs that are made again ---------------------------------------------------------------------


def test_create_a_vm_from_views_is_another_one_with_the_same_content(site: IslandSite) -> None:
    site.add_vm("web")
    site.write("web", b"content")
    machine = site.machine("web")
    disks = {disk.name: site.view("lun1", "v1").view.uri for disk in machine.disks}
    host = site.host()
    assert host.check_create(machine, disks, "web again") == []
    made = site.vm(host.create(machine, disks, "web again", "mark1", no_step))
    config = made.properties["config"]
    assert made.properties["name"] == "web again"
    assert config.uuid != machine.uuid
    assert MARK not in {option.key for option in config.extraConfig}  # it is no placeholder
    cards = [d for d in config.hardware.device if hasattr(d, "macAddress")]
    assert cards[0].macAddress != "00:50:56:00:00:01"
    assert site.read(made.moid, 7) == b"content"
    with pytest.raises(BusyError) as caught:
        host.check_create(machine, disks, "web again")
    assert caught.value.code == "name-taken"
    host.destroy("mark1")
    host.destroy("mark1")
    site.assert_bare()


def test_create_that_fails_half_way_is_taken_away_by_its_mark(site: IslandSite) -> None:
    site.add_vm("web")
    machine = site.machine("web")
    disks = {disk.name: site.view("lun1", "v1").view.uri for disk in machine.disks}

    def fail(name: str) -> None:
        if name == "settings":
            raise UnavailableError("as if the power went")

    with pytest.raises(UnavailableError):
        site.host().create(machine, disks, "web again", "mark1", fail)
    site.host().destroy("mark1")
    site.assert_bare()


def test_create_from_a_path_of_this_machine_is_refused(shared: IslandSite) -> None:
    machine = shared.machine("web")
    with pytest.raises(UsageError) as caught:
        shared.host().create(machine, {"scsi0:0": "/srv/web.raw"}, "again", "m", no_step)
    assert caught.value.code == "not-a-view"
    shared.host().destroy("m")
