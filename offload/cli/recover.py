"""`offload recover`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offload.cli.app import Command, settings_of
from offload.cli.connect import connection_fields
from offload.cli.mount import view_fields
from offload.cli.output import emit
from offload.cli.session import confirm, only_context
from offload.quantity import show_size

if TYPE_CHECKING:
    from offload.journal import Leftover
    from offload.services.recover import RecoverReport


@click.command(
    cls=Command,
    examples=["offload recover --dry-run", "offload recover", "offload recover --orphans --yes"],
)
@click.option(
    "--orphans",
    is_flag=True,
    help="Also delete snapshots and overlays of this instance that the catalog does not know.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--yes", is_flag=True, help="With --orphans: do not ask.")
@click.pass_context
def recover(ctx: click.Context, orphans: bool, dry_run: bool, yes: bool) -> None:
    """Take back what a dead process left, and serve again the views whose server is gone.

    Each command that changes something takes leftovers back first; this one also remounts (after a
    reboot), removes VM snapshots of ours that nobody needs, and names orphans. Orphans are never
    deleted unasked: where the catalog is lost they are the last TimeMarks there are.
    """
    from offload.services import recover as service

    settings = settings_of(ctx)
    with only_context(settings) as context:
        if orphans and not dry_run and service.find_orphans(context):
            confirm(settings, "Delete what --dry-run shows as orphans?", yes=yes)
        report = service.recover(context, orphans=orphans, dry_run=dry_run)
    emit(settings, _data(report, dry_run), lambda: _show(report, dry_run))


def _data(report: RecoverReport, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "undone": [_leftover(entry) for entry in report.undone],
        "taken_down": [entry.name for entry in report.taken_down],
        "remounted": [view_fields(view) for view in report.remounted],
        "reconnected": [connection_fields(entry) for entry in report.reconnected],
        "warnings": report.warnings,
        "vm_snapshots": report.vm_snapshots,
        "orphans": report.orphans,
        "orphans_deleted": report.orphans_deleted,
        "unfinished_restores": [
            {
                "origin": entry.head.origin,
                "to": entry.head.to,
                "done_bytes": entry.done_bytes,
                "size_bytes": entry.head.size_bytes,
            }
            for entry in report.unfinished
        ],
    }


def _leftover(entry: Leftover) -> dict[str, Any]:
    return {
        "id": entry.id,
        "kind": entry.kind,
        "subject": entry.subject,
        "began_at": entry.began_at,
        "steps": [intent.step for intent in entry.intents],
    }


def _show(report: RecoverReport, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    for entry in report.undone:
        click.echo(f"{would}taken back: {entry.kind} {entry.subject} of {entry.began_at}")
    for view in report.remounted:
        click.echo(f"{would}remounted: {view.name} at {view.uri}")
    for island in report.taken_down:
        click.echo(f"{would}taken down: {island.name} on {island.host}")
    for connection in report.reconnected:
        click.echo(f"{would}connected again: {connection.name} at {connection.device}")
    for snapshot in report.vm_snapshots:
        click.echo(f"{would}removed: VM snapshot {snapshot.name} of {snapshot.vm}")
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    for orphan in report.orphans:
        where = " ".join(f"{key}={value}" for key, value in orphan.ref.items())
        fate = "deleted" if report.orphans_deleted else "left alone (--orphans deletes it)"
        what = " ".join(word for word in ("orphan", orphan.provider, orphan.kind) if word)
        click.echo(f"{what} {where}: {fate}")
    for restore in report.unfinished:
        click.echo(
            f"unfinished: restore {restore.head.origin} to {restore.head.to}, "
            f"{show_size(restore.done_bytes)} of {show_size(restore.head.size_bytes)} (again to go "
            f"on; to give it up: offload restore --abandon --to {restore.head.to})"
        )
    if not any(
        (
            report.undone,
            report.taken_down,
            report.remounted,
            report.reconnected,
            report.vm_snapshots,
            report.warnings,
            report.orphans,
            report.unfinished,
        )
    ):
        click.echo("nothing to recover")
