"""How long work tells how far it is. Services report; whoever called them shows it, or does not."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what a use case has done so far.

    `task` names one piece of the work (a volume, say) and is unique among those that run at the
    same time. Thread safety: all methods, from any thread. None of them raises.
    """

    def start(self, task: str, total_bytes: int | None) -> None:
        """A piece of work begins; `total_bytes` is None where the amount is not known."""
        ...

    def advance(self, task: str, count_bytes: int) -> None:
        """`count_bytes` more of it are done."""
        ...

    def finish(self, task: str) -> None:
        """The piece is complete. Idempotent."""
        ...

    def status(self, task: str, text: str) -> None:
        """What a piece of work without an amount is at now: replaces what was said of it before."""
        ...

    def message(self, text: str) -> None:
        """One line worth a person's attention while the work runs."""
        ...


class NoProgress:
    """Shows nothing."""

    def start(self, task: str, total_bytes: int | None) -> None:
        """Nothing."""

    def advance(self, task: str, count_bytes: int) -> None:
        """Nothing."""

    def finish(self, task: str) -> None:
        """Nothing."""

    def status(self, task: str, text: str) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""
