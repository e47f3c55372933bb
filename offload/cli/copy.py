"""`offload copy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, note, table
from offload.cli.session import changing_context
from offload.errors import IntegrityError
from offload.quantity import count_of, show_size

if TYPE_CHECKING:
    from offload.services.copy import CopyReport

_HOW = {
    "same-key": "copied",
    "new-key": "copied under new ids",
    "new-cut": "copied and cut anew",
    "already-there": "there already",
    "failed": "FAILED",
    "gone": "deleted meanwhile",
}


@click.command(
    cls=Command,
    examples=[
        "offload copy b7k2 --from main --to away",
        "offload copy --group shop --last 3 --from main --to away",
        "offload copy --all --from main --to away --verify",
    ],
)
@click.argument("backups", nargs=-1, metavar="BACKUP...", shell_complete=complete.backups)
@click.option("--all", "everything", is_flag=True, help="Every backup of the store.")
@click.option("--group", shell_complete=complete.groups, help="Those of this group.")
@click.option(
    "--last", type=click.IntRange(min=1), metavar="N", help="With --all or --group: the newest N."
)
@click.option(
    "--from", "source", required=True, shell_complete=complete.stores, help="The store they are in."
)
@click.option(
    "--to", "target", required=True, shell_complete=complete.stores, help="The store to copy to."
)
@click.option("--verify", is_flag=True, help="Look afterwards that all of each copy is there.")
@click.pass_context
def copy(
    ctx: click.Context,
    backups: tuple[str, ...],
    *,
    everything: bool,
    group: str | None,
    last: int | None,
    source: str,
    target: str,
    verify: bool,
) -> None:
    """Copy backups from one store to another, the oldest first.

    A copy is a backup of its own there, with its own id. What the other store has already is not
    sent again, also after a copy that was killed. Run it again at any time: it says what is there.
    """
    from offload.services import copy as service
    from offload.services import verify as verifying
    from offload.services.copy_plan import CopyRequest

    if bool(backups) == (everything or group is not None):
        raise click.UsageError("name the backups to copy, or say --all or --group")
    if last is not None and backups:
        raise click.UsageError("--last needs --all or --group")
    settings = settings_of(ctx)
    request = CopyRequest(source=source, target=target, ids=backups, group=group, last=last)
    checked = None
    with changing_context(settings) as context, progress(settings) as shown:
        report = service.copy(context, request, shown)
        made = [entry.copy for entry in report.copies if entry.copy]
        if verify and made:
            options = verifying.VerifyOptions(quick=True)
            checked = verifying.verify(context, made, options=options, progress=shown)
    emit(settings, report, lambda: _show(report))
    if checked is not None:
        problems = count_of(len(checked.problems), "problem")
        note(settings, f"looked at {count_of(checked.backups, 'backup')}: {problems}")
    failed = [entry for entry in report.copies if entry.how == "failed"]
    if failed or (checked is not None and checked.problems):
        what = f"{count_of(len(failed), 'backup')} could not be copied"
        if not failed and checked is not None:
            what = f"the copies have {count_of(len(checked.problems), 'problem')}"
        raise IntegrityError(
            what,
            code="copy-incomplete",
            hint=f"see: offload verify --all --store {source if failed else target}",
        )


def _show(report: CopyReport) -> None:
    rows = [
        [
            entry.backup,
            entry.group,
            entry.copy or "-",
            _HOW[entry.how],
            show_size(entry.read_bytes),
            show_size(entry.stored_bytes),
            entry.error,
        ]
        for entry in report.copies
    ]
    header = ["backup", "group", "copy", "", "read", "stored", ""]
    table(header, rows, "no backups to copy")
