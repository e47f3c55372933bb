"""How long placeholders on vSphere take to stand, and to go, and how many calls that is.

The server is the simulator of the tests, whose host logs in to the views by iSCSI. What its calls
and tasks take there is in `LATENCY_S`: seconds that a vCenter with some load and an ESXi host with
a software iSCSI adapter take by our judgement; nothing of it was measured on real ones.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from bench.ground import OFFLOAD
from bench.measure import once
from bench.report import Table
from tests.vsphere_sim.privileges import NEEDED
from tests.vsphere_sim.site import BACKUP, GROUP, Plan, Site, running_site

CALL_S = 0.01
LATENCY_S = {
    "RescanHba": 3.0,
    "RescanVmfs": 2.0,
    "QueryUnresolvedVmfsVolumes": 0.5,
    "ResignatureUnresolvedVmfsVolume_Task": 5.0,
    "RegisterVM_Task": 1.5,
    "RevertToSnapshot_Task": 1.5,
    "RemoveSnapshot_Task": 2.0,
    "CreateSnapshotEx_Task": 2.0,
    "ReconfigVM_Task": 1.0,
    "UnregisterVM": 0.2,
    "UnmountVmfsVolume": 1.0,
    "DetachScsiLun": 0.5,
}
INVENTORY_LAG_S = 2.0
# VMs, LUNs, what the TimeMark must be worth
SIZES = ((1, 1, "crash"), (16, 1, "crash"), (64, 4, "crash"), (16, 1, "filesystem"))


def measure() -> Table:
    """One mount and one unmount of each size."""
    table = Table(
        "Placeholders on vSphere, the simulator's host logged in by iSCSI",
        ("VMs", "LUNs", "each shows", "mount, whole", "of it waiting for LUNs and VMFS",
         "unmount", "calls a VM, mount", "unmount"),
    )  # fmt: skip
    for vms, luns, consistency in SIZES:
        table.add(*_one(vms, luns, consistency))
    table.notes.append(
        "Latencies are set: "
        + ", ".join(f"{name} {seconds:g} s" for name, seconds in LATENCY_S.items())
        + f", other calls {CALL_S * 1000:g} ms, the inventory {INVENTORY_LAG_S:g} s behind. "
        "Tasks run eight at a time. Against the simulator, never a real ESXi."
    )
    return table


def _one(vms: int, luns: int, consistency: str) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(prefix="island") as name:
        folder = Path(name)
        plan = Plan(luns_in=folder, provider="copy", vms=vms, luns=luns, consistency=consistency)
        with running_site(folder, plan) as site:
            site.model.weather.latency_s = {**dict.fromkeys(NEEDED, CALL_S), **LATENCY_S}
            site.model.weather.inventory_lag_s = INVENTORY_LAG_S
            begin = [OFFLOAD, "--config", str(site.config), "--json"]
            mounted = once([*begin, "mount", GROUP, "--placeholder", "--host", BACKUP[0]])
            made, storage = _calls(site, vms)
            island = json.loads(mounted.stdout)["name"]
            gone = once([*begin, "unmount", island])
            undone, _ = _calls(site, vms)
    return (
        f"{vms}",
        f"{luns}",
        "the group's instant" if consistency == "crash" else "its own instant",
        f"{mounted.seconds:.1f} s",
        f"{storage:.1f} s",
        f"{gone.seconds:.1f} s",
        f"{made:.0f}",
        f"{undone:.0f}",
    )


def _calls(site: Site, vms: int) -> tuple[float, float]:
    """Calls a VM since the last time, and seconds that storage calls took of them."""
    found = Counter(site.model.calls)
    site.model.calls.clear()
    storage = ("RescanHba", "RescanVmfs", "ResignatureUnresolvedVmfsVolume_Task")
    waited = sum(found[method] * LATENCY_S[method] for method in storage)
    return found.total() / vms, waited
