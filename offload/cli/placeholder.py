"""`offload placeholder`, and what `offload mount --placeholder` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete
from offload.cli.app import Group, settings_of
from offload.cli.bars import progress
from offload.cli.mount import view_fields
from offload.cli.output import emit, facts, show_time, table
from offload.cli.session import changing_context, reading_context
from offload.errors import PolicyError

if TYPE_CHECKING:
    from offload.hypervisor import Standing
    from offload.island import Island, Placeholder
    from offload.services.island import IslandReport
    from offload.services.placeholders import CheckReport, IslandStatus


@click.group(
    cls=Group, examples=["offload placeholder list", "offload placeholder refresh shop-esx1"]
)
def placeholder() -> None:
    """VMs that stand powered off on a backup host, and show points in time of production.

    `offload mount --placeholder` makes them, an island at a time; `offload unmount ISLAND` takes
    them away.
    """


@placeholder.command(
    "list", examples=["offload placeholder list", "offload placeholder list --json"]
)
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List the islands and their placeholders, the newest last, as they stand now."""
    from offload.services import placeholders as service

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = service.look(context)
    rows = [row for status in found for row in _rows(status)]
    header = ["island", "host", "placeholder", "vm", "shows", "of", "consistency", "state"]

    def human() -> None:
        table(header, rows, "no placeholders stand")
        for status in found:
            if status.problem:
                click.echo(f"warning: island {status.island.name}: {status.problem}", err=True)

    emit(settings, [_status_fields(status) for status in found], human)


@placeholder.command(
    "check", examples=["offload placeholder check", "offload placeholder check shop-esx1 --json"]
)
@click.argument("islands", nargs=-1, metavar="[ISLAND...]", shell_complete=complete.islands)
@click.pass_context
def check(ctx: click.Context, islands: tuple[str, ...]) -> None:
    """Compare placeholders with production: disks added, resized, removed or moved, VMs gone.

    Each difference comes with what to do. The exit code is 9 if there is one.
    """
    from offload.services import placeholders as service

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        report = service.check(context, islands)
    emit(settings, report, lambda: _show_check(report))
    if report.findings:
        number = len(report.findings)
        raise PolicyError(
            f"{number} " + ("difference was" if number == 1 else "differences were") + " found",
            code="placeholder-drift",
            hint="each says what to do",
        )


@placeholder.command("refresh", examples=["offload placeholder refresh shop-esx1"])
@click.argument(
    "islands", nargs=-1, required=True, metavar="ISLAND...", shell_complete=complete.islands
)
@click.option("--force", is_flag=True, help="Even where their disks are being read.")
@click.pass_context
def refresh(ctx: click.Context, islands: tuple[str, ...], force: bool) -> None:
    """Let islands show a new TimeMark of their groups, under the same names.

    The TimeMark is taken first; then the old placeholders go, and the new ones come.
    """
    from offload.services import placeholders as service

    settings = settings_of(ctx)
    with changing_context(settings) as context, progress(settings) as shown:
        done = list(service.refresh(context, islands, shown, force=force))

    def human() -> None:
        for report in done:
            show_island(report)

    emit(settings, [report_fields(report) for report in done], human)


def show_island(report: IslandReport) -> None:
    """What stands now, for a person, and what to do with it."""
    island = report.island
    facts(
        [
            ("island", island.name),
            ("host", island.host),
            ("of", f"{island.origin} of group {island.group}"),
        ]
    )
    click.echo()
    rows = [
        [
            entry.name,
            entry.vm,
            shows(entry),
            show_time(entry.at),
            entry.consistency,
            str(len(entry.disks)),
        ]
        for entry in island.placeholders
    ]
    table(["placeholder", "vm", "shows", "of", "consistency", "disks"], rows, "no placeholders")
    notes = [(entry.name, note) for entry in island.placeholders for note in entry.notes]
    if notes:
        click.echo()
        for name, note in notes:
            click.echo(f"{name}: {note}")
    click.echo()
    click.echo(f"Back them up on {island.host}, powered off as they are. Then:")
    click.echo(f"  offload placeholder refresh {island.name}  # for the next point in time")
    click.echo(f"  offload unmount {island.name}  # to take them away")


def shows(entry: Placeholder) -> str:
    """Which of the two points in time."""
    return "the VM's own instant" if entry.shown == "vm" else "the group's instant"


def report_fields(report: IslandReport) -> dict[str, Any]:
    """An island that was made, as JSON."""
    return {
        **island_fields(report.island),
        "views": [view_fields(view) for view in report.views],
        "warnings": report.warnings,
    }


def island_fields(island: Island) -> dict[str, Any]:
    """An island as JSON: without the records that only its driver reads."""
    return {
        "id": island.id,
        "name": island.name,
        "host": island.host,
        "group": island.group,
        "origin": island.origin,
        "created_at": island.created_at,
        "state": island.state,
        "placeholders": [_placeholder_fields(entry) for entry in island.placeholders],
    }


def _placeholder_fields(entry: Placeholder) -> dict[str, Any]:
    return {
        "id": entry.id,
        "name": entry.name,
        "vm": entry.vm,
        "hypervisor": entry.hypervisor,
        "production": entry.production,
        "at": entry.at,
        "shown": entry.shown,
        "consistency": entry.consistency,
        "disks": entry.disks,
        "notes": entry.notes,
    }


def _status_fields(status: IslandStatus) -> dict[str, Any]:
    fields = island_fields(status.island)
    for made, entry in zip(fields["placeholders"], status.island.placeholders, strict=True):
        made["standing"] = status.of(entry)
    return {
        **fields,
        "view_ids": status.island.views,
        "views_not_served": status.dead,
        "problem": status.problem,
    }


def _rows(status: IslandStatus) -> list[list[str]]:
    island = status.island
    if not island.placeholders:
        return [[island.name, island.host, "-", "-", "-", "-", "-", island.state.value]]
    return [
        [
            island.name,
            island.host,
            entry.name,
            entry.vm,
            shows(entry),
            show_time(entry.at),
            entry.consistency,
            _state(status, status.of(entry)),
        ]
        for entry in island.placeholders
    ]


def _state(status: IslandStatus, standing: Standing | None) -> str:
    if status.island.state.value != "standing":
        return status.island.state.value
    if standing is None:
        return "not known"
    if not standing.there:
        return "GONE"
    if standing.problem:
        return standing.problem
    if status.dead:
        return "its disks are not served"
    return standing.power or "off"


def _show_check(report: CheckReport) -> None:
    rows = [
        [entry.island, entry.placeholder or entry.vm or "-", entry.what, entry.do]
        for entry in report.findings
    ]
    number = report.placeholders
    said = (
        "no placeholders stand"
        if not report.islands
        else f"{number} placeholder{'s are' if number != 1 else ' is'} as production is"
    )
    table(["island", "placeholder", "what", "what to do"], rows, said)
