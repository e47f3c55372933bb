"""What an ESXi host does with our LUNs: logs in, finds them, resignatures VMFS copies, lets go.

Sources: vSphere Web Services API, HostStorageSystem and HostDatastoreSystem. Everything is told
apart by the LUNs' canonical names: labels and UUIDs are those of production. Each call can be made
again: what is there already, or gone already, is success.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyVmomi import vim

from offload.errors import CleanupError, UnavailableError
from offload.hypervisors.vsphere.hosts import Host
from offload.hypervisors.vsphere.record import Record, RecordedLun
from offload.hypervisors.vsphere.tasks import run_one
from offload.iscsi import Chap
from offload.vsphere import Vsphere

_POLL_S = 0.5
_FIRST_POLL_S = 0.05
_GONE = (vim.fault.NotFound, vim.fault.InvalidState)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unresolved:
    """A VMFS whose header names another LUN than the one it is on: our copy of it. `missing`: the
    LUNs of extents that no LUN of ours has."""

    label: str
    uuid: str
    names: frozenset[str]  # canonical names of the LUNs of ours that it lies on
    paths: tuple[str, ...]  # of its extents, as a resignature wants them
    missing: tuple[str, ...]
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A VMFS of ours that the host knows, mounted or not."""

    uuid: str
    name: str
    names: frozenset[str]
    mounted: bool


class HostStorage:
    """The storage of one host, in one session."""

    def __init__(self, vsphere: Vsphere, host: Host, record: Record, *, timeout_s: float) -> None:
        self._vsphere = vsphere
        self._record = record
        self._timeout_s = timeout_s
        self._storage: Any = vim.host.StorageSystem(host.storage, vsphere.stub)
        self._datastores: Any = vim.host.DatastoreSystem(host.datastores, vsphere.stub)
        self._what = f"the storage of host {host.name}"
        self._host = host.name

    # -- targets and LUNs ------------------------------------------------------------------------

    def add_targets(self, chap: Chap | None) -> None:
        """Tell the adapter of our targets, all at once, and of their secrets: with the targets,
        and again by the call that is for that, whichever of both counts."""
        kinds = vim.host.InternetScsiHba
        secrets = _authentication(chap) if chap is not None else None
        ours = [
            kinds.StaticTarget(address=lun.address, port=lun.port, iScsiName=lun.iqn)
            for lun in self._record.luns
        ]
        with self._vsphere.translated(self._what):
            known = {target.iScsiName for target in self._targets()}
            wanted = [target for target in ours if target.iScsiName not in known]
            for target in wanted:
                target.authenticationProperties = secrets
            if wanted:
                self._storage.AddInternetScsiStaticTargets(
                    iScsiHbaDevice=self._record.adapter, targets=wanted
                )
            if secrets is not None:
                self._storage.UpdateInternetScsiAuthenticationProperties(
                    iScsiHbaDevice=self._record.adapter,
                    authenticationProperties=secrets,
                    targetSet=kinds.TargetSet(staticTargets=ours),
                )

    def remove_targets(self) -> None:
        """Static ones, and those that a discovery has found, wherever they are listed.

        The call removes what it finds, and raises NotFound for the rest of its list.
        """
        with self._vsphere.translated(self._what):
            ours = [t for t in self._targets() if t.iScsiName in self._record.iqns]
            if ours:
                with contextlib.suppress(vim.fault.NotFound):
                    self._storage.RemoveInternetScsiStaticTargets(
                        iScsiHbaDevice=self._record.adapter,
                        targets=[
                            vim.host.InternetScsiHba.StaticTarget(
                                address=t.address, port=t.port, iScsiName=t.iScsiName
                            )
                            for t in ours
                        ],
                    )

    def has_targets(self) -> bool:
        """Whether the adapter is still told of one of ours."""
        with self._vsphere.translated(self._what):
            return any(t.iScsiName in self._record.iqns for t in self._targets())

    def _targets(self) -> list[Any]:
        found = self._vsphere.read(self._storage, "storageDeviceInfo.hostBusAdapter")
        return [
            target
            for adapter in found.get("storageDeviceInfo.hostBusAdapter", ())
            if adapter.device == self._record.adapter
            for target in adapter.configuredStaticTarget or ()
        ]

    def rescan(self) -> None:
        """Of our adapter alone, and of VMFS. The inventory follows when it does."""
        with self._vsphere.translated(self._what):
            self._storage.RescanHba(hbaDevice=self._record.adapter)
            self._storage.RescanVmfs()

    def wait_for_luns(self) -> None:
        """Until the host sees each of them, attached. Raises UnavailableError (`lun-missing`)."""

        def missing() -> list[RecordedLun]:
            seen = {disk.canonicalName for disk in self.disks()}
            return [lun for lun in self._record.luns if not seen & set(lun.names)]

        self._until(lambda: not missing(), lambda: self._lun_missing(missing()))
        with self._vsphere.translated(self._what):
            for disk in self.disks():
                if "off" in disk.operationalState:  # detached once, which survives rescans
                    self._storage.AttachScsiLun(lunUuid=disk.uuid)

    def _lun_missing(self, luns: list[RecordedLun]) -> UnavailableError:
        shown = "; ".join(
            f"{lun.names[0]} of volume {lun.volume}, at {lun.address}:{lun.port}" for lun in luns
        )
        return UnavailableError(
            f"host {self._host} does not see {shown} after {self._timeout_s:g} s",
            code="lun-missing",
            hint="does the host reach that address from its iSCSI port, and do [iscsi.chap] and "
            "its adapter's settings agree?",
        )

    def disks(self) -> list[Any]:
        """Our LUNs (`ScsiLun`) that the host sees."""
        with self._vsphere.translated(self._what):
            found = self._vsphere.read(self._storage, "storageDeviceInfo.scsiLun")
        luns = found.get("storageDeviceInfo.scsiLun", ())
        return [lun for lun in luns if lun.canonicalName in self._record.names]

    def detach(self) -> None:
        """All our LUNs."""
        with self._vsphere.translated(self._what):
            for disk in self.disks():
                if "off" not in disk.operationalState:
                    self._retried(partial(self._storage.DetachScsiLun, lunUuid=disk.uuid))

    def forget_luns(self, names: Iterable[str]) -> None:
        """What the host keeps of LUNs that were detached."""
        with self._vsphere.translated(self._what):
            for name in names:
                with contextlib.suppress(*_GONE):
                    self._storage.DeleteScsiLunState(lunCanonicalName=name)

    def wait_without_luns(self) -> None:
        """Until the host sees none of ours. Raises CleanupError (`lun-stays`)."""
        self._until(
            lambda: not self.disks(),
            lambda: CleanupError(
                f"host {self._host} still sees "
                + ", ".join(disk.canonicalName for disk in self.disks()),
                code="lun-stays",
                hint="run: offload recover; the views stay until then",
            ),
        )

    # -- VMFS ------------------------------------------------------------------------------------

    def unresolved(self) -> list[Unresolved]:
        """Copies of a VMFS with an extent on a LUN of ours."""
        with self._vsphere.translated(self._what):
            found = self._datastores.QueryUnresolvedVmfsVolumes() or ()
        copies = [_unresolved(entry, self._record.names) for entry in found]
        return [copy for copy in copies if copy.names]

    def volumes(self) -> list[Volume]:
        """VMFS on LUNs of ours that the host knows."""
        with self._vsphere.translated(self._what):
            found = self._vsphere.read(self._storage, "fileSystemVolumeInfo.mountInfo")
        mounts = found.get("fileSystemVolumeInfo.mountInfo", ())
        volumes = [_volume(m) for m in mounts if isinstance(m.volume, vim.host.VmfsVolume)]
        return [volume for volume in volumes if volume.names & self._record.names]

    def wait_for_copies(self, expected: set[str]) -> list[Unresolved]:
        """Until each LUN of `expected` (canonical names, one for each) has its VMFS: unresolved
        still, or ours already. Raises UnavailableError (`vmfs-missing`, `extent-missing`)."""
        found: list[Unresolved] = []

        def missing() -> set[str]:
            found[:] = self.unresolved()
            known = {name for copy in found for name in copy.names}
            known |= {name for volume in self.volumes() for name in volume.names}
            return {name for name in expected if not set(self._aliases(name)) & known}

        self._until(
            lambda: not missing(),
            lambda: UnavailableError(
                f"host {self._host} finds no VMFS on {', '.join(sorted(missing()))} after "
                f"{self._timeout_s:g} s",
                code="vmfs-missing",
                hint="is the volume's LUN a VMFS datastore, and is [volumes] lun right?",
            ),
        )
        for copy in found:
            if not copy.complete:
                also = f": also on {', '.join(copy.missing)}" if copy.missing else ""
                raise UnavailableError(
                    f"the datastore {copy.label} has extents that no volume of the group is{also}",
                    code="extent-missing",
                    hint="configure a volume for each of its LUNs, and put all into the group",
                )
        return found

    def _aliases(self, name: str) -> tuple[str, ...]:
        lun = self._record.lun(name)
        return lun.names if lun else (name,)

    def resignature(self, copy: Unresolved) -> None:
        """Write a new signature, and mount. Never a force mount: the original may be visible."""
        run_one(
            self._vsphere,
            f"the resignature of {copy.label} on host {self._host}",
            lambda: self._datastores.ResignatureUnresolvedVmfsVolume_Task(
                vim.host.UnresolvedVmfsResignatureSpec(extentDevicePath=list(copy.paths))
            ),
            timeout_s=self._timeout_s,
        )

    def mount(self, volume: Volume) -> None:
        """One that is known and not mounted."""
        with self._vsphere.translated(self._what), contextlib.suppress(vim.fault.InvalidState):
            self._storage.MountVmfsVolume(vmfsUuid=volume.uuid)

    def unmount(self, volumes: Iterable[Volume]) -> None:
        """Never RemoveDatastore, which destroys the VMFS. Raises CleanupError (`datastore-busy`)
        where something uses one to the end of the deadline."""
        with self._vsphere.translated(self._what):
            for volume in volumes:
                self._retried(partial(self._storage.UnmountVmfsVolume, vmfsUuid=volume.uuid))
        self._until(
            lambda: not any(volume.mounted for volume in self.volumes()),
            lambda: CleanupError(
                f"host {self._host} still has "
                + ", ".join(volume.name for volume in self.volumes() if volume.mounted)
                + " mounted",
                code="datastore-busy",
            ),
        )

    def forget_volume(self, uuid: str) -> None:
        """What the host keeps of a VMFS that was unmounted."""
        with self._vsphere.translated(self._what), contextlib.suppress(*_GONE):
            self._storage.DeleteVmfsVolumeState(vmfsUuid=uuid)

    def _retried(self, call: Callable[[], Any]) -> None:
        """Again while it is in use (heartbeats, statistics, a backup that ends), to a deadline."""
        until = time.monotonic() + self._timeout_s
        pause_s = _FIRST_POLL_S
        while True:
            try:
                with contextlib.suppress(*_GONE):
                    call()
            except vim.fault.ResourceInUse as fault:
                if time.monotonic() + pause_s > until:
                    raise CleanupError(
                        f"host {self._host} does not let go of {fault.name or 'the datastore'}: "
                        f"{fault.msg or 'it is in use'}",
                        code="datastore-busy",
                        hint="end what uses it (a VM, a template, an ISO, a backup), then: "
                        "offload recover",
                    ) from fault
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S)
            else:
                return

    def _until(self, done: Callable[[], bool], late: Callable[[], Exception]) -> None:
        until = time.monotonic() + self._timeout_s
        pause_s = _FIRST_POLL_S
        while not done():
            if time.monotonic() + pause_s > until:
                raise late()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_S)


def _authentication(chap: Chap) -> Any:
    """Of these targets alone: nothing is inherited from the adapter."""
    properties = vim.host.InternetScsiHba.AuthenticationProperties(
        chapAuthEnabled=True,
        chapInherited=False,
        chapAuthenticationType="chapRequired",
        chapName=chap.user,
        chapSecret=chap.secret.get_secret_value(),
        mutualChapInherited=False,
        mutualChapAuthenticationType="chapProhibited",
    )
    if chap.mutual_user is not None and chap.mutual_secret is not None:
        properties.mutualChapAuthenticationType = "chapRequired"
        properties.mutualChapName = chap.mutual_user
        properties.mutualChapSecret = chap.mutual_secret.get_secret_value()
    return properties


def _unresolved(found: Any, ours: frozenset[str]) -> Unresolved:
    """One entry may show several copies of a VMFS: an extent of each, with the same ordinal."""
    mine = {e.ordinal: e for e in found.extent if e.device.diskName in ours}
    others = [e for e in found.extent if e.ordinal not in mine]
    return Unresolved(
        label=found.vmfsLabel,
        uuid=found.vmfsUuid,
        names=frozenset(extent.device.diskName for extent in mine.values()),
        paths=tuple(mine[ordinal].devicePath for ordinal in sorted(mine)),
        missing=tuple(sorted({extent.device.diskName for extent in others})),
        complete=not others and not found.resolveStatus.incompleteExtents,
    )


def _volume(found: Any) -> Volume:
    return Volume(
        uuid=found.volume.uuid,
        name=found.volume.name,
        names=frozenset(extent.diskName for extent in found.volume.extent),
        mounted=found.mountInfo.mounted is not False,
    )
