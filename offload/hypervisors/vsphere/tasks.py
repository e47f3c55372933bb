"""Several tasks at once, watched by one property collector, under one deadline.

Source: vSphere Web Services API, Task and PropertyCollector.WaitForUpdatesEx.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from pyVmomi import vim, vmodl

from offload.errors import OffloadError
from offload.hypervisors.vsphere.link import SessionLostError
from offload.vsphere import TaskLateError, Vsphere

AT_ONCE = 8  # tasks of ours that a vCenter has at a time
_WAIT_S = 10  # of one wait for changes: less than the limit of a request


@dataclass(frozen=True, slots=True)
class Job:
    """A task to be: `begin` starts it; `what` it is, for errors."""

    what: str
    begin: Callable[[], Any]


def run_all(vsphere: Vsphere, jobs: Sequence[Job], *, timeout_s: float) -> list[Any]:
    """The results, or the faults, of all jobs, in their order: a fault is a value here.

    Not more than AT_ONCE at a time. Raises TaskLateError where none has ended for `timeout_s` (they
    go on at the server), SessionLostError, and what `Vsphere.translated` raises for the calls.
    """
    if not jobs:
        return []
    ended: dict[int, Any] = {}
    with vsphere.translated(jobs[0].what):
        watch = _Watch(vsphere)
        try:
            todo = list(enumerate(jobs))
            until = time.monotonic() + timeout_s
            while len(ended) < len(jobs):
                while todo and len(watch.tasks) < AT_ONCE:
                    number, job = todo.pop(0)
                    try:
                        watch.add(job.begin(), number)
                    except (vim.fault.NotAuthenticated, vim.fault.NoPermission):
                        raise
                    except vmodl.MethodFault as fault:
                        ended[number] = fault
                if watch.tasks and (fresh := _next(watch, jobs, until)):
                    ended |= fresh
                    until = time.monotonic() + timeout_s
        finally:
            watch.close()
    return [ended[number] for number in range(len(jobs))]


def run_one(vsphere: Vsphere, what: str, begin: Callable[[], Any], *, timeout_s: float) -> Any:
    """The result of one task. Raises as `run_all`, and what the task failed with, translated."""
    found = run_all(vsphere, [Job(what, begin)], timeout_s=timeout_s)[0]
    if isinstance(found, vmodl.MethodFault):
        raise error_of(vsphere, found, what)
    return found


def error_of(vsphere: Vsphere, fault: Any, what: str) -> OffloadError:
    """A fault that a task ended with, as an error of ours; the fault is its cause."""
    try:
        with vsphere.translated(what):
            raise fault
    except OffloadError as error:
        return error


def _next(watch: _Watch, jobs: Sequence[Job], until: float) -> dict[int, Any]:
    left_s = until - time.monotonic()
    if left_s <= 0:
        late = ", ".join(jobs[number].what for number in watch.tasks.values())
        raise TaskLateError(f"not finished in time: {late}")
    return watch.ended(min(left_s, _WAIT_S))


class _Watch:
    """A private collector, with a filter a task."""

    def __init__(self, vsphere: Vsphere) -> None:
        self.tasks: dict[str, int] = {}  # by reference, the number of the job
        self._collector = vsphere.content.propertyCollector.CreatePropertyCollector()
        self._filters: dict[str, Any] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._version = ""

    def add(self, task: Any, number: int) -> None:
        kinds = vmodl.query.PropertyCollector
        spec = kinds.FilterSpec(
            objectSet=[kinds.ObjectSpec(obj=task)],
            propSet=[
                kinds.PropertySpec(
                    type=vim.Task, pathSet=["info.state", "info.error", "info.result"]
                )
            ],
        )
        key = task._moId  # noqa: SLF001 - its name in the API
        try:
            self._filters[key] = self._collector.CreateFilter(spec, partialUpdates=False)
        except vmodl.fault.ManagedObjectNotFound as gone:
            raise _lost() from gone
        self.tasks[key] = number

    def ended(self, patience_s: float) -> dict[int, Any]:
        """Of those that ended meanwhile: result or fault, by number."""
        whole_s = max(1, math.floor(patience_s))  # 0 would ask without a pause
        options = vmodl.query.PropertyCollector.WaitOptions(maxWaitSeconds=whole_s)
        try:
            updates = self._collector.WaitForUpdatesEx(self._version, options)
        except vmodl.fault.ManagedObjectNotFound as gone:  # the collector itself
            raise _lost() from gone
        if updates is None:
            return {}
        self._version = updates.version
        for changed in updates.filterSet:
            for entry in changed.objectSet:
                key = entry.obj._moId  # noqa: SLF001
                if key in self.tasks and str(entry.kind) == "leave":
                    raise _lost()
                known = self._known.setdefault(key, {})
                known.update({change.name: change.val for change in entry.changeSet})
        return dict(self._take())

    def _take(self) -> list[tuple[int, Any]]:
        found = []
        for key, known in list(self._known.items()):
            state = str(known.get("info.state"))
            if key not in self.tasks or state not in {"success", "error"}:
                continue
            self._filters.pop(key).DestroyPropertyFilter()
            value = known.get("info.error") if state == "error" else known.get("info.result")
            found.append((self.tasks.pop(key), value))
            del self._known[key]
        return found

    def close(self) -> None:
        with contextlib.suppress(vmodl.MethodFault, OSError, HTTPException):
            self._collector.DestroyPropertyCollector()


def _lost() -> SessionLostError:
    return SessionLostError("the server has forgotten a task: it was restarted")
