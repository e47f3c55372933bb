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
        "offload mount backup:b7k2/ds1 --vmdk web/web.vmdk",
        "offload mount shop --placeholder --host backup-esx1",
    ],
)
@click.argument(
    "origins", nargs=-1, required=True, metavar="ORIGIN...", shell_complete=complete.origins
)
@click.option("--again", is_flag=True, help="ORIGIN is a view that was kept: serve it again.")
@click.option("--name", help="The name of the view (of one volume only), or of the island.")
@click.option("--target", help="What serves it: nbd (the default), lio or tgt.")
@click.option(
    "--writable", is_flag=True, help="What is written is kept in an overlay until unmount."
)
@click.option(
    "--overlay-limit",
    callback=quantities.size,
    metavar="SIZE",
    help="How large it may grow; e.g. 20GiB.",
)
@click.option("--vmdk", metavar="PATH", help="A VM's disk on the volume's VMFS: see volume vmdks.")
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
@click.option(
    "--placeholder",
    is_flag=True,
    help="VMs that stand powered off on a backup host, for any backup software.",
)
@click.option("--host", shell_complete=complete.backup_hosts, help="Placeholders: where.")
@click.option("--vm", "vms", multiple=True, help="Placeholders: of these VMs only.")
@click.option(
    "--shows",
    type=click.Choice(["group", "vm"]),
    help="Placeholders: the group's one instant, or each VM's own quiesced one.",
)
@click.pass_context
def mount(
    ctx: click.Context,
    /,
    origins: tuple[str, ...],
    *,
    again: bool,
    name: str | None,
    target: str | None,
    writable: bool,
    overlay_limit: int | None,
    vmdk: str | None,
    tcp: bool,
    placeholder: bool,
    host: str | None,
    vms: tuple[str, ...],
    shows: str | None,
    **exposure: Any,
) -> None:
    """Present points in time as block devices (TimeViews).

    ORIGIN is timemark:ID[/VOLUME], backup:ID[/VOLUME], or a group's name for a fresh TimeMark of
    it, which goes with its last view. Without a VOLUME each one becomes a view. All or none.

    With --placeholder its VMs stand on a backup host, powered off, with these views as their disks:
    an island, which is unmounted by its name.
    """
    from offload.services import mount as service

    others = target or writable or overlay_limit or vmdk or tcp or any(exposure.values())
    if again and (name or placeholder or host or vms or shows or others):
        raise click.UsageError("--again serves a view as it was: no other option goes with it")
    if placeholder:
        if others:
            raise click.UsageError("--placeholder: the backup host says how views are served to it")
        if len(origins) != 1:
            raise click.UsageError("--placeholder takes one ORIGIN")
        _mount_island(ctx, origins[0], host=host, vms=vms, shows=shows, name=name)
        return
    for option, value in (("--host", host), ("--vm", vms), ("--shows", shows)):
        if value:
            raise click.UsageError(f"{option} goes with --placeholder")
    target = target or "nbd"
    asked = _exposure(target, tcp=tcp, **exposure)
    if overlay_limit is not None and not writable:
        raise click.UsageError("--overlay-limit needs --writable")
    settings = settings_of(ctx)
    options = service.MountOptions(
        name=name,
        target=target,
        writable=writable,
        overlay_limit_bytes=overlay_limit,
        vmdk=vmdk,
        exposure=asked,
    )
    with changing_context(settings) as context, progress(settings) as shown:
        if again:
            made = service.mount_again(context, origins)
        else:
            made = service.mount(context, origins, options, shown)
    rows = [[view.name, show_size(view.size_bytes), _origin(view), view.uri] for view in made]
    emit(
        settings,
        [view_fields(view) for view in made],
        lambda: table(["name", "size", "origin", "uri"], rows, ""),
    )


def _mount_island(
    ctx: click.Context,
    origin: str,
    *,
    host: str | None,
    vms: tuple[str, ...],
    shows: str | None,
    name: str | None,
) -> None:
    from offload.cli.placeholder import report_fields, show_island
    from offload.island import Shown
    from offload.services import island as service
    from offload.services.island_record import IslandOptions

    settings = settings_of(ctx)
    options = IslandOptions(host=host, vms=vms, shows=Shown(shows) if shows else None, name=name)
    with changing_context(settings) as context, progress(settings) as shown:
        made = service.mount(context, origin, options, shown)
    emit(settings, report_fields(made), lambda: show_island(made))


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
        "offload unmount shop-backup-esx1",
        "offload unmount --group shop",
        "offload unmount --all --force",
    ],
)
@click.argument("names", nargs=-1, metavar="VIEW...", shell_complete=complete.mounted)
@click.option("--all", "all_views", is_flag=True, help="Every view and island of this instance.")
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

    VIEW may be an island: its placeholders are taken down, then its views go. --json names views
    only; those of islands are among them.
    """
    from offload.services import island_away
    from offload.services import mount as service

    if keep and not names:
        raise click.UsageError("--keep goes with the names of views")
    if (bool(names), all_views, group is not None).count(True) != 1:
        raise click.UsageError("name the views to unmount, or say --group or --all")
    settings = settings_of(ctx)
    with changing_context(settings) as context:
        if keep:
            gone = island_away.Gone(views=tuple(service.keep(context, names, force=force)))
        else:
            gone = island_away.unmount_all(
                context, names, group=group, all_views=all_views, force=force
            )

    def human() -> None:
        for island in gone.islands:
            click.echo(f"taken down {island.name} on {island.host}")
        for view in gone.views:
            click.echo(f"kept {view.name}" if keep else f"unmounted {view.name}")
        if not gone.islands and not gone.views:
            click.echo("no views are mounted", err=True)

    emit(settings, [view_fields(view) for view in gone.views], human)


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
            _origin(entry.view),
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
            "island": entry.island or None,
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


def _origin(view: View) -> str:
    """With the disk, where it is one on a VMFS."""
    return f"{view.origin} {view.vmdk}" if view.vmdk else view.origin


def view_fields(view: View) -> dict[str, Any]:
    """A view as JSON: without the records that only the server's own code reads."""
    return {
        "id": view.id,
        "name": view.name,
        "uri": view.uri,
        "origin": view.origin,
        "vmdk": view.vmdk or None,
        "target": view.target,
        "writable": view.writable,
        "size_bytes": view.size_bytes,
        "sector_size": view.sector_size,
        "created_at": view.created_at,
        "state": view.state,
    }
