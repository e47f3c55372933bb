"""`make demo-vsphere`: an island of placeholders on the vSphere simulator.

The LUN underneath is real: the simulated backup host logs in to it over iSCSI, writes a signature
to it, and reads the VMs' disks from it. There is no ESXi here, and no backup software: what that
would read is read instead.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from demo.screen import OFFLOAD, DemoError, Screen, print_table
from offload import run
from offload.errors import OffloadError
from offload.quantity import show_seconds
from tests.vsphere_sim.latency import REALISTIC
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.site import BACKUP, GROUP, Plan, Site, running_site

_HOST = BACKUP[0]
_ISLAND = "night"
_OFFSET = 4096  # where the guests of this demonstration write
_NOISE = (
    "RetrieveServiceContent", "RetrieveProperties", "Login", "Logout", "CreateFilter", "Destroy",
    "WaitForUpdates", "CreatePropertyCollector", "CreateContainerView", "HasPrivilege", "REST",
    "Fetch", "CurrentTime",
)  # fmt: skip


class Story:
    """The steps, in order."""

    def __init__(self, site: Site, screen: Screen) -> None:
        self.site = site
        self.screen = screen
        self.figures: list[tuple[str, str]] = []
        self._said = 0  # calls

    def tell(self) -> None:
        """All of them. DemoError where one does not show what it says."""
        screen = self.screen
        screen.heading("A vCenter: VMs on datastores, datastores on LUNs")
        for number, name in enumerate(self.site.vms):
            self.site.write(name, _words(name, "before"), _OFFSET + number * 512)
        screen.offload("inventory", "refresh", "vc")
        screen.offload("inventory", "tree", "vc")
        screen.say(
            "The configuration names the LUNs under the datastores, and a group: all VMs of a "
            "folder."
        )
        self._mount()
        self._compare()
        self._check_drift()
        self._unmount()

    def _mount(self) -> None:
        screen = self.screen
        screen.heading(f"Its VMs as placeholders on {_HOST}, powered off")
        seconds = screen.offload(
            "mount", GROUP, "--placeholder", "--host", _HOST, "--name", _ISLAND
        )  # fmt: skip
        self.figures.append(("mount of the island", show_seconds(seconds)))
        self._show_calls("What the vCenter was told (sessions and reading left out):")

    def _compare(self) -> None:
        screen = self.screen
        screen.heading("Production goes on; the placeholders show the instant of the TimeMark")
        for number, name in enumerate(self.site.vms):
            self.site.write(name, _words(name, "after"), _OFFSET + number * 512)
        rows = [("VM", "production", f"placeholder on {_HOST}")]
        placeholders = self.site.placeholders(_HOST)
        for number, (name, vm) in enumerate(self.site.vms.items()):
            offset = _OFFSET + number * 512
            now = self._read(vm, offset)
            then = self._read(placeholders[f"backup-{name}"], offset)
            rows.append((name, now, then))
            if [now, then] != [
                _words(name, when).decode().rstrip() for when in ("after", "before")
            ]:
                raise DemoError(f"the disks of {name} are not what they should be: {now}, {then}")
        print_table("Read from their disks, a placeholder's through the host's iSCSI LUN:", rows)
        screen.offload("placeholder", "list")

    def _read(self, vm: Managed, offset: int) -> str:
        return self.site.read(vm, 32, offset).rstrip(b"\0 ").decode()

    def _check_drift(self) -> None:
        screen = self.screen
        screen.heading("Production changes: the placeholders are checked against it, and refreshed")
        self.site.add_vm("newcomer", datastore="ds1")
        screen.offload("inventory", "refresh", "vc")
        seconds = screen.offload("placeholder", "refresh", _ISLAND)
        self.figures.append(("refresh to a new point in time", show_seconds(seconds)))
        if "backup-newcomer" not in self.site.placeholders(_HOST):
            raise DemoError("the new VM has no placeholder")
        screen.offload("placeholder", "check")

    def _unmount(self) -> None:
        screen = self.screen
        screen.heading("It goes: VMs, datastores, LUNs, targets, in this order")
        self._said = len(self.site.model.record)
        seconds = screen.offload("unmount", _ISLAND)
        self.figures.append(("unmount", show_seconds(seconds)))
        self._show_calls("What the vCenter was told:")
        left = self.site.left_on(_HOST)
        pulled = self.site.model.storage.all_paths_down()
        rows = [
            (f"left on {_HOST}", ", ".join(left) or "nothing"),
            ("LUNs pulled from under a datastore", str(len(pulled))),
            ("VMs or datastores destroyed", str(len(self._destroyed()))),
            ("sessions of offload in vCenter", str(self.site.model.sessions)),
        ]
        print_table("Afterwards:", rows)
        if left or pulled or self._destroyed():
            raise DemoError("the island has left something behind")

    def _destroyed(self) -> list[str]:
        model = self.site.model
        return [*model.registration.destroyed, *model.datastores.destroyed]

    def _show_calls(self, title: str) -> None:
        """Those that change or look at hosts; a number of the same in one line."""
        calls = self.site.model.record[self._said :]
        self._said += len(calls)
        rows: list[tuple[str, int]] = []
        for call in calls:
            if call.method.startswith(_NOISE):
                continue
            name = "files over HTTPS" if call.method.startswith("HTTP") else call.method
            if rows and rows[-1][0] == name:
                rows[-1] = (name, rows[-1][1] + 1)
            else:
                rows.append((name, 1))
        shown = [(name, f"× {count}" if count > 1 else "") for name, count in rows]
        print_table(title, shown)


def _words(vm: str, when: str) -> bytes:
    return f"{vm}, {when} the TimeMark".encode().ljust(32)


def play(folder: Path, *, vms: int, luns: int, slow: bool) -> None:
    """The whole demonstration in a folder of its own."""
    (folder / "luns").mkdir()
    plan = Plan(luns_in=folder / "luns", provider="copy", luns=luns, vms=vms)
    with running_site(folder, plan) as site, ExitStack() as stack:
        if slow:
            site.model.weather.latency_s |= REALISTIC
        screen = Screen(site.config)
        # whatever happens, the LUNs' servers are ended; after a whole run there is nothing to do
        stack.callback(_take_away, screen)
        screen.say(
            "This is a simulated vSphere: no ESXi runs here. Its hosts are real iSCSI initiators."
        )
        began = time.monotonic()
        story = Story(site, screen)
        story.tell()
        story.figures.append(("the whole demonstration", show_seconds(time.monotonic() - began)))
        print_table("Measured, on the simulator:", story.figures)


def _take_away(screen: Screen) -> None:
    if screen.ask("views"):
        run.run([str(OFFLOAD), "unmount", "--all"], env=screen.env, check=False, timeout_s=600)


def main() -> int:
    """Run it; the exit code is 0 if everything was as promised and nothing is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=4, help="VMs of the group (4)")
    parser.add_argument("--luns", type=int, default=2, help="LUNs under them (2)")
    parser.add_argument("--slow", action="store_true", help="calls take as long as on a busy one")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: sys.exit(128 + got))
    folder = Path(tempfile.mkdtemp(prefix="offload-demo-", dir="/tmp"))  # sockets want short paths
    try:
        play(folder, vms=args.vms, luns=args.luns, slow=args.slow)
    except KeyboardInterrupt:
        print("\ninterrupted: everything is taken away", file=sys.stderr)
        return 130
    except OffloadError as error:
        hint = f"\n  {error.hint}" if error.hint else ""
        print(f"\ndemo: {error.message}{hint}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
