"""`offload completion`: the script that a shell sources."""

from __future__ import annotations

import click

from offload.cli.app import Command, settings_of
from offload.cli.output import emit


@click.command(
    cls=Command,
    examples=[
        "offload completion bash > /etc/bash_completion.d/offload",
        'offload completion zsh > "${fpath[1]}/_offload"',
        "offload completion fish > ~/.config/fish/completions/offload.fish",
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL.

    It completes commands, options, and the names and ids of groups, views, TimeMarks and backups.
    """
    from click.shell_completion import get_completion_class

    from offload.cli.main import COMPLETE_ENV, cli

    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"no completion for {shell}")
    script = made(cli, {}, "offload", COMPLETE_ENV).source()
    emit(settings_of(ctx), {"name": shell, "script": script}, lambda: click.echo(script))
