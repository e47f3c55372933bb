"""Placeholders as a user has them: VMs of the vSphere simulator, whose backup hosts really log in.

Nothing of this has met a real ESXi.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_site import Site as Commands

from offload import compose
from offload.journal import CRASH_ENV, TRACE_ENV
from tests.vsphere_sim.site import BACKUP, Plan, Site, running_site
from tests.vsphere_sim.vms import DiskPlan

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(900)]

KILLED = -9
GROUPS = """
[groups.quiesced]
hypervisor = "vc"
vms = ["vm01", "vm02"]
consistency = "filesystem"
atomic = "record"
deadline_s = 60
[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "1MiB"
[groups.second]
hypervisor = "vc"
datastores = ["ds2"]
atomic = "record"
[groups.by-lun]
hypervisor = "vc"
luns = ["{lun1}"]
atomic = "record"
[groups.gold]
hypervisor = "vc"
tags = ["backup:gold"]
atomic = "record"
"""
ONE_VM = """
[groups.{name}]
hypervisor = "vc"
vms = ["{name}"]
atomic = "record"
"""
OTHERS: dict[str, dict[str, Any]] = {  # VMs of which no placeholder can be
    "on-vsan": {"datastore": "vsan"},
    "on-nfs": {"datastore": "nas"},
    "on-vvol": {"datastore": "vvols"},
    "golden": {"template": True, "power": "poweredOff"},
    "secret": {"encrypted": True},
}


@dataclass
class Vsphere:
    """The simulated site, and `offload` beside it."""

    site: Site
    offload: Commands

    def clean(self) -> bool:
        """Whether nothing is left of any island: neither here nor on a host."""
        with self.offload.context() as ctx:
            kept = ctx.catalog.islands(), ctx.catalog.views(), ctx.catalog.timemarks()
        left = [line for host in BACKUP for line in self.site.left_on(host)]
        return not any((*kept, left, self.offload.journal_files(), self.offload.overlays()))


@pytest.fixture(scope="module")
def world() -> Iterator[Vsphere]:
    folder = Path(tempfile.mkdtemp(prefix="ofl-"))
    plan = Plan(luns_in=folder, provider="copy", luns=3, vms=0)
    with running_site(folder, plan) as site:
        for name, store in (("vm01", "ds1"), ("vm02", "ds2"), ("vm03", "ds1")):
            site.add_vm(name, datastore=store)
        site.add_vm("far", disks=(DiskPlan(size_bytes=1 << 20),), datastore="ds2", folder="other")
        for name, kind in (("vsan", "vsan"), ("nas", "NFS"), ("vvols", "VVOL")):
            site.model.datastores.add(name, kind)
        for name, fields in OTHERS.items():
            site.add_vm(name, **{"datastore": "ds3", "folder": "other", **fields})
        groups = GROUPS.format(folder=folder, lun1=site.luns["lun1"][1])
        site.write_config(groups + "".join(ONE_VM.format(name=n) for n in (*OTHERS, "nobody")))
        made = Vsphere(site, Commands(folder=folder, pool=folder, config=site.config))
        yield made
        made.offload.run("unmount", "--all", "--force")
    shutil.rmtree(folder)


@pytest.fixture
def vc(world: Vsphere) -> Iterator[Vsphere]:
    """Nothing stands before a test, nor after it."""
    yield world
    world.offload.ok("unmount", "--all", "--force")
    for mark in world.offload.ask("timemark", "list"):
        world.offload.ok("timemark", "delete", mark["id"], "--yes")
    assert world.clean()


def test_placeholders_of_a_folder_from_mount_to_unmount(vc: Vsphere) -> None:
    vc.site.write("vm01", b"before")
    said = vc.offload.ok("mount", "shop", "--placeholder", "--host", BACKUP[0])
    vc.site.write("vm01", b"after!")
    assert "backup-vm01" in said
    assert f"offload unmount shop-{BACKUP[0]}" in said
    standing = vc.site.placeholders()
    assert set(standing) == {"backup-vm01", "backup-vm02", "backup-vm03"}
    assert vc.site.read(standing["backup-vm01"], 6) == b"before"
    (listed,) = vc.offload.ask("placeholder", "list")
    assert {p["standing"]["there"] for p in listed["placeholders"]} == {True}
    assert {p["shown"] for p in listed["placeholders"]} == {"group"}
    assert vc.offload.ask("placeholder", "check")["findings"] == []

    (fresh,) = vc.offload.ask("placeholder", "refresh", listed["name"])
    assert fresh["origin"] != listed["origin"]
    standing = vc.site.placeholders()
    assert set(standing) == {"backup-vm01", "backup-vm02", "backup-vm03"}
    assert vc.site.read(standing["backup-vm01"], 6) == b"after!"
    vc.offload.ok("unmount", listed["name"])
    assert vc.clean()


def test_placeholders_of_quiesced_vms_show_each_its_own_instant(vc: Vsphere) -> None:
    made = vc.offload.ask("mount", "quiesced", "--placeholder", "--host", BACKUP[0])
    shown = {p["vm"]: (p["shown"], p["consistency"]) for p in made["placeholders"]}
    assert shown == {"vm01": ("vm", "filesystem"), "vm02": ("vm", "filesystem")}
    (mark,) = vc.offload.ask("timemark", "list")
    at = {report["vm"]: report["image_at"] for report in mark["reports"]}
    assert {p["vm"]: p["at"] for p in made["placeholders"]} == at
    vc.offload.ok("unmount", made["name"])

    mark = vc.offload.ask("timemark", "create", "quiesced")
    origin = f"timemark:{mark['id']}"
    made = vc.offload.ask("mount", origin, "--placeholder", "--host", BACKUP[0], "--shows", "group")
    assert {(p["shown"], p["consistency"]) for p in made["placeholders"]} == {("group", "crash")}
    assert {p["at"] for p in made["placeholders"]} == {mark["created_at"]}
    for standing in vc.site.placeholders().values():
        assert vc.site.model.snapshot_names(standing) == []


def test_placeholders_of_a_backup_show_what_was_quiesced(vc: Vsphere) -> None:
    vc.offload.ok("store", "init", "main")
    vc.site.write("vm01", b"kept!!")
    backup = vc.offload.ask("backup", "quiesced", "--store", "main")["id"]
    vc.site.write("vm01", b"later!")
    made = vc.offload.ask("mount", f"backup:{backup}", "--placeholder", "--host", BACKUP[0])
    shown = {(p["shown"], p["consistency"]) for p in made["placeholders"]}
    assert shown == {("vm", "filesystem")}
    assert vc.site.read(vc.site.placeholders()["backup-vm01"], 6) == b"kept!!"


def test_placeholders_stand_on_while_their_views_are_served_again(vc: Vsphere) -> None:
    made = vc.offload.ask("mount", "by-lun", "--placeholder", "--host", BACKUP[0])
    (uri,) = {view["uri"] for view in made["views"]}
    with vc.offload.context() as ctx:  # what a reboot does
        for view in ctx.catalog.views():
            target = compose.target(view.target, ctx.instance)
            target.withdraw(ctx.instance.views_dir / view.id, view.server)
    done = vc.offload.run("--json", "placeholder", "check")
    assert "is not served" in done.stdout
    assert [view["uri"] for view in vc.offload.ask("recover")["remounted"]] == [uri]
    assert vc.offload.ask("placeholder", "check")["findings"] == []
    assert len(vc.site.placeholders()) == len(made["placeholders"])


def test_islands_of_two_groups_and_two_hosts_stand_at_once(vc: Vsphere) -> None:
    vc.offload.ok("mount", "second", "--placeholder", "--host", BACKUP[0])
    vc.offload.ok("mount", "by-lun", "--placeholder", "--host", BACKUP[0], "--vm", "vm01")
    vc.offload.ok("mount", "by-lun", "--placeholder", "--host", BACKUP[1], "--vm", "vm03")
    assert set(vc.site.placeholders()) == {"backup-vm01", "backup-vm02", "backup-far"}
    assert set(vc.site.placeholders(BACKUP[1])) == {"backup-vm03"}
    vc.offload.ok("unmount", "--group", "by-lun")
    assert set(vc.site.placeholders()) == {"backup-vm02", "backup-far"}
    assert vc.site.placeholders(BACKUP[1]) == {}


def test_check_names_a_vm_that_the_group_chooses_since(vc: Vsphere) -> None:
    made = vc.offload.ask("mount", "by-lun", "--placeholder", "--host", BACKUP[0])
    vc.site.add_vm("late", datastore="ds1", folder="other")
    done = vc.offload.run("--json", "placeholder", "check")
    assert done.status == 9
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["vm"] == "late"
    assert finding["do"] == f"offload placeholder refresh {made['name']}"
    vc.offload.ok("placeholder", "refresh", made["name"])
    assert "backup-late" in vc.site.placeholders()
    assert vc.offload.ask("placeholder", "check")["findings"] == []


def test_group_chosen_by_a_tag_follows_storage_vmotion(vc: Vsphere) -> None:
    vm = vc.site.vms["vm01"]
    vc.site.model.tags.attach("backup:gold", vm)
    vc.site.write("vm01", b"moving")
    made = vc.offload.ask("mount", "gold", "--placeholder", "--host", BACKUP[0])
    assert [p["vm"] for p in made["placeholders"]] == ["vm01"]
    assert [view["origin"].rpartition("/")[2] for view in made["views"]] == ["lun1"]
    vc.site.model.events.storage_vmotion(vm, "ds2")
    done = vc.offload.run("--json", "placeholder", "check")
    said = [finding["what"] for finding in json.loads(done.stdout)["findings"]]
    one, two = vc.site.luns["lun1"][1], vc.site.luns["lun2"][1]
    assert any(f"was on {one}, it is on {two} now" in what for what in said)
    (fresh,) = vc.offload.ask("placeholder", "refresh", made["name"])
    assert [view["origin"].rpartition("/")[2] for view in fresh["views"]] == ["lun2"]
    assert vc.site.read(vc.site.placeholders()["backup-vm01"], 6) == b"moving"
    vc.site.model.tags.detach("backup:gold", vm)
    vc.site.model.events.storage_vmotion(vm, "ds1")


def test_view_of_an_island_is_not_taken_from_under_it(vc: Vsphere) -> None:
    made = vc.offload.ask("mount", "by-lun", "--placeholder", "--host", BACKUP[0])
    refused = vc.offload.refused("unmount", made["views"][0]["name"], "--force")
    assert refused["code"] == "view-in-island"
    assert made["name"] in refused["hint"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["shop"], "no-backup-host", "no backup host chosen"),
        (["nobody", "--host", BACKUP[0]], "unknown-vm", "vc has no VM 'nobody'"),
        (["by-lun", "--host", BACKUP[0], "--shows", "vm"], "no-vm-image", "no quiesced images"),
        (["on-vsan", "--host", BACKUP[0]], "disk-without-lun", "is on the vSAN datastore vsan"),
        (["on-nfs", "--host", BACKUP[0]], "disk-without-lun", "is on the NFS datastore nas"),
        (["on-vvol", "--host", BACKUP[0]], "disk-without-lun", "is on the vVol datastore vvols"),
        (["golden", "--host", BACKUP[0]], "vm-is-template", "VM golden is a template"),
        (["secret", "--host", BACKUP[0]], "no-placeholder", "secret"),
    ],
)
def test_placeholders_that_cannot_be_are_refused_in_a_line(
    vc: Vsphere, words: list[str], code: str, said: str
) -> None:
    refused = vc.offload.refused("mount", *words, "--placeholder")
    assert refused["code"] == code
    assert said in refused["message"]
    assert vc.clean()


def test_mount_killed_on_the_host_leaves_nothing(vc: Vsphere) -> None:
    words = ("mount", "by-lun", "--placeholder", "--host", BACKUP[0], "--vm", "vm01")
    trace = vc.offload.folder / "trace"
    vc.offload.ok(*words, **{TRACE_ENV: str(trace)})
    vc.offload.ok("unmount", "--all")
    steps = [step for step in trace.read_text().split() if step.startswith("island.build.")]
    assert len(steps) > 3
    # the host's driver has a walk of its own over all of them: here is every third
    for step in dict.fromkeys(["island.known.done", *steps[::3], "island.standing.done"]):
        done = vc.offload.run(*words, **{CRASH_ENV: step})
        assert done.status == KILLED, f"{step}: {done.stderr}"
        vc.offload.ok("recover")
        assert vc.clean(), step
