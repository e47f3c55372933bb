"""`offload init`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from offload.cli.app import Command, settings_of
from offload.cli.output import emit


@click.command(
    cls=Command,
    examples=[
        "offload init",
        "offload --config ./offload.toml init --state-dir /srv/offload",
    ],
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where this instance keeps its catalog and journal.",
)
@click.option("--force", is_flag=True, help="Move an existing configuration aside first.")
@click.pass_context
def init(ctx: click.Context, state_dir: Path | None, force: bool) -> None:
    """Write a commented configuration.

    It goes to --config, OFFLOAD_CONFIG, or the usual place (/etc/offload/offload.toml for root), is
    readable by its owner only, and never overwrites anything.
    """
    from offload import init_template
    from offload.config import CONFIG_ENV, usual_places

    settings = settings_of(ctx)
    chosen = settings.config_path or os.environ.get(CONFIG_ENV) or usual_places()[0]
    path = Path(chosen).absolute()
    state = state_dir or init_template.default_state_dir()
    old = init_template.write(path, init_template.render(state), force=force)

    def human() -> None:
        say = f"offload --config {path}" if path not in usual_places() else "offload"
        click.echo(f"wrote {path}" + (f" (the old one is now {old})" if old else ""))
        click.echo("Next:")
        click.echo("  1. name your volumes, groups and a store in it")
        click.echo(f"  2. {say} config check")
        click.echo(f"  3. {say} doctor")
        click.echo(f"  4. {say} store init NAME")
        click.echo(f"  5. {say} backup GROUP")

    emit(settings, {"path": path, "state_dir": state, "moved_aside": old}, human)
