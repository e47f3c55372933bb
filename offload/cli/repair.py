"""`offload repair`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, note
from offload.cli.session import changing_context
from offload.errors import IntegrityError
from offload.quantity import count_of, show_size

if TYPE_CHECKING:
    from offload.services.repair import RepairReport


@click.command(cls=Command, examples=["offload repair main --dry-run", "offload repair main"])
@click.argument("store", shell_complete=complete.stores)
@click.option("--dry-run", is_flag=True, help="Look for what is lost, and write nothing.")
@click.pass_context
def repair(ctx: click.Context, store: str, *, dry_run: bool) -> None:
    """Look for what STORE has lost, and store it anew.

    It is looked for in the store itself, in all other configured stores, and in the TimeMarks on
    production storage; only what hashes to the very chunk that was lost counts. Nothing is deleted.
    What is damaged is known from `offload verify`: run that first. The exit code is 7 if something
    stays lost.
    """
    from offload.services import repair as service

    settings = settings_of(ctx)
    with changing_context(settings) as context, progress(settings) as shown:
        report = service.repair(context, store, dry_run=dry_run, progress=shown)
    emit(settings, report, lambda: _show(report))
    for why in report.unasked:
        note(settings, f"not asked: {why}")
    lost = len(report.lost) + len(report.unreadable)
    if lost:
        raise IntegrityError(
            f"{count_of(lost, 'range')} of backups in {store} "
            + ("would stay lost" if dry_run else "stay lost"),
            code="backup-lost",
            hint="a backup of the group stores anew what the volumes still hold: offload backup; "
            "restore those ranges from another backup",
        )


def _show(report: RepairReport) -> None:
    for name, count in sorted(report.found_in.items()):
        click.echo(f"{count_of(count, 'chunk')} found in {name}")
    for lost in report.lost:
        click.echo(
            f"LOST: backup {lost.backup}, volume {lost.volume}, "
            f"bytes {lost.offset} to {lost.offset + lost.length - 1}"
        )
    for backup in report.unreadable:
        click.echo(f"LOST: backup {backup}")
    what = "can be mended" if report.dry_run else "mended"
    click.echo(
        f"{count_of(report.mended_chunks, 'chunk')}, {show_size(report.mended_bytes)} {what}"
    )
