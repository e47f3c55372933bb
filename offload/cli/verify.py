"""`offload verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit
from offload.cli.quantities import share
from offload.cli.session import reading_context
from offload.errors import IntegrityError
from offload.quantity import count_of, show_size

if TYPE_CHECKING:
    from offload.services.verify import Problem, VerifyReport


@click.command(
    cls=Command,
    examples=[
        "offload verify b7k2",
        "offload verify --all --store main",
        "offload verify --all --sample 5%",
    ],
)
@click.argument("backups", nargs=-1, metavar="BACKUP...", shell_complete=complete.backups)
@click.option("--all", "all_backups", is_flag=True, help="Every backup, and every stored byte.")
@click.option(
    "--sample", callback=share, metavar="SHARE", help="Read this share of each backup only, as 5%."
)
@click.option("--store", shell_complete=complete.stores, help="With --all: only this store.")
@click.pass_context
def verify(
    ctx: click.Context,
    backups: tuple[str, ...],
    *,
    all_backups: bool,
    sample: float | None,
    store: str | None,
) -> None:
    """Read backups from their store and check every byte of them.

    Each problem is shown with the backup, the volume and the range of bytes that it hits. The exit
    code is 7 if there is one.
    """
    from offload.services import verify as service

    if bool(backups) == all_backups:
        raise click.UsageError("name the backups to verify, or say --all")
    if store is not None and not all_backups:
        raise click.UsageError("--store needs --all: a backup is in one store anyway")
    settings = settings_of(ctx)
    with reading_context(settings) as context, progress(settings) as shown:
        report = service.verify(
            context, backups, all_backups=all_backups, sample=sample, store=store, progress=shown
        )
    emit(settings, report, lambda: _show(report))
    if report.problems:
        count = len(report.problems)
        raise IntegrityError(
            f"{count} problem{'s' if count > 1 else ''} found",
            code="backup-damaged",
            hint="restore those ranges from another backup; later backups of the same data "
            "refer to the same chunks, so back up to a fresh store until this one is mended",
        )


def _show(report: VerifyReport) -> None:
    for problem in report.problems:
        click.echo(f"PROBLEM: {_where(problem)}: {problem.what}")
    part = "" if report.sampled is None else f" (a sample of {report.sampled:.0%})"
    click.echo(
        f"{count_of(report.backups, 'backup')}, {count_of(report.chunks, 'chunk')}, "
        f"{show_size(report.checked_bytes)} read and checked{part}: "
        + count_of(len(report.problems), "problem")
    )


def _where(problem: Problem) -> str:
    places = [f"store {problem.store}"]
    if problem.backup:
        places.append(f"backup {problem.backup}")
    if problem.volume:
        places.append(f"volume {problem.volume}")
    if problem.length:
        places.append(f"bytes {problem.offset} to {problem.offset + problem.length - 1}")
    return ", ".join(places)
