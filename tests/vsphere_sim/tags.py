"""Tags: they are in the REST API alone.

Source: vSphere Automation API reference, `cis/session` and `cis/tagging`: under `/api` as of 7.0
U2, under `/rest` with each answer in a `value` as before.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from http import HTTPStatus
from typing import Any

from tests.vsphere_sim.calls import Part
from tests.vsphere_sim.messages import Answer, Request
from tests.vsphere_sim.properties import Managed

_SESSION = "vmware-api-session-id"
_KIND = "application/json"


class Tags(Part):
    """Categories and tags, and what they are attached to. `old_only`: a vCenter before 7.0 U2."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.old_only = False
        self._tokens: dict[str, str] = {}  # user by token
        self._categories: dict[str, str] = {}  # name by id
        self._tags: dict[str, tuple[str, str]] = {}  # category and name by id
        self._attached: dict[str, set[str]] = {}  # ids of objects by tag
        model.web.serve("/api/", self._new)
        model.web.serve("/rest/com/vmware/", self._old)

    @property
    def sessions(self) -> int:
        """Of the REST API, logged in now."""
        return len(self._tokens)

    def end(self) -> None:
        """They have expired."""
        self._tokens.clear()

    # -- for tests -------------------------------------------------------------------------------

    def attach(self, tag: str, *objects: Managed) -> None:
        """`category:tag`, made where it is not there."""
        category, _, name = tag.partition(":")
        tag_id = self._tag(self._category(category), name)
        self._attached.setdefault(tag_id, set()).update(found.moid for found in objects)

    def detach(self, tag: str, *objects: Managed) -> None:
        """From these."""
        category, _, name = tag.partition(":")
        tag_id = self._tag(self._category(category), name)
        self._attached[tag_id] -= {found.moid for found in objects}

    def _category(self, name: str) -> str:
        for found, known in self._categories.items():
            if known == name:
                return found
        made = f"urn:vmomi:InventoryServiceCategory:{uuid.uuid4()}:GLOBAL"
        self._categories[made] = name
        return made

    def _tag(self, category: str, name: str) -> str:
        for found, known in self._tags.items():
            if known == (category, name):
                return found
        made = f"urn:vmomi:InventoryServiceTag:{uuid.uuid4()}:GLOBAL"
        self._tags[made] = (category, name)
        return made

    # -- requests --------------------------------------------------------------------------------

    def _new(self, request: Request) -> Answer:
        if self.old_only:
            return Answer(status=HTTPStatus.NOT_FOUND)
        path = request.path.removeprefix("/api")
        return self._ask(request, path.removeprefix("/cis"), request.query("action"), wrap=False)

    def _old(self, request: Request) -> Answer:
        path = request.path.removeprefix("/rest/com/vmware/cis").replace("/id:", "/")
        return self._ask(request, path, request.query("~action"), wrap=True)

    def _ask(self, request: Request, path: str, action: str, *, wrap: bool) -> Answer:
        self.model.note("", f"REST {request.method} {path} {action}".rstrip(), "", {})
        with self.model.changed:
            if path == "/session":
                return self._session(request, wrap=wrap)
            headers = {name.lower(): value for name, value in request.headers.items()}
            if headers.get(_SESSION) not in self._tokens:
                return Answer(status=HTTPStatus.UNAUTHORIZED)
            try:
                found = self._tagging(request, path.removeprefix("/tagging"), action)
            except (KeyError, ValueError):
                return Answer(status=HTTPStatus.NOT_FOUND)
            return _json(found, wrap=wrap)

    def _session(self, request: Request, *, wrap: bool) -> Answer:
        headers = {name.lower(): value for name, value in request.headers.items()}
        if request.method == "DELETE":
            self._tokens.pop(headers.get(_SESSION, ""), None)
            return Answer(status=HTTPStatus.NO_CONTENT)
        try:
            text = base64.b64decode(headers.get("authorization", "").removeprefix("Basic "))
            user, _, password = text.decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return Answer(status=HTTPStatus.UNAUTHORIZED)
        if self.model.sessions_part.passwords.get(user) != password:
            return Answer(status=HTTPStatus.UNAUTHORIZED)
        token = uuid.uuid4().hex
        self._tokens[token] = user
        return _json(token, wrap=wrap, status=HTTPStatus.CREATED)

    def _tagging(self, request: Request, path: str, action: str) -> Any:
        kind, _, one = path.lstrip("/").partition("/")
        body = json.loads(request.body) if request.body else {}
        if kind == "category":
            if not one:
                return list(self._categories)
            return {"id": one, "name": self._categories[one], "cardinality": "MULTIPLE"}
        if kind == "tag":
            if not one:
                return list(self._tags)
            category, name = self._tags[one]
            return {"id": one, "name": name, "category_id": category, "description": ""}
        if kind == "tag-association":
            return self._associations(action, one, body)
        raise KeyError(path)

    def _associations(self, action: str, one: str, body: dict[str, Any]) -> Any:
        if action == "list-attached-objects":
            return self._objects(one)
        if action == "list-attached-objects-on-tags":
            return [{"tag_id": t, "object_ids": self._objects(t)} for t in body["tag_ids"]]
        if action == "list-attached-tags":
            return self._tags_of(body["object_id"]["id"])
        if action == "list-attached-tags-on-objects":
            pairs = ((o, self._tags_of(o["id"])) for o in body["object_ids"])
            return [{"object_id": o, "tag_ids": tags} for o, tags in pairs if tags]
        raise KeyError(action)

    def _objects(self, tag: str) -> list[dict[str, str]]:
        found = (self.model.objects.get(moid) for moid in sorted(self._attached.get(tag, ())))
        return [{"id": o.moid, "type": _type(o)} for o in found if o is not None]

    def _tags_of(self, moid: str) -> list[str]:
        return [tag for tag, objects in self._attached.items() if moid in objects]


def _type(found: Managed) -> str:
    return type(found.ref).__name__.rpartition(".")[2]


def _json(value: Any, *, wrap: bool, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    body = {"value": value} if wrap else value
    return Answer(
        status=HTTPStatus.OK if wrap else status, body=json.dumps(body).encode(), kind=_KIND
    )
