"""How errors reach the user: one line and a hint, or one JSON object; on stderr, with a code."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from offload.cli.app import Settings
from offload.errors import OffloadError

INTERNAL = 1
USAGE = 2
INTERRUPTED = 128 + signal.SIGINT


def wants_json(args: Sequence[str]) -> bool:
    """Whether `--json` is given anywhere: known even where the rest cannot be parsed."""
    words = list(args)
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def report(error: Exception, settings: Settings) -> int:
    """Print an error; returns the exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.Abort):  # Ctrl-C or the end of input at a prompt
        _show(settings, "interrupted", "interrupted", "")
        return INTERRUPTED
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and not settings.json:
        click.echo(error.format_message(), err=True)
        return USAGE
    if settings.debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, OffloadError):
        _show(settings, error.code, error.message, error.hint, _notes(error))
        return error.exit_code
    if isinstance(error, click.ClickException):
        _show(settings, "usage", _usage_message(error), _usage_hint(error))
        return USAGE
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {last[0].filename.rpartition('/')[2]}:{last[0].lineno}" if last else ""
    _show(
        settings,
        "internal",
        f"internal error: {type(error).__name__}: {error}{where}",
        "" if settings.debug else "run again with --debug and report what it prints",
        _notes(error),
    )
    return INTERNAL


def interrupted(stop: KeyboardInterrupt, settings: Settings) -> int:
    """Ctrl-C: what was begun has been rolled back by now, or a note says what was not."""
    _show(settings, "interrupted", "interrupted", "", _notes(stop))
    return INTERRUPTED


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _usage_message(error: click.ClickException) -> str:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return "a command is missing"
    return " ".join(error.format_message().split())


def _usage_hint(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    return f"see: {ctx.command_path} --help" if ctx is not None else ""


def _show(
    settings: Settings, code: str, message: str, hint: str, notes: Sequence[str] = ()
) -> None:
    if settings.json:
        record: dict[str, object] = {"code": code, "message": message, "hint": hint}
        if notes:
            record["notes"] = list(notes)
        click.echo(json.dumps(record, ensure_ascii=False), err=True)
        return
    click.echo(f"offload: error: {message}", err=True)
    for note in notes:
        click.echo(f"  also: {note}", err=True)
    if hint:
        click.echo(f"  hint: {hint}", err=True)
