"""What makes a run of the model the same each time: ids, clocks, and no threads but the actors'.

All of it is put into modules of the program for the life of this process, which runs the model and
nothing else.
"""
# ruff: noqa: SLF001 - what it changes are insides

from __future__ import annotations

import datetime as dt
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import offload.ids
from offload import compose
from offload.engine import packwriter, pins, retention_lock, work
from offload.engine.packwriter import PackWriter
from offload.engine.pins import HeldPin, Pin
from offload.journal import Operation, Undo
from offload.services import legalholds
from offload.stores import s3_lock
from offload.testing.backup_site import PROVIDER
from offload.testing.model_schedule import Killed, current

Now = Callable[[], dt.datetime]

_PATIENT = 10  # looks of who waits, and turns between two of them
_PAUSE = 5


class _NoThread:
    """A thread that is not begun: its work is done by whoever hands it out, or by the world."""

    def __init__(self, **_: object) -> None: ...

    def start(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


class _InlineThread:
    """A thread that has ended when it was started."""

    def __init__(self, *, target: Callable[[], None], **_: object) -> None:
        self._target = target

    def start(self) -> None:
        self._target()

    def join(self, timeout: float | None = None) -> None: ...

    def is_alive(self) -> bool:
        return False


class _Threading:
    """`threading` with other threads."""

    def __init__(self, thread: type) -> None:
        self.Thread = thread

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


class _InlineQueue:
    """Packs are put by whoever fills them."""

    def __init__(self, writer: PackWriter) -> None:
        self._writer = writer

    def put(self, pack: Any) -> None:
        writer = self._writer
        if pack is None:
            return
        try:
            if writer._failure is None:
                writer._put(pack)
        except BaseException as error:
            writer._failure = error
            raise
        finally:
            pack.parts.clear()
            writer._room.release()


class _InlineCrew:
    """A pool whose work is done by whoever hands it out."""

    def __enter__(self) -> _InlineCrew:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [work(item) for item in items]


class _Time:
    """`time` by the clock of the model."""

    def __init__(self, now: Now) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now().timestamp()


class _Ids:
    """`secrets` for ids, with a seed."""

    def __init__(self, chooser: random.Random) -> None:
        self.choice = chooser.choice


def replace_in(owner: object, name: str, value: object) -> None:
    """Put something else into a module or class."""
    setattr(owner, name, value)


def install(chooser: random.Random, now: Now, machine: Callable[[], str]) -> None:
    """Put it all in place. `now` is the clock of the host whose turn it is, `machine` its name."""
    replace_in(offload.ids, "secrets", _Ids(chooser))
    replace_in(work, "threading", _Threading(_InlineThread))
    replace_in(packwriter, "threading", _Threading(_NoThread))
    replace_in(pins, "threading", _Threading(_NoThread))
    replace_in(random, "SystemRandom", lambda: chooser)
    replace_in(retention_lock, "_crew", lambda _: _InlineCrew())
    replace_in(s3_lock, "time", _Time(now))
    replace_in(legalholds, "_attempts", _attempts)
    compose.STORES["disk"] = "offload.testing.model_places:open_folder"
    compose.STORES["s3"] = "offload.testing.versioned_store:VersionedMemoryStore"
    compose.PROVIDERS["copy"] = PROVIDER
    _packs_are_put_inline()
    _the_dead_take_nothing_back()
    pins._machine = machine
    _clock(now)


def _packs_are_put_inline() -> None:
    begin = PackWriter.__init__

    def init(writer: PackWriter, *args: Any, **more: Any) -> None:
        begin(writer, *args, **more)
        replace_in(writer, "_queue", _InlineQueue(writer))

    replace_in(PackWriter, "__init__", init)


def _attempts() -> Iterator[None]:
    """Who waits for another's end lets others go on."""
    actor = current()
    for _ in range(_PATIENT):
        yield
        for _ in range(_PAUSE):
            if actor is not None:
                actor.gate("idle", "")()


def _the_dead_take_nothing_back() -> None:
    roll_back = Operation.roll_back

    def only_the_living(op: Operation, undo: Undo) -> None:
        actor = current()
        if actor is not None and actor.dead:
            raise Killed
        roll_back(op, undo)

    replace_in(Operation, "roll_back", only_the_living)


def _clock(now: Now) -> None:
    class Clock(dt.datetime):
        """`datetime` by the clock of the host whose turn it is."""

        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Clock:
            found = now()
            return cls.fromtimestamp(found.timestamp(), tz)

    for name, module in list(sys.modules.items()):
        ours = name.startswith("offload.") and not name.startswith("offload.testing")
        if ours and getattr(module, "datetime", None) is dt.datetime:
            replace_in(module, "datetime", Clock)


def pins_of_the_dead(is_dead: Callable[[Pin], bool]) -> None:
    """Who is known to be dead on the host that asks."""

    def asked(pin: Pin) -> bool:
        return is_dead(pin)

    replace_in(Pin, "_dead", asked)


def on_pin(seen: Callable[[HeldPin], None]) -> None:
    """Be told of each pin that is put."""
    begin = HeldPin.__init__

    def init(pin: HeldPin, *args: Any, **more: Any) -> None:
        begin(pin, *args, **more)
        seen(pin)

    replace_in(HeldPin, "__init__", init)
