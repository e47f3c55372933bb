"""An island is taken off its host: by what is known of it before it was built, and nothing else.

The order matters: a LUN that goes while its datastore is mounted leaves the host with all paths
down, which can hang it. So the views are withdrawn by the caller, after all of this is confirmed.
Never RemoveDatastore or Destroy: they remove the VMFS.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyVmomi import vim, vmodl

from offload.errors import CleanupError
from offload.filesystem import fsync_folder
from offload.hypervisor import Step
from offload.hypervisors.vsphere.datastore import OurDatastore, our_datastores
from offload.hypervisors.vsphere.hosts import Host
from offload.hypervisors.vsphere.link import Link
from offload.hypervisors.vsphere.properties import read_each
from offload.hypervisors.vsphere.record import MARK, Record
from offload.hypervisors.vsphere.register import find_folder, vms_in
from offload.hypervisors.vsphere.storage import HostStorage
from offload.vsphere import Vsphere

_POLL_S = 0.5


class Seen:
    """What was found on the way and cannot be found again: UUIDs of unmounted VMFS, of which the
    host keeps a state. A small file, so that it outlives us."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, uuids: Iterable[str]) -> None:
        """Durable on return."""
        known = self.uuids()
        fresh = [uuid for uuid in uuids if uuid not in known]
        if not fresh:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._path.open("a") as out:
            out.writelines(f"{uuid}\n" for uuid in fresh)
            out.flush()
            os.fsync(out.fileno())
        fsync_folder(self._path.parent)

    def uuids(self) -> list[str]:
        """All that were noted."""
        with contextlib.suppress(FileNotFoundError):
            return [line for line in self._path.read_text().splitlines() if line]
        return []

    def forget(self) -> None:
        """It is over."""
        self._path.unlink(missing_ok=True)


def dismantle(
    link: Link, host: Host, record: Record, seen: Seen, step: Step, *, timeout_s: float
) -> None:
    """Idempotent. Raises CleanupError where something is still used, or could not be confirmed,
    and what sessions raise."""

    def storage(vsphere: Vsphere) -> HostStorage:
        return HostStorage(vsphere, host, record, timeout_s=timeout_s)

    link.do(lambda vsphere: _unregister(vsphere, host, record, timeout_s))
    step("unregistered")
    link.do(lambda vsphere: _unmount(storage(vsphere), seen))
    step("unmounted")
    link.do(lambda vsphere: storage(vsphere).detach())
    step("detached")
    link.do(lambda vsphere: _let_go(storage(vsphere)))
    step("targets-removed")
    link.do(lambda vsphere: storage(vsphere).wait_without_luns())
    step("rescanned")
    link.do(lambda vsphere: _forget(storage(vsphere), record, seen))
    link.do(lambda vsphere: _confirm(vsphere, storage(vsphere), host, record, timeout_s))
    seen.forget()
    step("forgotten")


def _unregister(vsphere: Vsphere, host: Host, record: Record, timeout_s: float) -> None:
    datastores = our_datastores(vsphere, host, record)
    ours, others = _vms(vsphere, host, record, datastores)
    if others:
        raise CleanupError(
            f"{', '.join(sorted(others))} uses a disk of the island: it is no placeholder",
            code="datastore-busy",
            hint="end the backup that has attached it, or take the disk from that VM; then: "
            "offload recover",
        )
    running = sorted(str(f.get("name")) for f in ours.values() if _runs(f))
    if running:
        raise CleanupError(
            f"{', '.join(running)} runs: its disks would vanish under it",
            code="placeholder-runs",
            hint="power it off, then: offload recover",
        )
    for moref in ours:
        _unregister_one(vsphere, moref, timeout_s)


def _runs(fields: dict[str, Any]) -> bool:
    return str(fields.get("runtime.powerState")) == "poweredOn"


def _vms(
    vsphere: Vsphere, host: Host, record: Record, datastores: list[OurDatastore]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Those whose settings lie on our datastores, or that bear our mark, by reference; and the
    names of others that merely use something there (a backup proxy with a disk attached)."""
    morefs = {moref for datastore in datastores for moref in datastore.vms}
    folder = find_folder(vsphere, host, record.folder)
    if folder is not None:
        morefs |= set(vms_in(vsphere, folder))
    with vsphere.translated("the placeholders of the island"):
        fields = read_each(
            vsphere,
            [vim.VirtualMachine(moref, vsphere.stub) for moref in sorted(morefs)],
            "name",
            "runtime.powerState",
            "config.files.vmPathName",
            "config.extraConfig",
        )
    places = tuple(f"[{datastore.name}] " for datastore in datastores)
    near = {moref for datastore in datastores for moref in datastore.vms}
    ours, others = {}, []
    for moref, known in fields.items():
        path = str(known.get("config.files.vmPathName", ""))
        marks = {o.key: o.value for o in known.get("config.extraConfig", ())}
        if (places and path.startswith(places)) or marks.get(MARK) == record.mark:
            ours[moref] = known
        elif moref in near:
            others.append(str(known.get("name", moref)))
    return ours, others


def _unregister_one(vsphere: Vsphere, moref: str, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    vm = vim.VirtualMachine(moref, vsphere.stub)
    with vsphere.translated("a placeholder"):
        while True:
            try:
                vm.UnregisterVM()
            except vmodl.fault.ManagedObjectNotFound:
                return
            except vim.fault.TaskInProgress:  # a backup of it, which ends some time
                if time.monotonic() + _POLL_S > until:
                    raise
                time.sleep(_POLL_S)
            else:
                return


def _unmount(storage: HostStorage, seen: Seen) -> None:
    found = storage.volumes()
    seen.add(volume.uuid for volume in found)
    storage.unmount(volume for volume in found if volume.mounted)


def _let_go(storage: HostStorage) -> None:
    """A rescan disturbs the host: not where there is nothing to find out."""
    found = storage.has_targets() or bool(storage.disks()) or bool(storage.volumes())
    storage.remove_targets()
    if found:
        storage.rescan()


def _forget(storage: HostStorage, record: Record, seen: Seen) -> None:
    """By each name that the host may have had for them: which it took is gone with the LUNs."""
    storage.forget_luns(sorted(record.names))
    for uuid in seen.uuids():
        storage.forget_volume(uuid)


def _confirm(
    vsphere: Vsphere, storage: HostStorage, host: Host, record: Record, timeout_s: float
) -> None:
    """The inventory follows the host some time later."""
    until = time.monotonic() + timeout_s
    while True:
        left = ["one of its targets"] if storage.has_targets() else []
        left += [datastore.name for datastore in our_datastores(vsphere, host, record)]
        if not left:
            return
        if time.monotonic() + _POLL_S > until:
            raise CleanupError(
                f"host {host.name} still has {', '.join(left)} of the island",
                code="island-stays",
                hint="run: offload recover; the views stay until then",
            )
        time.sleep(_POLL_S)
