"""Islands on vSphere that end: taken down after anything that may have happened, on the simulator.
The views are withdrawn last, and no host ever has all paths down."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from esx_island import IslandSite, island_site, no_step
from pyVmomi import vim

from offload.errors import CleanupError, UnavailableError
from offload.hypervisor import IslandRequest
from offload.island import Shown
from offload.journal import CRASH_ENV
from offload.testing.warm import warm_python

pytestmark = pytest.mark.timeout(300)

BUILD = (
    "targets", "luns", "resignatured", "renamed", "settings", "registered", "reverted", "shown",
    "settled",
)  # fmt: skip
AWAY = ("unregistered", "unmounted", "detached", "targets-removed", "rescanned", "forgotten")
SCRIPT = """
import pickle, sys
from offload.hypervisors.vsphere.backup_host import VsphereBackupHost
from offload.journal import step
with open(sys.argv[2], "rb") as stream:
    instance, request, record = pickle.load(stream)
host = VsphereBackupHost("backup1", instance.config.backup_host("backup1"), instance)
if sys.argv[1] == "build":
    host.build(request, record, step)
else:
    host.take_down(record, step)
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[IslandSite]:
    with island_site(tmp_path) as made:
        yield made


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[IslandSite]:
    """With a backup host that is given up soon."""
    host = {"hypervisor": "vc", "host": "backup1", "target": "tgt", "timeout_s": 1.5}
    with island_site(tmp_path, backup_hosts={"backup1": host}) as made:
        yield made


def _killed(
    site: IslandSite, what: str, request: IslandRequest, record: Mapping[str, str], at: str
) -> None:
    order = site.folder / "order"
    order.write_bytes(pickle.dumps((site.instance, request, record)))
    done = warm_python().run("-c", SCRIPT, what, str(order), env={CRASH_ENV: at})
    assert done.status == -9, done.stderr
    site.model.end_sessions()  # of the dead: they would expire


def _fresh(site: IslandSite, view: str) -> tuple[IslandRequest, dict[str, str]]:
    """On a new view: one that was resignatured is no copy any more."""
    request = site.request([site.view("lun1", view)])
    if "ours" in site.model.snapshot_names(site.vms["web"]):
        request = replace(request, shown=Shown.VM, vm_snapshot={"web": "ours"})
    return request, site.host().plan(request)


def test_island_killed_at_any_step_is_taken_down_without_a_trace(site: IslandSite) -> None:
    site.add_vm("web")
    for at in BUILD:
        request, record = _fresh(site, at)
        _killed(site, "build", request, record, at)
        site.host().take_down(record, no_step)
        site.assert_bare()
        site.withdraw(at)
    for at in AWAY:
        request, record = _fresh(site, at)
        site.host().build(request, record, no_step)
        _killed(site, "away", request, record, at)
        site.host().take_down(record, no_step)
        site.assert_bare()
        site.withdraw(at)
    site.host().take_down(record, no_step)
    site.assert_bare()


def test_island_is_built_and_taken_down_over_restarts_of_vcenter(site: IslandSite) -> None:
    site.add_vm("web")
    request = site.request([site.view("lun1")])
    record = site.host().plan(request)
    passed: list[str] = []

    def restart(name: str) -> None:
        passed.append(name)
        site.model.restart()

    (placeholder,) = site.host().build(request, record, restart)
    assert site.vm(placeholder.id).properties["name"] == "backup-web"
    site.host().take_down(record, restart)
    assert tuple(passed) == (*BUILD, *AWAY)
    site.assert_bare()


def _expired(site: IslandSite) -> object:
    return vim.fault.NotAuthenticated(object=site.root.ref, privilegeId="System.View")


def _expire_once(site: IslandSite, method: str) -> None:
    """The session of the first call of a method."""
    left = [method]

    def fault(called: str) -> object | None:
        if called not in left:
            return None
        left.remove(called)
        return _expired(site)

    site.model.weather.fault = fault


def test_island_every_call_may_meet_an_expired_session(site: IslandSite) -> None:
    site.add_vm("web")
    site.model.add_snapshot(site.vms["web"], "ours")
    request, record = _fresh(site, "e")
    before = len(site.model.calls)
    site.host().build(request, record, no_step)
    site.host().take_down(record, no_step)
    methods = set(site.model.calls[before:])
    for number, method in enumerate(sorted(methods - {"Login", "Logout", "HTTP GET", "HTTP PUT"})):
        _expire_once(site, method)
        request, record = _fresh(site, f"e{number}")
        site.host().build(request, record, no_step)
        _expire_once(site, method)
        site.host().take_down(record, no_step)
        site.withdraw(f"e{number}")
    site.assert_bare()


def test_island_task_that_vcenter_forgot_is_begun_again(site: IslandSite) -> None:
    site.add_vm("web")
    request = site.request([site.view("lun1")])
    held = threading.Event()
    site.model.weather.hold["ResignatureUnresolvedVmfsVolume_Task"] = held
    found: list[object] = []
    record = site.host().plan(request)
    worker = threading.Thread(
        target=lambda: found.append(site.host().build(request, record, no_step))
    )
    worker.start()
    site.wait_for_call("ResignatureUnresolvedVmfsVolume_Task")
    site.model.restart()
    held.set()
    worker.join(60)
    assert len(found) == 1


def test_take_down_spares_a_vm_that_has_attached_a_disk(quick: IslandSite) -> None:
    quick.add_vm("web")
    record, (web,) = quick.build(quick.request([quick.view("lun1")]))
    proxy = quick.add_proxy(quick.disks(quick.vm(web.id))[0].backing.fileName)
    with pytest.raises(CleanupError) as caught:
        quick.host().take_down(record, no_step)
    assert caught.value.code == "datastore-busy"
    assert "proxy uses a disk of the island" in caught.value.message
    assert proxy.moid in quick.model.objects
    assert web.id in quick.model.objects
    assert quick.model.storage.all_paths_down() == []


def test_take_down_of_a_placeholder_that_runs_waits_for_its_owner(quick: IslandSite) -> None:
    quick.add_vm("web")
    record, (web,) = quick.build(quick.request([quick.view("lun1")]))
    quick.model.set_power(quick.vm(web.id), "poweredOn")
    (standing,) = quick.host().look(record, [web])
    assert (standing.power, standing.do) == ("on", "power it off")
    with pytest.raises(CleanupError) as caught:
        quick.host().take_down(record, no_step)
    assert caught.value.code == "placeholder-runs"
    quick.model.set_power(quick.vm(web.id), "poweredOff")
    quick.host().take_down(record, no_step)
    quick.assert_bare()


def test_take_down_of_a_datastore_in_use_is_tried_until_it_is_free(site: IslandSite) -> None:
    site.add_vm("web")
    record, _ = site.build(site.request([site.view("lun1")]))
    busy = 3

    def fault(method: str) -> object | None:
        nonlocal busy
        if method == "UnmountVmfsVolume" and busy:
            busy -= 1
            return vim.fault.ResourceInUse(type=vim.Datastore, name="shop-ds1")
        return None

    site.model.weather.fault = fault
    site.host().take_down(record, no_step)
    assert busy == 0
    site.assert_bare()


def test_take_down_of_a_datastore_that_stays_in_use_leaves_its_lun(quick: IslandSite) -> None:
    quick.add_vm("web")
    record, _ = quick.build(quick.request([quick.view("lun1", "v1")]))
    store = quick.model.datastores.by_name("shop-ds1")
    store.used = True  # an ISO image that somebody has open
    with pytest.raises(CleanupError) as caught:
        quick.host().take_down(record, no_step)
    assert caught.value.code == "datastore-busy"
    assert quick.host_lun("v1") not in quick.model.hosts.all["backup1"].detached
    store.used = False
    quick.host().take_down(record, no_step)
    quick.assert_bare()


def test_take_down_unregisters_what_others_registered_from_the_copy(site: IslandSite) -> None:
    site.add_vm("web")
    site.add_vm("db")
    record, _ = site.build(site.request([site.view("lun1")], ["web"]))
    site.model.registration.load("[shop-ds1] db/db.vmx", "by hand", site.root, "backup1")
    site.host().take_down(record, no_step)
    site.assert_bare()


def test_take_down_without_the_host_says_so_and_keeps_the_rest(quick: IslandSite) -> None:
    quick.add_vm("web")
    record, _ = quick.build(quick.request([quick.view("lun1")]))
    quick.model.hosts.set_state("backup1", "disconnected")
    with pytest.raises(CleanupError) as caught:
        quick.host().take_down(record, no_step)
    assert caught.value.code == "island-stays"
    quick.model.hosts.set_state("backup1")
    quick.host().take_down(record, no_step)
    quick.assert_bare()


def test_island_after_a_reboot_of_its_host_stands_and_goes(site: IslandSite) -> None:
    site.add_vm("web")
    site.write("web", b"content")
    record, (web,) = site.build(site.request([site.view("lun1")]))
    site.model.hosts.reboot("backup1")
    assert [s.problem for s in site.host().look(record, [web])] == [""]
    assert site.read(web.id, 7) == b"content"
    site.host().take_down(record, no_step)
    site.assert_bare()


def test_build_on_a_host_that_another_mount_has_waits_its_turn(site: IslandSite) -> None:
    """Two at once, of one instance: their storage calls never mix."""
    site.add_vm("web")
    site.add_vm("db")
    requests = [
        replace(site.request([site.view("lun1", name)], [vm]), id=name, name=name)
        for name, vm in (("one", "web"), ("two", "db"))
    ]
    records = [site.host().plan(request) for request in requests]
    before = len(site.model.record)
    failed: list[BaseException] = []

    def build(request: IslandRequest, record: Mapping[str, str]) -> None:
        try:
            site.host().build(request, record, no_step)
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    crew = [
        threading.Thread(target=build, args=pair) for pair in zip(requests, records, strict=True)
    ]
    for worker in crew:
        worker.start()
    for worker in crew:
        worker.join(120)
    assert failed == []
    storage = [
        call.session
        for call in site.model.record[before:]
        if call.method in {"AddInternetScsiStaticTargets", "RescanHba", "RescanVmfs",
                           "ResignatureUnresolvedVmfsVolume_Task"}
    ]  # fmt: skip
    turns = [one for one, last in zip(storage, [None, *storage], strict=False) if one != last]
    assert len(turns) == 2
    for record in records:
        site.host().take_down(record, no_step)
    site.assert_bare()


def test_build_on_a_vcenter_that_went_is_given_up_in_time(quick: IslandSite) -> None:
    quick.add_vm("web")
    request = quick.request([quick.view("lun1")])
    record = quick.host().plan(request)

    def gone(name: str) -> None:
        if name == "luns":
            quick.model.weather.fault = lambda _method: _expired(quick)

    with pytest.raises(UnavailableError) as caught:
        quick.host().build(request, record, gone)
    assert caught.value.code == "vsphere-session"
    quick.model.weather.fault = lambda _method: None
    quick.model.end_sessions()  # nobody could log out
    quick.host().take_down(record, no_step)
    quick.assert_bare()
