"""`offload prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete
from offload.cli.app import Command, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, show_time, table
from offload.cli.quantities import span, tags_of
from offload.cli.session import changing_context, confirm, reading_context
from offload.errors import UsageError
from offload.quantity import count_of, show_size

if TYPE_CHECKING:
    from offload.config import Config
    from offload.retention import KeepRules
    from offload.services.prune import PruneReport

_COUNT = click.IntRange(min=0)


@click.command(
    cls=Command,
    examples=[
        "offload prune --dry-run",
        "offload prune --store main --yes",
        "offload prune --keep-last 3 --keep-daily 14 --keep-within 7d --dry-run",
    ],
)
@click.option("--store", shell_complete=complete.stores, help="Which one; default: the only one.")
@click.option("--keep-last", "last", type=_COUNT, help="The newest N.")
@click.option("--keep-hourly", "hourly", type=_COUNT, help="The newest of each of N hours.")
@click.option("--keep-daily", "daily", type=_COUNT, help="The newest of each of N days.")
@click.option("--keep-weekly", "weekly", type=_COUNT, help="The newest of each of N weeks.")
@click.option("--keep-monthly", "monthly", type=_COUNT, help="The newest of each of N months.")
@click.option("--keep-yearly", "yearly", type=_COUNT, help="The newest of each of N years.")
@click.option(
    "--keep-within", "within_s", callback=span, metavar="SPAN", help="All that are younger, as 14d."
)
@click.option(
    "--keep-tag",
    "tags",
    multiple=True,
    metavar="TAG",
    callback=tags_of,
    help="All that have this tag; can be given several times.",
)
@click.option(
    "--keep-min-age",
    "min_age_s",
    callback=span,
    metavar="SPAN",
    help="A floor under the counts: nothing younger goes by them; none with options unless given.",
)
@click.option("--dry-run", is_flag=True, help="Only say what is kept and why, and what goes.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def prune(
    ctx: click.Context,
    /,
    *,
    store: str | None,
    dry_run: bool,
    yes: bool,
    tags: tuple[str, ...],
    **keep: float | None,
) -> None:
    """Delete the backups that no rule keeps, and free what no backup needs.

    The rules are the store's own (stores.NAME.keep); any --keep option replaces all of them. A
    backup is kept if one rule keeps it; the newest of each group always is, one with a legal hold,
    and one dated in the future, which counts for no rule. It runs beside
    backups and mounted views; what it must wait for it says, and the next prune goes on with that.
    """
    from offload.services import prune as service

    settings = settings_of(ctx)
    rules = _rules(keep, tags)
    with reading_context(settings) as context:
        name = _store(context.instance.config, store)
        if dry_run or not yes:
            plan = service.prune(context, name, rules=rules, dry_run=True)
    if dry_run:
        emit(settings, _data(plan), lambda: _show(plan))
        return
    if not yes:
        if not settings.json:
            _show(plan)
        gone = sum(not verdict.kept for verdict in plan.verdicts)
        question = f"Delete {count_of(gone, 'backup')} of store {name} and free the space?"
        confirm(settings, question, yes=yes)
    with changing_context(settings) as context, progress(settings) as shown:
        report = service.prune(context, name, rules=rules, progress=shown)
    emit(settings, _data(report), lambda: _show(report))


def _rules(keep: dict[str, float | None], tags: tuple[str, ...]) -> KeepRules | None:
    """None where no option is given: the store's own rules."""
    from offload.retention import KeepRules

    given: dict[str, Any] = {name: value for name, value in keep.items() if value is not None}
    if tags:
        given["tags"] = tags
    return KeepRules(**given) if given else None


def _store(config: Config, name: str | None) -> str:
    if name is None and len(config.stores) == 1:
        return next(iter(config.stores))
    if name is None:
        known = ", ".join(sorted(config.stores)) or "none"
        raise UsageError(
            "no store chosen", code="no-store", hint=f"give --store; configured: {known}"
        )
    config.store(name)
    return name


def _data(report: PruneReport) -> dict[str, Any]:
    return {
        "store": report.store,
        "dry_run": report.dry_run,
        "backups": [
            {
                "id": verdict.backup.id,
                "group": verdict.backup.group,
                "created_at": verdict.backup.created_at,
                "kept": verdict.kept,
                "reasons": verdict.reasons,
                "missed": verdict.missed,
            }
            for verdict in report.verdicts
        ],
        "packs_deleted": report.packs_deleted,
        "packs_rewritten": report.packs_rewritten,
        "freed_bytes": report.freed_bytes,
        "live_bytes": report.live_bytes,
        "folded": report.folded,
        "folded_bytes": report.folded_bytes,
        "waiting": [
            {
                "prune": waiting.prune,
                "packs": waiting.packs,
                "frees_bytes": waiting.frees_bytes,
                "holders": waiting.holders,
                "until": waiting.until,
            }
            for waiting in report.waiting
        ],
    }


def _show(report: PruneReport) -> None:
    goes = "would go" if report.dry_run else "deleted"
    rows = [
        [
            verdict.backup.id,
            verdict.backup.group,
            show_time(verdict.backup.created_at),
            "kept" if verdict.kept else goes,
            ", ".join(verdict.reasons or verdict.missed),
        ]
        for verdict in report.verdicts
    ]
    table(["id", "group", "of", "", "why"], rows, f"no backups in store {report.store}")
    would = "would free" if report.dry_run else "freed"
    click.echo(
        f"{would} {show_size(report.freed_bytes)}: "
        f"{count_of(report.packs_deleted, 'pack')} deleted, "
        f"{report.packs_rewritten} rewritten; {show_size(report.live_bytes)} stay in use"
    )
    if report.folded:
        written = show_size(report.folded_bytes)
        click.echo(f"folded {count_of(report.folded, 'delta')}, {written} written for that")
    for waiting in report.waiting:
        what = f"{count_of(waiting.packs, 'pack')}, {show_size(waiting.frees_bytes)}"
        whom = [f"until {show_time(waiting.until)}"] if waiting.until else []
        reason = "; ".join([*whom, *(f"for {holder}" for holder in waiting.holders)])
        click.echo(f"waits for a later prune: {what}: {reason}")
