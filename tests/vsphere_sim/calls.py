"""What a call is to the parts of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tests.vsphere_sim.model import Model

_Handler = TypeVar("_Handler", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Who calls what."""

    session: str
    user: str
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A call as it came. `at`: of `time.monotonic`."""

    at: float
    session: str
    method: str
    moid: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Part:
    """Some calls of the API: those of its methods whose names begin with a capital letter.

    They are given the Call, the object, and the arguments by the API's names; they run under the
    model's lock, unless they are `unlocked`. What they raise as SoapFault is the answer.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """By the name of the call."""
        return {name: getattr(self, name) for name in dir(self) if name[0].isupper()}


def unlocked(handler: _Handler) -> _Handler:
    """Runs without the model's lock: it waits, or talks to a target."""
    handler.unlocked = True  # type: ignore[attr-defined]
    return handler
