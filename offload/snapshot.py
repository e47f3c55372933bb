"""The contract of snapshot providers (one a kind of production storage)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from offload.extents import Ranges
from offload.model import Consistency, Instant, Snapshot, Source, Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeState:
    """What a volume looks like right now, before anything is frozen."""

    size_bytes: int
    sector_size: int
    identity: str
    allocated_bytes: int
    extents: int  # how many extents a snapshot has to touch; 0 where it does not matter
    estimate_s: float  # how long the snapshot of it is expected to take
    pool: str  # names the pool (file system, thin pool …) whose space it uses; "" where none is
    pool_size_bytes: int
    pool_free_bytes: int
    needed_bytes: int  # space that a snapshot takes at once in the pool
    metadata_size_bytes: int = 0  # of a pool that keeps its metadata apart; 0: it does not
    metadata_free_bytes: int = 0
    # The snapshot freezes a file system that is mounted from the volume on this host: a quiescer
    # must not have done so before.
    freezes_itself: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the snapshots of one TimeMark will be: known *before* they exist, so that the journal
    can name them. `refs[i]` belongs to `volumes[i]`."""

    timemark: str
    volumes: tuple[Volume, ...]
    refs: tuple[dict[str, str], ...]
    instant_alone: Instant  # ONE if the provider makes one instant of all of them by itself
    estimate_s: float
    notes: tuple[str, ...] = ()  # what the TimeMark's report must say of these snapshots
    # What each snapshot reaches without a quiescer; empty: crash consistency. `snapshot` fails
    # where it reached less.
    consistency: tuple[Consistency, ...] = ()


@runtime_checkable
class HoldsForChanged(Protocol):
    """A provider whose `changed` holds something on the storage while it looks: it is journalled
    before, so that it is let go of where the process dies."""

    def changed_undo(self, newer: Snapshot) -> dict[str, str]:
        """The arguments of `release_changed`. Changes nothing."""
        ...

    def release_changed(self, args: Mapping[str, str]) -> None:
        """Let go of what a dead process held. Idempotent; what others hold is never touched."""
        ...


class SnapshotProvider(Protocol):
    """Makes, reads and deletes snapshots of volumes of one kind.

    A provider is constructed with `instance`, a short id that is part of every name it makes, so
    that several instances share one pool and a leftover's owner is known.
    Thread safety: one TimeMark at a time; `changed`, `source` and `inspect` at any time.
    """

    name: str

    def inspect(self, volume: Volume) -> VolumeState:
        """Look at a volume without changing anything.

        Raises NotFoundError (`volume-missing`), UnavailableError, PrivilegeError, BusyError (in use
        in a way that makes a snapshot unsafe).
        """
        ...

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """Say what `snapshot` would make. No side effects."""
        ...

    def prepare(self, plan: Plan) -> None:
        """All slow work that may happen before the freeze (folders, flushes). Idempotent."""
        ...

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """Take all snapshots of the plan or none: on an error those already made are deleted.

        Runs while writers are held: it must not touch the catalog, start anything slow, or write
        outside the pool. Durability of the snapshots is `settle`'s job.
        """
        ...

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """After the thaw: make the snapshots durable (fsync), set them read-only."""
        ...

    def delete(self, ref: dict[str, str]) -> None:
        """Delete one snapshot, finished or half made. Idempotent: already gone is success."""
        ...

    def exists(self, ref: dict[str, str]) -> bool:
        """Whether the snapshot is there."""
        ...

    def source(self, snapshot: Snapshot) -> Source:
        """How the snapshot's bytes are read."""
        ...

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        """The ranges in which `newer` may differ from `older`, from metadata alone; None: unknown.

        May name too much, never too little. Both snapshots must exist. Ranges are in normal form,
        inside `[0, newer.size_bytes)`.
        """
        ...

    def leftovers(self, volumes: Sequence[Volume]) -> list[dict[str, str]]:
        """Refs of everything that bears this instance's name near these volumes."""
        ...
