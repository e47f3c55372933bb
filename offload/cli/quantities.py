"""Option callbacks for shares and durations as people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from offload.quantity import parse_duration, parse_percent, parse_size

_Number = TypeVar("_Number", int, float)


def share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """`5%` → 0.05; a usage error says how one is written."""
    return _parsed(parse_percent, ctx, param, value)


def span(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """`14d` → seconds; a usage error says how one is written."""
    return _parsed(parse_duration, ctx, param, value)


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """`20GiB` → bytes; a usage error says how one is written."""
    return _parsed(parse_size, ctx, param, value)


def tags_of(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Tags of backups, as given; a usage error says what one looks like."""
    from offload.configs.base import tag_name

    try:
        return tuple(tag_name(tag) for tag in value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=param) from error


def _parsed(
    parse: Callable[[str], _Number], ctx: click.Context, param: click.Parameter, value: str | None
) -> _Number | None:
    if value is None:
        return None
    try:
        return parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=param) from error
