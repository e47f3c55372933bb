"""`offload restore`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, table
from offload.cli.session import changing_context
from offload.quantity import show_seconds, show_size

if TYPE_CHECKING:
    from offload.services.restore import RestoreReport


@click.command(
    cls=Command,
    examples=[
        "offload restore b7k2/shop-db --to /srv/restore/shop-db.raw",
        "offload restore b7k2 --to /srv/restore/",
        "offload restore b7k2/shop-db --to /dev/vg0/shop-db",
        "offload restore b7k2/shop-db --to nbd://10.0.0.5:10809",
    ],
)
@click.argument("what", metavar="BACKUP", shell_complete=complete.backups)
@click.option(
    "--to",
    required=True,
    metavar="PATH|BLOCKDEV|NBD-URI",
    help="A new file, a folder, a block device that nobody uses, or an NBD server.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.pass_context
def restore(ctx: click.Context, what: str, to: str, overwrite: bool) -> None:
    """Write the image of a BACKUP somewhere.

    BACKUP is ID[/VOLUME] or timemark:ID[/VOLUME]; the volume may be left out where there is one
    only, or where --to is a folder. A file appears under its name when it is whole; a device holds
    neither the old nor the new content until the end. A device that is mounted or too small is
    refused.
    """
    from offload.services import restore as service

    settings = settings_of(ctx)
    with changing_context(settings) as context, progress(settings) as shown:
        report = service.restore(context, what, to, overwrite=overwrite, progress=shown)
    emit(settings, report, lambda: _show(report))


def _show(report: RestoreReport) -> None:
    rate = report.written_bytes / report.seconds if report.seconds else 0.0
    rows = [
        [entry.volume, show_size(entry.size_bytes), show_size(entry.written_bytes), entry.to]
        for entry in report.volumes
    ]
    table(["volume", "size", "written", "to"], rows, "")
    click.echo(
        f"restored {report.origin}: {show_size(report.written_bytes)} in "
        f"{show_seconds(report.seconds)}, {show_size(rate)}/s"
    )
