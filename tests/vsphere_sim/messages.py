"""HTTP requests that are no SOAP, and answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One that is no SOAP. `session`: of the SOAP API, by its cookie; "" without one."""

    method: str
    target: str  # path and query
    headers: Mapping[str, str]
    body: bytes
    session: str

    @property
    def path(self) -> str:
        """Without the query."""
        return unquote(urlsplit(self.target).path)

    def query(self, name: str) -> str:
        """A parameter, "" where it is not given."""
        return parse_qs(urlsplit(self.target).query).get(name, [""])[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To a Request."""

    status: HTTPStatus = HTTPStatus.OK
    body: bytes = b""
    kind: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)
