"""What a connection will be: its name, and the address of its view as a client here needs it."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

from offload.attachment import Attachment
from offload.endpoint import NbdEndpoint, TlsClient, parse, with_files
from offload.errors import BusyError, UsageError
from offload.ids import new_id
from offload.instance import Instance
from offload.model import Connection, ConnectionId, View
from offload.origin import NAME
from offload.services.context import Context

LINKS = Path("/dev/offload")

_RESERVED = "device"  # the udev rule's own folder of links
_NAME_MAX = 63


def planned(
    ctx: Context, view: View | None, uri: str, *, name: str | None, timeout_s: int
) -> Connection:
    """The connection before there is a device: its id is journalled first.

    Raises UsageError (`bad-name`), BusyError (`name-taken`).
    """
    chosen = ConnectionId(new_id())
    if name is None:
        name = view.name if view is not None else _derived_name(uri)
    _check_name(ctx, name)
    wanted = Attachment(
        uri=_client_uri(ctx.instance, view, uri),
        identifier=f"offload-{ctx.instance.id}-{chosen}",
        folder=ctx.instance.runtime_dir / "tunnels" / chosen,
        timeout_s=timeout_s,
    )
    return Connection(
        id=chosen,
        name=name,
        view=view.id if view is not None else "",
        uri=uri,
        kind=wanted.kind,
        read_only=view is not None and not view.writable,
        size_bytes=0,
        sector_size=0,
        created_at=datetime.now(UTC),
        record=wanted.to_strings(),
    )


def _derived_name(uri: str) -> str:
    """A name for another instance's view."""
    endpoint = parse(uri)
    if not isinstance(endpoint, NbdEndpoint):
        text = f"{endpoint.iqn.rpartition(':')[2]}-{endpoint.lun}"
    elif isinstance(endpoint.address, tuple):
        text = "-".join(str(part) for part in (*endpoint.address, endpoint.export) if part)
    else:
        text = f"{endpoint.address.parent.name}-{endpoint.export}"
    return re.sub(r"[^a-z0-9._-]", "-", text.lower()).strip("._-")[:_NAME_MAX] or "view"


def _check_name(ctx: Context, name: str) -> None:
    if not NAME.fullmatch(name) or name == _RESERVED:
        raise UsageError(
            f"'{name}' is no name for a connection",
            code="bad-name",
            hint="up to 63 lower-case letters, digits, '.', '_' and '-'; a letter or digit first",
        )
    taken = any(connection.name == name for connection in ctx.catalog.connections())
    if taken or (LINKS / name).exists():  # another instance's, perhaps
        raise BusyError(
            f"there is a connection '{name}' already",
            code="name-taken",
            hint="choose another name: --name",
        )


def _client_uri(instance: Instance, view: View | None, uri: str) -> str:
    """The URI as a client here needs it: with the files for TLS, at an address that is one."""
    endpoint = parse(uri)
    if not isinstance(endpoint, NbdEndpoint) or not isinstance(endpoint.address, tuple):
        return uri
    uri = _reachable(uri, endpoint.address[0])
    if endpoint.tls is None or endpoint.tls.certificates or endpoint.tls.psk:
        return uri
    config = instance.config.nbd
    pre_shared = endpoint.tls.pre_shared or (view is not None and view.exposure.tls == "psk")
    if pre_shared:
        user = endpoint.tls.user or _first_user(config.psk)
        return with_files(uri, TlsClient(pre_shared=True, psk=config.psk, user=user))
    return with_files(uri, TlsClient(certificates=config.certificates))


def _reachable(uri: str, host: str) -> str:
    """A server on every address of this machine is reached at loopback."""
    with contextlib.suppress(ValueError):
        if ip_address(host).is_unspecified:
            return uri.replace("[::]", "[::1]").replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    return uri


def _first_user(psk: Path | None) -> str:
    """Whose pre-shared key this machine uses."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in psk.read_text().splitlines() if psk is not None else ():
            if ":" in line and not line.startswith("#"):
                return line.partition(":")[0]
    return ""
