"""What a vCenter serves beside SOAP: files of datastores under `/folder`, and the REST API.

Sources: vSphere Web Services SDK Programming Guide, on access to datastore files over HTTP;
vSphere Automation API reference.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from tests.vsphere_sim import vmdks
from tests.vsphere_sim.calls import Call, Part
from tests.vsphere_sim.datastores import Store
from tests.vsphere_sim.disks import DiskError
from tests.vsphere_sim.messages import Answer, Request
from tests.vsphere_sim.soap import SoapFault
from tests.vsphere_sim.vmfs import Volume


class Web(Part):
    """Hands requests to who answers them."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._served: list[tuple[str, Callable[[Request], Answer]]] = [("/folder/", self._folder)]

    def serve(self, prefix: str, answer: Callable[[Request], Answer]) -> None:
        """From now on, requests for what begins so."""
        self._served.append((prefix, answer))

    def answer(self, request: Request) -> Answer:
        """404 for what nobody serves."""
        for prefix, answer in self._served:
            if request.path.startswith(prefix):
                return answer(request)
        return Answer(status=HTTPStatus.NOT_FOUND)

    def _folder(self, request: Request) -> Answer:
        """`/folder/PATH?dcPath=DC0&dsName=ds1`, with the cookie of a SOAP session. Reading needs
        Datastore.Browse, writing Datastore.FileManagement."""
        model = self.model
        user = model.sessions_part.user(request.session)
        if user is None:
            return Answer(status=HTTPStatus.UNAUTHORIZED)
        store = model.datastores.by_name(request.query("dsName"))
        known = request.query("dcPath") == model.inventory.datacenter.properties["name"]
        if store is None or not known:
            return Answer(status=HTTPStatus.NOT_FOUND)
        method = f"HTTP {request.method}"
        model.note(request.session, method, store.managed.moid, {"path": request.path})
        call = Call(session=request.session, user=user, method=method)
        try:
            model.privileges.check(call, store.managed)
            model.storm(method)
        except SoapFault:
            return Answer(status=HTTPStatus.FORBIDDEN)
        if not store.managed.properties["summary"].accessible:
            return Answer(status=HTTPStatus.INTERNAL_SERVER_ERROR)
        return self._file(request, store, request.path.removeprefix("/folder/"))

    def _file(self, request: Request, store: Store, path: str) -> Answer:
        with self.model.changed, store.volume.lock:
            try:
                if request.method == "PUT":
                    known = path in store.volume.files
                    store.volume.write_text(path, request.body.decode())
                    status = HTTPStatus.OK if known else HTTPStatus.CREATED
                    return Answer(status=status)
                if request.method == "GET" and path in store.volume.files:
                    return Answer(body=_content(store.volume, path))
            except DiskError:
                return Answer(status=HTTPStatus.INTERNAL_SERVER_ERROR)
        missing = request.method == "GET"
        return Answer(status=HTTPStatus.NOT_FOUND if missing else HTTPStatus.METHOD_NOT_ALLOWED)


def _content(volume: Volume, path: str) -> bytes:
    found = volume.files[path]
    if found.text is not None:
        return found.text.encode()
    return vmdks.read_file(volume, path)
