"""Hosts: what a test says of them, and what they are told by calls."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from pyVmomi import vim, vmodl

from offload.testing.libiscsi import Login
from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.disks import Disk, FileDisk, IscsiDisk, Target
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault

_HBA = vim.host.InternetScsiHba
_Key = tuple[str, int, str]  # of a target: address, port, name


@dataclass(eq=False)
class Host:
    """An ESXi host. `adapter`: its software iSCSI adapter, "" without one."""

    managed: Managed
    system: Managed  # its storage system
    datastore_system: Managed
    iqn: str
    adapter: str
    pool: Managed
    lock: threading.RLock = field(default_factory=threading.RLock)  # storage calls go one by one
    local: dict[str, FileDisk] = field(default_factory=dict)  # LUNs of production storage
    targets: list[Any] = field(default_factory=list)  # static ones, as they were added
    chap: Any = None  # of the adapter, for targets that inherit it
    disks: dict[str, Disk] = field(default_factory=dict)  # seen by the last rescan
    detached: set[str] = field(default_factory=set)
    unmounted: set[str] = field(default_factory=set)  # UUIDs of VMFS
    refused: list[str] = field(default_factory=list)  # logins that failed, in words
    down: bool = False  # rebooting
    before: list[IscsiDisk] = field(default_factory=list)  # sessions that the reboot has ended

    @property
    def name(self) -> str:
        """As in the inventory."""
        name: str = self.managed.properties["name"]
        return name

    @property
    def sessions(self) -> list[IscsiDisk]:
        """LUNs that it is logged in to."""
        return [disk for disk in list(self.disks.values()) if isinstance(disk, IscsiDisk)]

    def target_of(self, entry: Any) -> Target:
        """A static target with the CHAP that counts for it: its own, or the adapter's
        ("chapInherited")."""
        chap = entry.authenticationProperties
        if chap is None or chap.chapInherited:
            chap = self.chap
        login = Login(initiator=self.iqn)
        if chap is not None and chap.chapAuthEnabled:
            mutual = chap.mutualChapName if chap.mutualChapSecret else ""
            login = Login(
                initiator=self.iqn,
                user=chap.chapName or self.iqn,
                secret=chap.chapSecret or "",
                mutual_user=mutual or "",
                mutual_secret=(chap.mutualChapSecret or "") if mutual else "",
            )
        return Target(
            address=entry.address, port=entry.port or 3260, iqn=entry.iScsiName, login=login
        )


def key_of(entry: Any) -> _Key:
    """What makes a target the same one."""
    return entry.address, entry.port or 3260, entry.iScsiName


class Hosts(Part):
    """All of them."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.all: dict[str, Host] = {}  # by name
        self._of: dict[str, Host] = {}  # by the id of any of its objects

    def of(self, found: Managed) -> Host:
        """The host of a storage system, or of a host's own object."""
        return self._of[found.moid]

    def pick(self, name: str = "") -> Host | None:
        """By name, or the first there is."""
        return self.all[name] if name else next(iter(self.all.values()), None)

    def add(self, name: str, *, adapter: str = "vmhba64", iqn: str = "", cluster: str = "") -> Host:
        """A host: standalone, or in a cluster, which is made when it is not there."""
        add, folder = self.model.add, self.model.inventory.folders["host"]
        compute = self._cluster(cluster) if cluster else None
        if compute is None:
            compute = add(vim.ComputeResource, "domain", name=name, parent=folder)
            compute.properties["resourcePool"] = add(
                vim.ResourcePool, "resgroup", name="Resources", parent=compute
            ).ref
        system = add(vim.host.StorageSystem, "storageSystem")
        stores = add(vim.host.DatastoreSystem, "datastoreSystem")
        managed = add(
            vim.HostSystem, "host", name=name, parent=compute, vm=[], datastore=[],
            configManager=vim.host.ConfigManager(
                storageSystem=system.ref, datastoreSystem=stores.ref
            ),
        )  # fmt: skip
        pool = self.model.of(compute.properties["resourcePool"])
        host = Host(managed, system, stores, iqn or _name(name), adapter, pool)
        compute.properties["host"] = [*compute.properties.get("host", []), managed.ref]
        managed.properties["summary"] = vim.host.Summary(
            host=managed.ref,
            config=vim.host.Summary.ConfigSummary(
                name=name, port=443, vmotionEnabled=True, faultToleranceEnabled=False,
                product=self.model.inventory.content.about,
            ),
            quickStats=vim.host.Summary.QuickStats(),
            overallStatus="green",
            rebootRequired=False,
        )  # fmt: skip
        managed.computed["config"] = lambda: vim.host.ConfigInfo(
            host=managed.ref,
            product=self.model.inventory.content.about,
            storageDevice=system.properties.get("storageDeviceInfo"),
            fileSystemVolume=system.properties.get("fileSystemVolumeInfo"),
        )
        self.all[name] = host
        self._of |= dict.fromkeys((managed.moid, system.moid, stores.moid), host)
        self.set_state(name)
        self.model.storage.publish(host)
        return host

    def _cluster(self, name: str) -> Managed:
        found: Managed
        for found in self.model.objects.values():
            kind = vim.ClusterComputeResource
            if isinstance(found.ref, kind) and found.properties["name"] == name:
                return found
        found = self.model.add(
            vim.ClusterComputeResource, "domain-c", name=name,
            parent=self.model.inventory.folders["host"],
        )  # fmt: skip
        found.properties["resourcePool"] = self.model.add(
            vim.ResourcePool, "resgroup", name="Resources", parent=found
        ).ref
        return found

    # -- their state -----------------------------------------------------------------------------

    def set_state(
        self, name: str, connection: str = "connected", *, maintenance: bool = False
    ) -> None:
        """`connected`, `disconnected` or `notResponding`."""
        with self.model.changed:
            managed = self.all[name].managed
            runtime = vim.host.RuntimeInfo(
                connectionState=connection,
                powerState="poweredOn" if connection == "connected" else "unknown",
                inMaintenanceMode=maintenance,
            )
            managed.properties["runtime"] = runtime
            managed.properties["summary"].runtime = runtime
            managed.properties.touch("summary")
            self.model.changed.notify_all()

    def check(self, host: Host) -> None:
        """A host that vCenter cannot reach does nothing: HostNotConnected. Raises SoapFault."""
        if host.down or host.managed.properties["runtime"].connectionState != "connected":
            raise SoapFault(
                vmodl.fault.HostNotConnected(),
                "Unable to communicate with the remote host, since it is disconnected.",
            )

    def reboot(self, name: str, *, served: bool = True) -> None:
        """Sessions end; static targets, the states of detached LUNs and unmounted volumes, and
        registered VMs stay. At its end it logs in again, to what is `served` then: see `boot`."""
        host = self.all[name]
        host.down = True
        self.set_state(name, "notResponding")
        with host.lock:
            host.before = host.sessions
            for disk in host.before:
                disk.close()
            host.disks = {}
        if served:
            self.boot(name)

    def boot(self, name: str) -> None:
        """The end of a reboot."""
        host = self.all[name]
        host.down = False
        self.set_state(name)
        self.model.storage.rescan(host)
        for old in host.before:
            if old.naa in host.disks:
                self.model.datastores.swap(host, old, host.disks[old.naa])
        self.model.datastores.rescan(host)

    def EnterMaintenanceMode_Task(self, _call: Call, of: Managed, **_arguments: Any) -> None:
        """No VM may run on it."""
        host = self.of(of)
        self.check(host)
        self.set_state(host.name, maintenance=True)

    def ExitMaintenanceMode_Task(self, _call: Call, of: Managed, **_arguments: Any) -> None:
        """As before."""
        self.set_state(self.of(of).name)

    def DisconnectHost_Task(self, _call: Call, of: Managed) -> None:
        """vCenter lets go of it; it runs on."""
        self.set_state(self.of(of).name, "disconnected")

    def ReconnectHost_Task(self, _call: Call, of: Managed, **_arguments: Any) -> None:
        """And takes it again."""
        self.set_state(self.of(of).name)


def _name(host: str) -> str:
    """As an ESXi host names its software initiator."""
    return f"iqn.1998-01.com.vmware:{host.partition('.')[0]}-5f6f6c64"


def adapters(host: Host) -> list[Any]:
    """As the API shows them. Secrets are never read back."""
    found: list[Any] = [
        vim.host.BlockHba(
            key="key-vim.host.BlockHba-vmhba0", device="vmhba0", bus=0, status="online",
            model="Storage controller", driver="vmw_ahci", pci="0000:00:1f.2",
        )
    ]  # fmt: skip
    if host.adapter:
        found.append(
            _HBA(
                key=f"key-vim.host.InternetScsiHba-{host.adapter}",
                device=host.adapter, bus=0, status="online", model="iSCSI Software Adapter",
                driver="iscsi_vmk", iScsiName=host.iqn, iScsiAlias="", isSoftwareBased=True,
                canBeDisabled=True,
                discoveryCapabilities=_HBA.DiscoveryCapabilities(),
                discoveryProperties=_HBA.DiscoveryProperties(staticTargetDiscoveryEnabled=True),
                authenticationCapabilities=_HBA.AuthenticationCapabilities(
                    chapAuthSettable=True, targetChapSettable=True, targetMutualChapSettable=True
                ),
                authenticationProperties=_public(host.chap)
                or _HBA.AuthenticationProperties(chapAuthEnabled=False),
                ipCapabilities=_HBA.IPCapabilities(),
                ipProperties=_HBA.IPProperties(),
                configuredStaticTarget=[
                    _HBA.StaticTarget(
                        address=t.address, port=t.port or 3260, iScsiName=t.iScsiName,
                        discoveryMethod="staticMethod",
                        authenticationProperties=_public(t.authenticationProperties),
                    )
                    for t in host.targets
                ],
            )
        )  # fmt: skip
    return found


def _public(chap: Any) -> Any:
    if chap is None:
        return None
    return _HBA.AuthenticationProperties(
        chapAuthEnabled=chap.chapAuthEnabled,
        chapName=chap.chapName,
        chapAuthenticationType=chap.chapAuthenticationType,
        chapInherited=chap.chapInherited,
        mutualChapName=chap.mutualChapName,
        mutualChapAuthenticationType=chap.mutualChapAuthenticationType,
        mutualChapInherited=chap.mutualChapInherited,
    )
