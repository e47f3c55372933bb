"""`offload agent`."""

from __future__ import annotations

from pathlib import Path

import click

from offload.cli import complete
from offload.cli.app import Group, settings_of
from offload.cli.output import emit, facts


@click.group(
    cls=Group, examples=["offload agent show shop-db", "offload agent hooks --to /root/hooks"]
)
def agent() -> None:
    """Guest agents of VMs, and the freeze hooks for guests."""


@agent.command("show", examples=["offload agent show shop-db"])
@click.argument("vm", shell_complete=complete.vms)
@click.pass_context
def show(ctx: click.Context, vm: str) -> None:
    """Ask the QEMU guest agent of a VM what it is, and whether it is frozen."""
    from offload.config import find_config, load_config
    from offload.services.agents import look

    settings = settings_of(ctx)
    report = look(load_config(find_config(settings.config_path)), vm)

    def human() -> None:
        facts(
            [
                ("vm", report.vm),
                ("socket", str(report.socket)),
                ("agent", f"qemu-ga {report.version}"),
                ("state", "frozen" if report.frozen else "thawed"),
                ("system", report.system.name or report.system.id),
                ("host name", report.host_name),
                ("addresses", ", ".join(report.addresses)),
                *(
                    ("file system", f"{found.mount} ({found.kind} on {found.device})")
                    for found in report.file_systems
                ),
                *(("last freeze", line) for line in report.hooks),
            ]
        )

    emit(settings, report, human)


@agent.command(
    "hooks",
    examples=[
        "offload agent hooks --to /root/hooks",
        "offload agent hooks --to /root/hooks --only deadman --only mysql",
    ],
)
@click.option(
    "--to",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where to write them; made if it is not there.",
)
@click.option(
    "--only", multiple=True, metavar="NAME", help="This hook; may be repeated. Default: all."
)
@click.pass_context
def hooks(ctx: click.Context, folder: Path, only: tuple[str, ...]) -> None:
    """Write the freeze hooks for Linux guests into a folder.

    Copy what is in it to /etc/qemu in the guest, and name the dispatcher in /etc/qemu/qemu-ga.conf.
    Settings that are there already are kept.
    """
    from offload.services import guest_hooks

    written = guest_hooks.write(folder, only)

    def human() -> None:
        for path in written.files:
            click.echo(f"wrote {path}")
        for path in written.kept:
            click.echo(f"kept {path}")
        click.echo("Next:")
        click.echo(f"  1. say in {folder / guest_hooks.SETTINGS} what your databases need")
        click.echo(f"  2. copy what is in {folder} to /etc/qemu in the guest, with its modes")
        click.echo("  3. in the guest, in /etc/qemu/qemu-ga.conf:")
        click.echo("       [general]")
        click.echo(f"       fsfreeze-hook=/etc/qemu/{guest_hooks.DISPATCHER}")
        click.echo("  4. in the guest: systemctl restart qemu-guest-agent")

    emit(settings_of(ctx), written, human)
