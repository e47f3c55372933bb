"""Events, and the things that happen to production by themselves: vMotion, storage vMotion.

Source: vSphere Web Services API reference, EventManager.
"""

from __future__ import annotations

import posixpath
from typing import Any

from pyVmomi import VmomiSupport, vim

from tests.vsphere_sim import vmdks, vmx
from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.properties import Managed


class Events(Part):
    """What has happened, newest last."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.all: list[Any] = []

    def post(self, kind: Any, vm: Managed, **fields: Any) -> None:
        """Something happened to a VM."""
        with self.model.changed:
            number = len(self.all) + 1
            name = vm.properties["name"]
            self.all.append(
                kind(
                    key=number, chainId=number, createdTime=self.model.now(), userName="user",
                    fullFormattedMessage=f"{VmomiSupport.GetWsdlName(kind)} {name}",
                    template=vm.properties["config"].template,
                    vm=vim.event.VmEventArgument(name=name, vm=vm.ref), **fields,
                )
            )  # fmt: skip
            manager = self.model.objects["eventManager"]
            manager.properties["latestEvent"] = self.all[-1]

    def QueryEvents(
        self, _call: Call, _of: Managed, filter: Any, eventViewSpec: Any = None
    ) -> list[Any]:
        """Those of the types that are named, or all; of an entity, or all."""
        wanted = set(filter.eventTypeId)
        entity = filter.entity.entity if filter.entity is not None else None
        return [
            event
            for event in self.all
            if (not wanted or VmomiSupport.GetWsdlName(type(event)) in wanted)
            and (entity is None or event.vm.vm == entity)
        ]

    # -- for tests -------------------------------------------------------------------------------

    def vmotion(self, vm: Managed, host: str) -> None:
        """A VM runs on another host now."""
        with self.model.changed:
            runtime = vm.properties["runtime"]
            before = next(
                h for h in self.model.hosts.all.values() if h.managed.ref == runtime.host
            ).managed
            after = self.model.hosts.all[host].managed
            before.properties["vm"] = [r for r in before.properties["vm"] if r != vm.ref]
            after.properties["vm"] = [*after.properties["vm"], vm.ref]
            runtime.host = after.ref
            vm.properties.touch("runtime")
            self.post(
                vim.event.VmMigratedEvent, vm,
                host=vim.event.HostEventArgument(name=host, host=after.ref),
                sourceHost=vim.event.HostEventArgument(
                    name=before.properties["name"], host=before.ref
                ),
            )  # fmt: skip
            self.model.changed.notify_all()

    def _host(self, vm: Managed) -> Any:
        ref = vm.properties["runtime"].host
        name = self.model.objects[ref._moId].properties["name"]
        return vim.event.HostEventArgument(name=name, host=ref)

    def storage_vmotion(self, vm: Managed, datastore: str) -> None:
        """All files of a VM lie on another datastore now."""
        registration = self.model.registration
        with self.model.changed:
            source, path = registration.files(vm)
            target = self.model.datastores.ensure(datastore)
            folder = posixpath.dirname(path)
            moved = [p for p in source.volume.files if posixpath.dirname(p) == folder]
            vmdks.move(source.volume, target.volume, moved)
            values = vmx.parse(target.volume.text(path))
            vm.properties["config"].files.vmPathName = f"[{target.name}] {path}"
            registration.write(vm, values)
            self.post(
                vim.event.VmRelocatedEvent, vm, sourceHost=self._host(vm),
                sourceDatastore=vim.event.DatastoreEventArgument(
                    name=source.name, datastore=source.managed.ref
                ),
            )  # fmt: skip
            self.model.changed.notify_all()
