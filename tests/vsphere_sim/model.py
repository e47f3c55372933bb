"""What the simulator is: managed objects, calls, tasks. What it does lies in its parts."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from pyVmomi import vim, vmodl

from tests.vsphere_sim.browsing import Browsing
from tests.vsphere_sim.calls import Call, Part, Recorded
from tests.vsphere_sim.collector import Collector
from tests.vsphere_sim.datastores import Datastores
from tests.vsphere_sim.events import Events
from tests.vsphere_sim.hosts import Hosts
from tests.vsphere_sim.inventory import Inventory
from tests.vsphere_sim.messages import Answer, Request
from tests.vsphere_sim.mounting import Mounting
from tests.vsphere_sim.privileges import Privileges
from tests.vsphere_sim.properties import Managed, Properties
from tests.vsphere_sim.reconfigure import Reconfigure
from tests.vsphere_sim.registration import Registration
from tests.vsphere_sim.sessions import Sessions
from tests.vsphere_sim.snapshots import Snapshots
from tests.vsphere_sim.soap import SoapFault
from tests.vsphere_sim.storage import Storage
from tests.vsphere_sim.tags import Tags
from tests.vsphere_sim.tasks import Tasks
from tests.vsphere_sim.vms import VmPlan
from tests.vsphere_sim.web import Web

__all__ = ["Model", "VmPlan", "Weather"]


@dataclass(slots=True)
class Weather:
    """Faults on demand. `fault(method)`: what a call, or a task that it starts, fails with;
    `hold`: tasks of these methods wait for the event; `latency_s`: how long a call takes, by
    method, and a task, by its method. `inventory_lag_s`: how long after a rescan has returned its
    datastores appear: RescanVmfs does not wait for the inventory to know what the host found."""

    fault: Callable[[str], Any] = lambda _method: None
    web: Callable[[str], HTTPStatus | None] = lambda _path: None  # what a request is refused with
    hold: dict[str, threading.Event] = field(default_factory=dict)
    latency_s: dict[str, float] = field(default_factory=dict)
    inventory_lag_s: float = 0.0
    inventory_hold: threading.Event | None = None  # they appear when it is set
    quiesces: bool = True  # else a snapshot is made, and says that it is not quiesced
    consolidation_fails: bool = False  # a removal leaves the delta, and consolidationNeeded
    clock_ahead: timedelta = timedelta()


class Model:
    """Answers calls as a vCenter does. `calls` has their names in order, `record` all of each.
    Thread safe.

    A property is read by its object's own call (Fetch), many by the property collector.
    """

    def __init__(self, user: str, password: str) -> None:
        self.weather = Weather()
        self.calls: list[str] = []
        self.record: list[Recorded] = []
        self.on_call: Callable[[Recorded], None] = lambda _call: None
        self.changed = threading.Condition(threading.RLock())
        self.objects: dict[str, Managed] = {}
        self.generation = 0  # how often an object came or went
        self._numbers = itertools.count(1)
        self._handlers: dict[str, Callable[..., Any]] = {}
        self.sessions_part = Sessions(self, user, password)
        self.collector = Collector(self)
        self.tasks = Tasks(self)
        self.inventory = Inventory(self)
        self.hosts = Hosts(self)
        self.datastores = Datastores(self)
        self.storage = Storage(self)
        self.mounting = Mounting(self)
        self.browsing = Browsing(self)
        self.snapshots = Snapshots(self)
        self.registration = Registration(self)
        self.reconfigure = Reconfigure(self)
        self.events = Events(self)
        self.privileges = Privileges(self)
        self.web = Web(self)
        self.tags = Tags(self)
        for part in list(vars(self).values()):
            if isinstance(part, Part):
                self._handlers |= part.handlers()

    # -- for tests: see the parts for more -------------------------------------------------------

    def add_vm(self, plan: VmPlan) -> Managed:
        """As of `Inventory`."""
        return self.inventory.add_vm(plan)

    def set_power(self, vm: Managed, state: str, *, clean: bool = True) -> None:
        """As of `Inventory`."""
        self.inventory.set_power(vm, state, clean=clean)

    def snapshot_names(self, vm: Managed) -> list[str]:
        """As of `Snapshots`."""
        return self.snapshots.names(vm)

    def add_snapshot(self, vm: Managed, name: str) -> None:
        """As of `Snapshots`."""
        self.snapshots.add(vm, name)

    def drop_snapshot(self, vm: Managed, name: str) -> None:
        """As of `Snapshots`."""
        self.snapshots.drop(vm, name)

    @property
    def specs(self) -> list[Any]:
        """How snapshots were to be quiesced."""
        return self.snapshots.specs

    @property
    def most_at_once(self) -> dict[str, int]:
        """How many tasks ran together, by method."""
        return self.tasks.most_at_once

    def end_sessions(self) -> None:
        """They have expired."""
        self.sessions_part.end()

    def restart(self) -> None:
        """vCenter was restarted: no session, collector, view or task of before is known any more.
        Hosts and VMs go on."""
        with self.changed:
            self.end_sessions()
            kinds = (vim.Task, vim.view.View, vmodl.query.PropertyCollector.Filter)
            for found in list(self.objects.values()):
                if isinstance(found.ref, kinds) or self.collector.made(found):
                    self.forget(found)
            for found in self.objects.values():
                if "recentTask" in found.properties:
                    found.properties["recentTask"] = []

    @property
    def sessions(self) -> int:
        """Logged in now."""
        return self.sessions_part.count

    def now(self) -> datetime:
        """The server's clock."""
        return datetime.now(UTC) + self.weather.clock_ahead

    # -- objects ---------------------------------------------------------------------------------

    def number(self) -> int:
        """One that was never given before."""
        return next(self._numbers)

    def add(
        self,
        kind: Any,
        prefix: str,
        moid: str = "",
        *,
        parent: Managed | None = None,
        **values: Any,
    ) -> Managed:
        """A new managed object."""
        with self.changed:
            ref = kind(moid or f"{prefix}-{self.number()}")
            made = Managed(ref, Properties(values), parent)
            if parent is not None:
                made.properties["parent"] = parent.ref
            self.objects[made.moid] = made
            self.generation += 1
            return made

    def forget(self, found: Managed) -> None:
        """It is not there any more."""
        with self.changed:
            self.objects.pop(found.moid, None)
            self.generation += 1
            self.changed.notify_all()

    def of(self, ref: Any) -> Managed:
        """The object of a reference. Raises SoapFault (ManagedObjectNotFound)."""
        found = self.objects.get(ref._moId)
        if found is None:
            raise SoapFault(
                vmodl.fault.ManagedObjectNotFound(obj=ref),
                "The object has already been deleted or has not been completely created",
            )
        return found

    # -- calls -----------------------------------------------------------------------------------

    def call(self, session: str, reference: Any, method: str, arguments: dict[str, Any]) -> Any:
        """As of Service."""
        with self.changed:
            self.note(session, method, reference._moId, arguments)
            found = self.of(reference)
            call = self.sessions_part.admit(session, found, method)
            self.privileges.check(call, found)
        handler = self._handlers.get(method)
        if handler is None:
            raise SoapFault(vmodl.fault.MethodNotFound(receiver=found.ref, method=method))
        if method.endswith("_Task"):  # a task fails by itself
            return self.tasks.start(call, found, handler, arguments)
        time.sleep(self.weather.latency_s.get(method, 0))
        self.storm(method)
        return self.run(handler, call, found, arguments)

    def answer(self, request: Request) -> Answer:
        """As of Service: what is no SOAP."""
        refused = self.weather.web(request.path)
        return self.web.answer(request) if refused is None else Answer(status=refused)

    def note(self, session: str, method: str, moid: str, arguments: dict[str, Any]) -> None:
        """Record a call."""
        with self.changed:
            self.calls.append(method)
            self.record.append(
                Recorded(
                    at=time.monotonic(),
                    session=session,
                    method=method,
                    moid=moid,
                    arguments=arguments,
                )
            )
            self.on_call(self.record[-1])

    def storm(self, method: str) -> None:
        """Fail, where that is wanted."""
        fault = self.weather.fault(method)
        if fault is not None:
            raise SoapFault(fault)

    def run(
        self, handler: Callable[..., Any], call: Call, found: Managed, arguments: dict[str, Any]
    ) -> Any:
        """Under the lock, unless the handler wants to wait or to talk to a target."""
        if getattr(handler, "unlocked", False):
            return handler(call, found, **arguments)
        with self.changed:
            try:
                return handler(call, found, **arguments)
            finally:
                self.changed.notify_all()

    def later(self, act: Callable[[], None]) -> None:
        """Act when the weather lets the inventory know: now, or in a thread of its own."""
        delay_s, hold = self.weather.inventory_lag_s, self.weather.inventory_hold
        if delay_s <= 0 and hold is None:
            act()
            return

        def wait() -> None:
            time.sleep(delay_s)
            if hold is not None:
                hold.wait()
            act()

        threading.Thread(target=wait, daemon=True).start()

    def close(self) -> None:
        """Hosts log out of their targets."""
        with suppress(OSError):
            self.storage.close()
