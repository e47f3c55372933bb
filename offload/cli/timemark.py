"""`offload timemark`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete
from offload.cli.app import Group, settings_of
from offload.cli.bars import progress
from offload.cli.output import emit, facts, show_time, table
from offload.cli.session import changing_context, confirm, reading_context
from offload.model import Consistency, HeldPart, QuiesceReport, TimeMark
from offload.quantity import show_size

if TYPE_CHECKING:
    from offload.services.context import Context


@click.group(cls=Group, examples=["offload timemark create shop", "offload timemark list"])
def timemark() -> None:
    """Points in time of a group: snapshots of all its volumes at one instant."""


@timemark.command(
    "create",
    examples=[
        "offload timemark create shop",
        "offload timemark create shop --consistency application --keep",
    ],
)
@click.argument("group", shell_complete=complete.groups)
@click.option(
    "--consistency",
    type=click.Choice([level.value for level in Consistency]),
    help="The least accepted, instead of the group's own.",
)
@click.option("--keep", is_flag=True, help="Never reclaim it when the pool runs full.")
@click.pass_context
def create(ctx: click.Context, group: str, consistency: str | None, keep: bool) -> None:
    """Take a TimeMark of a GROUP."""
    from offload.services import director as service

    settings = settings_of(ctx)
    options = service.CreateOptions(
        consistency=Consistency(consistency) if consistency else None, keep=keep
    )
    with changing_context(settings) as context, progress(settings) as shown:
        made = service.create(context, group, options, shown)
    emit(settings, made, lambda: _show(made))


@timemark.command("list", examples=["offload timemark list", "offload timemark list --group shop"])
@click.option("--group", shell_complete=complete.groups, help="Only those of this group.")
@click.pass_context
def list_(ctx: click.Context, group: str | None) -> None:
    """List the TimeMarks, the newest last."""
    settings = settings_of(ctx)
    with reading_context(settings) as context:
        if group is not None and not context.catalog.timemarks(group):
            context.instance.config.group(group)  # an unknown group is an error, not an empty list
        marks = context.catalog.timemarks(group)
    rows = [
        [
            mark.id,
            mark.group,
            show_time(mark.created_at),
            mark.consistency.value,
            mark.instant.value,
            f"{mark.freeze_ms:.0f} ms",
            mark.purpose + (", kept" if mark.keep else ""),
            ", ".join(snapshot.volume for snapshot in mark.snapshots),
        ]
        for mark in marks
    ]
    header = ["id", "group", "taken", "consistency", "instant", "freeze", "for", "volumes"]
    emit(settings, marks, lambda: table(header, rows, "no TimeMarks"))


@timemark.command("show", examples=["offload timemark show k3f9"])
@click.argument("id", shell_complete=complete.timemarks)
@click.pass_context
def show(ctx: click.Context, id: str) -> None:  # noqa: A002 - the argument's name in the help
    """Show a TimeMark: its snapshots, and what each quiescer did. ID may be a prefix."""
    settings = settings_of(ctx)
    with reading_context(settings) as context:
        mark = context.catalog.timemark(id)
    emit(settings, mark, lambda: _show(mark))


@timemark.command(
    "delete",
    examples=["offload timemark delete k3f9 --dry-run", "offload timemark delete k3f9 m2x0 --yes"],
)
@click.argument("ids", nargs=-1, required=True, metavar="ID...", shell_complete=complete.timemarks)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def delete(ctx: click.Context, ids: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Delete TimeMarks and their snapshots. One that a view or a backup reads is refused."""
    from offload.services import timemark as service

    settings = settings_of(ctx)
    opened = reading_context if dry_run else changing_context
    with opened(settings) as context:
        marks = _wanted(context, ids)
        if not dry_run:
            names = ", ".join(f"{mark.id} of {mark.group}" for mark in marks)
            confirm(settings, f"Delete {names}?", yes=yes)
            for mark in marks:
                service.delete(context, mark.id)
    data: dict[str, Any] = {"dry_run": dry_run, "deleted": [] if dry_run else marks}
    if dry_run:
        data["would_delete"] = marks
    said = "would delete" if dry_run else "deleted"

    def human() -> None:
        for mark in marks:
            click.echo(f"{said} {mark.id} of {mark.group}, {show_time(mark.created_at)}")

    emit(settings, data, human)


def _wanted(context: Context, ids: tuple[str, ...]) -> list[TimeMark]:
    """All of them, each once, and all deletable: nothing is deleted if one is not."""
    from offload.services import timemark as service

    marks = {mark.id: mark for mark in (context.catalog.timemark(prefix) for prefix in ids)}
    for mark in marks.values():
        service.check_deletable(context, mark)
    return list(marks.values())


def _show(mark: TimeMark) -> None:
    facts(
        [
            ("id", mark.id),
            ("group", mark.group),
            ("taken", show_time(mark.created_at)),
            ("consistency", mark.consistency.value),
            ("instant", mark.instant.value),
            ("freeze", f"{mark.freeze_ms:.0f} ms"),
            *([("skew", f"{mark.skew_ms:.0f} ms")] if mark.reports else []),
            ("for", mark.purpose + (", kept" if mark.keep else "")),
            *(("warning", warning) for warning in mark.warnings),
        ]
    )
    click.echo()
    rows = [
        [s.volume, s.provider, show_size(s.size_bytes), str(s.sector_size)] for s in mark.snapshots
    ]
    table(["volume", "provider", "size", "sector"], rows, "no snapshots")
    if mark.reports:
        click.echo()
        header = ["held", "by", "consistency", "for", "frozen in", "what"]
        table(header, [row for report in mark.reports for row in _held_rows(report)], "")
        for report in mark.reports:
            _details(report)


def _held_rows(report: QuiesceReport) -> list[list[str]]:
    """A row for the VM or the entry, and one for each of its parts where it has several."""
    first = [
        report.name + ("" if report.frozen else " NOT HELD"),
        report.kind,
        report.consistency.value,
        f"{report.held_ms:.0f} ms",
        f"{report.freeze_ms:.0f} ms",
        "image of " + show_time(report.image_at) if report.image_at else "",
    ]
    if not report.vm and len(report.parts) < 2:
        first[-1] = ", ".join(what for part in report.parts for what in part.what)
        return [first]
    return [first, *(_part_row(part) for part in report.parts)]


def _part_row(part: HeldPart) -> list[str]:
    outcome = "held" if part.unbroken else "BROKE"
    return [
        f"  {part.name}",
        part.kind,
        outcome if part.ok else "FAILED",
        f"{part.held_ms:.0f} ms" if part.held_ms else "",
        f"{part.freeze_ms:.0f} ms",
        ", ".join(part.what),
    ]


def _details(report: QuiesceReport) -> None:
    """What was said, each line under the name of who said it."""
    said = [(part.name, part.detail) for part in report.parts if part.detail]
    for name, text in said or [(report.name, report.detail)]:
        if text:
            click.echo()
            click.echo(f"{name}:")
            for line in text.splitlines():
                click.echo(f"  {line}")
