"""`offload doctor`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from offload.cli.app import Command, Settings, settings_of
from offload.cli.output import emit, table
from offload.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from offload.config import Config


@click.command(cls=Command, examples=["offload doctor", "offload doctor --json"])
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Show what this machine has and lacks for each capability.

    Says which package or kernel module would give what is missing. Works without a configuration.
    With one, VMs are asked whether they could be held, hypervisors are logged in to, and the exit
    code is 6 if something is missing that it needs.
    """
    from offload.services.doctor import examine, lacking

    settings = settings_of(ctx)
    config = _config(settings)
    checks = examine(config)
    if config is not None and config.vms:
        from offload.services.doctor_vms import look_at_vms

        checks += look_at_vms(config, settings.config_path)
    if config is not None and config.hypervisors:
        from offload.services.doctor_hypervisors import look_at_hypervisors

        checks += look_at_hypervisors(config, settings.config_path)
    rows = [
        [check.name, check.status.value, "yes" if check.required else "", check.detail, check.fix]
        for check in checks
    ]
    emit(
        settings,
        checks,
        lambda: table(["capability", "status", "needed", "what", "to get it"], rows, ""),
    )
    missing = lacking(checks)
    if missing:
        raise UnavailableError(
            "this configuration needs what is missing: " + ", ".join(c.name for c in missing),
            code="capability-missing",
            hint="; ".join(c.fix for c in missing if c.fix),
        )


def _config(settings: Settings) -> Config | None:
    """None where there is no configuration and none was asked for."""
    from offload.config import CONFIG_ENV, find_config, load_config

    try:
        return load_config(find_config(settings.config_path))
    except ConfigError as error:
        chosen = settings.config_path or os.environ.get(CONFIG_ENV)
        if error.code == "config-missing" and not chosen:
            return None
        raise
