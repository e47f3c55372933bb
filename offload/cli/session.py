"""How commands open the instance: for reading, or for changing something."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from offload.cli.app import Settings
from offload.cli.output import note
from offload.errors import CleanupError, UsageError

if TYPE_CHECKING:
    from offload.services.context import Context


@contextmanager
def only_context(settings: Settings) -> Iterator[Context]:
    """The opened instance and nothing more: for the command that is about leftovers."""
    from offload.services.context import open_context

    with open_context(settings.config_path) as context:
        yield context


@contextmanager
def reading_context(settings: Settings) -> Iterator[Context]:
    """The opened instance. What a dead process left is reported, never touched."""
    from offload.services.context import open_context

    with open_context(settings.config_path) as context:
        left = len(context.journal.leftovers())
        if left:
            what = "an operation" if left == 1 else f"{left} operations"
            note(settings, f"{what} of a dead process wait to be taken back: offload recover")
        yield context


@contextmanager
def changing_context(settings: Settings) -> Iterator[Context]:
    """The opened instance, after what a dead process left has been taken back.

    Where that fails the command still runs (a stuck leftover of one group must not stop the backups
    of the others), and the failure is reported when its result has been printed.
    """
    from offload.services.context import open_context

    with open_context(settings.config_path) as context:
        try:
            for done in context.journal.recover():
                note(settings, f"took back {done.kind} {done.subject} of a dead process")
        except CleanupError as error:
            settings.unclean = error
        try:
            yield context
        except BaseException as error:
            if settings.unclean is not None:
                error.add_note(settings.unclean.message)
            raise


def confirm(settings: Settings, question: str, *, yes: bool) -> None:
    """Ask before something is destroyed. Ends the command (exit code 1) if the answer is no."""
    if yes:
        return
    if settings.json or not sys.stdin.isatty():
        raise UsageError(
            "nobody is there to confirm this",
            code="not-confirmed",
            hint="say --yes, or look first with --dry-run",
        )
    if not click.confirm(question, err=True):
        click.echo("nothing changed", err=True)
        raise click.exceptions.Exit(1)
