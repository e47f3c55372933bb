"""Actors that share a store, one running at a time: who is next is chosen by a seed.

An actor is a thread that stops before each operation on the store. The scheduler lets one go on,
until its next operation, and then chooses again: an interleaving is a sequence of choices, and can
be had again from its seed. On its way an actor may be killed (nothing of what it does counts from
there on), lose a request or only its reply, or stand still while others and the clock go on.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from enum import Enum

from offload.errors import UnavailableError


class Fate(Enum):
    """What becomes of an operation."""

    GO = "go"
    KILL_BEFORE = "killed before"
    KILL_AFTER = "killed after"
    LOSE_REQUEST = "request lost before"
    LOSE_REPLY = "reply lost after"


class Killed(BaseException):
    """The actor is dead. Whatever it still does on its way out does not reach the store."""


class Actor:
    """One process. `run` is what it does; it ends when that returns."""

    def __init__(self, name: str, host: str, what: str, run: Callable[[Actor], None]) -> None:
        self.name = name
        self.host = host
        self.what = what
        self.dead = False
        self.ended = False
        self.stalled_until = 0  # the step
        self.late = False  # its pin has expired at some time
        self.at = ("begin", "")  # the operation that it stands before
        self.failure: BaseException | None = None  # of the test itself
        self.before_go: Callable[[Actor], None] | None = None
        self._run = run
        self._fate = Fate.GO
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)

    def start(self) -> None:
        """Let it come to its first operation."""
        self._thread.start()
        self._back.acquire()

    def go(self, fate: Fate = Fate.GO) -> bool:
        """Let it do its operation, and come to the next one; whether it has ended instead."""
        self._fate = fate
        self._turn.release()
        self._back.acquire()
        return self.ended

    def _live(self) -> None:
        _CURRENT.actor = self
        try:
            self._run(self)
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - the scheduler raises it
            self.failure = error
        finally:
            self.ended = True
            self._back.release()

    def passes(self) -> Callable[[], None]:
        """An operation at which it need not stop, unless it is dead."""
        if self.dead:
            raise Killed
        return _nothing

    def gate(self, verb: str, name: str) -> Callable[[], None]:
        """Stand before an operation until it is this one's turn."""
        if self.dead:
            raise Killed
        self.at = (verb, name)
        self._back.release()
        self._turn.acquire()
        fate = self._fate
        if fate is Fate.GO:
            if self.before_go is not None:
                self.before_go(self)
            return _nothing
        if fate is Fate.KILL_BEFORE:
            self.dead = True
            raise Killed
        if fate is Fate.LOSE_REQUEST:
            raise _lost(verb, name)
        return lambda: self._after(fate, verb, name)

    def _after(self, fate: Fate, verb: str, name: str) -> None:
        if fate is Fate.KILL_AFTER:
            self.dead = True
            raise Killed
        raise _lost(verb, name)


def _nothing() -> None:
    pass


def _lost(verb: str, name: str) -> UnavailableError:
    return UnavailableError(f"no answer to {verb} {name}", code="store-unavailable")


_CURRENT = threading.local()


def current() -> Actor | None:
    """The actor whose thread this is."""
    found: Actor | None = getattr(_CURRENT, "actor", None)
    return found


class Chooser(random.Random):
    """Random choices by a seed."""

    def chance(self, one_in: float) -> bool:
        """True once in so many times."""
        return self.random() * one_in < 1
