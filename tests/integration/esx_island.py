"""A backup host on the vSphere simulator, with views that it really logs in to, for tests of the
driver alone: no catalog, no journal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyVmomi import vim

from offload import iscsi, run
from offload.hypervisor import IslandRequest, IslandView
from offload.hypervisors.vsphere.backup_host import VsphereBackupHost
from offload.instance import Instance
from offload.island import Placeholder, Shown
from offload.machine import DiskKind, Machine, MachineDisk
from offload.model import HomeSource, RawSource, View, ViewId
from offload.target import ExportRequest
from offload.testing.instances import free_port, make_instance
from targets.tgt import TgtTarget
from tests.vsphere_sim import vmdks
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.server import Vcenter, running_vcenter
from tests.vsphere_sim.vms import VmPlan

MIB = 1 << 20
AT = datetime(2026, 11, 21, 3, 0, tzinfo=UTC)
LUN_BYTES = 64 * MIB


def no_step(_name: str) -> None:
    """Nothing happens at a step."""


@dataclass
class IslandSite:
    """A vCenter with a production host and backup hosts, LUNs that are files, an instance."""

    folder: Path
    vcenter: Vcenter
    port: int
    extra: dict[str, Any] = field(default_factory=dict)  # tables of the configuration
    luns: dict[str, tuple[Path, str]] = field(default_factory=dict)  # file and NAA, by volume
    plans: dict[str, VmPlan] = field(default_factory=dict)
    vms: dict[str, Managed] = field(default_factory=dict)
    views: dict[str, ExportRequest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("esx1", "backup1", "backup2"):
            self.model.hosts.add(name)
        hosts = {
            name: {"hypervisor": "vc", "host": name, "target": "tgt", "timeout_s": 20}
            for name in ("backup1", "backup2")
        }
        tables: dict[str, Any] = {
            "hypervisors": {"vc": self.vcenter.table()},
            "backup_hosts": hosts,
            "iscsi": {"port": self.port},
        }
        for name, changed in self.extra.items():
            tables[name] = {**tables.get(name, {}), **changed}
        self.instance: Instance = make_instance(self.folder / "i", tables)
        self.target = TgtTarget(self.instance)

    @property
    def model(self) -> Any:
        return self.vcenter.model

    def host(self, name: str = "backup1") -> VsphereBackupHost:
        """The driver under test."""
        return VsphereBackupHost(name, self.instance.config.backup_host(name), self.instance)

    # -- production ------------------------------------------------------------------------------

    def add_lun(self, volume: str, size_bytes: int = LUN_BYTES) -> str:
        """A LUN of production; its NAA."""
        path = self.folder / f"{volume}.raw"
        with path.open("wb") as out:
            out.truncate(size_bytes)
        naa = f"naa.600a098038{len(self.luns) + 1:022x}"
        self.luns[volume] = (path, naa)
        self.model.storage.give("esx1", path, naa)
        return naa

    def add_datastore(self, label: str, *volumes: str) -> None:
        """A VMFS on new LUNs."""
        for volume in volumes:
            self.add_lun(volume)
        disks = [self.model.hosts.all["esx1"].local[self.luns[v][1]] for v in volumes]
        self.model.datastores.make(label, disks, ["esx1"])

    def add_vm(self, name: str, **plan: Any) -> Managed:
        """On datastore ds1, where the plan says nothing else."""
        number = len(self.plans) + 1
        made = VmPlan(name=name, instance_uuid=f"5023{number:04x}-0000", host="esx1", **plan)
        self.plans[name] = made
        self.vms[name] = self.model.add_vm(made)
        return self.vms[name]

    def machine(self, name: str) -> Machine:
        """Its settings, as an inventory has them."""
        vm = self.vms[name]
        config = vm.properties["config"]
        place = config.files.vmPathName
        store, path = self.model.datastores.path(place)
        disks = self.disks(vm)
        return Machine(
            name=name,
            kind="vsphere",
            hypervisor="vc",
            id=vm.moid,
            uuid=config.uuid,
            definition=store.volume.text(path),
            definition_path=place,
            disks=tuple(
                self._disk(plan, f, d)
                for (f, plan, _), d in zip(self.plans[name].disk_files(), disks, strict=True)
            ),
        )

    def _disk(self, plan: Any, place: str, device: Any) -> MachineDisk:
        store, _ = self.model.datastores.path(device.backing.fileName)
        kind = DiskKind(plan.kind)
        chain, parent = [], device.backing.parent
        while parent is not None:
            chain.append(parent.fileName)
            parent = parent.parent
        return MachineDisk(
            name=place,
            label=device.deviceInfo.label if device.deviceInfo else place,
            kind=kind,
            path=device.backing.fileName,
            chain=tuple(chain),
            size_bytes=plan.size_bytes,
            datastore=store.name,
            luns=(plan.lun,) if plan.lun else tuple(d.naa for d in store.volume.disks),
            independent=plan.mode.startswith("independent"),
        )

    @property
    def root(self) -> Managed:
        """The datacenter's folder of VMs."""
        found: Managed = self.model.inventory.folders["vm"]
        return found

    def add_proxy(self, path: str) -> Managed:
        """A VM of backup software that has attached a disk of another one."""
        self.model.datastores.ensure("proxies")
        vm: Managed = self.model.add_vm(
            VmPlan(name="proxy", instance_uuid="5023-proxy", datastore="proxies", host="backup1")
        )
        device = vim.vm.device.VirtualDisk(
            key=-1,
            controllerKey=1000,
            unitNumber=1,
            backing=vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
                fileName=path, diskMode="independent_nonpersistent"
            ),
        )
        change = vim.vm.device.VirtualDeviceSpec(operation="add", device=device)
        self.model.reconfigure.ReconfigVM_Task(None, vm, vim.vm.ConfigSpec(deviceChange=[change]))
        return vm

    # -- views -----------------------------------------------------------------------------------

    def read_only_view(self, volume: str) -> IslandView:
        """One that takes no resignature."""
        made = self.view(volume)
        request = replace(
            self.views[made.view.id],
            source=RawSource(
                path=self.folder / f"{made.view.id}.raw", size_bytes=made.view.size_bytes
            ),
        )
        self.target.withdraw(request.run_dir, made.view.server)
        endpoint = self.target.export(request)
        return replace(made, view=replace(made.view, server=endpoint.server))

    def view(self, volume: str, view_id: str = "", host: str = "backup1") -> IslandView:
        """A writable view of a copy of a LUN, as of now."""
        view_id = view_id or f"v{len(self.views) + 1}"
        source, naa = self.luns[volume]
        copy = self.folder / f"{view_id}.raw"
        run.run(["cp", "--sparse=always", str(source), str(copy)])
        _, exposure, may_write = self.host(host).export()
        assert may_write
        request = ExportRequest(
            view_id=view_id,
            name=view_id,
            # written in place, without a daemon for its overlay
            source=HomeSource(place=str(copy), size_bytes=copy.stat().st_size, sector_size=512),
            run_dir=self.instance.views_dir / view_id,
            exposure=exposure,
        )
        endpoint = self.target.export(request)
        self.views[view_id] = request
        view = View(
            id=ViewId(view_id),
            name=view_id,
            origin=f"timemark:t1/{volume}",
            target="tgt",
            uri=endpoint.uri,
            writable=True,
            size_bytes=request.source.size_bytes,
            sector_size=512,
            created_at=AT,
            source=request.source,
            server=endpoint.server,
            exposure=exposure,
        )
        return IslandView(view=view, volume=volume, identity=volume, luns=(naa,))

    def host_lun(self, view_id: str) -> str:
        """What the backup host calls a view."""
        names = iscsi.canonical_names("tgt", view_id)
        (found,) = set(names) & set(self.model.hosts.all["backup1"].disks)
        return found

    def withdraw(self, view_id: str) -> None:
        """What the caller does when an island is down."""
        self.target.withdraw(self.views.pop(view_id).run_dir, {})

    def request(
        self, views: Sequence[IslandView], names: Sequence[str] = (), **more: Any
    ) -> IslandRequest:
        """An island of these VMs, or of all."""
        made = IslandRequest(
            id="i1",
            name="shop",
            group="shop",
            origin="timemark:t1",
            at=AT,
            consistency={},
            shown=Shown.GROUP,
            views=tuple(views),
            machines=tuple(self.machine(name) for name in names or self.vms),
        )
        return replace(made, **more)

    def build(
        self, request: IslandRequest, host: str = "backup1"
    ) -> tuple[dict[str, str], tuple[Placeholder, ...]]:
        """As the service does it: the record comes first."""
        driver = self.host(host)
        driver.refuse(request)
        record = driver.plan(request)
        return record, driver.build(request, record, no_step)

    # -- what there is ---------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        """The guest of a production VM writes, at the start of its first disk."""
        store, path = self._disk_of(self.vms[name])
        vmdks.write(store.volume, path, data, 0)
        store.volume.save()

    def read(self, moref: str, count: int) -> bytes:
        """What a backup of a VM would read there."""
        store, path = self._disk_of(self.vm(moref))
        found: bytes = vmdks.read(store.volume, path, count, 0)
        return found

    def _disk_of(self, vm: Managed) -> tuple[Any, str]:
        disks = self.disks(vm)
        found: tuple[Any, str] = self.model.datastores.path(disks[0].backing.fileName)
        return found

    def disks(self, vm: Managed) -> list[Any]:
        """Virtual disks of a VM, as the API shows them."""
        devices = vm.properties["config"].hardware.device
        return [d for d in devices if isinstance(d, vim.vm.device.VirtualDisk)]

    def wait_for_call(self, method: str) -> None:
        """Until a call has come, and its task is under way."""
        with self.model.changed:
            assert self.model.changed.wait_for(lambda: method in self.model.calls, 60)

    def vm(self, moref: str) -> Managed:
        """A registered VM."""
        found: Managed = self.model.objects[moref]
        return found

    def assert_bare(self, host: str = "backup1") -> None:
        """The backup host has nothing of ours, and never had all paths down."""
        found = self.model.hosts.all[host]
        assert found.targets == []
        assert found.disks == {}
        assert found.detached == set()
        assert found.unmounted == set()
        assert found.managed.properties["datastore"] == []
        assert found.managed.properties["vm"] == []
        assert self.model.storage.all_paths_down() == []
        assert self.model.registration.destroyed == []
        assert self.model.sessions == 0

    def close(self) -> None:
        """Views end after the hosts are logged out."""
        self.model.storage.close()
        for view_id in list(self.views):
            self.withdraw(view_id)


@contextmanager
def island_site(folder: Path, **extra: Any) -> Iterator[IslandSite]:
    """One with datastore ds1 on volume lun1."""
    with running_vcenter(folder / "vcenter") as vcenter, contextlib.ExitStack() as stack:
        site = IslandSite(folder, vcenter, free_port(), extra)
        stack.callback(site.close)
        site.add_datastore("ds1", "lun1")
        yield site
