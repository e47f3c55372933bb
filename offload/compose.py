"""The one place that picks implementations.

Built-ins stand in explicit tables `name → "module:Class"` and are loaded when they are used; third
parties add theirs through entry points of the same group (`offload.snapshots`, `offload.targets`,
`offload.stores`, `offload.freezers`, `offload.applications`, `offload.hypervisors`,
`offload.backup_hosts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from offload.errors import ConfigError
from offload.model import (
    BackupSource,
    Consistency,
    HomeSource,
    NbdSource,
    Qcow2Source,
    RawSource,
    RbdSource,
    Source,
    VmfsSource,
)
from offload.objectlock import LockableStore, LockRules
from offload.store import Probing
from offload.storespec import StoreSpec

if TYPE_CHECKING:
    from offload.configs.quiesce import (
        ApplicationConfig,
        FreezeConfig,
        LocalQuiesce,
        QmpQuiesce,
        VmConfig,
    )
    from offload.hypervisor import BackupHost, Hypervisor
    from offload.image import Image
    from offload.instance import Instance
    from offload.quiesce import Part, Quiescer
    from offload.snapshot import SnapshotProvider
    from offload.store import Store
    from offload.target import Target

PROVIDERS = {
    "reflink": "offload.snapshots.reflink:ReflinkProvider",
    "copy": "offload.snapshots.copy:CopyProvider",
    "qcow2": "offload.snapshots.qcow2:Qcow2Provider",
    "device": "offload.snapshots.device:DeviceProvider",
    "rbd": "offload.snapshots.rbd:RbdProvider",
    "lvmthin": "offload.snapshots.lvmthin:LvmThinProvider",
}
TARGETS = {
    "nbd": "targets.nbd:NbdTarget",
    "tgt": "targets.tgt:TgtTarget",
    "lio": "targets.lio:LioTarget",
}
# called with the VM's name, the entry of the configuration and the instance; so are APPLICATIONS
FREEZERS: dict[str, str] = {
    "qemu-ga": "offload.quiescers.guest_agent:GuestAgentPart",
    "libvirt": "offload.quiescers.libvirt:LibvirtPart",
    "vmware": "offload.quiescers.vmware:VmwarePart",
}
APPLICATIONS: dict[str, str] = {
    "postgresql": "offload.quiescers.postgresql:PostgresqlPart",
    "mysql": "offload.quiescers.mysql:MysqlPart",
    "sqlite": "offload.quiescers.sqlite:SqlitePart",
    "script": "offload.quiescers.script:ScriptPart",
    "ssh": "offload.quiescers.ssh:SshPart",
}
# called with the name in the configuration, its entry and the instance
HYPERVISORS: dict[str, str] = {
    "libvirt": "offload.hypervisors.libvirt.hypervisor:LibvirtHypervisor",
    "vsphere": "offload.hypervisors.vsphere.hypervisor:VsphereHypervisor",
}
BACKUP_HOSTS: dict[str, str] = {  # by the kind of their hypervisor
    "libvirt": "offload.hypervisors.libvirt.backup_host:LibvirtBackupHost",
    "vsphere": "offload.hypervisors.vsphere.backup_host:VsphereBackupHost",
}
STORES = {"disk": "offload.stores.disk:DiskStore", "s3": "offload.stores.s3:S3Store"}


def snapshot_provider(name: str, instance_id: str) -> SnapshotProvider:
    """The provider of this name; ConfigError (`unknown-provider`) if there is none."""
    made: SnapshotProvider = _load("offload.snapshots", "provider", PROVIDERS, name)(instance_id)
    return made


def target(name: str, instance: Instance) -> Target:
    """The target of this name; ConfigError (`unknown-target`) if there is none."""
    made: Target = _load("offload.targets", "target", TARGETS, name)(instance)
    return made


def open_store(spec: StoreSpec | str) -> Store:
    """Open the objects of a store, by its spec or by the text of that."""
    found = StoreSpec.parse(spec) if isinstance(spec, str) else spec
    made: Store = _load("offload.stores", "store", STORES, found.kind)(found)
    return _with_versions(made)


def probe_store(spec: StoreSpec) -> dict[str, str]:
    """What the place of a store honours, found by trying; empty where there is no doubt."""
    made: Store = _load("offload.stores", "store", STORES, spec.kind)(spec)
    try:
        return made.probe() if isinstance(made, Probing) else {}
    finally:
        made.close()


def _with_versions(store: Store) -> Store:
    """A store as it was at a moment, or under object lock, where its options say so."""
    rules = LockRules.of(store.spec)
    moment = store.spec.options.get("as_of")
    if moment is None and rules is None:
        return store
    if not isinstance(store, LockableStore):
        store.close()
        raise ConfigError(f"the store {store.url} keeps no versions: it has no lock and no as_of")
    if moment is not None:
        from offload.stores.s3_past import PastStore

        return PastStore(store, datetime.fromisoformat(moment))
    if rules is not None:
        from offload.stores.s3_lock import LockedStore

        return LockedStore(store, rules)
    return store


def quiescer(
    entry: LocalQuiesce | QmpQuiesce, volumes: tuple[str, ...], instance: Instance
) -> Quiescer:
    """The quiescer of one `[[groups.X.quiesce]]` entry; `volumes` are those of the group."""
    if entry.kind == "local":
        from offload.quiescers.local import LocalQuiescer

        return LocalQuiescer(entry, volumes, instance)
    if entry.kind == "qmp":
        from offload.quiescers.qmp import QmpQuiescer

        return QmpQuiescer(entry, volumes, instance)
    assert_never(entry.kind)


def vm_quiescer(
    name: str, vm: VmConfig, least: Consistency, volumes: tuple[str, ...], instance: Instance
) -> Quiescer:
    """The quiescer of a `[vms.NAME]` for a group of `volumes`."""
    from offload.quiescers.vm import VmQuiescer

    ours = tuple(volume for volume in vm.volumes if volume in volumes)
    freezer = freezer_part(name, vm.freeze, ours, instance) if vm.freeze is not None else None
    return VmQuiescer(
        name,
        volumes=ours,
        least=least,
        applications=[application_part(name, entry, instance) for entry in vm.applications],
        freezer=freezer,
        freezes=getattr(freezer, "freezes", ()),
    )


def freezer_part(
    vm: str, entry: FreezeConfig, volumes: tuple[str, ...], instance: Instance
) -> Part:
    """What freezes the file systems of a VM, with disks on `volumes` of the group."""
    if entry.kind == "local":
        from offload.configs.quiesce import LocalQuiesce
        from offload.quiescers.local import LocalQuiescer

        return LocalQuiescer(LocalQuiesce(kind="local", mounts=entry.mounts), volumes, instance)
    if entry.kind == "qmp":
        from offload.configs.quiesce import QmpQuiesce
        from offload.quiescers.qmp import QmpQuiescer

        return QmpQuiescer(QmpQuiesce(kind="qmp", socket=entry.socket), volumes, instance)
    made: Part = _load("offload.freezers", "freezer", FREEZERS, entry.kind)(vm, entry, instance)
    return made


def application_part(vm: str, entry: ApplicationConfig, instance: Instance) -> Part:
    """What holds an application of a VM."""
    kind = _load("offload.applications", "application", APPLICATIONS, entry.kind)
    made: Part = kind(vm, entry, instance)
    return made


def hypervisor(name: str, instance: Instance) -> Hypervisor:
    """What `[hypervisors.NAME]` names; NotFoundError (`unknown-hypervisor`)."""
    entry = instance.config.hypervisor(name)
    kind = _load("offload.hypervisors", "hypervisor", HYPERVISORS, entry.kind)
    made: Hypervisor = kind(name, entry, instance)
    return made


def backup_host(name: str, instance: Instance) -> BackupHost:
    """What `[backup_hosts.NAME]` names; NotFoundError (`unknown-backup-host`)."""
    entry = instance.config.backup_host(name)
    runs = instance.config.hypervisor(entry.hypervisor)
    kind = _load("offload.backup_hosts", "backup host", BACKUP_HOSTS, runs.kind)
    made: BackupHost = kind(name, entry, instance)
    return made


def open_image(source: Source) -> Image:
    """Open whatever a source names, for reading."""
    match source:
        case RawSource():
            from offload.images.file import FileImage

            return FileImage(source)
        case Qcow2Source():
            from offload.images.qcow2 import Qcow2Image

            return Qcow2Image(source)
        case BackupSource():
            from offload.images.backup import open_backup_image

            return open_backup_image(source)
        case NbdSource():
            from offload.images.nbd import NbdImage

            return NbdImage(source.uri, size_bytes=source.size_bytes, block_size=source.sector_size)
        case RbdSource():
            from offload.images.rbd import RbdImage

            return RbdImage(source)
        case HomeSource():
            size, sector = source.size_bytes, source.sector_size
            if "://" in source.place:
                return open_image(NbdSource(uri=source.place, size_bytes=size, sector_size=sector))
            place = Path(source.place)
            return open_image(RawSource(path=place, size_bytes=size, sector_size=sector))
        case VmfsSource():
            from offload.images.vmfs.image import VmfsImage
            from offload.sources import lun_of

            lun = open_image(lun_of(source))
            try:
                return VmfsImage(lun, source.path)
            except BaseException:
                lun.close()
                raise
    assert_never(source)


def _load(group: str, what: str, table: Mapping[str, str], name: str) -> Any:
    place = table.get(name)
    if place is None:
        from importlib.metadata import entry_points

        found = entry_points(group=group, name=name)
        if not found:
            raise ConfigError(
                f"there is no {what} '{name}'",
                code=f"unknown-{what}",
                hint=f"built in: {', '.join(sorted(table))}",
            )
        return next(iter(found)).load()
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
