"""Start a simulated vSphere site and point `offload` at it.

The vCenter listens on loopback. Its production hosts have LUNs that are files; its backup hosts log
in to what `offload` exports. Everything it knows is gone when it ends.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

from tests.vsphere_sim.calls import Recorded
from tests.vsphere_sim.latency import REALISTIC
from tests.vsphere_sim.server import USER
from tests.vsphere_sim.site import BACKUP, GROUP, Plan, Site, running_site
from tests.vsphere_sim.vms import VmPlan


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vsphere_sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vms", type=int, default=3, help="VMs with disks on LUNs (3)")
    parser.add_argument("--luns", type=int, default=1, help="LUNs, each with a datastore (1)")
    parser.add_argument("--more", type=int, default=0, help="VMs without LUNs, for inventories (0)")
    parser.add_argument("--port", type=int, default=0, help="of the vCenter (any)")
    parser.add_argument("--folder", type=Path, help="where all of it lies (a temporary one)")
    parser.add_argument(
        "--provider", default="copy", help="reflink where the folder is on XFS or btrfs (copy)"
    )
    parser.add_argument("--target", default="tgt", choices=("tgt", "lio"), help="(tgt)")
    parser.add_argument("--slow", action="store_true", help="calls take as long as on a busy one")
    parser.add_argument("--calls", action="store_true", help="print each call")
    return parser.parse_args()


def _explain(site: Site) -> None:
    print(
        f"vCenter 127.0.0.1:{site.vcenter.port}, user {USER}, password in "
        f"{site.vcenter.folder}/password\n"
        f"hosts {', '.join(site.model.hosts.all)}; VMs {', '.join(list(site.vms)[:5])}"
        f"{' …' if len(site.vms) > 5 else ''}\n"
        f"\n  export OFFLOAD_CONFIG={site.config}\n"
        "  offload inventory refresh vc\n"
        "  offload inventory tree vc\n"
        f"  offload mount {GROUP} --placeholder --host {BACKUP[0]} --name night\n"
        "  offload placeholder check\n"
        "  offload unmount night\n"
        "\nCtrl-C ends it: unmount first.",
        flush=True,
    )


def _print_call(call: Recorded) -> None:
    print(f"{call.at:.3f} {call.session[:8] or '-':8} {call.method} {call.moid}", flush=True)


def _add_more(site: Site, count: int) -> None:
    for number in range(count):
        site.model.add_vm(
            VmPlan(
                name=f"more{number + 1:05}",
                instance_uuid=f"5024{number:04x}-1111-4222-8333-{number:012x}",
                datastore=f"more{number % 50 + 1:02}",
                folder=f"more/{number % 20 + 1:02}",
            )
        )


def main() -> int:
    """Until it is interrupted."""
    arguments = _arguments()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="vsphere-sim-", dir="/tmp"))
    if arguments.folder is not None and folder.exists() and any(folder.iterdir()):
        print(f"{folder} is not empty: choose another --folder", file=sys.stderr)
        return 2
    luns = folder / "luns"
    luns.mkdir(parents=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: ended.set())
    plan = Plan(
        luns_in=luns.absolute(), provider=arguments.provider, luns=arguments.luns,
        vms=arguments.vms, target=arguments.target, port=arguments.port,
    )  # fmt: skip
    with running_site(folder.absolute(), plan) as site:
        _add_more(site, arguments.more)
        if arguments.slow:
            site.model.weather.latency_s |= REALISTIC
        if arguments.calls:
            site.model.on_call = _print_call
        _explain(site)
        ended.wait()
        left = [f"{host}: {what}" for host in BACKUP for what in site.left_on(host)]
    if left:
        print("\n".join(["still there:", *left, f"{folder} stays"]), file=sys.stderr)
        return 1
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
