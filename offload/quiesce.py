"""The contract of quiescers: they hold the writers of a group for a moment.

The director takes all quiescers of a group through the same phases, each phase in parallel:

    check → arm → hold → freeze → (snapshots) → still_frozen → thaw → close

`hold` is for applications, `freeze` for file systems: no file system waits, frozen, for somebody
else's database. One deadline, a time of `time.monotonic`, runs from the first hold to the last
thaw. Whatever holds writers has a dead-man timer that needs nothing of this process: if it dies
(`kill -9` included) or the deadline passes, writers go on by themselves.
"""

from __future__ import annotations

from datetime import datetime
from typing import Protocol, runtime_checkable

from offload.model import Consistency, HeldPart


class Part(Protocol):
    """Something in a VM that can be held: its file systems, a database, what a script stops.

    Life: `check` → `arm` → `freeze` → `still_frozen` → `thaw` → `close`. One thread at a time.
    """

    name: str  # for the report, without secrets: "postgresql:backup@db1:5432"
    kind: str

    def check(self) -> None:
        """Refuse what must never be frozen, or cannot be. Changes nothing. Raises ConfigError,
        NotFoundError, PrivilegeError, PolicyError, UnavailableError."""
        ...

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """The journal's undo actions and their arguments, in the order in which to intend them
        (they are undone in reverse). Valid before `arm`; harmless where nothing was held, and
        where it has been let go. Their arguments go to disk: no secrets."""
        ...

    def arm(self, deadline_s: float) -> None:
        """All that can be done while writers go on: connect, start the helper that owns the
        dead-man timer, flush for the first time. `deadline_s` is what the timer is set to."""
        ...

    def freeze(self, until: float) -> Consistency:
        """Hold the writers, before `until`; return what an image reaches by this part alone.

        All or nothing: where it raises, nothing is held. Raises UnavailableError
        (`freeze-failed`, `hook-failed`, `freeze-late`).
        """
        ...

    def still_frozen(self) -> bool:
        """Asked after the snapshot: whether writers were held from `freeze` until now. What its
        own side says is checked, not believed."""
        ...

    def thaw(self) -> None:
        """Let the writers go. Idempotent. Raises UnavailableError if it cannot be confirmed
        (`thaw-failed`), or if a command that must follow failed (`hook-failed`; then the writers
        do go on). May find out more about `still_frozen`: see `unbroken`."""
        ...

    def close(self) -> None:
        """End the helper; thaws if still frozen. Never raises for a thing already gone."""
        ...

    @property
    def what(self) -> tuple[str, ...]:
        """What was held, as its own side names it; empty before `freeze`."""
        ...

    @property
    def unbroken(self) -> bool:
        """False once a break of the hold became known, by `still_frozen` or by `thaw`."""
        ...

    @property
    def image_at(self) -> datetime | None:
        """Where this part's image is of an instant of its own: when it was made. Else None."""
        ...

    @property
    def output(self) -> str:
        """What hooks printed and what was noticed, for the report."""
        ...


@runtime_checkable
class Flushes(Protocol):
    """Of a Part that keeps nobody waiting: what `freeze` did is all of it (a CHECKPOINT, a VM
    snapshot). Valid after `check`."""

    holds_nothing: bool


@runtime_checkable
class Learns(Protocol):
    """Of a Part that may know only after `close` what was reached: hooks in a guest tell then."""

    @property
    def reached(self) -> Consistency:
        """What `freeze` returned, or what has become known since."""
        ...


@runtime_checkable
class InSnapshot(Protocol):
    """Of a Part or Quiescer whose image, where it has `image_at`, is in a VM snapshot of this
    name."""

    @property
    def snapshot_name(self) -> str:
        """Empty where there is none."""
        ...


class Quiescer(Protocol):
    """Holds the writers of some volumes of a group: one VM, or a list of mounts.

    `thaw` runs where `hold` or `freeze` succeeded, and always then.
    """

    name: str
    kind: str
    vm: str  # the VM's name in the configuration, or empty
    volumes: tuple[str, ...]  # which volumes' writers it holds
    freezes: tuple[str, ...]  # on whose own device it freezes a file system of this machine
    least: Consistency | None  # the least accepted of it; None: the group's

    @property
    def held_since(self) -> float | None:
        """When the first writer may have been held (`time.monotonic`): 0 where nobody is, None
        where that is not told apart from the beginning of `hold`. Valid after `freeze`."""
        ...

    @property
    def holds(self) -> bool:
        """Whether the writers stand still from `freeze` to `thaw`; valid after `check`."""
        ...

    def check(self) -> None:
        """As of Part."""
        ...

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """As of Part."""
        ...

    def arm(self, deadline_s: float) -> None:
        """As of Part."""
        ...

    def hold(self, until: float) -> None:
        """Hold the applications. All or nothing, but for applications without which the least
        accepted can still be reached: those are reported as failed. Raises UnavailableError."""
        ...

    def freeze(self, until: float) -> Consistency:
        """Freeze the file systems; return the consistency reached by all of it. Where it raises,
        file systems are not frozen; applications are held still, until `thaw`."""
        ...

    def still_frozen(self) -> bool:
        """As of Part: all of it."""
        ...

    def thaw(self) -> None:
        """As of Part: file systems first, then applications in reverse, each whatever befalls the
        others."""
        ...

    def close(self) -> None:
        """As of Part."""
        ...

    @property
    def unbroken(self) -> bool:
        """As of Part: all that counts for the consistency that `freeze` returned."""
        ...

    @property
    def reached(self) -> Consistency:
        """The consistency after all that has become known; `crash` where nothing was held."""
        ...

    @property
    def what(self) -> tuple[str, ...]:
        """As of Part."""
        ...

    @property
    def parts(self) -> tuple[HeldPart, ...]:
        """What was done with each, in the order of holding; empty for a quiescer of one part."""
        ...

    @property
    def image_at(self) -> datetime | None:
        """As of Part."""
        ...

    @property
    def output(self) -> str:
        """As of Part."""
        ...
