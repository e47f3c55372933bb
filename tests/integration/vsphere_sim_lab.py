"""What the tests of the vSphere simulator share: a vCenter with a production host and a datastore,
and copies of its LUN that a real iSCSI target exports."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyVmomi import vim

from offload.configs.hypervisors import VsphereConfig
from offload.model import Exposure, RawSource
from offload.target import Endpoint, ExportRequest
from offload.testing.instances import free_port, make_instance
from offload.testing.target import writable
from offload.vsphere import Vsphere
from targets.tgt import TgtTarget
from tests.vsphere_sim.hosts import Host
from tests.vsphere_sim.server import Vcenter
from tests.vsphere_sim.vmfs import MIN_BYTES

NAA = "naa.600a09800000000000000001"
ADAPTER = "vmhba64"


def client_of(vcenter: Vcenter) -> Vsphere:
    """A session."""
    return Vsphere(VsphereConfig.model_validate(vcenter.table()))


def done(client: Vsphere, task: Any) -> Any:
    """The result of a task; its fault is raised as the errors of `offload` have it."""
    return client.wait(task, time.monotonic() + 60, "a task")


@dataclass
class Copies:
    """Copies of LUNs, exported. Withdrawn at the end."""

    folder: Path
    chap: dict[str, Any] = field(default_factory=dict)
    made: int = 0
    exported: dict[str, tuple[ExportRequest, Endpoint]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = free_port()
        instance = make_instance(self.folder / "instance", {"iscsi": self.chap})
        self.target = TgtTarget(instance)
        self.views = instance.views_dir

    def export(self, source: Path, *, read_only: bool = False) -> Any:
        """A copy of a LUN as it is now; the static target by which a host reaches it."""
        self.made += 1
        name = f"v{self.made}"
        path = self.folder / f"{name}.raw"
        shutil.copyfile(source, path)
        request = ExportRequest(
            view_id=name,
            name=name,
            source=RawSource(path=path, size_bytes=path.stat().st_size),
            run_dir=self.views / name,
            exposure=Exposure(port=self.port),
        )
        request = request if read_only else writable(request)
        endpoint = self.target.export(request)
        iqn = endpoint.uri.split("/")[3]
        self.exported[iqn] = (request, endpoint)
        return vim.host.InternetScsiHba.StaticTarget(
            address="127.0.0.1", port=self.port, iScsiName=iqn
        )

    def uri(self, entry: Any) -> str:
        """Of an export."""
        return self.exported[entry.iScsiName][1].uri

    def clients(self, entry: Any) -> int:
        """Who is logged in to it."""
        request, endpoint = self.exported[entry.iScsiName]
        return len(self.target.clients(request.run_dir, endpoint.server))

    def wait_without_clients(self, entry: Any) -> None:
        """Until nobody is logged in to it: a target notices a moment later."""
        until = time.monotonic() + 60
        while self.clients(entry):
            assert time.monotonic() < until
            time.sleep(0.01)

    def withdraw(self, entry: Any) -> None:
        """It is not there any more."""
        request, endpoint = self.exported.pop(entry.iScsiName)
        self.target.withdraw(request.run_dir, endpoint.server)

    def close(self) -> None:
        """All of them."""
        for request, endpoint in self.exported.values():
            self.target.withdraw(request.run_dir, endpoint.server)
        self.exported.clear()


@dataclass
class Esx:
    """A host's managers, as a client sees them."""

    client: Vsphere
    host: Host
    model: Any

    @property
    def storage(self) -> Any:
        return vim.host.StorageSystem(self.host.system.moid, self.client.stub)

    @property
    def stores(self) -> Any:
        return vim.host.DatastoreSystem(self.host.datastore_system.moid, self.client.stub)

    def add(self, *targets: Any) -> None:
        """Tell it of targets, and let it look."""
        self.storage.AddInternetScsiStaticTargets(ADAPTER, list(targets))
        self.rescan()

    def remove(self, *targets: Any) -> None:
        """And the other way round."""
        self.storage.RemoveInternetScsiStaticTargets(ADAPTER, list(targets))
        self.rescan()

    def rescan(self) -> None:
        """Devices, then volumes."""
        self.storage.RescanAllHba()
        self.storage.RescanVmfs()

    def luns(self) -> dict[str, Any]:
        """By canonical name."""
        return {lun.canonicalName: lun for lun in self.storage.storageDeviceInfo.scsiLun}

    def unresolved(self) -> list[Any]:
        """Copies that it sees."""
        return list(self.stores.QueryUnresolvedVmfsVolumes())

    def resignature(self, *paths: str) -> Any:
        """The datastore."""
        spec = vim.host.UnresolvedVmfsResignatureSpec(extentDevicePath=list(paths))
        task = self.stores.ResignatureUnresolvedVmfsVolume_Task(spec)
        return done(self.client, task).result

    def adopt(self, target: Any) -> Any:
        """The datastore of a copy, resignatured."""
        self.add(target)
        (copy,) = self.unresolved()
        return self.resignature(*[extent.devicePath for extent in copy.extent])

    def register(self, path: str, name: str) -> Any:
        """A VM on this host, in the datacenter's folder."""
        folder = vim.Folder(self.model.inventory.folders["vm"].moid, self.client.stub)
        task = folder.RegisterVM_Task(
            path=path, name=name, asTemplate=False,
            pool=vim.ResourcePool(self.host.pool.moid, self.client.stub),
            host=vim.HostSystem(self.host.managed.moid, self.client.stub),
        )  # fmt: skip
        return done(self.client, task)


def make_lun(path: Path) -> Path:
    """A file that is large enough for a datastore."""
    with path.open("xb") as out:
        os.ftruncate(out.fileno(), MIN_BYTES)
    return path


def vcenter_vm(vcenter: Vcenter, client: Vsphere, name: str) -> Any:
    """A VM as a client sees it."""
    found = next(
        o for o in vcenter.model.objects.values()
        if isinstance(o.ref, vim.VirtualMachine) and o.properties["name"] == name
    )  # fmt: skip
    return vim.VirtualMachine(found.moid, client.stub)


def disks_of(vm: Any) -> list[Any]:
    """Its virtual disks, as a client sees them."""
    return [d for d in vm.config.hardware.device if isinstance(d, vim.vm.device.VirtualDisk)]
