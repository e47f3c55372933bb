"""Files of a datastore, over HTTPS: `/folder/PATH?dcPath=DATACENTER&dsName=DATASTORE`.

Source: vSphere Web Services SDK Programming Guide, "Datastore file access", with the cookie of the
SOAP session. Needs Datastore.FileManagement.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPSConnection
from urllib.parse import quote, urlencode

from offload.errors import NotFoundError, PrivilegeError, UnavailableError
from offload.vsphere import Vsphere

_MAX_BYTES = 4 << 20  # settings of a VM, not its disks
_NOT_FOUND = 404
_EXPIRED = 401
_DENIED = 403
_SUCCESS = range(200, 300)  # RFC 9110, 15.3


class Files:
    """Files of the datastores of one datacenter, over one connection."""

    def __init__(self, vsphere: Vsphere, connection: HTTPSConnection, datacenter: str) -> None:
        self._vsphere = vsphere
        self._connection = connection
        self._datacenter = datacenter

    def read(self, datastore: str, path: str) -> bytes:
        """A small file, whole. Raises NotFoundError (`unknown-file`), PrivilegeError,
        UnavailableError."""
        return self._ask("GET", datastore, path, None)

    def write(self, datastore: str, path: str, data: bytes) -> None:
        """Make or replace a file."""
        self._ask("PUT", datastore, path, data)

    def _ask(self, method: str, datastore: str, path: str, data: bytes | None) -> bytes:
        what = f"[{datastore}] {path}"
        query = urlencode({"dcPath": self._datacenter, "dsName": datastore}, quote_via=quote)
        headers = {"Cookie": self._vsphere.stub.cookie}
        if data is not None:
            headers["Content-Type"] = "application/octet-stream"
        with self._vsphere.translated(what):
            self._connection.request(method, f"/folder/{quote(path)}?{query}", data, headers)
            answer = self._connection.getresponse()
            found = answer.read(_MAX_BYTES + 1)
        if answer.status == _NOT_FOUND:
            raise NotFoundError(f"there is no file {what}", code="unknown-file")
        if answer.status == _EXPIRED:
            raise UnavailableError(f"{what}: the session has expired", code="vsphere-session")
        if answer.status == _DENIED:
            raise PrivilegeError(
                f"{self._vsphere.server} gives no access to {what}: this user may lack the "
                "privilege Datastore.FileManagement",
                code="vsphere-privilege",
            )
        if answer.status not in _SUCCESS:
            raise UnavailableError(
                f"{self._vsphere.server} answers {answer.status} {answer.reason} for {what}",
                code="vsphere-failed",
            )
        if len(found) > _MAX_BYTES:
            raise UnavailableError(
                f"{what} is too large for settings of a VM", code="vsphere-failed"
            )
        return found


@contextmanager
def datastore_files(vsphere: Vsphere, datacenter: str) -> Iterator[Files]:
    """The connection is made with the first request."""
    connection = vsphere.connection()
    try:
        yield Files(vsphere, connection, datacenter)
    finally:
        connection.close()


def read_file(vsphere: Vsphere, datacenter: str, datastore: str, path: str) -> bytes:
    """One file; see `Files.read`."""
    with datastore_files(vsphere, datacenter) as files:
        return files.read(datastore, path)
