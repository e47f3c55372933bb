"""The host on which placeholders stand: its managers, its state, its software iSCSI adapter.

Sources: vSphere Web Services API, HostSystem, HostStorageSystem, HostInternetScsiHba.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyVmomi import vim

from offload.configs.hypervisors import BackupHostConfig
from offload.errors import ConfigError, NotFoundError, UnavailableError
from offload.vsphere import Vsphere

_PROPERTIES = (
    "name",
    "parent",
    "runtime.connectionState",
    "runtime.inMaintenanceMode",
    "configManager.storageSystem",
    "configManager.datastoreSystem",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """References (`_moId`), which outlive sessions, and what a host's state was."""

    name: str
    host: str
    storage: str
    datastores: str
    pool: str
    datacenter: str
    datacenter_name: str
    vm_folder: str
    connection: str  # connected | disconnected | notResponding
    maintenance: bool
    cluster: str = ""  # its name, where the host is no standalone one

    def check_usable(self) -> None:
        """Raises UnavailableError (`host-disconnected`, `host-in-maintenance`)."""
        if self.connection != "connected":
            raise UnavailableError(
                f"host {self.name} is {self.connection} in vSphere",
                code="host-disconnected",
                hint="connect it again in vSphere",
            )
        if self.maintenance:
            raise UnavailableError(
                f"host {self.name} is in maintenance mode",
                code="host-in-maintenance",
                hint="take it out of maintenance mode, or name another backup host",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A software iSCSI adapter. `targets`: address, port, IQN of those that it is told of."""

    device: str
    iqn: str


def find_host(vsphere: Vsphere, config: BackupHostConfig) -> Host:
    """The host of this backup host's table. Raises ConfigError (`backup-host-unnamed`),
    NotFoundError (`unknown-host`)."""
    with vsphere.translated("the hosts of vSphere"):
        hosts = list(vsphere.collect(vim.HostSystem, _PROPERTIES))
        names = sorted(str(fields.get("name", "")) for _, fields in hosts)
        if config.host is None and len(hosts) != 1:
            raise ConfigError(
                f"{vsphere.server} has {len(hosts)} hosts: which one is the backup host?",
                code="backup-host-unnamed",
                hint=f"host of its table in [backup_hosts]: {', '.join(names) or 'none is seen'}",
            )
        for managed, fields in hosts:
            if config.host in (None, fields.get("name")):
                return _host(vsphere, managed, fields)
    raise NotFoundError(
        f"{vsphere.server} has no host {config.host} that this user may see",
        code="unknown-host",
        hint=f"hosts that are seen: {', '.join(names) or 'none'}",
    )


def _host(vsphere: Vsphere, managed: Any, fields: dict[str, Any]) -> Host:
    compute = vsphere.read(fields["parent"], "name", "parent", "resourcePool")
    above = compute["parent"]
    while not isinstance(above, vim.Datacenter):
        above = vsphere.read(above, "parent")["parent"]
    datacenter = vsphere.read(above, "name", "vmFolder")
    cluster = isinstance(fields["parent"], vim.ClusterComputeResource)
    return Host(
        name=fields["name"],
        host=reference(managed),
        storage=reference(fields["configManager.storageSystem"]),
        datastores=reference(fields["configManager.datastoreSystem"]),
        pool=reference(compute["resourcePool"]),
        datacenter=reference(above),
        datacenter_name=datacenter["name"],
        vm_folder=reference(datacenter["vmFolder"]),
        connection=str(fields["runtime.connectionState"]),
        maintenance=bool(fields["runtime.inMaintenanceMode"]),
        cluster=compute["name"] if cluster else "",
    )


def find_adapter(vsphere: Vsphere, host: Host, config: BackupHostConfig) -> Adapter:
    """Its software iSCSI adapter, or the one that the configuration names.

    Raises ConfigError (`no-software-iscsi`, `iscsi-adapter-unnamed`).
    """
    with vsphere.translated(f"the storage adapters of host {host.name}"):
        storage = vim.host.StorageSystem(host.storage, vsphere.stub)
        device = vsphere.read(
            storage,
            "storageDeviceInfo.hostBusAdapter",
            "storageDeviceInfo.softwareInternetScsiEnabled",
        )
    found = [
        adapter
        for adapter in device.get("storageDeviceInfo.hostBusAdapter", ())
        if isinstance(adapter, vim.host.InternetScsiHba)
        and (
            adapter.isSoftwareBased if config.adapter is None else adapter.device == config.adapter
        )
    ]
    enabled = device.get("storageDeviceInfo.softwareInternetScsiEnabled", False)
    if not found or (not enabled and found[0].isSoftwareBased):
        named = "" if config.adapter is None else f" {config.adapter}"
        raise ConfigError(
            f"host {host.name} has no iSCSI adapter{named}"
            if config.adapter is not None
            else f"host {host.name} has no software iSCSI adapter that is enabled",
            code="no-software-iscsi",
            hint="in vSphere: Configure, Storage Adapters, Add Software Adapter",
        )
    if len(found) > 1:
        raise ConfigError(
            f"host {host.name} has {len(found)} software iSCSI adapters",
            code="iscsi-adapter-unnamed",
            hint="adapter of its table in [backup_hosts]: "
            + ", ".join(adapter.device for adapter in found),
        )
    return Adapter(device=found[0].device, iqn=found[0].iScsiName)


def reference(managed: Any) -> str:
    """By which an object is found again in any session."""
    return str(managed._moId)  # noqa: SLF001 - its name in the API
