"""Where a view is served, as its URI says it: an NBD export or an iSCSI LUN.

Forms: those of libnbd and libiscsi.

| | |
| --- | --- |
| `nbd+unix:///EXPORT?socket=PATH` | NBD on a unix socket |
| `nbd://HOST:PORT/EXPORT` | NBD over TCP |
| `nbds://HOST:PORT/EXPORT?tls-certificates=FOLDER` | … with TLS |
| `nbds://USER@HOST:PORT/EXPORT?tls-psk-file=FILE` | … with a pre-shared key |
| `iscsi://HOST:PORT/IQN/LUN` | iSCSI |

Secrets are never in a URI; files that hold them are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import ParseResult, parse_qs, quote, unquote, urlencode, urlparse

from offload.errors import UsageError
from offload.iqn import check_iqn
from offload.nbd_export import Address

NBD_PORT = 10809  # NBD protocol, doc/uri.md
ISCSI_PORT = 3260

_FORMS = "nbd+unix:///?socket=PATH, nbd://HOST:PORT, nbds://HOST:PORT or iscsi://HOST:PORT/IQN/LUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsClient:
    """How an NBD client proves who it is: files only. A user means a pre-shared key."""

    pre_shared: bool = False
    certificates: Path | None = None  # folder: ca-cert.pem, client-cert.pem, client-key.pem
    psk: Path | None = None  # lines `user:hex`
    user: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdEndpoint:
    """An export of an NBD server."""

    address: Address
    export: str = ""
    tls: TlsClient | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IscsiEndpoint:
    """A LUN of an iSCSI target."""

    host: str
    port: int
    iqn: str
    lun: int

    @property
    def portal(self) -> str:
        """`HOST:PORT`; an IPv6 address goes in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Endpoint = NbdEndpoint | IscsiEndpoint


def parse(uri: str) -> Endpoint:
    """Read a URI. Raises UsageError (`bad-uri`, `secret-in-uri`)."""
    try:
        parts = urlparse(uri)
        port = parts.port
    except ValueError as error:
        raise _bad(uri, str(error)) from error
    # libiscsi writes iscsi://USER%SECRET@HOST
    if parts.password is not None or (parts.scheme == "iscsi" and parts.username is not None):
        raise UsageError(
            "a URI is no place for a secret",
            code="secret-in-uri",
            hint="put it into a file that the configuration names, see [iscsi.chap] and [nbd]",
        )
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    match parts.scheme:
        case "nbd+unix":
            return _unix(uri, parts, query)
        case "nbd" | "nbds":
            if not parts.hostname:
                raise _bad(uri, "no host")
            address = (parts.hostname, port or NBD_PORT)
            export = unquote(parts.path.removeprefix("/"))
            tls = None if parts.scheme == "nbd" else _tls(uri, parts, query)
            return NbdEndpoint(address=address, export=export, tls=tls)
        case "iscsi":
            return _iscsi(uri, parts, port)
        case scheme:
            raise _bad(uri, f"no such scheme as '{scheme}'")


def with_files(uri: str, tls: TlsClient) -> str:
    """The URI of an export over TLS that names the files of its client."""
    parts = urlparse(uri)
    query = {
        key: str(value)
        for key, value in (("tls-certificates", tls.certificates), ("tls-psk-file", tls.psk))
        if value is not None
    }
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{quote(tls.user)}@{host}" if tls.user else host
    return parts._replace(netloc=netloc, query=urlencode(query, safe="/")).geturl()


def _unix(uri: str, parts: ParseResult, query: dict[str, str]) -> NbdEndpoint:
    path = Path(query.get("socket", ""))
    if not path.is_absolute():
        raise _bad(uri, "no absolute path of a socket")
    return NbdEndpoint(address=path, export=unquote(parts.path.removeprefix("/")))


def _tls(uri: str, parts: ParseResult, query: dict[str, str]) -> TlsClient:
    files = {}
    for key in ("tls-certificates", "tls-psk-file"):
        if key in query:
            files[key] = Path(query[key])
            if not files[key].is_absolute():
                raise _bad(uri, f"{key} is no absolute path")
    return TlsClient(
        pre_shared=bool(parts.username) or "tls-psk-file" in files,
        certificates=files.get("tls-certificates"),
        psk=files.get("tls-psk-file"),
        user=unquote(parts.username or ""),
    )


def _iscsi(uri: str, parts: ParseResult, port: int | None) -> IscsiEndpoint:
    iqn, _, lun = parts.path.removeprefix("/").partition("/")
    try:
        check_iqn(iqn)
    except ValueError as error:
        raise _bad(uri, str(error)) from error
    if not parts.hostname or not lun.isdecimal():
        raise _bad(uri, "it needs a host and the number of a LUN")
    return IscsiEndpoint(host=parts.hostname, port=port or ISCSI_PORT, iqn=iqn, lun=int(lun))


def _bad(uri: str, why: str) -> UsageError:
    shown = re.sub(r"//[^/]*@", "//…@", uri)
    return UsageError(
        f"'{shown}' is no URI of a view: {why}", code="bad-uri", hint=f"e.g. {_FORMS}"
    )
