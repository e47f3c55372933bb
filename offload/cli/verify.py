"""`offload verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, show_time
from offload.cli.quantities import share, size, span
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
        "offload verify --all --quick",
        "offload verify --all --older-than 30d --budget 50GiB",
    ],
)
@click.argument("backups", nargs=-1, metavar="BACKUP...", shell_complete=complete.backups)
@click.option("--all", "all_backups", is_flag=True, help="Every backup, and every stored byte.")
@click.option(
    "--sample", callback=share, metavar="SHARE", help="Read this share of each backup only, as 5%."
)
@click.option(
    "--quick", is_flag=True, help="That all is there: manifests, trees, ends of packs; no data."
)
@click.option(
    "--older-than",
    callback=span,
    metavar="TIME",
    help="With --all: of the packs only those not read in full for so long, as 30d.",
)
@click.option(
    "--budget",
    callback=size,
    metavar="SIZE",
    help="With --all: read so much and no more, what has gone longest unread first.",
)
@click.option("--store", shell_complete=complete.stores, help="With --all: only this store.")
@click.pass_context
def verify(
    ctx: click.Context,
    backups: tuple[str, ...],
    *,
    all_backups: bool,
    sample: float | None,
    quick: bool,
    older_than: float | None,
    budget: int | None,
    store: str | None,
) -> None:
    """Read backups from their store and check every byte of them.

    Each problem is shown with the backup, the volume and the range of bytes that it hits. The exit
    code is 7 if there is one. Packs that are found bad are noted in the store: the next backup
    stores anew what it can, and `offload repair` looks for the rest elsewhere.
    """
    from offload.services import verify as service

    if bool(backups) == all_backups:
        raise click.UsageError("name the backups to verify, or say --all")
    if store is not None and not all_backups:
        raise click.UsageError("--store needs --all: a backup is in one store anyway")
    parts = older_than is not None or budget is not None
    if parts and not all_backups:
        raise click.UsageError("--older-than and --budget need --all: they choose packs of stores")
    if quick + parts + (sample is not None) > 1:
        raise click.UsageError("--quick, --sample, and --older-than with --budget: one of them")
    options = service.VerifyOptions(
        quick=quick, sample=sample, older_than_s=older_than, budget_bytes=budget
    )
    settings = settings_of(ctx)
    with reading_context(settings) as context, progress(settings) as shown:
        report = service.verify(
            context, backups, all_backups=all_backups, options=options, store=store, progress=shown
        )
    emit(settings, report, lambda: _show(report))
    if report.problems:
        count = len(report.problems)
        raise IntegrityError(
            f"{count} problem{'s' if count > 1 else ''} found",
            code="backup-damaged",
            hint="see what can be mended, and from where: offload repair STORE --dry-run",
        )


def _show(report: VerifyReport) -> None:
    for problem in report.problems:
        click.echo(f"PROBLEM: {_where(problem)}: {problem.what}")
    for pack in report.quarantined:
        click.echo(f"noted as bad: {pack}")
    for pack in report.lifted:
        click.echo(f"reads well again: {pack}")
    part = "" if report.level == "full" else f" ({report.level})"
    if report.packs:
        since = "" if report.oldest is None else f", all since {show_time(report.oldest)}"
        click.echo(f"{report.packs_read} of {count_of(report.packs, 'pack')} read in full{since}")
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
