"""`offload status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload.cli.app import Command, settings_of
from offload.cli.output import emit, show_age, show_time, table
from offload.cli.session import reading_context
from offload.quantity import show_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from offload.services.status import PoolStatus, StatusReport, ViewStatus


@click.command(cls=Command, examples=["offload status", "offload status --json"])
@click.pass_context
def status(ctx: click.Context) -> None:
    """Show pools, TimeMarks, views, last backups, leftovers and alarms.

    Changes nothing. The exit code is 0 whatever it shows: `alarms` in the JSON is for monitoring.
    """
    from offload.services.status import collect

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        report = collect(context)
    emit(settings, report, lambda: _show(report))


def _show(report: StatusReport) -> None:
    _pools(report)
    _groups(report)
    _backups(report)
    _views(report)
    _islands(report)
    if report.running:
        click.echo(f"\n{report.running} operations are running")
    if report.leftovers:
        click.echo("\nLeftovers of dead processes")
        rows = [[e.kind, e.subject, e.began_at, ", ".join(e.steps)] for e in report.leftovers]
        table(["operation", "subject", "began", "steps"], rows, "")
    click.echo("\nAlarms" if report.alarms else "\nNo alarms")
    for alarm in report.alarms:
        click.echo(f"  {alarm}")


def _pools(report: StatusReport) -> None:
    rows = [
        [
            pool.name,
            show_size(pool.free_bytes),
            show_size(pool.size_bytes),
            show_size(pool.watermark_bytes),
            _metadata(pool),
            "low" if pool.low else "ok",
            ", ".join(pool.volumes),
        ]
        for pool in report.pools
    ]
    _section("Pools", ["pool", "free", "size", "watermark", "metadata", "state", "volumes"], rows)


def _metadata(pool: PoolStatus) -> str:
    """`7.2 MiB of 8.0 MiB` free, or a dash."""
    if not pool.metadata_size_bytes:
        return "-"
    return f"{show_size(pool.metadata_free_bytes)} of {show_size(pool.metadata_size_bytes)}"


def _groups(report: StatusReport) -> None:
    rows = [
        [group.name, str(group.timemarks), _when(group.oldest_at), _when(group.newest_at)]
        for group in report.groups
    ]
    _section("\nGroups", ["group", "timemarks", "oldest", "newest"], rows)


def _backups(report: StatusReport) -> None:
    rows = [
        [
            row.group,
            row.store,
            str(row.backups),
            row.last_id or "-",
            _when(row.last_at),
            "-" if row.age_s is None else show_age(row.age_s),
            _when(row.verified_at) + (f" ({row.verified_how})" if row.verified_how else ""),
        ]
        for row in report.backups
    ]
    header = ["group", "store", "backups", "last", "of", "age", "verified"]
    _section("\nBackups", header, rows)


def _views(report: StatusReport) -> None:
    rows = [[view.name, view.id, _state(view), view.origin, view.uri] for view in report.views]
    _section("\nViews", ["name", "id", "state", "origin", "uri"], rows)


def _islands(report: StatusReport) -> None:
    if not report.islands:
        return
    rows = [
        [entry.name, entry.host, str(entry.placeholders), entry.state, entry.origin]
        for entry in report.islands
    ]
    _section("\nIslands", ["name", "host", "placeholders", "state", "origin"], rows)


def _state(view: ViewStatus) -> str:
    if view.kept:
        return "kept"
    return "served" if view.alive else "dead"


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    click.echo(title)
    if rows:
        table(header, rows, "")
    else:
        click.echo("  none")


def _when(at: datetime | None) -> str:
    return "-" if at is None else show_time(at)
