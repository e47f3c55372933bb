"""A whole site: a vCenter, production hosts with VMs on LUNs, two backup hosts, and a configuration
that points `offload` at it.

The LUNs are files, which `offload` has as volumes; the backup hosts log in to what it exports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload.testing.instances import free_port
from tests.vsphere_sim import vmdks
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.server import Vcenter, running_vcenter
from tests.vsphere_sim.vmfs import MIN_BYTES
from tests.vsphere_sim.vms import DiskPlan, VmPlan

PRODUCTION = ("esx1", "esx2")
BACKUP = ("backup-esx1", "backup-esx2")
GROUP = "shop"
DISK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a site has. Datastore `ds1` lies on LUN `lun1`, and so on; the VMs `vm01` … go round
    them. `luns_in`: the folder of the LUNs' files; for provider reflink on XFS or btrfs."""

    luns_in: Path
    provider: str = "reflink"
    luns: int = 1
    vms: int = 2
    lun_bytes: int = MIN_BYTES
    target: str = "tgt"
    port: int = 0  # of the vCenter; 0: any
    consistency: str = "crash"


@dataclass
class Site:
    """A running one. `luns`: file and NAA, by volume; `config`: the configuration's file."""

    plan: Plan
    folder: Path
    vcenter: Vcenter
    config: Path
    iscsi_port: int
    luns: dict[str, tuple[Path, str]] = field(default_factory=dict)
    vms: dict[str, Managed] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """Of the vCenter."""
        return self.vcenter.model

    # -- making it -------------------------------------------------------------------------------

    def add_lun(self, volume: str) -> None:
        """A LUN that all production hosts see."""
        path = self.plan.luns_in / f"{volume}.raw"
        with path.open("xb") as out:
            os.ftruncate(out.fileno(), self.plan.lun_bytes)
        naa = f"naa.600a0980{len(self.luns) + 1:024x}"
        self.luns[volume] = (path, naa)
        for host in PRODUCTION:
            self.model.storage.give(host, path, naa)

    def add_datastore(self, name: str, *volumes: str) -> None:
        """A VMFS on LUNs."""
        disks = [self.model.hosts.all[PRODUCTION[0]].local[self.luns[v][1]] for v in volumes]
        self.model.datastores.make(name, disks, PRODUCTION)

    def add_vm(self, name: str, **changed: Any) -> Managed:
        """One with a disk, running, with Tools; `changed`: of its VmPlan."""
        number = len(self.vms) + 1
        plan: dict[str, Any] = {
            "instance_uuid": f"5023{number:04x}-1111-4222-8333-{number:012x}",
            "bios_uuid": f"4223{number:04x}-1111-4222-8333-{number:012x}",
            "mac": f"00:50:56:00:{number >> 8:02x}:{number & 255:02x}",
            "addresses": (f"10.1.{number >> 8}.{number & 255}",),
            "host": PRODUCTION[number % len(PRODUCTION)],
            "folder": GROUP,
            "disks": (DiskPlan(size_bytes=DISK_BYTES),),
        }
        self.vms[name] = self.model.add_vm(VmPlan(name=name, **{**plan, **changed}))
        return self.vms[name]

    def write_config(self, more: str = "") -> None:
        """The configuration: volumes, hypervisor, backup hosts, a group of all VMs of the folder;
        and `more`."""
        tables: dict[str, dict[str, Any]] = {}
        for volume, (path, naa) in self.luns.items():
            tables[f"volumes.{volume}"] = {
                "provider": self.plan.provider, "path": str(path), "lun": naa,
            }  # fmt: skip
        tables["hypervisors.vc"] = self.vcenter.table()
        for host in BACKUP:
            tables[f"backup_hosts.{host}"] = {
                "hypervisor": "vc", "host": host, "target": self.plan.target, "timeout_s": 60,
            }  # fmt: skip
        tables[f"groups.{GROUP}"] = {
            "hypervisor": "vc", "folders": [f"/DC0/vm/{GROUP}"],
            "consistency": self.plan.consistency, "atomic": "record", "deadline_s": 60,
        }  # fmt: skip
        tables["iscsi"] = {"port": self.iscsi_port}
        head = f'state_dir = "{self.folder}/state"\nruntime_dir = "{self.folder}/run"\n'
        self.config.write_text(head + "".join(_table(n, v) for n, v in tables.items()) + more)
        self.config.chmod(0o600)

    # -- contents of disks -----------------------------------------------------------------------

    def write(self, vm: str, data: bytes, offset: int = 0, disk: int = 0) -> None:
        """What a guest writes, now: into the newest delta, if there are VM snapshots."""
        volume, path = self._disk(self.vms[vm], disk)
        vmdks.write(volume, path, data, offset)

    def read(self, vm: Managed, count: int, offset: int = 0, disk: int = 0) -> bytes:
        """What a VM, or a placeholder, sees on a disk: read from the LUN of its host."""
        volume, path = self._disk(vm, disk)
        return vmdks.read(volume, path, count, offset)

    def _disk(self, vm: Managed, number: int) -> tuple[Any, str]:
        devices = vm.properties["config"].hardware.device
        disks = [d for d in devices if hasattr(d, "capacityInKB")]
        store, path = self.model.datastores.path(disks[number].backing.fileName)
        return store.volume, path

    # -- what there is ---------------------------------------------------------------------------

    def placeholders(self, host: str = BACKUP[0]) -> dict[str, Managed]:
        """VMs that are registered on a backup host, by name."""
        refs = self.model.hosts.all[host].managed.properties["vm"]
        found = [self.model.objects[ref._moId] for ref in refs]
        return {vm.properties["name"]: vm for vm in found}

    def left_on(self, host: str = BACKUP[0]) -> list[str]:
        """What a host still has of islands, in words: nothing after an unmount."""
        found = self.model.hosts.all[host]
        known = found.managed.properties
        stores = [self.model.datastores.of(self.model.of(ref)) for ref in known["datastore"]]
        left = {
            "static targets": [target.iScsiName for target in found.targets],
            "LUNs": sorted(found.disks),
            "detached LUNs": sorted(found.detached),
            "unmounted volumes": sorted(found.unmounted),
            "datastores": [store.name for store in stores if store.real],
            "VMs": sorted(self.placeholders(host)),
        }  # fmt: skip
        return [f"{what}: {items}" for what, items in left.items() if items]


def _table(name: str, values: dict[str, Any]) -> str:
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    return f"\n[{name}]\n{lines}"


@contextmanager
def running_site(folder: Path, plan: Plan, datastores: Sequence[str] = ()) -> Iterator[Site]:
    """Started, with its configuration written; ended with the block. The LUNs' files stay."""
    with running_vcenter(folder / "vcenter", port=plan.port) as vcenter:
        site = Site(plan, folder, vcenter, folder / "offload.toml", free_port())
        for host in PRODUCTION:
            site.model.hosts.add(host, cluster="production")
        for host in BACKUP:
            site.model.hosts.add(host)
        names = datastores or [f"ds{number + 1}" for number in range(plan.luns)]
        for number, name in enumerate(names):
            site.add_lun(f"lun{number + 1}")
            site.add_datastore(name, f"lun{number + 1}")
        for number in range(plan.vms):
            site.add_vm(f"vm{number + 1:02}", datastore=names[number % len(names)])
        site.write_config()
        yield site
