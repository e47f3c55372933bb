"""Views as block devices of this machine: connect, disconnect, what is connected, again.

What a crash leaves at each step of `connect` (recovery ends the device, the link and the row):

| killed | left |
| --- | --- |
| `connect.device.intended` | perhaps a device, a TLS tunnel, a session and its node record |
| `connect.device.done` | a device |
| `connect.link.intended`, `.done` | a device and perhaps its link in /dev/offload |
| `connect.row.done`, `connect.commit.before` | a connection that nobody was told of |
| `connect.commit.after` | nothing: the view is connected |

`disconnect` journals the same undo action, so that recovery finishes it. `reconnect` journals only
the end of the new device: the row stays, and the next recovery connects again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from offload import attachment, compose, device_use, host_rules, iscsi
from offload.attachment import Attachment
from offload.blockdev import (
    device_read_only,
    device_sector_size,
    device_size,
    make_device_read_only,
)
from offload.catalog.store import Catalog
from offload.endpoint import parse
from offload.errors import (
    BusyError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    UnavailableError,
    UsageError,
)
from offload.filelock import alone
from offload.instance import Instance
from offload.journal import Operation
from offload.model import Connection, View, ViewState
from offload.services.connect_plan import LINKS, planned
from offload.services.context import Context


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectOptions:
    """How a view is wanted."""

    name: str | None = None  # default: the view's
    timeout_s: int = attachment.TIMEOUT_S  # how long requests wait for a server that is gone
    host_rules: bool = True  # refuse where this machine would act on what it finds in the view


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A new connection, and what a person should know of this machine."""

    connection: Connection
    warnings: tuple[str, ...] = ()


class ConnectionState(StrEnum):
    """How a connection is now."""

    CONNECTED = "connected"
    DEAD = "dead"  # its view is not served
    GONE = "gone"  # there is no device: the machine was rebooted


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionStatus:
    """A connection, and how it is now."""

    connection: Connection
    state: ConnectionState


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnected:
    """What `reconnect` did: the connections that work again, and what a person must know of it."""

    connections: tuple[Connection, ...] = ()
    warnings: tuple[str, ...] = ()


def connect(ctx: Context, what: str, options: ConnectOptions | None = None) -> Connected:
    """Make a block device of a view of this instance (name or id), or of another's (URI).

    Raises UsageError, NotFoundError, BusyError (`already-connected`, `name-taken`), PolicyError
    (`host-rules-missing`), PrivilegeError, UnavailableError (`view-dead`), IntegrityError
    (`device-mismatch`), and what the clients of NBD and iSCSI raise.
    """
    options = options or ConnectOptions()
    view, uri = _find_view(ctx, what)
    with alone(_lock(ctx)):
        _refuse_second(ctx, view, uri)
        wanted = planned(ctx, view, uri, name=options.name, timeout_s=options.timeout_s)
        attachment.check(Attachment.from_strings(wanted.record))
        warnings = host_rules.require() if options.host_rules else []
        with ctx.journal.operation("connect", wanted.name) as op:
            made = _attached(ctx, op, wanted, view)
            _make_link(op, made)
            ctx.catalog.add_connection(made)
            op.done("row")
    return Connected(connection=made, warnings=tuple(warnings))


def disconnect(
    ctx: Context, names: Sequence[str], *, all_connections: bool = False, force: bool = False
) -> list[Connection]:
    """End connections, by name, id or device; all are checked before the first one goes.

    Raises UsageError, NotFoundError, BusyError (`device-busy`: in use and it is not forced).
    """
    if all_connections == bool(names):
        raise UsageError(
            "name the connections to end, or all", code="bad-connections", hint="or: --all"
        )
    known = ctx.catalog.connections()
    found = known if all_connections else [_find(known, name) for name in names]
    chosen = list({connection.id: connection for connection in found}.values())
    if not chosen:
        return []
    if not force:
        for connection in chosen:
            _check_idle(connection)
    with (
        alone(_lock(ctx)),
        ctx.journal.operation("disconnect", ", ".join(c.name for c in chosen)) as op,
    ):
        for number, connection in enumerate(chosen, 1):
            op.intend(f"device-{number}", "detach-device", _device_args(connection))
        for number, connection in enumerate(chosen, 1):
            _remove_link(connection.name, connection.device)
            op.done(f"link-{number}")
            attachment.detach(Attachment.from_strings(connection.record))
            op.done(f"device-{number}")
            ctx.catalog.delete_connection(connection.id)
            op.done(f"row-{number}")
        host_rules.settle()
    return chosen


def connections(ctx: Context) -> list[ConnectionStatus]:
    """What is connected, the oldest first. Changes nothing."""
    known: dict[str, View] = {view.id: view for view in ctx.catalog.views()}
    found = []
    for connection in ctx.catalog.connections():
        view = known.get(connection.view)
        if attachment.find(Attachment.from_strings(connection.record)) is None:
            state = ConnectionState.GONE
        elif connection.view and (view is None or not _served(ctx, view)):
            state = ConnectionState.DEAD
        else:
            state = ConnectionState.CONNECTED
        found.append(ConnectionStatus(connection=connection, state=state))
    return found


def reconnect(ctx: Context) -> Reconnected:
    """Have every connection work again that does not (a reboot, a server killed and served again).

    One that cannot is a warning, and the next ones are tried all the same.
    """
    again, warnings = [], []
    for connection in ctx.catalog.connections():
        try:
            with alone(_lock(ctx)):  # for which a disconnect may have been waited
                there = any(known.id == connection.id for known in ctx.catalog.connections())
                mended = _again(ctx, connection) if there else None
        except OffloadError as error:
            hint = f" ({error.hint})" if error.hint else ""
            warnings.append(f"{connection.name} cannot be connected again: {error.message}{hint}")
        else:
            again += [mended] if mended is not None else []
    return Reconnected(connections=tuple(again), warnings=tuple(warnings))


def of_views(catalog: Catalog, views: Iterable[View]) -> list[Connection]:
    """The connections of these views."""
    ids = {view.id for view in views}
    return [connection for connection in catalog.connections() if connection.view in ids]


def undo_device(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """End a connection, half made or half gone. `device` is empty where there was none yet."""
    _remove_link(args["name"], args["device"])
    attachment.detach(Attachment.from_strings(args))
    catalog.delete_connection(args["id"])


def undo_again(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """End the device of a connection that stays in the catalog."""
    attachment.detach(Attachment.from_strings(args))


def undo_link(instance: Instance, catalog: Catalog, args: Mapping[str, str]) -> None:  # noqa: ARG001
    """Remove the link of a connection that is gone, or never came to be."""
    _remove_link(args["name"], args["device"])


# -- before anything is changed ---------------------------------------------------------------


def _find_view(ctx: Context, what: str) -> tuple[View | None, str]:
    """A view of ours and its URI, or the URI of another's."""
    if "://" in what:
        parse(what)
        bare = what.partition("?tls-")[0]  # a client's own files are no part of a view's URI
        view = next((view for view in ctx.catalog.views() if view.uri in {what, bare}), None)
        uri = what
    else:
        view = ctx.catalog.view(what)
        uri = view.uri
    if view is None:
        return None, what
    if not _served(ctx, view):
        raise UnavailableError(
            f"view {view.name} is not served", code="view-dead", hint="serve it: offload recover"
        )
    return view, uri


def _served(ctx: Context, view: View) -> bool:
    if view.state is ViewState.CLOSING:
        return False
    run_dir = ctx.instance.views_dir / view.id
    return compose.target(view.target, ctx.instance).alive(run_dir, view.server)


def _refuse_second(ctx: Context, view: View | None, uri: str) -> None:
    for connection in ctx.catalog.connections():
        if connection.uri == uri or (view is not None and connection.view == view.id):
            raise BusyError(
                f"it is connected already: {connection.name}, {connection.device}",
                code="already-connected",
                hint=f"use that, or: offload disconnect {connection.name}",
            )


# -- devices and links ------------------------------------------------------------------------


def _attached(
    ctx: Context, op: Operation, wanted: Connection, view: View | None, undo: str = "detach-device"
) -> Connection:
    """With its device, which is what it should be."""
    op.intend("device", undo, _device_args(wanted))
    chap = iscsi.load_chap(ctx.instance.config.iscsi)
    device = attachment.attach(
        Attachment.from_strings(wanted.record),
        chap,
        sector_size=view.sector_size if view is not None else wanted.sector_size or None,
        read_only=wanted.read_only,
    )
    host_rules.settle()
    made = _measured(wanted, device)
    _check_size(made, wanted, view)
    op.done("device")
    return made


def _check_size(made: Connection, wanted: Connection, view: View | None) -> None:
    """Never other data than was asked for: as the view is, and as it was before a reboot."""
    for known in (view, wanted if wanted.size_bytes else None):
        if known is None:
            continue
        if (known.size_bytes, known.sector_size) != (made.size_bytes, made.sector_size):
            raise IntegrityError(
                f"{made.device} has {made.size_bytes} bytes in sectors of {made.sector_size}, not "
                f"{known.size_bytes} in sectors of {known.sector_size}",
                code="device-mismatch",
                hint="another view is served at its address",
            )


def _measured(wanted: Connection, device: str) -> Connection:
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if wanted.read_only and not device_read_only(fd):
                make_device_read_only(fd)  # the server refuses anyway
            return replace(
                wanted,
                device=device,
                read_only=device_read_only(fd),
                size_bytes=device_size(fd),
                sector_size=device_sector_size(fd),
            )
        finally:
            os.close(fd)
    except OSError as error:
        raise UnavailableError(
            f"{device} cannot be read: {error.strerror}", code="no-device"
        ) from error


def _make_link(op: Operation, made: Connection) -> None:
    path = LINKS / made.name
    op.intend("link", "remove-device-link", _link_args(made))
    try:
        LINKS.mkdir(mode=0o755, exist_ok=True)
        if path.is_symlink() and not path.exists():
            path.unlink()  # of a device that is no more
        path.symlink_to(made.device)
    except OSError as error:
        raise UnavailableError(
            f"cannot make {path}: {error.strerror}", code="link-unusable"
        ) from error
    op.done("link")


def _remove_link(name: str, device: str) -> None:
    """Not one that leads somewhere else by now."""
    path = LINKS / name
    with contextlib.suppress(OSError):
        if str(path.readlink()) == device:
            path.unlink()
    with contextlib.suppress(OSError):  # not while there are others
        LINKS.rmdir()


def _again(ctx: Context, known: Connection) -> Connection | None:
    """The connection, if it had to be mended."""
    wanted = Attachment.from_strings(known.record)
    device = attachment.find(wanted)
    if device == known.device and device is not None:
        return known if attachment.mend(wanted, device) else None
    view = None
    if known.view:
        view = next((view for view in ctx.catalog.views() if view.id == known.view), None)
        if view is None:
            raise NotFoundError(
                "its view is gone",
                code="unknown-view",
                hint=f"offload disconnect {known.name}",
            )
    with ctx.journal.operation("reconnect", known.name) as op:
        _remove_link(known.name, known.device)
        attachment.detach(wanted)  # what a broken reconnect left
        made = _attached(ctx, op, known, view, undo="detach-again")
        _make_link(op, made)
        ctx.catalog.update_connection(made)
        op.done("row")
    return made


# -- ending -----------------------------------------------------------------------------------


def _find(known: Sequence[Connection], text: str) -> Connection:
    """By name, device, link, or the beginning of the id."""
    device = os.path.realpath(text) if text.startswith("/") else ""
    for connection in known:
        if text == connection.name or device == connection.device != "":
            return connection
    matching = [connection for connection in known if connection.id.startswith(text)]
    if len(matching) == 1:
        return matching[0]
    raise NotFoundError(
        f"no connection '{text}'",
        code="unknown-connection",
        hint="list what there is with: offload connections",
    )


def _check_idle(connection: Connection) -> None:
    device = attachment.find(Attachment.from_strings(connection.record))
    if device is None:
        return
    users = device_use.users(device)
    if users:  # udev has it open for a moment whenever something has happened to it
        host_rules.settle()
        users = device_use.users(device)
    if users:
        raise BusyError(
            f"{connection.name} ({device}) is in use: {'; '.join(users)}",
            code="device-busy",
            hint="end that first, or disconnect with --force: whoever uses it gets errors",
        )


def _device_args(connection: Connection) -> dict[str, str]:
    return {"id": connection.id, **_link_args(connection), **connection.record}


def _link_args(connection: Connection) -> dict[str, str]:
    return {"name": connection.name, "device": connection.device}


def _lock(ctx: Context) -> Path:
    """One at a time: a session, a name and a link are looked for before they are made."""
    return ctx.instance.state_dir / "connections.lock"
