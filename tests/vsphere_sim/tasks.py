"""Tasks: calls that answer at once and go on by themselves.

Source: vSphere Web Services API reference, Task and TaskInfo.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pyVmomi import vim, vmodl

from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault

_EXCLUSIVE = (
    "CreateSnapshotEx_Task", "CreateSnapshot_Task", "RemoveSnapshot_Task", "RevertToSnapshot_Task",
    "RemoveAllSnapshots_Task", "ReconfigVM_Task", "ConsolidateVMDisks_Task", "RelocateVM_Task",
    "Destroy_Task",
)  # fmt: skip
_DESCRIPTIONS = {
    "CreateSnapshot_Task": "VirtualMachine.createSnapshot",
    "CreateSnapshotEx_Task": "VirtualMachine.createSnapshot",
    "RemoveSnapshot_Task": "vm.Snapshot.remove",
    "RevertToSnapshot_Task": "vm.Snapshot.revert",
    "ConsolidateVMDisks_Task": "VirtualMachine.consolidateDisks",
}


class Tasks(Part):
    """Each in a thread of its own. `most_at_once`: how many ran together, by method."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.most_at_once: dict[str, int] = {}
        self._running: dict[str, int] = {}
        self._busy: dict[str, Any] = {}  # the task that a VM is busy with

    def start(
        self, call: Call, of: Managed, handler: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        """Runs in a thread of its own, as a task does; recentTask of its object names it."""
        with self.model.changed:
            entity = self.model.snapshots.vm_of(of)
            self._claim(call.method, entity)
            info = vim.TaskInfo(
                key="", descriptionId=_described(call.method, of), state="running",
                cancelled=False, cancelable=False, queueTime=self.model.now(),
                startTime=self.model.now(),
                reason=vim.TaskReasonUser(userName=call.user), eventChainId=1,
                entity=entity.ref if isinstance(entity.ref, vim.ManagedEntity) else None,
            )  # fmt: skip
            task = self.model.add(vim.Task, "task", info=info)
            info.key, info.task = task.moid, task.ref
            recent = entity.properties.get("recentTask", [])
            entity.properties["recentTask"] = [*recent[-9:], task.ref]
            if call.method in _EXCLUSIVE:
                self._busy[entity.moid] = task.ref
        work = (call, task, of, handler, arguments)
        threading.Thread(target=self._work, args=work, daemon=True).start()
        return task.ref

    def _claim(self, method: str, entity: Managed) -> None:
        """TaskInProgress: if the virtual machine is busy with another task of these."""
        if method in _EXCLUSIVE:
            busy = self._busy.get(entity.moid)
            if busy is not None:
                raise SoapFault(
                    vim.fault.TaskInProgress(task=busy),
                    "The operation is not allowed: another task is already in progress.",
                )

    def _work(
        self,
        call: Call,
        task: Managed,
        of: Managed,
        handler: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> None:
        method = call.method
        with self.model.changed:
            self._running[method] = self._running.get(method, 0) + 1
            most = max(self.most_at_once.get(method, 0), self._running[method])
            self.most_at_once[method] = most
        time.sleep(self.model.weather.latency_s.get(method, 0))
        if method in self.model.weather.hold:
            self.model.weather.hold[method].wait()
        info = task.properties["info"]
        result, fault = None, None
        try:
            self.model.storm(method)
            result = self.model.run(handler, call, of, arguments)
        except SoapFault as error:
            fault = error.fault
        except BaseException as error:
            fault = vmodl.fault.SystemError(reason=repr(error), msg=f"simulator: {error!r}")
            raise
        finally:
            with self.model.changed:
                self._running[method] -= 1
                for moid in [moid for moid, busy in self._busy.items() if busy == task.ref]:
                    del self._busy[moid]
                info.completeTime, info.error = self.model.now(), fault
                info.state, info.result = ("error", None) if fault else ("success", result)
                task.properties.touch("info")
                self.model.changed.notify_all()


def _described(method: str, of: Managed) -> str:
    """TaskInfo.descriptionId: type and method, as the message catalog has them."""
    plain = method.removesuffix("_Task")
    kind = type(of.ref).__name__.removeprefix("vim.")
    return _DESCRIPTIONS.get(method, f"{kind}.{plain[:1].lower()}{plain[1:]}")
