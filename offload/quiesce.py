"""The contract of quiescers: they hold the writers of a group for a moment."""

from __future__ import annotations

from typing import Protocol

from offload.model import Consistency


class Quiescer(Protocol):
    """Freezes one thing (the file systems of a mount list, one VM …).

    Life: `check` → `arm` → `freeze` → `still_frozen` → `thaw` → `close`. `thaw` runs only where
    `freeze` succeeded, and always then. Whatever holds writers has its own dead-man timer: if this
    process dies (`kill -9` included) or the deadline passes, writers go on by themselves.
    """

    name: str  # for the report, e.g. "local:/srv/shop/db"
    kind: str
    volumes: tuple[str, ...]  # which volumes' writers it holds
    freezes: tuple[str, ...]  # on whose own device it freezes a file system of this machine

    def check(self) -> None:
        """Refuse what must never be frozen or cannot be: raises ConfigError, NotFoundError,
        PrivilegeError, PolicyError. Changes nothing."""
        ...

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """The journal's undo actions and their arguments, in the order in which to intend them
        (they are undone in reverse). Valid before `arm`; harmless where nothing was frozen, and
        where the thaw has been done."""
        ...

    def arm(self, deadline_s: float) -> None:
        """Start the helper that owns the dead-man timer; nothing is frozen yet."""
        ...

    def freeze(self) -> Consistency:
        """Hold the writers; return the consistency reached. Raises UnavailableError."""
        ...

    def still_frozen(self) -> bool:
        """Asked after the snapshot: whether the writers were held all the time."""
        ...

    def thaw(self) -> None:
        """Let the writers go. Idempotent. Raises UnavailableError if it cannot be confirmed, or
        if a command that must follow failed (`hook-failed`; then the writers do go on)."""
        ...

    def close(self) -> None:
        """End the helper; thaws if still frozen. Never raises for a thing already gone."""
        ...

    @property
    def output(self) -> str:
        """What hooks printed, for the report (secrets are not expected there)."""
        ...
