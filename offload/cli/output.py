"""The one place that prints results: JSON for programs, text and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import PurePath
from typing import Any

import click

from offload.cli.app import Settings

_GAP = "  "
_FOLDED = 1000  # rows: ten thousand took rich four seconds


def emit(settings: Settings, data: object, human: Callable[[], None]) -> None:
    """Print `data` as one JSON value under `--json`, else let `human` print."""
    if settings.json:
        click.echo(json.dumps(to_json(data), indent=2, ensure_ascii=False))
    else:
        human()


def note(settings: Settings, text: str) -> None:
    """A line on stderr for a person; nothing under `--json` and `--quiet`."""
    if not settings.json and not settings.quiet:
        click.echo(f"offload: {text}", err=True)


def to_json(value: object) -> Any:
    """Model values as JSON: RFC 3339 times in UTC, enums as strings, dataclasses as objects."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str | PurePath):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Sequence | set | frozenset):
        return [to_json(entry) for entry in value]
    raise TypeError(f"no JSON form for {type(value).__name__}")


def show_time(at: datetime) -> str:
    """In the local zone, to the second."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def show_age(seconds: float) -> str:
    """`40 s`, `12 min`, `5 h`, `3 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(max(seconds, 0))} s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """A table on stdout; `empty` on stderr where there are no rows.

    On a terminal long cells are folded to its width; elsewhere, and where nobody reads them all,
    columns are padded with blanks and never cut.
    """
    if not rows:
        click.echo(empty, err=True)
    elif sys.stdout.isatty() and len(rows) <= _FOLDED:
        _rich_table(header, rows)
    else:
        _plain_table(header, rows)


def _plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [[name.upper() for name in header], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo(_GAP.join(padded).rstrip())


def _rich_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in header:
        made.add_column(name.upper(), overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    Console().print(made)


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """`name  value` lines; pairs with an empty value are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{name.ljust(width)}{_GAP}{value}")
