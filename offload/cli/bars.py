"""Progress for people: bars on a terminal, lines elsewhere, always on stderr; none with JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from offload.cli.app import Settings
from offload.progress import NoProgress, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@contextmanager
def progress(settings: Settings) -> Iterator[Progress]:
    """What fits this run: bars and live lines, lines for a log, or nothing."""
    if settings.json or settings.quiet:
        yield NoProgress()
    elif sys.stderr.isatty():
        with _live() as shown:
            yield shown
    else:
        yield LineProgress()


class LineProgress(NoProgress):
    """Messages only: a log file is no place for bars."""

    def message(self, text: str) -> None:
        """One line on stderr."""
        click.echo(text, err=True)


@contextmanager
def _live() -> Iterator[BarProgress]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
    )
    states = Bars(
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
    )
    with Live(Group(states, bars), console=console, refresh_per_second=20):
        yield BarProgress(bars, states)


class BarProgress:
    """One bar a task, one line a state. rich locks inside, so any thread may report."""

    def __init__(self, bars: Bars, states: Bars) -> None:
        self._bars = bars
        self._states = states
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, TaskID] = {}

    def start(self, task: str, total_bytes: int | None) -> None:
        """A new bar; it pulses where the total is not known."""
        self._tasks[task] = self._bars.add_task(task, total=total_bytes)

    def advance(self, task: str, count_bytes: int) -> None:
        """Move the bar; a task that was never started moves nothing."""
        if task in self._tasks:
            self._bars.advance(self._tasks[task], count_bytes)

    def finish(self, task: str) -> None:
        """Fill the bar and stop its clock."""
        if task in self._tasks:
            number = self._tasks.pop(task)
            done = next(t.completed for t in self._bars.tasks if t.id == number)
            self._bars.update(number, total=done, completed=done)
            self._bars.stop_task(number)

    def status(self, task: str, text: str) -> None:
        """Replace the task's line."""
        if task in self._lines:
            self._states.update(self._lines[task], status=text)
        else:
            self._lines[task] = self._states.add_task(task, total=None, status=text)

    def message(self, text: str) -> None:
        """A line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)
