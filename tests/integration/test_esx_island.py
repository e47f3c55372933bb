"""Islands on vSphere, against the simulator: no ESXi runs here. Its hosts log in to real views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from esx_island import AT, IslandSite, island_site, no_step

from offload.errors import NotFoundError, UnavailableError
from offload.hypervisors.vsphere.backup_host import VsphereBackupHost
from offload.hypervisors.vsphere.record import MARK
from offload.island import Shown
from tests.vsphere_sim.vms import DiskPlan

pytestmark = pytest.mark.timeout(180)

LONG = "x" * 90
SECRET, MUTUAL = "a secret of 22 letters", "another secret, longer"
SNAPSHOT = "offload.inst.op1"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[IslandSite]:
    with island_site(tmp_path) as made:
        yield made


def test_island_vms_stand_powered_off_marked_and_without_network(site: IslandSite) -> None:
    site.add_vm("web")
    site.add_vm("db")
    site.write("web", b"content of web")
    record, placeholders = site.build(site.request([site.view("lun1")]))
    site.write("web", b"written later!")
    assert {p.vm: p.name for p in placeholders} == {"web": "backup-web", "db": "backup-db"}
    for placeholder in placeholders:
        vm = site.vm(placeholder.id)
        config = vm.properties["config"]
        assert vm.properties["runtime"].powerState == "poweredOff"
        assert vm.parent is not None
        assert vm.parent.properties["name"] == "offload placeholders"
        options = {o.key: o.value for o in config.extraConfig}
        assert options[MARK] == f"{site.instance.id}/i1"
        assert options["uuid.action"] == "create"
        cards = [d for d in config.hardware.device if hasattr(d, "macAddress")]
        assert [c.connectable.startConnected for c in cards] == [False]
        assert config.annotation.startswith(f"Placeholder of VM {placeholder.vm}, made by offload")
        assert [d.backing.fileName for d in site.disks(vm)] == [
            f"[shop-ds1] {placeholder.vm}/{placeholder.vm}.vmdk"
        ]
    web = next(p for p in placeholders if p.vm == "web")
    assert site.read(web.id, 14) == b"content of web"
    assert (web.at, web.shown, web.consistency) == (AT, Shown.GROUP, "crash")
    assert web.disks == site.machine("web").disks
    assert [s.problem for s in site.host().look(record, placeholders)] == ["", ""]
    site.host().take_down(record, no_step)
    site.assert_bare()
    assert [s.there for s in site.host().look(record, placeholders)] == [False, False]


def test_island_only_the_vms_that_were_chosen_stand(site: IslandSite) -> None:
    for name in ("web", "db", "mail"):
        site.add_vm(name)
    _, placeholders = site.build(site.request([site.view("lun1")], ["db"]))
    assert [p.vm for p in placeholders] == ["db"]
    backup = site.model.hosts.all["backup1"]
    assert [r._moId for r in backup.managed.properties["vm"]] == [placeholders[0].id]


def test_island_datastore_name_taken_gets_a_number(site: IslandSite) -> None:
    site.add_vm("web")
    site.model.datastores.add("shop-ds1")
    _, (placeholder,) = site.build(site.request([site.view("lun1")]))
    assert placeholder.record["path"] == "[shop-ds1-2] web/web.vmx"


def test_island_names_are_short_escaped_and_each_once(site: IslandSite) -> None:
    names = ["a/b", "50%", LONG, LONG[:-1] + "!"]
    for name in names:
        site.add_vm(name.replace("/", "%2f").replace("50%", "50%25"))
    _, placeholders = site.build(site.request([site.view("lun1")]))
    made = [p.name for p in placeholders]
    assert made[0] == "backup-a%2fb"
    assert made[1] == "backup-50%25"
    assert len(set(made)) == 4
    assert max(map(len, made)) == 79


def test_island_of_own_instants_shows_what_was_quiesced(site: IslandSite) -> None:
    site.add_vm("web")
    site.add_vm("off")
    site.model.add_snapshot(site.vms["web"], "before the update")
    site.write("web", b"quiesced")
    site.model.add_snapshot(site.vms["web"], SNAPSHOT)
    site.write("web", b"too late")
    request = replace(
        site.request([site.view("lun1")]),
        shown=Shown.VM,
        vm_snapshot={"web": SNAPSHOT},
        vm_at={"web": AT - timedelta(seconds=3)},
        consistency={"web": "application", "off": "filesystem"},
    )
    _, (web, off) = site.build(request)
    assert site.read(web.id, 8) == b"quiesced"
    assert (web.shown, web.at, web.consistency) == (
        Shown.VM,
        AT - timedelta(seconds=3),
        "application",
    )
    assert (off.shown, off.at, off.consistency) == (Shown.GROUP, AT, "filesystem")
    assert "shows the group's instant" in "".join(off.notes)
    vm = site.vm(web.id)
    assert site.model.snapshot_names(vm) == ["before the update"]
    assert site.model.snapshot_names(site.vms["web"]) == ["before the update", SNAPSHOT]
    # the revert brought back the settings of then
    config = vm.properties["config"]
    assert [
        d.connectable.startConnected for d in config.hardware.device if hasattr(d, "macAddress")
    ] == [False]
    assert {o.key: o.value for o in config.extraConfig}[MARK].endswith("/i1")
    assert "its own quiesced instant of 2026-11-21 02:59:57" in config.annotation


def test_island_of_the_groups_instant_shows_the_running_disk(site: IslandSite) -> None:
    site.add_vm("web")
    site.write("web", b"quiesced")
    site.model.add_snapshot(site.vms["web"], SNAPSHOT)
    site.write("web", b"too late")
    request = replace(
        site.request([site.view("lun1")]),
        vm_snapshot={"web": SNAPSHOT},
        consistency={"web": "application"},
    )
    _, (web,) = site.build(request)
    assert site.read(web.id, 8) == b"too late"
    assert (web.shown, web.at, web.consistency) == (Shown.GROUP, AT, "crash")
    assert site.model.snapshot_names(site.vm(web.id)) == []


def test_island_without_the_snapshot_that_was_asked_for_is_refused(site: IslandSite) -> None:
    site.add_vm("web")
    request = replace(
        site.request([site.view("lun1")]), shown=Shown.VM, vm_snapshot={"web": SNAPSHOT}
    )
    with pytest.raises(UnavailableError) as caught:
        site.build(request)
    assert caught.value.code == "vm-instant-missing"


def test_island_disks_on_several_datastores_are_all_copies(site: IslandSite) -> None:
    site.add_datastore("ds2", "lun2")
    site.add_vm("web", disks=(DiskPlan(), DiskPlan(datastore="ds2")))
    _, (web,) = site.build(site.request([site.view("lun1"), site.view("lun2")]))
    places = [d.backing.fileName for d in site.disks(site.vm(web.id))]
    assert places == ["[shop-ds1] web/web.vmdk", "[shop-ds2] web/web_1.vmdk"]
    assert web.notes == ()


def test_island_disk_outside_of_the_group_is_left_out_and_told(site: IslandSite) -> None:
    site.add_datastore("ds2", "lun2")
    site.add_vm("web", disks=(DiskPlan(), DiskPlan(datastore="ds2")))
    _, (web,) = site.build(site.request([site.view("lun1")]))
    assert [d.backing.fileName for d in site.disks(site.vm(web.id))] == ["[shop-ds1] web/web.vmdk"]
    assert "scsi0:1" in "".join(web.notes)


@pytest.mark.parametrize("kind", ["rdm", "rdm-physical"])
def test_island_raw_mapping_points_at_the_copy_and_never_at_production(
    site: IslandSite, kind: str
) -> None:
    naa = site.add_lun("raw")
    site.add_vm("web", disks=(DiskPlan(), DiskPlan(kind=kind, lun=naa)))
    seen: list[str] = []
    site.model.weather.fault = seen.append
    _, (web,) = site.build(site.request([site.view("lun1"), site.view("raw", "v9")]))
    (mapped,) = [d for d in site.disks(site.vm(web.id)) if getattr(d.backing, "lunUuid", "")]
    copy = site.host_lun("v9")
    assert mapped.backing.lunUuid == site.model.storage.lun_uuid(copy)
    assert seen.index("CreateVirtualDisk_Task") < seen.index("RegisterVM_Task")
    assert ("physical RDM" in "".join(web.notes)) == (kind == "rdm-physical")


def test_island_raw_mapping_of_another_lun_is_left_out_before_the_vm_is_registered(
    site: IslandSite,
) -> None:
    naa = site.add_lun("raw")
    site.add_vm("web", disks=(DiskPlan(), DiskPlan(kind="rdm-physical", lun=naa)))
    seen: list[str] = []
    site.model.weather.fault = seen.append
    _, (web,) = site.build(site.request([site.view("lun1")]))
    assert len(site.disks(site.vm(web.id))) == 1
    assert naa in "".join(web.notes)
    assert seen.index("DeleteVirtualDisk_Task") < seen.index("RegisterVM_Task")
    assert "ReconfigVM_Task" not in seen  # it was never there


def test_island_of_a_datastore_on_two_luns_stands_on_both_copies(site: IslandSite) -> None:
    site.add_datastore("wide", "a", "b")
    site.add_vm("web", datastore="wide")
    record, (web,) = site.build(site.request([site.view("a"), site.view("b")]))
    assert web.record["path"] == "[shop-wide] web/web.vmx"
    site.host().take_down(record, no_step)
    site.assert_bare()


def test_island_of_half_a_datastore_is_refused_with_the_lun_that_is_missing(
    site: IslandSite,
) -> None:
    site.add_datastore("wide", "a", "b")
    site.add_vm("web", datastore="wide")
    request = site.request([site.view("a")])
    with pytest.raises(UnavailableError) as caught:
        site.build(request)
    assert caught.value.code in {"extent-missing", "vmfs-missing"}
    site.host().take_down(site.host().plan(request), no_step)
    site.assert_bare()


def test_islands_of_two_times_stand_side_by_side_on_one_host(site: IslandSite) -> None:
    site.add_vm("web")
    site.write("web", b"monday ")
    monday = site.request([site.view("lun1", "mon")], id="i1", name="mon")
    site.write("web", b"tuesday")
    tuesday = site.request([site.view("lun1", "tue")], id="i2", name="tue")
    first, (one,) = site.build(monday)
    host = _other_names(site)
    record = host.plan(tuesday)
    (two,) = host.build(tuesday, record, no_step)
    assert (site.read(one.id, 7), site.read(two.id, 7)) == (b"monday ", b"tuesday")
    site.host().take_down(first, no_step)
    assert site.read(two.id, 7) == b"tuesday"
    host.take_down(record, no_step)
    site.assert_bare()


def test_islands_stand_on_two_hosts_each_with_its_own_view(site: IslandSite) -> None:
    site.add_vm("web")
    first, (one,) = site.build(site.request([site.view("lun1", host="backup1")]))
    request = site.request([site.view("lun1", host="backup2")], id="i2", name="two")
    host = _other_names(site, "backup2")
    record = host.plan(request)
    (two,) = host.build(request, record, no_step)
    assert site.vm(one.id).properties["runtime"].host != site.vm(two.id).properties["runtime"].host
    site.host().take_down(first, no_step)
    host.take_down(record, no_step)
    site.assert_bare("backup1")
    site.assert_bare("backup2")


def test_island_with_another_copy_of_the_datastore_about_takes_its_own(site: IslandSite) -> None:
    site.add_vm("web")
    strange = site.folder / "strange.raw"
    strange.write_bytes(site.luns["lun1"][0].read_bytes())
    site.model.storage.give("backup1", strange, "naa.600a0980aaaaaaaaaaaaaaaaaaaaaaaa")
    before = strange.read_bytes()
    site.build(site.request([site.view("lun1")]))
    assert strange.read_bytes() == before


def test_island_host_with_a_slow_inventory_is_waited_for(site: IslandSite) -> None:
    site.add_vm("web")
    site.model.weather.inventory_lag_s = 0.3
    record, _ = site.build(site.request([site.view("lun1")]))
    site.host().take_down(record, no_step)
    site.assert_bare()


def test_island_lun_that_the_host_cannot_log_in_to_is_named(tmp_path: Path) -> None:
    quick = {"backup_hosts": {"backup1": {"hypervisor": "vc", "host": "backup1", "target": "tgt",
                                          "timeout_s": 1}}}  # fmt: skip
    with island_site(tmp_path, **quick) as site:
        site.add_vm("web")
        request = site.request([site.view("lun1", "v1")])
        site.withdraw("v1")
        with pytest.raises(UnavailableError) as caught:
            site.build(request)
        assert caught.value.code == "lun-missing"
        assert "of volume lun1, at 127.0.0.1:" in caught.value.message
        site.host().take_down(site.host().plan(request), no_step)
        site.assert_bare()


def test_island_vm_that_is_not_in_the_copy_is_named(site: IslandSite) -> None:
    site.add_vm("web")
    view = site.view("lun1")
    site.add_vm("new")
    request = site.request([view])
    with pytest.raises(NotFoundError) as caught:
        site.build(request)
    assert caught.value.code == "vm-not-in-copy"
    assert "VM new is not in the copy of datastore ds1" in caught.value.message


@pytest.mark.parametrize("mutual", [False, True])
def test_island_hosts_log_in_with_chap(tmp_path: Path, *, mutual: bool) -> None:
    (tmp_path / "chap").write_text(SECRET)
    (tmp_path / "mutual").write_text(MUTUAL)
    chap = {"user": "backup", "secret_file": str(tmp_path / "chap")}
    if mutual:
        chap |= {"mutual_user": "array", "mutual_secret_file": str(tmp_path / "mutual")}
    for name in ("chap", "mutual"):
        (tmp_path / name).chmod(0o600)
    with island_site(tmp_path, iscsi={"chap": chap}) as site:
        site.add_vm("web")
        record, _ = site.build(site.request([site.view("lun1")]))
        assert SECRET not in str(record)
        assert MUTUAL not in str(record)
        (target,) = site.model.hosts.all["backup1"].targets
        assert target.authenticationProperties.chapName == "backup"
        assert target.authenticationProperties.mutualChapName == ("array" if mutual else None)
        site.host().take_down(record, no_step)
        site.assert_bare()


def _other_names(site: IslandSite, host: str = "backup1") -> VsphereBackupHost:
    """The host with another prefix: placeholders of one VM, twice."""
    config = site.instance.config.backup_host(host).model_copy(update={"prefix": "other-"})
    return VsphereBackupHost(host, config, site.instance)


def test_island_of_64_luns_is_told_and_rescanned_once(site: IslandSite) -> None:
    names = [f"l{number}" for number in range(63)]
    for name in names:
        site.add_datastore(name, name)
    site.add_vm("web")
    site.add_vm("last", datastore="l62")
    views = [site.view(volume) for volume in ("lun1", *names)]
    before = len(site.model.calls)
    record, placeholders = site.build(site.request(views))
    calls = site.model.calls[before:]
    assert [p.vm for p in placeholders] == ["web", "last"]
    assert calls.count("AddInternetScsiStaticTargets") == 1
    assert calls.count("RescanHba") == 1
    assert len(site.model.hosts.all["backup1"].disks) == 64
    site.host().take_down(record, no_step)
    site.assert_bare()
