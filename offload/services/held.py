"""The quiescers of a group in use: armed, held, frozen and thawed, each phase in parallel."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from offload.errors import CleanupError, OffloadError, UnavailableError
from offload.model import Consistency, HeldPart, QuiesceReport
from offload.progress import Progress
from offload.quiesce import InSnapshot, Quiescer


@dataclass(slots=True)
class Held:
    """One quiescer in use. `least`: the least consistency accepted of it."""

    quiescer: Quiescer
    least: Consistency
    reached: Consistency | None = None
    held: bool = False  # to be thawed
    began: float = 0.0  # of time.monotonic, as the next two
    since: float = 0.0  # when the first writer may have been held; 0: nobody was
    ended: float = 0.0
    at: datetime | None = None  # when all of it was
    freeze_ms: float = 0.0
    held_ms: float = 0.0
    error: OffloadError | None = None  # of hold or freeze
    thaw_error: OffloadError | None = None

    @property
    def good(self) -> bool:
        """Held without a break, as far as is known."""
        return self.reached is not None and self.quiescer.unbroken

    def report(self) -> QuiesceReport:
        """For the TimeMark, once it is thawed."""
        detail = self.quiescer.output
        if self.error is not None:
            detail = self.error.message
        elif not self.good:
            detail = f"the freeze had ended by itself before the snapshot was complete; {detail}"
        return QuiesceReport(
            name=self.quiescer.name,
            kind=self.quiescer.kind,
            volumes=self.quiescer.volumes,
            frozen=self.good,
            consistency=self.quiescer.reached if self.good else Consistency.CRASH,
            freeze_ms=round(self.freeze_ms, 1),
            held_ms=round(self.held_ms, 1),
            detail=detail.strip("; "),
            vm=self.quiescer.vm,
            parts=self.quiescer.parts or (self._whole(),),
            image_at=self.quiescer.image_at,
            image_in=self._image_in(),
        )

    def _image_in(self) -> str:
        if self.quiescer.image_at is None or not isinstance(self.quiescer, InSnapshot):
            return ""
        return self.quiescer.snapshot_name

    def _whole(self) -> HeldPart:
        """A quiescer of one part."""
        return HeldPart(
            name=self.quiescer.name,
            kind=self.quiescer.kind,
            ok=self.reached is not None,
            unbroken=self.quiescer.unbroken,
            what=self.quiescer.what,
            at=self.at,
            freeze_ms=round(self.freeze_ms, 1),
            held_ms=round(self.held_ms, 1),
            detail=self.error.message if self.error is not None else self.quiescer.output,
        )


class Holding:
    """All of a group. What a phase raises in one is kept in its `error`; the others go on."""

    def __init__(self, entries: Sequence[Held], deadline_s: float, progress: Progress) -> None:
        self.entries = entries
        self._deadline_s = deadline_s
        self._progress = progress
        self._until = 0.0

    def check(self) -> None:
        """What must never be frozen, or is not configured, is raised; what does not answer now is
        that quiescer's `error`, for policy to decide on."""
        self._each(self._check)
        for entry in self.entries:
            if entry.error is not None and not isinstance(entry.error, UnavailableError):
                raise entry.error

    def arm(self) -> None:
        """Start the helpers, of those without an error."""
        self._each(self._arm)

    def hold(self) -> None:
        """The applications. The deadline runs from here."""
        self._until = time.monotonic() + self._deadline_s
        self._each(self._hold)

    def freeze(self) -> None:
        """The file systems."""
        self._each(self._freeze)

    def check_unbroken(self) -> None:
        """After the snapshots: was all held until now?"""
        self._each(self._check_unbroken)

    def thaw(self) -> float:
        """Let go of all that is held; never raises. Returns for how many milliseconds writers were
        held, from the first to the last."""
        self._each(self._thaw)
        held = [entry for entry in self.entries if entry.since and entry.ended]
        if not held:
            return 0.0
        return (max(e.ended for e in held) - min(e.since for e in held)) * 1000

    def raise_stuck(self) -> None:
        """CleanupError (`thaw-failed`) where a thaw could not be confirmed."""
        stuck = [e.thaw_error for e in self.entries if e.thaw_error is not None]
        if stuck:
            raise CleanupError(
                "; ".join(error.message for error in stuck),
                code="thaw-failed",
                hint="thaw by hand at once (fsfreeze --unfreeze, virsh domfsthaw), "
                "then: offload recover",
            )

    # -- one quiescer, in a thread of its own ------------------------------------------------------

    def _each(self, work: Callable[[Held], None]) -> None:
        if not self.entries:
            return
        with ThreadPoolExecutor(max_workers=len(self.entries)) as crew:
            list(crew.map(work, self.entries))

    def _check(self, entry: Held) -> None:
        try:
            self._tell(entry, "looking")
            entry.quiescer.check()
        except OffloadError as error:
            entry.error = error
            self._tell(entry, f"cannot be held: {error.message}")

    def _arm(self, entry: Held) -> None:
        if entry.error is not None:
            return
        try:
            self._tell(entry, "getting ready")
            entry.quiescer.arm(self._deadline_s)
        except OffloadError as error:
            entry.error = error
            self._tell(entry, f"cannot be held: {error.message}")

    def _hold(self, entry: Held) -> None:
        if entry.error is not None:
            return
        self._tell(entry, "holding")
        entry.began = entry.since = time.monotonic()
        try:
            entry.quiescer.hold(self._until)
            entry.held = True
        except OffloadError as error:
            entry.error = error
            entry.since = 0.0
            self._tell(entry, f"not held: {error.message}")

    def _freeze(self, entry: Held) -> None:
        if entry.error is not None:
            return
        try:
            entry.reached = entry.quiescer.freeze(self._until)
            entry.at = datetime.now(UTC)
            self._tell(entry, "frozen")
        except OffloadError as error:
            entry.error = error
            self._tell(entry, f"not frozen: {error.message}")
        entry.freeze_ms = (time.monotonic() - entry.began) * 1000
        if entry.quiescer.held_since is not None:
            entry.since = entry.quiescer.held_since

    def _check_unbroken(self, entry: Held) -> None:
        if entry.reached is not None:
            entry.quiescer.still_frozen()

    def _thaw(self, entry: Held) -> None:
        if entry.held:
            try:
                entry.quiescer.thaw()
            except OffloadError as error:
                entry.thaw_error = error
            entry.ended = time.monotonic()
            entry.held_ms = (entry.ended - entry.since) * 1000 if entry.since else 0.0
            entry.held = False
            said = f"thawed after {entry.held_ms:.0f} ms"
            self._tell(entry, said if entry.thaw_error is None else "NOT thawed")
        entry.quiescer.close()

    def _tell(self, entry: Held, text: str) -> None:
        self._progress.status(entry.quiescer.name, text)
