"""Continuous care, between the commands: room in pools, dead servers, overlays that fill up.

Each round takes back what dead processes left, makes room in pools that are low (see pools.py),
serves views again whose server is gone, and looks at what is written to views. What it finds is an
event once, when it changes. A check that fails is an alarm, and the others are made all the same.

It works beside other commands: a TimeMark that is read, shown or being made is never reclaimed, and
a view that another process mounts, takes away or serves again is left to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from offload.errors import OffloadError
from offload.services import connect, mount, overlays, pools
from offload.services.context import Context

# what is another number in each round, and no other state
_AMOUNT = re.compile(r"\d+(?:\.\d+)? ?(?:B|KiB|MiB|GiB|TiB|%|ms|s)\b")


class EventKind(StrEnum):
    """What a line of the watch is about."""

    ALARM = "alarm"
    CLEARED = "cleared"  # an alarm that is over
    RECOVERED = "recovered"  # what a dead process left was taken back
    RECLAIMED = "reclaimed"  # a TimeMark went, to make room
    REMOUNTED = "remounted"  # a view is served again
    RECONNECTED = "reconnected"  # a block device of this machine works again


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A change of state, for a person."""

    at: datetime
    event: EventKind
    message: str


@dataclass(slots=True)
class _Findings:
    """Of one check: what is wrong now, and what was done."""

    alarms: list[str] = field(default_factory=list)
    done: list[Event] = field(default_factory=list)

    def did(self, event: EventKind, message: str) -> None:
        self.done.append(_event(event, message))


class Watch:
    """`opened` opens the instance anew for each round: its configuration may change."""

    def __init__(self, opened: Callable[[], AbstractContextManager[Context]]) -> None:
        self._opened = opened
        self._rounds = 0
        self._alarms: dict[str, dict[str, str]] = {}  # by check; message by its state

    @property
    def alarms(self) -> list[str]:
        """What was wrong in the last round."""
        return [message for found in self._alarms.values() for message in found.values()]

    def round(self) -> list[Event]:
        """One look at everything. Raises what opening the instance raises, in the first round; from
        then on that is an alarm too."""
        events: list[Event] = []
        self._rounds += 1
        try:
            with self._opened() as ctx:
                for name, check in _CHECKS.items():
                    events += self._run(ctx, name, check)
        except OffloadError as error:
            if self._rounds == 1:
                raise
            return [*events, *self._changes("instance", [error.message])]
        return [*events, *self._changes("instance", [])]

    def _run(
        self, ctx: Context, name: str, check: Callable[[Context, _Findings], None]
    ) -> list[Event]:
        found = _Findings()
        try:
            check(ctx, found)
        except OffloadError as error:
            found.alarms.append(error.message)
        return [*found.done, *self._changes(name, found.alarms)]

    def _changes(self, name: str, alarms: list[str]) -> list[Event]:
        """The events that lead from the last round's alarms of a check to these."""
        before = self._alarms.get(name, {})
        now = {_AMOUNT.sub("…", message): message for message in alarms}
        self._alarms[name] = now
        over = [before[state] for state in before if state not in now]
        new = [now[state] for state in now if state not in before]
        return [
            *(_event(EventKind.CLEARED, message) for message in over),
            *(_event(EventKind.ALARM, message) for message in new),
        ]


def _event(event: EventKind, message: str) -> Event:
    return Event(at=datetime.now(UTC), event=event, message=message)


def _leftovers(ctx: Context, found: _Findings) -> None:
    for done in ctx.journal.recover():
        found.did(EventKind.RECOVERED, f"took back {done.kind} {done.subject} of a dead process")


def _pools(ctx: Context, found: _Findings) -> None:
    states, errors = pools.inspect_all(ctx)
    found.alarms += [f"volume {name}: {error.message}" for name, error in errors.items()]
    for pool in pools.survey(ctx, states):
        left, gone = pools.relieve(ctx, pool)
        for timemark in gone:
            found.did(
                EventKind.RECLAIMED,
                f"pool {pool.name} was low: deleted timemark {timemark.id} of {timemark.group}",
            )
        if left.low:
            found.alarms.append(f"pool {pool.name} has {left.shortage()}: no new TimeMark is made")


def _views(ctx: Context, found: _Findings) -> None:
    remounted = mount.remount(ctx)
    for view in remounted.views:
        found.did(EventKind.REMOUNTED, f"view {view.name} is served again at {view.uri}")
    found.alarms += remounted.warnings


def _connections(ctx: Context, found: _Findings) -> None:
    again = connect.reconnect(ctx)
    for connection in again.connections:
        found.did(EventKind.RECONNECTED, f"{connection.name} works again, as {connection.device}")
    found.alarms += again.warnings


def _overlays(ctx: Context, found: _Findings) -> None:
    found.alarms += overlays.alarms(ctx)


_CHECKS: dict[str, Callable[[Context, _Findings], None]] = {
    "leftovers": _leftovers,
    "pools": _pools,
    "views": _views,
    "connections": _connections,
    "overlays": _overlays,
}
