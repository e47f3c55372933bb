"""One VM: its applications, then its file systems; thawed in reverse."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from offload.errors import OffloadError, UnavailableError
from offload.model import Consistency, HeldPart
from offload.quiesce import Flushes, InSnapshot, Learns, Part


@dataclass(slots=True)
class Holding:
    """A part and what became of it."""

    part: Part
    held: bool = False  # to be thawed
    reached: Consistency | None = None
    error: OffloadError | None = None
    since: float = 0.0
    at: datetime | None = None
    freeze_ms: float = 0.0
    held_ms: float = 0.0

    def freeze(self, until: float) -> None:
        """Raises what the part raises; then nothing is held."""
        self.since = time.monotonic()
        try:
            self.reached = self.part.freeze(until)
        except OffloadError as error:
            self.error = error
            raise
        finally:
            self.freeze_ms = (time.monotonic() - self.since) * 1000
        self.held = True
        self.at = datetime.now(UTC)

    def thaw(self) -> None:
        """Once; raises what the part raises."""
        if not self.held:
            return
        self.held = False
        try:
            self.part.thaw()
        finally:
            if not _flushes(self.part):
                self.held_ms = (time.monotonic() - self.since) * 1000

    @property
    def level(self) -> Consistency | None:
        """What it reached, by all that is known."""
        if self.reached is not None and isinstance(self.part, Learns):
            return self.part.reached
        return self.reached

    @property
    def good(self) -> bool:
        """Held without a break."""
        return self.reached is not None and self.part.unbroken

    def report(self) -> HeldPart:
        """For the TimeMark."""
        return HeldPart(
            name=self.part.name,
            kind=self.part.kind,
            ok=self.reached is not None,
            unbroken=self.part.unbroken,
            what=self.part.what,
            at=self.at,
            freeze_ms=round(self.freeze_ms, 1),
            held_ms=round(self.held_ms, 1),
            detail=self.error.message if self.error is not None else self.part.output,
        )


class VmQuiescer:
    """A `[vms.NAME]`. `freezer` is None for a VM that only scripts hold.

    Consistency: what the file systems reach; one level up, `application`, where they reach
    `filesystem` and each application was held too. Scripts without a freezer reach what their
    entries say, the least of them.
    """

    def __init__(
        self,
        name: str,
        *,
        volumes: tuple[str, ...],
        least: Consistency,
        applications: Sequence[Part],
        freezer: Part | None,
        freezes: tuple[str, ...] = (),
    ) -> None:
        self.name = f"vm:{name}"
        self.vm = name
        self.kind = freezer.kind if freezer is not None else applications[0].kind
        self.volumes = volumes
        self.freezes = freezes
        self.least: Consistency | None = least
        # what keeps nobody waiting is not done while others wait
        in_order = sorted(applications, key=lambda part: not _flushes(part))
        self._applications = [Holding(part) for part in in_order]
        self._freezer = Holding(freezer) if freezer is not None else None
        self._in_order = [*self._applications, *([self._freezer] if self._freezer else [])]

    @property
    def holds(self) -> bool:
        """Not where its image is of an instant of its own: a VM snapshot."""
        if self._freezer is None:
            return True
        return not _flushes(self._freezer.part)

    @property
    def held_since(self) -> float | None:
        """Of the first part that keeps somebody waiting."""
        times = [h.since for h in self._in_order if h.since and not _flushes(h.part)]
        return min(times, default=0.0)

    def check(self) -> None:
        """An application that does not answer fails the VM only if nothing less is accepted."""
        for holding in self._in_order:
            self._try(holding, holding.part.check)

    def undos(self) -> list[tuple[str, dict[str, str]]]:
        """Of all parts: file systems are intended last, so they are thawed first."""
        return [undo for holding in self._in_order for undo in holding.part.undos()]

    def arm(self, deadline_s: float) -> None:
        """As `check`."""
        for holding in self._in_order:
            self._try(holding, partial(holding.part.arm, deadline_s))

    def _try(self, holding: Holding, work: Callable[[], None]) -> None:
        if holding.error is not None:
            return
        try:
            work()
        except UnavailableError as error:
            if self._needs(holding):
                raise
            holding.error = error

    def _needs(self, holding: Holding) -> bool:
        """Whether the least accepted cannot be reached without it."""
        return (
            holding is self._freezer
            or self._freezer is None
            or (self.least is Consistency.APPLICATION)
        )

    def hold(self, until: float) -> None:
        """The applications, in the configured order; first those that keep nobody waiting."""
        for holding in self._applications:
            self._try(holding, partial(holding.freeze, until))

    def freeze(self, until: float) -> Consistency:
        """The file systems; the consistency of the VM."""
        if self._freezer is not None:
            self._freezer.freeze(until)
        return self._level()

    def _level(self) -> Consistency:
        """What is reached by all that holds (still)."""
        levels = [h.reached for h in self._applications if h.reached is not None and h.good]
        whole = len(levels) == len(self._applications)
        if self._freezer is None:
            return min(levels, key=lambda c: c.rank) if whole else Consistency.CRASH
        base = self._freezer.level
        if base is None or not self._freezer.good:
            return Consistency.CRASH
        if base is Consistency.APPLICATION and not whole:
            return Consistency.FILESYSTEM  # what its writers in the guest held is not all of it
        if base is Consistency.FILESYSTEM and self._applications and whole:
            return min(levels, key=lambda c: c.rank)
        return base

    @property
    def reached(self) -> Consistency:
        """The consistency after all that has become known since `freeze`."""
        return self._level()

    def still_frozen(self) -> bool:
        """Whether the file systems (without a freezer: the scripts) are held without a break.

        An application whose hold broke lowers `reached`, and does not undo what the rest reached.
        """
        results = [h.part.still_frozen() for h in self._in_order if h.reached is not None]
        return all(results) or self.unbroken

    def thaw(self) -> None:
        """File systems first, then applications in reverse. Idempotent."""
        with contextlib.ExitStack() as stack:
            for holding in self._in_order:
                stack.callback(holding.thaw)  # an ExitStack goes backwards, and on after an error

    def close(self) -> None:
        """As of Quiescer; thaws what is held."""
        with contextlib.ExitStack() as stack:
            for holding in self._in_order:
                stack.callback(holding.part.close)
            self.thaw()

    @property
    def unbroken(self) -> bool:
        """Of the file systems; of the scripts where there is no freezer."""
        if self._freezer is not None:
            return self._freezer.good
        return all(holding.good for holding in self._applications)

    @property
    def what(self) -> tuple[str, ...]:
        """Of all parts."""
        return tuple(what for holding in self._in_order for what in holding.part.what)

    @property
    def parts(self) -> tuple[HeldPart, ...]:
        """In the order of holding; what was never tried is not there."""
        return tuple(h.report() for h in self._in_order if h.since or h.error is not None)

    @property
    def image_at(self) -> datetime | None:
        """Of the file systems."""
        return self._freezer.part.image_at if self._freezer is not None else None

    @property
    def snapshot_name(self) -> str:
        """Of the file systems."""
        part = self._freezer.part if self._freezer is not None else None
        return part.snapshot_name if isinstance(part, InSnapshot) else ""

    @property
    def output(self) -> str:
        """All that was noticed, a line each."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for holding in self._in_order:
            if holding.error is not None:
                yield f"{holding.part.name}: {holding.error.message}"
            elif holding.part.output:
                yield holding.part.output


def _flushes(part: Part) -> bool:
    return isinstance(part, Flushes) and part.holds_nothing
