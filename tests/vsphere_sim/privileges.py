"""Who may do what: NoPermission names the privilege and the object.

Source: vSphere Web Services API reference, "Required privileges" of each method; the list of
privileges in vSphere Security, "Defined privileges".
"""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault

_STORAGE = "Host.Config.Storage"
# what a call needs on its own object; of what it names besides, only a VM's resource pool is asked
NEEDED = {
    "AddInternetScsiStaticTargets": _STORAGE,
    "RemoveInternetScsiStaticTargets": _STORAGE,
    "UpdateInternetScsiAuthenticationProperties": _STORAGE,
    "RescanAllHba": _STORAGE,
    "RescanHba": _STORAGE,
    "RescanVmfs": _STORAGE,
    "RefreshStorageSystem": _STORAGE,
    "DetachScsiLun": _STORAGE,
    "AttachScsiLun": _STORAGE,
    "DeleteScsiLunState": _STORAGE,
    "DeleteVmfsVolumeState": _STORAGE,
    "UnmountVmfsVolume": _STORAGE,
    "UnmountVmfsVolumeEx_Task": _STORAGE,
    "MountVmfsVolume": _STORAGE,
    "QueryUnresolvedVmfsVolume": _STORAGE,
    "QueryUnresolvedVmfsVolumes": _STORAGE,
    "ResignatureUnresolvedVmfsVolume_Task": _STORAGE,
    "RegisterVM_Task": "VirtualMachine.Inventory.Register",
    "UnregisterVM": "VirtualMachine.Inventory.Unregister",
    "CreateSnapshot_Task": "VirtualMachine.State.CreateSnapshot",
    "CreateSnapshotEx_Task": "VirtualMachine.State.CreateSnapshot",
    "RemoveSnapshot_Task": "VirtualMachine.State.RemoveSnapshot",
    "RemoveAllSnapshots_Task": "VirtualMachine.State.RemoveSnapshot",
    "ConsolidateVMDisks_Task": "VirtualMachine.State.RemoveSnapshot",
    "RevertToSnapshot_Task": "VirtualMachine.State.RevertToSnapshot",
    "RevertToCurrentSnapshot_Task": "VirtualMachine.State.RevertToSnapshot",
    "CreateFolder": "Folder.Create",
    "RenameDatastore": "Datastore.Rename",
    "SearchDatastore_Task": "Datastore.Browse",
    "SearchDatastoreSubFolders_Task": "Datastore.Browse",
    "CreateVirtualDisk_Task": "Datastore.FileManagement",
    "DeleteVirtualDisk_Task": "Datastore.FileManagement",
    "HTTP GET": "Datastore.Browse",
    "HTTP PUT": "Datastore.FileManagement",
}


class Privileges(Part):
    """Every user has all of them, but for those that a test denies."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._denied: set[tuple[str, str]] = set()  # privilege, moid or ""
        self.read_only = False  # the API of a free ESXi: what changes something is refused

    def deny(self, privilege: str, on: Managed | None = None) -> None:
        """On an object and all below, or everywhere."""
        self._denied.add((privilege, on.moid if on is not None else ""))

    def grant(self, privilege: str, on: Managed | None = None) -> None:
        """Again."""
        self._denied.discard((privilege, on.moid if on is not None else ""))

    def has(self, privilege: str, on: Managed) -> bool:
        """Permissions propagate from above."""
        found: Managed | None = on
        while found is not None:
            if (privilege, found.moid) in self._denied:
                return False
            found = found.parent
        return (privilege, "") not in self._denied

    def check(self, call: Call, of: Managed) -> None:
        """NoPermission; RestrictedVersion where the API is read-only. Raises SoapFault."""
        privilege = self._needed(call.method, of)
        if not privilege:
            return
        if self.read_only:
            raise SoapFault(
                vim.fault.RestrictedVersion(),
                "Current license or ESXi version prohibits execution of the requested operation.",
            )
        entity = self._entity(of)
        if not self.has(privilege, entity):
            raise self.refusal(privilege, entity)

    def refusal(self, privilege: str, entity: Managed) -> SoapFault:
        """As an answer."""
        return SoapFault(
            vim.fault.NoPermission(object=entity.ref, privilegeId=privilege),
            "Permission to perform this operation was denied.",
        )

    def _needed(self, method: str, of: Managed) -> str:
        if method == "Rename_Task":
            kinds = {vim.Datastore: "Datastore.Rename", vim.VirtualMachine: "VirtualMachine.Config"}
            return next((p for kind, p in kinds.items() if isinstance(of.ref, kind)), "")
        if method == "ReconfigVM_Task":
            return "VirtualMachine.Config.AdvancedConfig"
        return NEEDED.get(method, "")

    def _entity(self, of: Managed) -> Managed:
        """The entity that a privilege is had on: a host for its storage system, a VM for its
        snapshot, a datastore for its browser."""
        model = self.model
        if isinstance(of.ref, vim.host.StorageSystem | vim.host.DatastoreSystem):
            host: Managed = model.hosts.of(of).managed
            return host
        if isinstance(of.ref, vim.host.DatastoreBrowser):
            store: Managed = model.of(of.properties["datastore"][0])
            return store
        if isinstance(of.ref, vim.VirtualDiskManager | vim.FileManager):
            datacenter: Managed = model.inventory.datacenter
            return datacenter
        vm: Managed = model.snapshots.vm_of(of)
        return vm

    # -- calls -----------------------------------------------------------------------------------

    def HasPrivilegeOnEntity(
        self, _call: Call, _of: Managed, entity: Any, sessionId: str, privId: list[str]
    ) -> list[bool]:
        """Whether each privilege is had on an object, in the order that they were asked in."""
        found = self.model.of(entity)
        return [self.has(privilege, found) for privilege in privId]

    def HasPrivilegeOnEntities(
        self, _call: Call, _of: Managed, entity: list[Any], sessionId: str, privId: list[str]
    ) -> list[Any]:
        """The same for several."""
        kinds = vim.AuthorizationManager
        return [
            kinds.EntityPrivilege(
                entity=ref,
                privAvailability=[
                    kinds.PrivilegeAvailability(
                        privId=privilege, isGranted=self.has(privilege, self.model.of(ref))
                    )
                    for privilege in privId
                ],
            )
            for ref in entity
        ]
