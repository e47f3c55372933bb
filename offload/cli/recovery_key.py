"""How a fresh recovery key gets to the one who keeps it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from offload.cli.app import Settings
from offload.errors import UsageError

_ASKED = 2  # groups, the last ones
_TRIES = 3


def recovery_choice(
    settings: Settings, file: Path | None, *, none: bool, encrypted: bool = True
) -> Path | Callable[[str], None] | None:
    """What the options ask for; without any, the key is shown on the terminal.

    UsageError (`recovery-key-undecided`) if nobody is there to see it.
    """
    if not encrypted:
        if file is not None or none:
            raise UsageError(
                "a store that is not encrypted has no recovery key",
                code="store-not-encrypted",
                hint="to encrypt it, add [stores.NAME.key] to the configuration first",
            )
        return None
    if file is not None and none:
        raise UsageError("either --recovery-key-to or --no-recovery-key, not both")
    if file is not None or none:
        return file
    if settings.json or not sys.stdin.isatty() or not sys.stderr.isatty():
        raise UsageError(
            "nobody is there to write down the recovery key",
            code="recovery-key-undecided",
            hint="give --recovery-key-to FILE, or --no-recovery-key",
        )
    return _show


def _show(text: str) -> None:
    """Show it once, and have its end typed back."""
    click.echo(
        "The recovery key opens this store when every other key is lost. It is shown now and never "
        "again: write it down, and keep it where neither this machine nor the store is.\n\n"
        f"    {text}\n",
        err=True,
    )
    wanted = _letters("".join(text.split("-")[-_ASKED:]))
    for _ in range(_TRIES):
        typed = click.prompt(f"Its last {_ASKED} groups", err=True, default="", show_default=False)
        if _letters(typed) in (wanted, _letters(text)):
            return
        click.echo("that is not how it ends", err=True)
    raise UsageError(
        "the recovery key was not confirmed: nothing was made",
        code="recovery-not-confirmed",
        hint="run it again; a new recovery key will be shown",
    )


def _letters(text: str) -> str:
    return "".join(c for c in text.upper() if c.isalnum())
