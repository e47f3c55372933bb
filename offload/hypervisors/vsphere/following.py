"""Properties of all objects that an inventory needs, read once and kept current.

A property collector of our own tells all values first, then what has changed, in sets that may be
truncated. Source: vSphere Web Services API, PropertyCollector.WaitForUpdatesEx. So there is one way
of reading, and nothing can change between a first read and the following of changes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from pyVmomi import vim, vmodl

from offload.vsphere import Vsphere, view_filter

_PAGE = 200  # updates in one set: a VM's devices are some 30 objects of pyVmomi
_WAIT_S = 10  # of one call: less than its time limit

PATHS: dict[Any, tuple[str, ...]] = {
    vim.VirtualMachine: (
        "name", "parent", "parentVApp", "runtime.powerState", "runtime.host",
        "guest.toolsRunningStatus", "guest.toolsVersionStatus2", "config.uuid",
        "config.instanceUuid", "config.template", "config.firmware", "config.keyId",
        "config.annotation", "config.hardware.device",
    ),
    vim.Datastore: (
        "name", "info", "summary.type", "summary.capacity", "summary.freeSpace",
        "summary.accessible",
    ),
    vim.HostSystem: ("name", "runtime.connectionState", "runtime.inMaintenanceMode"),
    vim.Folder: ("name", "parent"),
    vim.Datacenter: ("name", "parent"),
    vim.VirtualApp: ("name", "parentFolder", "parentVApp"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Of one object. `values`: what is set now; a None: unset."""

    managed: Any
    gone: bool
    values: Mapping[str, Any]


class Follower:
    """Lives in one session, and goes with it."""

    def __init__(self, vsphere: Vsphere) -> None:
        self._vsphere = vsphere
        with vsphere.translated("the inventory"):
            self._view = vsphere.view(list(PATHS))
            self._collector = vsphere.content.propertyCollector.CreatePropertyCollector()
            self._collector.CreateFilter(view_filter(self._view, PATHS), partialUpdates=False)
        self._version = ""

    def look(self, wait_s: float) -> Iterator[Update]:
        """All that has changed since the last look (the first time: everything), waiting so long
        for the first change. Raises PrivilegeError, UnavailableError, NotFoundError (the collector
        has gone with a restart of the server)."""
        until = time.monotonic() + wait_s
        truncated = False
        while True:
            left_s = 0.0 if truncated else max(0.0, min(until - time.monotonic(), _WAIT_S))
            kinds = vmodl.query.PropertyCollector
            options = kinds.WaitOptions(maxWaitSeconds=int(left_s), maxObjectUpdates=_PAGE)
            with self._vsphere.translated("the inventory"):
                found = self._collector.WaitForUpdatesEx(self._version, options)
                if found is not None:
                    self._version = found.version
                    for changed in found.filterSet or ():
                        for entry in changed.objectSet or ():
                            yield _update(entry)
            truncated = found is not None and bool(found.truncated)
            if not truncated and (found is not None or time.monotonic() + 1 > until):
                return

    def close(self) -> None:
        """Never raises."""
        with contextlib.suppress(vmodl.MethodFault, OSError, HTTPException):
            self._collector.DestroyPropertyCollector()
            self._view.DestroyView()


def _update(entry: Any) -> Update:
    for missing in entry.missingSet or ():
        if isinstance(missing.fault, vim.fault.NoPermission):
            raise missing.fault
    values = {
        change.name: change.val if change.op in ("assign", "add") else None
        for change in entry.changeSet or ()
    }
    return Update(managed=entry.obj, gone=entry.kind == "leave", values=values)
