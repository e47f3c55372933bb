"""`offload connect`, `offload disconnect`, `offload connections`, `offload host-rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.output import emit, facts, show_time, table
from offload.cli.session import changing_context, reading_context
from offload.quantity import show_size

if TYPE_CHECKING:
    from offload.host_rules import Rule
    from offload.model import Connection

_TIMEOUT_S = 30


@click.command(
    cls=Command,
    examples=[
        "offload connect inspect",
        "offload connect inspect --name disk1 --timeout 10",
        "offload connect nbds://backup2.example:10809?tls-certificates=/etc/offload/pki",
        "offload connect iscsi://192.0.2.7:3260/iqn.2026-11.internal.offload:k3.v7.db/0",
    ],
)
@click.argument("view", metavar="VIEW", shell_complete=complete.views)
@click.option("--name", help="The connection's name; default: the view's.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.IntRange(1, 86400),
    default=_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long requests wait for a server that is gone, before they fail.",
)
@click.option(
    "--without-host-rules",
    is_flag=True,
    help="Even where this machine would act on what is in the view.",
)
@click.pass_context
def connect(
    ctx: click.Context, /, view: str, name: str | None, timeout_s: int, without_host_rules: bool
) -> None:
    """Attach a view as a block device of this machine.

    VIEW is a view's name or id, or the URI of another instance's. The device has a link in
    /dev/offload, which is the same after a reboot.
    """
    from offload.services import connect as service

    settings = settings_of(ctx)
    options = service.ConnectOptions(
        name=name, timeout_s=timeout_s, host_rules=not without_host_rules
    )
    with changing_context(settings) as context:
        done = service.connect(context, view, options)
    made = done.connection

    def human() -> None:
        facts(
            [
                ("name", made.name),
                ("device", made.device),
                ("link", link_of(made)),
                ("size", show_size(made.size_bytes)),
                ("mode", _mode(made)),
            ]
        )
        for warning in done.warnings:
            click.echo(f"warning: {warning}", err=True)

    emit(settings, {**connection_fields(made), "warnings": done.warnings}, human)


@click.command(
    cls=Command,
    examples=[
        "offload disconnect inspect",
        "offload disconnect /dev/nbd1000",
        "offload disconnect --all --force",
    ],
)
@click.argument("names", nargs=-1, metavar="NAME|DEVICE...", shell_complete=complete.connections)
@click.option("--all", "all_connections", is_flag=True, help="Every connection of this instance.")
@click.option("--force", is_flag=True, help="Even where the device is in use.")
@click.pass_context
def disconnect(
    ctx: click.Context, names: tuple[str, ...], all_connections: bool, force: bool
) -> None:
    """Detach views. A device in use is refused unless --force."""
    from offload.services import connect as service

    settings = settings_of(ctx)
    with changing_context(settings) as context:
        gone = service.disconnect(context, names, all_connections=all_connections, force=force)

    def human() -> None:
        for connection in gone:
            click.echo(f"disconnected {connection.name}")
        if not gone:
            click.echo("nothing is connected", err=True)

    emit(settings, [connection_fields(connection) for connection in gone], human)


@click.command(cls=Command, examples=["offload connections", "offload connections --json"])
@click.pass_context
def connections(ctx: click.Context) -> None:
    """List the views that are attached to this machine, the oldest first."""
    from offload.services import connect as service

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = service.connections(context)
    rows = [
        [
            entry.connection.name,
            entry.state.value,
            entry.connection.device,
            _mode(entry.connection),
            show_size(entry.connection.size_bytes),
            show_time(entry.connection.created_at),
            entry.connection.uri,
        ]
        for entry in found
    ]
    data = [{**connection_fields(entry.connection), "state": entry.state} for entry in found]
    header = ["name", "state", "device", "mode", "size", "connected", "uri"]
    emit(settings, data, lambda: table(header, rows, "nothing is connected"))


@click.command(
    "host-rules",
    cls=Command,
    examples=["offload host-rules", "offload host-rules --print", "offload host-rules --install"],
)
@click.option("--install", is_flag=True, help="Write what is missing.")
@click.option("--print", "show", is_flag=True, help="Print the texts, and where they belong.")
@click.pass_context
def host_rules(ctx: click.Context, install: bool, show: bool) -> None:
    """What keeps this machine from acting on what is in connected views.

    A rule for udev, a blacklist for multipath, a filter for LVM. The exit code is 6 while one is
    missing that this machine needs.
    """
    from offload import host_rules as rules
    from offload.errors import UnavailableError

    settings = settings_of(ctx)
    found = rules.install() if install else rules.look()
    emit(settings, found, lambda: _show_rules(found, show))
    lacking = [rule for rule in found if not rule.in_force]
    if lacking:
        merge = [str(rule.path) for rule in lacking if rule.by_hand]
        raise UnavailableError(
            f"not in force: {', '.join(rule.name for rule in lacking)}",
            code="host-rules-missing",
            hint=f"merge what `offload host-rules --print` shows into {' and '.join(merge)}"
            if merge
            else "offload host-rules --install",
        )


def _show_rules(found: list[Rule], show: bool) -> None:
    if not show:
        rows = [[rule.name, rule.state.value, str(rule.path)] for rule in found]
        table(["rule", "state", "file"], rows, "")
        return
    for rule in found:
        click.echo(f"# ---- {rule.path} ----\n{rule.text}")


def connection_fields(connection: Connection) -> dict[str, Any]:
    """A connection as JSON: without the record that only the driver's own code reads."""
    return {
        "id": connection.id,
        "name": connection.name,
        "device": connection.device,
        "link": link_of(connection),
        "view": connection.view,
        "uri": connection.uri,
        "kind": connection.kind,
        "read_only": connection.read_only,
        "size_bytes": connection.size_bytes,
        "sector_size": connection.sector_size,
        "created_at": connection.created_at,
    }


def link_of(connection: Connection) -> str:
    """The lasting name of its device."""
    return f"/dev/offload/{connection.name}"


def _mode(connection: Connection) -> str:
    return "read-only" if connection.read_only else "writable"
