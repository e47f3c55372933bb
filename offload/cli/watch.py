"""`offload watch`."""

from __future__ import annotations

import json
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from offload.cli import quantities
from offload.cli.app import Command, Settings, settings_of
from offload.cli.output import note, to_json
from offload.errors import PolicyError
from offload.quantity import count_of, show_seconds

if TYPE_CHECKING:
    from offload.services.watch import Watch

_LEAST_S = 1.0


@click.command(
    cls=Command,
    json_help="Print one JSON object a line on stdout.",
    examples=["offload watch", "offload watch --interval 5m", "offload watch --once --json"],
)
@click.option(
    "--interval",
    callback=quantities.span,
    metavar="TIME",
    default="30s",
    show_default=True,
    help="The time between two rounds.",
)
@click.option("--once", is_flag=True, help="One round; the exit code is 9 if there are alarms.")
@click.pass_context
def watch(ctx: click.Context, interval: float, once: bool) -> None:
    """Take care of pools, views and overlays, all the time.

    Each round takes back what dead processes left, deletes TimeMarks where a pool is low (as before
    each TimeMark, and only with [pool] reclaim), serves views again whose server is gone, and warns
    of overlays that fill up. One line a change, not a line a round. Ends at SIGTERM, with 0.
    """
    from offload.services.context import open_context
    from offload.services.watch import Watch

    if interval < _LEAST_S:
        raise click.BadParameter(f"at least {show_seconds(_LEAST_S)}", param_hint="--interval")

    settings = settings_of(ctx)
    watched = Watch(lambda: open_context(settings.config_path))
    if once:
        _round(settings, watched)
        if watched.alarms:
            raise PolicyError(
                f"there {'is' if len(watched.alarms) == 1 else 'are'} "
                + count_of(len(watched.alarms), "alarm"),
                code="alarms",
                hint="the whole picture: offload status",
            )
        return
    signal.signal(signal.SIGTERM, _end)
    note(settings, f"a round every {show_seconds(interval)}, until SIGTERM")
    never = threading.Event()
    while True:
        _round(settings, watched)
        never.wait(interval)


def _round(settings: Settings, watched: Watch) -> None:
    for event in watched.round():
        if settings.json:
            click.echo(json.dumps(to_json(event), ensure_ascii=False))
        else:
            click.echo(f"{event.event}: {event.message}")


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)  # what was begun rolls back on the way out
