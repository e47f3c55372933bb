"""A store in memory, for tests that need thousands of operations and a clock of their own.

What is in it belongs to a `Place`, which outlives the openers, as a folder or a bucket does. Before
each operation the opener asks `Place.gate`: a test stops it there, kills it, or loses its reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from offload.errors import BusyError, IntegrityError, NotFoundError
from offload.store import Buffer, ObjectInfo
from offload.storespec import StoreSpec

_NAME = re.compile(r"[a-z0-9-][a-z0-9.-]*(/[a-z0-9-][a-z0-9.-]*)*")
_TICK = timedelta(microseconds=1)

Gate = Callable[[str, str], Callable[[], None]]
"""Called before an operation with its verb and object; what it returns is called after it."""


def open_gate(_verb: str, _name: str) -> Callable[[], None]:
    """Lets everybody pass."""
    return _nothing


def _nothing() -> None:
    pass


Found = TypeVar("Found")
Torn = Callable[[dict[str, Found], dict[str, Found]], dict[str, Found]]
"""What a listing tells that was not one instant: of the objects at its begin and at its end."""


def newest(before: dict[str, Found], after: dict[str, Found]) -> dict[str, Found]:
    """Only the later ones."""
    del before
    return after


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object. `modified` is by the place's clock."""

    data: bytes
    modified: datetime


Objects = dict[str, StoredObject]


@dataclass
class Place:
    """Where the objects of one store are. `clock` is the store's own, and may jump."""

    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    gate: Gate = open_gate
    torn: Torn[StoredObject] = newest
    objects: Objects = field(default_factory=dict)
    _last: datetime = field(default_factory=lambda: datetime.fromtimestamp(0, UTC))
    _ticks: int = 0

    def stamp(self) -> datetime:
        """The clock; while it stands still, never twice the same."""
        now = self.clock()
        self._ticks = self._ticks + 1 if now == self._last else 0
        self._last = now
        return now + self._ticks * _TICK

    def sizes(self, prefix: str) -> dict[str, int]:
        """Objects below a prefix and their bytes, past the gate."""
        return {n: len(o.data) for n, o in sorted(self.objects.items()) if n.startswith(prefix)}

    def has(self, name: str) -> bool:
        """Whether an object is there, past the gate."""
        return name in self.objects

    def newest(self, prefix: str) -> datetime | None:
        """When the newest object below a prefix was put, past the gate."""
        found = (o.modified for n, o in self.objects.items() if n.startswith(prefix))
        return max(found, default=None)

    def flip(self, name: str, at: int) -> None:
        """Damage one byte."""
        known = self.objects[name]
        data = bytearray(known.data)
        data[at] ^= 4
        self.objects[name] = replace(known, data=bytes(data))


PLACES: dict[str, Place] = {}  # by URL


class MemoryStore:
    """An opener of a place; see the contract of stores."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.url = spec.url
        self.place = PLACES.setdefault(spec.url, Place())

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """Store the parts under a new name."""
        if retain_until is not None:
            raise ValueError("memory cannot lock objects")
        _check(name)
        data = b"".join(parts)
        done = self.place.gate("put", name)
        # in one step, also for threads: the first one's stays
        mine = StoredObject(data, self.place.stamp())
        kept = self.place.objects.setdefault(name, mine)
        done()
        if kept is not mine:
            raise BusyError(f"object {name} exists already in {self.url}", code="object-exists")
        return len(data)

    def get(self, name: str) -> bytes:
        """The whole object."""
        return self._find("get", name).data

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""
        data = self._find("get", name).data[offset : offset + length]
        if len(data) != length:
            raise IntegrityError(
                f"object {name} of {self.url} ends {length - len(data)} bytes too early",
                code="object-short",
            )
        return data

    def size(self, name: str) -> int:
        """The object's size."""
        return len(self._find("size", name).data)

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        _check(name)
        done = self.place.gate("exists", name)
        found = name in self.place.objects
        done()
        return found

    def list(self, prefix: str) -> Iterator[str]:
        """Names below a folder, in name order."""
        return (info.name for info in self.infos(prefix))

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """The same, with what a listing says. What comes or goes meanwhile may be in it or not."""
        if not prefix.endswith("/"):
            raise ValueError(f"'{prefix}' is no object name with its slash")
        _check(prefix[:-1])
        done = self.place.gate("list", prefix)
        before = self._below(prefix)
        done()
        done = self.place.gate("listed", prefix)
        found = self.place.torn(before, self._below(prefix))
        done()
        for name, known in sorted(found.items()):
            yield ObjectInfo(name=name, size_bytes=len(known.data), modified=known.modified)

    def now(self) -> datetime:
        """The store's clock."""
        done = self.place.gate("now", "")
        now = self.place.stamp()
        done()
        return now

    def delete(self, name: str) -> None:
        """Remove an object. Idempotent."""
        _check(name)
        done = self.place.gate("delete", name)
        self.place.objects.pop(name, None)
        done()

    def space_bytes(self) -> tuple[int, int] | None:
        """There is no limit."""
        return None

    def close(self) -> None:
        """Nothing is held."""

    def _below(self, prefix: str) -> Objects:
        return {n: o for n, o in list(self.place.objects.items()) if n.startswith(prefix)}

    def _find(self, verb: str, name: str) -> StoredObject:
        _check(name)
        done = self.place.gate(verb, name)
        found = self.place.objects.get(name)
        done()
        if found is None:
            raise NotFoundError(f"no object {name} in {self.url}", code="no-object")
        return found


def _check(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' is no object name")
