"""VMs that a group chooses are quiesced by vSphere without an entry in [vms]: on the simulator."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload import run
from offload.journal import CRASH_ENV
from tests.vsphere_sim.site import GROUP, Plan, Site, running_site
from tests.vsphere_sim.vms import DiskPlan

pytestmark = pytest.mark.timeout(180)

VMS, AT_ONCE = 5, 2
Command = Callable[..., run.Completed]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Five VMs on two LUNs."""
    folder = tmp_path_factory.mktemp("site")
    plan = Plan(luns_in=folder, provider="copy", luns=2, vms=VMS, consistency="filesystem")
    with running_site(folder, plan) as started:
        text = started.config.read_text()
        more = f"[hypervisors.vc]\nsnapshots_at_once = {AT_ONCE}\n"
        started.config.write_text(text.replace("[hypervisors.vc]\n", more))
        # slow enough that creations would overlap, were they let
        latency = dict.fromkeys(("CreateSnapshotEx_Task", "RemoveSnapshot_Task"), 0.2)
        started.model.weather.latency_s = latency
        yield started


@pytest.fixture
def offload(site: Site) -> Command:
    def command(*words: str, **env: str) -> run.Completed:
        program = str(Path(sys.executable).with_name("offload"))
        argv = [program, "--config", str(site.config), "--json", *words]
        return run.run(argv, check=False, timeout_s=150, env=env)

    return command


def left(site: Site) -> list[str]:
    return [name for vm in site.vms.values() for name in site.model.snapshot_names(vm)]


def test_chosen_vms_are_quiesced_a_few_at_once(offload: Command, site: Site) -> None:
    done = offload("timemark", "create", GROUP)
    assert done.status == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["consistency"] == "filesystem"
    assert {report["vm"] for report in made["reports"]} == set(site.vms)
    assert all(report["frozen"] and report["image_at"] for report in made["reports"])
    most = site.model.most_at_once
    assert 1 <= most["CreateSnapshotEx_Task"] <= AT_ONCE
    assert 1 <= most["RemoveSnapshot_Task"] <= AT_ONCE
    assert left(site) == []
    assert site.model.sessions == 0


def test_chosen_vms_of_a_killed_timemark_are_rid_of_their_snapshots(
    offload: Command, site: Site
) -> None:
    killed = offload("timemark", "create", GROUP, **{CRASH_ENV: "timemark.frozen"})
    assert killed.status == -signal.SIGKILL
    assert len(left(site)) == VMS
    recovered = offload("recover")
    assert recovered.status == 0, recovered.stderr
    assert json.loads(recovered.stdout)["vm_snapshots"] == []  # the journal knew them all
    assert left(site) == []
    site.model.end_sessions()  # those of the killed one would expire in half an hour


def test_chosen_vm_that_cannot_be_quiesced_fails_the_timemark_and_leaves_nothing(
    offload: Command, site: Site
) -> None:
    site.model.weather.quiesces = False
    try:
        refused = offload("timemark", "create", GROUP)
    finally:
        site.model.weather.quiesces = True
    assert json.loads(refused.stderr)["code"] == "not-quiesced"
    assert left(site) == []


def test_physical_rdm_of_a_chosen_vm_is_named_as_what_a_power_cut_leaves(
    offload: Command, site: Site
) -> None:
    site.add_lun("raw")
    disks = (DiskPlan(), DiskPlan(kind="rdm-physical", lun=site.luns["raw"][1]))
    site.add_vm("mapped", datastore="ds1", disks=disks, folder="mapped")
    site.write_config(
        '[groups.mapped]\nhypervisor = "vc"\nvms = ["mapped"]\natomic = "record"\n'
        'consistency = "filesystem"\ndeadline_s = 60\n'
    )
    refused = json.loads(offload("timemark", "create", "mapped").stderr)
    assert refused["code"] == "consistency-not-reached"
    assert "an RDM in physical mode" in refused["message"]
    assert left(site) == []
