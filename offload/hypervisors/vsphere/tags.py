"""Tags of VMs. They are not in the SOAP API, but in vCenter's REST API.

Sources: vSphere Automation API, `cis/session`, `cis/tagging`. Paths of 7.0 U2 and later (`/api`)
are tried first, those of before (`/rest`, with each answer in a `value`) then. An ESXi has no tags.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPSConnection
from typing import Any

from offload.configs.hypervisors import VsphereConfig
from offload.errors import ConfigError, PrivilegeError, UnavailableError
from offload.secret_file import read_secret
from offload.vsphere import Vsphere

_SESSION_HEADER = "vmware-api-session-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paths:
    session: str
    tagging: str
    action: str
    one: str  # what is before an id in a path
    wrapped: bool


_NEW = _Paths(
    session="/api/session", tagging="/api/cis/tagging", action="action", one="", wrapped=False
)
_OLD = _Paths(
    session="/rest/com/vmware/cis/session",
    tagging="/rest/com/vmware/cis/tagging",
    action="~action",
    one="id:",
    wrapped=True,
)


def read_tags(vsphere: Vsphere, config: VsphereConfig) -> dict[str, tuple[str, ...]]:
    """`category:tag` of each VM that has some, by its id, in order.

    Raises ConfigError (`vsphere-login`), PrivilegeError, UnavailableError.
    """
    if not vsphere.is_vcenter:
        return {}
    with (
        contextlib.closing(vsphere.connection()) as connection,
        _session(vsphere, config, connection) as rest,
    ):
        return _read(rest)


def _read(rest: _Rest) -> dict[str, tuple[str, ...]]:
    ids = rest.get("/tag")
    if not ids:
        return {}
    attached = rest.post("/tag-association", "list-attached-objects-on-tags", {"tag_ids": ids})
    categories: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for entry in attached:
        vms = [o["id"] for o in entry["object_ids"] if o["type"] == "VirtualMachine"]
        if not vms:
            continue  # its name is not asked for either
        tag = rest.get_one("/tag", entry["tag_id"])
        category = tag["category_id"]
        if category not in categories:
            categories[category] = rest.get_one("/category", category)["name"]
        for vm in vms:
            found.setdefault(vm, []).append(f"{categories[category]}:{tag['name']}")
    return {vm: tuple(sorted(tags)) for vm, tags in found.items()}


class _Rest:
    """A session of the REST API over one connection."""

    def __init__(self, vsphere: Vsphere, connection: HTTPSConnection, paths: _Paths) -> None:
        self._vsphere = vsphere
        self._connection = connection
        self._paths = paths
        self.token = ""

    def get(self, path: str) -> Any:
        return self.ask("GET", self._paths.tagging + path)

    def get_one(self, path: str, which: str) -> Any:
        return self.get(f"{path}/{self._paths.one}{which}")

    def post(self, path: str, action: str, body: Mapping[str, Any]) -> Any:
        where = f"{self._paths.tagging}{path}?{self._paths.action}={action}"
        return self.ask("POST", where, body)

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        authorization: str = "",
    ) -> Any:
        """The answer's value; None where there is none. Raises what `read_tags` raises; a path
        that is not there is a LookupError."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if authorization:
            headers["Authorization"] = authorization
        else:
            headers[_SESSION_HEADER] = self.token
        with self._vsphere.translated("its tags"):
            sent = json.dumps(body) if body is not None else None
            self._connection.request(method, path, sent, headers)
            answer = self._connection.getresponse()
            data = answer.read()
        if answer.status == 404:
            raise LookupError(path)
        if answer.status // 100 != 2:
            raise _refused(self._vsphere.server, answer.status, answer.reason)
        try:
            value = json.loads(data) if data else None
            return value["value"] if self._paths.wrapped and value is not None else value
        except (ValueError, KeyError, TypeError) as error:
            raise UnavailableError(
                f"{self._vsphere.server} answers {method} {path} with what is no JSON of its API",
                code="vsphere-failed",
            ) from error


@contextlib.contextmanager
def _session(
    vsphere: Vsphere, config: VsphereConfig, connection: HTTPSConnection
) -> Iterator[_Rest]:
    password = read_secret(config.password_file, f"password of {config.server}")
    secret = f"{config.user}:{password.get_secret_value()}".encode()
    authorization = f"Basic {base64.b64encode(secret).decode()}"
    for paths in (_NEW, _OLD):
        rest = _Rest(vsphere, connection, paths)
        try:
            rest.token = rest.ask("POST", paths.session, authorization=authorization)
        except LookupError:
            continue
        try:
            yield rest
        finally:
            with contextlib.suppress(UnavailableError, ConfigError, PrivilegeError, LookupError):
                rest.ask("DELETE", paths.session)
        return
    raise UnavailableError(
        f"{vsphere.server} has no REST API, so the tags of its VMs are not known",
        code="vsphere-failed",
        hint="is the service vmware-vapi-endpoint (vSphere Automation API) running?",
    )


def _refused(
    server: str, status: int, reason: str
) -> ConfigError | PrivilegeError | UnavailableError:
    if status == 401:
        return ConfigError(
            f"the REST API of {server} does not let us in",
            code="vsphere-login",
            hint="user and password_file of its table in [hypervisors]",
        )
    if status == 403:
        return PrivilegeError(
            f"{server} does not let this user read tags: it lacks the privilege System.Read",
            code="vsphere-privilege",
        )
    return UnavailableError(
        f"{server} answers {status} {reason} for its tags", code="vsphere-failed"
    )
