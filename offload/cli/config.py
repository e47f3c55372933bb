"""`offload config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
        "stores": len(loaded.stores),
    }

    def human() -> None:
        shown = ", ".join(f"{count} {what}" for what, count in counts.items())
        click.echo(f"{path} is right: {shown}")

    emit(settings_of(ctx), {"path": path, **counts}, human)


@config.command("show", examples=["offload config show", "offload config show --json"])
@click.pass_context
def show(ctx: click.Context) -> None:
    """Print the configuration with all defaults filled in. Secrets are masked."""
    path, loaded = _load(settings_of(ctx))
    values = loaded.model_dump(mode="json")

    def human() -> None:
        click.echo(f"# {path}")
        click.echo("\n".join(to_toml(values)))

    emit(settings_of(ctx), {"path": path, **values}, human)


def to_toml(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines of TOML. What is None has no TOML form and is left out."""
    lines = []
    tables: list[tuple[str, Mapping[str, Any], str]] = []
    for key, value in values.items():
        name = f"{prefix}{_key(key)}"
        if isinstance(value, Mapping):
            tables.append((f"[{name}]", value, name))
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            tables.extend((f"[[{name}]]", entry, name) for entry in value)
        elif value is not None:
            lines.append(f"{_key(key)} = {_value(value)}")
    for head, entries, name in tables:
        inner = to_toml(entries, f"{name}.")
        only_tables = bool(inner) and inner[0] == ""
        lines += inner if only_tables and head[1] != "[" else ["", head, *inner]
    return lines


def _key(key: str) -> str:
    return f'"{key}"' if "." in key else key


def _value(value: object) -> str:
    import json

    if isinstance(value, list):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # TOML writes strings, numbers, booleans the same
