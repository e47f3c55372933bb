"""The contract of stores: named immutable objects, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from offload.storespec import StoreSpec

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a listing says of an object. `modified` is by the store's clock, with its zone."""

    name: str
    size_bytes: int
    modified: datetime


class Store(Protocol):
    """Objects under unique names, never overwritten.

    Names are relative paths of lower-case letters, digits, `-`, `.` and `/`.
    Atomicity: an object is there with all its bytes, durable, or it is not there.
    Read after write, list after write: once `put` or `delete` has returned, every process of every
    host sees it, in `get` and in listings. The protocol of pins and fences rests on this, and on
    no clock.
    Thread safety: all methods, from any thread. Buffers are not kept after return.
    Errors: NotFoundError (`no-object`), BusyError (`object-exists`), UnavailableError (`no-space`,
    `store-unavailable`).
    """

    spec: StoreSpec
    url: str  # of the spec

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """Store the concatenation of `parts` under a new name; returns the bytes written.

        A name that exists is refused where the store can tell (BusyError); names are unique, so
        that nothing relies on it. `retain_until`: lock the object until then (see `Lockable`);
        ValueError on a store without locks.
        """
        ...

    def get(self, name: str) -> bytes:
        """The whole object."""
        ...

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; a shorter object is an IntegrityError."""
        ...

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Names that start with `prefix` (a folder with its slash), in name order."""
        ...

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """The same, with what the listing itself says of each: no request an object."""
        ...

    def now(self) -> datetime:
        """The store's clock, by which `modified` is stamped; with its zone."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object. Idempotent."""
        ...

    def space_bytes(self) -> tuple[int, int] | None:
        """Space left and the whole, or None where there is no such limit."""
        ...

    def close(self) -> None:
        """Release what is held. Idempotent."""
        ...


@runtime_checkable
class Sweepable(Protocol):
    """A store in which an unfinished `put` leaves something behind that is no object."""

    def sweep(self, part: str, *, min_age_s: float = 0.0) -> int:
        """Remove what puts of objects whose name holds `part` have left, at least that old;
        returns how many. What a put in progress has written goes with it, and the put fails."""
        ...


@runtime_checkable
class Probing(Protocol):
    """A store whose server may lack what others have."""

    def probe(self) -> dict[str, str]:
        """What it really honours, found by trying, in words; PolicyError if it is not fit."""
        ...


@runtime_checkable
class Exclusive(Protocol):
    """A store that can tell whether anybody else uses it: one folder of one machine.

    Whoever reads or writes holds it shared. A prune that gets it alone need not wait for anybody.
    """

    def exclusion_is_sound(self) -> bool:
        """Whether the lock is one that all users see, and that none can lose while it runs: true
        for a local file system only."""
        ...

    def lock(self, *, exclusive: bool, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Hold the store with others (shared) or alone (exclusive); BusyError when held otherwise.

        The lock goes with the process that holds it.
        """
        ...


@runtime_checkable
class Filling(Protocol):
    """A store that is so near that new memory for what is read costs as much as reading it."""

    def get_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from `offset`; otherwise as `Store.get_range`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of an object, as a versioned store lists them, newest first."""

    name: str
    id: str
    size_bytes: int
    modified: datetime
    latest: bool
    deleted: bool  # a delete marker: it has no content


@runtime_checkable
class Versioned(Protocol):
    """A store that keeps what was overwritten or deleted.

    `Store`'s own methods show the newest version only, and nothing behind a delete marker.
    """

    def versions(self, prefix: str) -> Iterator[Version]:
        """All versions and delete markers of the objects below a prefix, in name order, newest
        first. A whole object name is a prefix too."""
        ...

    def get_version(self, version: Version, offset: int, length: int | None) -> bytes:
        """`length` bytes (None: all from there) of one version."""
        ...


@runtime_checkable
class Lockable(Protocol):
    """A store that can keep objects from being destroyed until a date."""

    def retained_until(self, version: Version) -> datetime | None:
        """Until when a version is locked; None if it is not."""
        ...

    def retain(self, version: Version, until: datetime) -> None:
        """Extend the lock of a version; an earlier date than it has changes nothing."""
        ...
