"""Looking for files on datastores.

Source of the rules: vSphere Web Services API reference, HostDatastoreBrowser.
"""

from __future__ import annotations

import fnmatch
import posixpath
from typing import Any

from pyVmomi import vim

from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.datastores import Store
from tests.vsphere_sim.properties import Managed
from tests.vsphere_sim.soap import SoapFault

_FILES = vim.host.DatastoreBrowser


class Browsing(Part):
    """HostDatastoreBrowser."""

    def SearchDatastore_Task(
        self, _call: Call, of: Managed, datastorePath: str, searchSpec: Any
    ) -> Any:
        """Files of one folder that match one of the patterns."""
        store, folder = self.model.datastores.path(datastorePath, of)
        names = self._names(store, folder, searchSpec)
        return _FILES.SearchResults(
            datastore=store.managed.ref, folderPath=datastorePath, file=names
        )

    def SearchDatastoreSubFolders_Task(
        self, _call: Call, of: Managed, datastorePath: str, searchSpec: Any
    ) -> Any:
        """The same, with all folders below."""
        store, top = self.model.datastores.path(datastorePath, of)
        tree = self._tree(store)
        folders = sorted({posixpath.dirname(path) for path in tree})
        found = _FILES.SearchResults.Array()
        for folder in folders:
            if not top or folder == top or folder.startswith(f"{top}/"):
                names = self._names(store, folder, searchSpec)
                if names:
                    where = f"[{store.name}] {folder}/" if folder else f"[{store.name}]"
                    result = _FILES.SearchResults(
                        datastore=store.managed.ref, folderPath=where, file=names
                    )
                    found.append(result)
        return found

    def _names(self, store: Store, folder: str, spec: Any) -> list[Any]:
        patterns = (spec.matchPattern if spec else None) or ["*"]
        tree = self._tree(store)
        inside = [path for path in sorted(tree) if posixpath.dirname(path) == folder]
        kinds = {".vmx": _FILES.VmConfigInfo, ".vmdk": _FILES.VmDiskInfo}
        return [
            kinds.get(posixpath.splitext(path)[1], _FILES.FileInfo)(
                path=posixpath.basename(path), fileSize=len(tree[path].text or "")
            )
            for path in inside
            if any(fnmatch.fnmatch(posixpath.basename(path), p) for p in patterns)
            and not path.endswith(("-flat.vmdk", "-delta.vmdk"))
        ]

    def _tree(self, store: Store) -> dict[str, Any]:
        if not store.managed.properties["summary"].accessible:
            raise SoapFault(
                vim.fault.InaccessibleDatastore(datastore=store.managed.ref, name=store.name),
                f"The datastore {store.name} is not accessible.",
            )
        return store.volume.files
