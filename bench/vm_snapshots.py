"""For how long production VMs carry a VM snapshot, for the sake of a TimeMark.

The server is the simulator of the tests. A quiesced snapshot takes two seconds there, its removal
two more, each other call 10 ms: that is what a vCenter with some load takes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pyVmomi import vim

from bench.ground import OFFLOAD
from bench.measure import once
from bench.report import Table
from tests.vsphere_sim.privileges import NEEDED
from tests.vsphere_sim.site import GROUP, Plan, Site, running_site

COUNTS = (1, 16, 64)
_TASK_S, _CALL_S = 2.0, 0.01
_CALLS = (
    "RetrieveServiceContent", "Login", "Logout", "RetrievePropertiesEx", "CurrentTime", "Fetch",
    "CreateContainerView", "CreatePropertyCollector", "CreateFilter",
)  # fmt: skip


def measure() -> Table:
    """One TimeMark of each size."""
    table = Table(
        "VMs of a group quiesced by vSphere: snapshot calls of 2 s, five at once",
        ("VMs", "a VM carries its snapshot, longest", "mean", "the command, whole",
         "calls a VM", "at once", "goal of the longest"),
    )  # fmt: skip
    for count in COUNTS:
        table.add(*_one(count))
    table.notes.append(
        "Five at once is what storage vendors allow a vCenter (`snapshots_at_once`); each wave "
        "takes 2 s, so that 64 VMs cannot be done in 10 s. Against the simulator."
    )
    return table


def _one(count: int) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(prefix="snapshots") as name:
        folder = Path(name)
        plan = Plan(luns_in=folder, provider="copy", vms=count, consistency="filesystem")
        with running_site(folder, plan) as site:
            latency = dict.fromkeys((*_CALLS, *NEEDED), _CALL_S)
            slow = {"CreateSnapshotEx_Task": _TASK_S, "RemoveSnapshot_Task": _TASK_S}
            site.model.weather.latency_s = latency | slow
            site.model.calls.clear()
            argv = [OFFLOAD, "--config", str(site.config), "timemark", "create", GROUP]
            sample = once(argv)
            carried = _carried(site)
            calls = len(site.model.calls) / count
            most = max(site.model.most_at_once.values())
    return (
        f"{count}",
        f"{max(carried):.1f} s",
        f"{sum(carried) / len(carried):.1f} s",
        f"{sample.seconds:.1f} s",
        f"{calls:.0f}",
        f"{most}",
        "≤ 10 s" if count <= 16 else "",
    )


def _carried(site: Site) -> list[float]:
    """Of each VM: from the end of the creation to the end of the removal."""
    made: dict[str, Any] = {}
    gone: dict[str, Any] = {}
    for found in site.model.objects.values():
        if isinstance(found.ref, vim.Task):
            info = found.properties["info"]
            of = made if "create" in info.descriptionId else gone
            of[info.entity._moId] = info.completeTime  # noqa: SLF001 - its name in the API
    return [(gone[moref] - made[moref]).total_seconds() for moref in made]
