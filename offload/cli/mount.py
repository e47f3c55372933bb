"""`offload mount`, `offload unmount`, `offload views`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete, quantities
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, show_time, table
from offload.cli.session import changing_context, reading_context
from offload.quantity import show_size

if TYPE_CHECKING:
    from offload.model import Exposure, View
    from offload.services.mount import ViewStatus

_CLIENTS_SHOWN = 3  # in a table; --json has all


@click.command(
    cls=Command,
    examples=[
        "offload mount shop",
        "offload mount timemark:k3f9/shop-db --name inspect",
        "offload mount backup:b7k2/shop-db --writable",
        "offload mount --again shop-db-b7k2",
        "offload mount backup:b7k2/shop-db --tcp --port 10809",
        "offload mount shop --tcp --address 192.0.2.10 --tls certificates --allow 192.0.2.20",
        "offload mount shop --target lio --initiator iqn.1998-01.com.example:esx1",
    ],
)
@click.argument(
    "origins", nargs=-1, required=True, metavar="ORIGIN...", shell_complete=complete.origins
)
@click.option("--again", is_flag=True, help="ORIGIN is a view that was kept: serve it again.")
@click.option("--name", help="The view's name; for one volume only.")
@click.option("--target", default="nbd", show_default=True, help="What serves it: nbd, lio or tgt.")
@click.option(
    "--writable", is_flag=True, help="What is written is kept in an overlay until unmount."
)
@click.option(
    "--overlay-limit",
    callback=quantities.size,
    metavar="SIZE",
    help="How large it may grow; e.g. 20GiB.",
)
@click.option("--tcp", is_flag=True, help="NBD: on a TCP port instead of a unix socket.")
@click.option("--address", help="The address to listen on; default: as configured, 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65535), help="The port; default: NBD free, 3260.")
@click.option("--tls", type=click.Choice(["off", "certificates", "psk"]), help="NBD over TCP.")
@click.option("--allow", multiple=True, help="NBD over TCP: an address or network to serve.")
@click.option("--initiator", multiple=True, help="iSCSI: an IQN that may log in.")
@click.option(
    "--insecure-network",
    is_flag=True,
    help="iSCSI outside loopback on a network that is not named as a storage network.",
)
@click.pass_context
def mount(
    ctx: click.Context,
    /,
    origins: tuple[str, ...],
    *,
    again: bool,
    name: str | None,
    target: str,
    writable: bool,
    overlay_limit: int | None,
    tcp: bool,
    **exposure: Any,
) -> None:
    """Present points in time as block devices (TimeViews).

    ORIGIN is timemark:ID[/VOLUME], backup:ID[/VOLUME], or a group's name for a fresh TimeMark of
    it, which goes with its last view. Without a VOLUME each one becomes a view. All or none.
    """
    from offload.services import mount as service

    if again and (name or writable or overlay_limit or tcp or any(exposure.values())):
        raise click.UsageError("--again serves a view as it was: no other option goes with it")
    asked = _exposure(target, tcp=tcp, **exposure)
    if overlay_limit is not None and not writable:
        raise click.UsageError("--overlay-limit needs --writable")
    settings = settings_of(ctx)
    options = service.MountOptions(
        name=name,
        target=target,
        writable=writable,
        overlay_limit_bytes=overlay_limit,
        exposure=asked,
    )
    with changing_context(settings) as context, progress(settings) as shown:
        if again:
            made = service.mount_again(context, origins)
        else:
            made = service.mount(context, origins, options, shown)
    rows = [[view.name, show_size(view.size_bytes), view.origin, view.uri] for view in made]
    emit(
        settings,
        [view_fields(view) for view in made],
        lambda: table(["name", "size", "origin", "uri"], rows, ""),
    )


def _exposure(
    target: str,
    *,
    tcp: bool,
    address: str | None,
    port: int | None,
    tls: str | None,
    allow: tuple[str, ...],
    initiator: tuple[str, ...],
    insecure_network: bool,
) -> Exposure:
    """What was asked for; an option that would do nothing is refused."""
    from offload.model import Exposure

    over_tcp = {"--address": address, "--port": port, "--tls": tls, "--allow": allow}
    iscsi = {"--initiator": initiator, "--insecure-network": insecure_network}
    if target == "nbd":
        for option, value in iscsi.items():
            if value:
                raise click.UsageError(f"{option} is for iSCSI: --target lio or tgt")
        for option, value in over_tcp.items():
            if value and not tcp:
                raise click.UsageError(f"{option} needs --tcp")
    elif tcp:
        raise click.UsageError("--tcp is for NBD; iSCSI is always over TCP")
    return Exposure(
        transport="tcp" if tcp else "",
        address=address or "",
        port=port,
        initiators=initiator,
        allow=allow,
        tls=tls or "",
        insecure_network=insecure_network,
    )


@click.command(
    cls=Command,
    examples=[
        "offload unmount inspect",
        "offload unmount --group shop",
        "offload unmount --all --force",
    ],
)
@click.argument("names", nargs=-1, metavar="VIEW...", shell_complete=complete.views)
@click.option("--all", "all_views", is_flag=True, help="Every view of this instance.")
@click.option("--group", shell_complete=complete.groups, help="All that `mount GROUP` made.")
@click.option("--keep", is_flag=True, help="Keep what was written, for `mount --again`.")
@click.option("--force", is_flag=True, help="Even where clients are connected.")
@click.pass_context
def unmount(
    ctx: click.Context,
    /,
    names: tuple[str, ...],
    *,
    all_views: bool,
    group: str | None,
    keep: bool,
    force: bool,
) -> None:
    """Withdraw TimeViews, by name or id. A view with a client is refused unless --force.

    What was written to a writable view goes with it, unless it is kept. To discard a kept view,
    unmount it without --keep.
    """
    from offload.services import mount as service

    if keep and not names:
        raise click.UsageError("--keep goes with the names of views")
    if (bool(names), all_views, group is not None).count(True) != 1:
        raise click.UsageError("name the views to unmount, or say --group or --all")
    settings = settings_of(ctx)
    with changing_context(settings) as context:
        if group is not None:
            names = tuple(view.name for view in context.catalog.views_of_group(group))
            if not names:
                context.instance.config.group(group)  # an unknown group is an error
        gone = (
            service.keep(context, names, force=force)
            if keep
            else service.unmount(context, names, all_views=all_views, force=force)
            if names or all_views
            else []
        )

    def human() -> None:
        for view in gone:
            click.echo(f"kept {view.name}" if keep else f"unmounted {view.name}")
        if not gone:
            click.echo("no views are mounted", err=True)

    emit(settings, [view_fields(view) for view in gone], human)


@click.command(cls=Command, examples=["offload views", "offload views --json"])
@click.pass_context
def views(ctx: click.Context) -> None:
    """List the TimeViews that are mounted, the newest last."""
    from offload.services import mount as service

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = service.views(context)
    rows = [
        [
            entry.view.name,
            entry.view.id,
            _state(entry),
            show_size(entry.view.size_bytes),
            _written(entry),
            show_time(entry.view.created_at),
            entry.view.origin,
            entry.view.uri,
        ]
        for entry in found
    ]
    data = [
        {
            **view_fields(entry.view),
            "state": "dead" if _state(entry) == "dead" else entry.view.state,
            "alive": entry.alive,
            "clients": entry.clients,
            "overlay": entry.overlay,
            "moving_to": entry.moving_to or None,
        }
        for entry in found
    ]
    header = ["name", "id", "state", "size", "written", "mounted", "origin", "uri"]
    emit(settings, data, lambda: table(header, rows, "no views are mounted"))


def _state(entry: ViewStatus) -> str:
    if entry.view.state == "kept":
        return "kept"
    if not entry.alive:
        return "dead"
    mode = "writable" if entry.view.writable else "read-only"
    if entry.moving_to:
        mode = f"moving to {entry.moving_to}"
    if not entry.clients:
        return mode
    number = f"{len(entry.clients)} client" + ("s" if len(entry.clients) > 1 else "")
    # several connections of one program are one name
    names = list(dict.fromkeys(client.who for client in entry.clients))
    more = ", …" if len(names) > _CLIENTS_SHOWN else ""
    return f"{mode}, {number}: {', '.join(names[:_CLIENTS_SHOWN])}{more}"


def _written(entry: ViewStatus) -> str:
    """How full the overlay is, `12.0 MiB of 20.0 GiB`."""
    if not entry.view.on_overlay:
        return "in place" if entry.view.writable else "-"
    if entry.overlay is None:
        return "overlay is gone"
    return f"{show_size(entry.overlay.used_bytes)} of {show_size(entry.overlay.limit_bytes)}"


def view_fields(view: View) -> dict[str, Any]:
    """A view as JSON: without the records that only the server's own code reads."""
    return {
        "id": view.id,
        "name": view.name,
        "uri": view.uri,
        "origin": view.origin,
        "target": view.target,
        "writable": view.writable,
        "size_bytes": view.size_bytes,
        "sector_size": view.sector_size,
        "created_at": view.created_at,
        "state": view.state,
    }
