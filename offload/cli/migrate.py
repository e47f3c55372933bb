"""`offload migrate`."""

from __future__ import annotations

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.mount import view_fields
from offload.cli.output import emit
from offload.cli.session import changing_context
from offload.quantity import show_seconds, show_size


@click.command(
    cls=Command,
    examples=[
        "offload migrate shop-db-b7k2 --to /srv/vms/shop-db.raw",
        "offload migrate shop-db-b7k2 --to /dev/vg0/shop-db",
        "offload migrate shop-db-b7k2 --to nbd://storage.example:10809/shop-db",
    ],
)
@click.argument("view", shell_complete=complete.views)
@click.option(
    "--to",
    "place",
    required=True,
    metavar="PATH|BLOCKDEV|NBD-URI",
    help="A new file, a block device that nobody uses, or an NBD export.",
)
@click.pass_context
def migrate(ctx: click.Context, view: str, place: str) -> None:
    """Copy a writable VIEW home and serve it from there, while its clients read and write.

    Its address stays, and so do its clients; at the end they wait for a moment. From then on the
    view needs neither its overlay nor the backup or TimeMark that it came from. A device or an
    export is overwritten. Whatever goes wrong before the switch, the view goes on as before.
    """
    from offload.services import migrate as service

    settings = settings_of(ctx)
    with changing_context(settings) as context, progress(settings) as shown:
        report = service.migrate(context, view, place, shown)

    def human() -> None:
        click.echo(
            f"{report.view.name} is at {report.place}: {show_size(report.view.size_bytes)} in "
            f"{show_seconds(report.seconds)}; clients waited {show_seconds(report.held_s)}"
        )

    data = {
        **view_fields(report.view),
        "place": report.place,
        "seconds": report.seconds,
        "held_s": report.held_s,
    }
    emit(settings, data, human)
