"""`offload volume`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offload.cli import complete
from offload.cli.app import Group, Settings, settings_of
from offload.cli.output import emit, facts, table
from offload.quantity import show_seconds, show_size

if TYPE_CHECKING:
    from offload.config import Config
    from offload.services.volumes import VolumeReport


@click.group(
    cls=Group,
    examples=[
        "offload volume list",
        "offload volume show shop-db",
        "offload volume vmdks backup:b7k2/ds1",
    ],
)
def volume() -> None:
    """The configured volumes, as they are right now."""


def _load(settings: Settings) -> Config:
    from offload.config import find_config, load_config

    return load_config(find_config(settings.config_path))


def _data(report: VolumeReport) -> dict[str, Any]:
    error = report.error
    return {
        "name": report.volume.name,
        "provider": report.volume.provider,
        "path": report.volume.path,
        "groups": report.groups,
        "state": report.state,
        "error": error and {"code": error.code, "message": error.message, "hint": error.hint},
    }


@volume.command("list", examples=["offload volume list", "offload volume list --json"])
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List the volumes. One that cannot be looked at says so in its row."""
    from offload.services.volumes import look_at_all

    reports = look_at_all(_load(settings_of(ctx)))
    rows = []
    for report in reports:
        state = report.state
        rows.append(
            [
                report.volume.name,
                report.volume.provider,
                show_size(state.size_bytes) if state else "-",
                show_size(state.allocated_bytes) if state else "-",
                str(state.sector_size) if state else "-",
                ", ".join(report.groups),
                str(report.volume.path)
                if report.error is None
                else f"{report.volume.path}: {report.error.message}",
            ]
        )
    header = ["name", "provider", "size", "allocated", "sector", "groups", "path"]
    emit(
        settings_of(ctx),
        [_data(report) for report in reports],
        lambda: table(header, rows, "no volumes are configured"),
    )


@volume.command("show", examples=["offload volume show shop-db"])
@click.argument("name", shell_complete=complete.volumes)
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show one volume: size, extents, how long a snapshot of it will take, its pool."""
    from offload.services.volumes import look

    report = look(_load(settings_of(ctx)), name)
    if report.error is not None:
        raise report.error
    emit(settings_of(ctx), _data(report), lambda: _facts(report))


def _facts(report: VolumeReport) -> None:
    pairs = [
        ("name", report.volume.name),
        ("provider", report.volume.provider),
        ("path", str(report.volume.path)),
        ("groups", ", ".join(report.groups)),
    ]
    state = report.state
    if state is not None:
        free = f"{show_size(state.pool_free_bytes)} of {show_size(state.pool_size_bytes)} free"
        pairs += [
            ("size", f"{show_size(state.size_bytes)} ({state.size_bytes} bytes)"),
            ("allocated", show_size(state.allocated_bytes)),
            ("sector size", f"{state.sector_size} bytes"),
            ("identity", state.identity),
            ("extents", str(state.extents) if state.extents else ""),
            ("snapshot", f"about {show_seconds(state.estimate_s)}"),
            ("pool", f"{state.pool}, {free}" if state.pool else ""),
        ]
    facts(pairs)


@volume.command(
    examples=["offload volume vmdks backup:b7k2/ds1", "offload volume vmdks timemark:k3f9/ds1"]
)
@click.argument("origin", shell_complete=complete.origins)
@click.pass_context
def vmdks(ctx: click.Context, /, origin: str) -> None:
    """List the disks of VMs on the VMFS of a volume, read straight from its snapshot or backup.

    ORIGIN is timemark:ID/VOLUME or backup:ID/VOLUME. One disk of it is mounted, or restored, with
    --vmdk PATH. Disks with snapshots, and such as are mapped to other LUNs, are named only.
    """
    from offload.cli.session import reading_context
    from offload.services.vmdks import vmdks as find

    settings = settings_of(ctx)
    with reading_context(settings) as context:
        found = find(context, origin)
    rows = [[d.path, d.kind, show_size(d.size_bytes), d.parent] for d in found.disks]

    def human() -> None:
        click.echo(f"VMFS {found.version} {found.label}")
        table(["path", "kind", "size", "delta of"], rows, "no disks")

    emit(settings, found, human)
