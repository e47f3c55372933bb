"""`offload init`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from offload.cli.app import Command, Settings, settings_of
from offload.cli.output import emit


@click.command(
    cls=Command,
    examples=[
        "offload init",
        "offload --config ./offload.toml init --state-dir /srv/offload",
        "offload init --from-store /mnt/backups",
    ],
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="Where this instance keeps its catalog and journal.",
)
@click.option(
    "--from-store",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    help="A bare machine: take groups and volumes from the backups in this store, and list them.",
)
@click.option("--force", is_flag=True, help="Move an existing configuration aside first.")
@click.pass_context
def init(ctx: click.Context, state_dir: Path | None, from_store: Path | None, force: bool) -> None:
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
    if from_store is not None:
        _from_store(settings, path, state, from_store, force)
        return
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


def _from_store(settings: Settings, path: Path, state: Path, store: Path, force: bool) -> None:
    from offload import init_template
    from offload.quantity import count_of
    from offload.services import bare, stores
    from offload.services.context import open_context

    text, name = bare.configuration(store, state)
    old = init_template.write(path, text, force=force)
    with open_context(path) as context:
        report = stores.check(context, name, rebuild_catalog=True)

    def human() -> None:
        click.echo(f"wrote {path}" + (f" (the old one is now {old})" if old else ""))
        click.echo(f"in the catalog now: {count_of(report.backups, 'backup')} of store {name}")
        for problem in report.problems:
            click.echo(f"problem: {problem}", err=True)
        click.echo("Next: check the paths in it, then: offload backup list")

    data = {"path": path, "state_dir": state, "moved_aside": old, "store": name,
            "backups": report.backups, "problems": report.problems}  # fmt: skip
    emit(settings, data, human)
