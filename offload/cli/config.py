"""`offload config`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from offload.cli.app import Group, Settings, settings_of
from offload.cli.output import emit

if TYPE_CHECKING:
    from pathlib import Path

    from offload.config import Config


@click.group(cls=Group, examples=["offload config check", "offload config show --json"])
def config() -> None:
    """Check and show the configuration."""


def _load(settings: Settings) -> tuple[Path, Config]:
    from offload.config import find_config, load_config

    path = find_config(settings.config_path)
    return path, load_config(path)


@config.command(
    "check", examples=["offload config check", "offload --config new.toml config check"]
)
@click.pass_context
def check(ctx: click.Context) -> None:
    """Read the configuration and say whether it is right.

    Every provider and target that it names must exist. Nothing outside is touched: whether the
    volumes are there is what `offload doctor` says.
    """
    from offload.services.doctor import check_names

    path, loaded = _load(settings_of(ctx))
    check_names(loaded)
    counts = {
        "volumes": len(loaded.volumes),
        "groups": len(loaded.groups),
        "vms": len(loaded.vms),
        "stores": len(loaded.stores),
    }

    def human() -> None:
        shown = ", ".join(f"{count} {what}" for what, count in counts.items())
        click.echo(f"{path} is right: {shown}")

    emit(
        settings_of(ctx),
        {"path": path, **counts},
        human,
    )


@config.command("show", examples=["offload config show", "offload config show --json"])
@click.pass_context
def show(ctx: click.Context) -> None:
    """Print the configuration with all defaults filled in. Secrets are masked."""
    path, loaded = _load(settings_of(ctx))
    values = loaded.model_dump(mode="json", exclude_none=True)

    def human() -> None:
        import tomli_w

        click.echo(f"# {path}")
        click.echo(tomli_w.dumps(values), nl=False)

    emit(settings_of(ctx), {"path": path, **values}, human)
