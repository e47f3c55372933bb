"""A folder store for the model: the real one, on a file system in memory, behind gates.

Before each operation it asks the gate of its place, as the store in memory does. What it writes
bears the time of the model's clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from offload.store import Buffer, ObjectInfo
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.memory_store import Gate, Torn

_Result = TypeVar("_Result")


@dataclass
class DiskPlace:
    """Where the objects of one store are; see `memory_store.Place`."""

    root: Path
    clock: Callable[[], datetime]
    gate: Gate
    torn: Torn[ObjectInfo]

    def sizes(self, prefix: str) -> dict[str, int]:
        """Objects below a prefix and their bytes."""
        return {name: path.stat().st_size for name, path in self._below(prefix)}

    def has(self, name: str) -> bool:
        """Whether an object is there."""
        return (self.root / name).is_file()

    def newest(self, prefix: str) -> datetime | None:
        """When the newest object below a prefix was put."""
        found = (path.stat().st_mtime for _, path in self._below(prefix))
        return max((datetime.fromtimestamp(at, UTC) for at in found), default=None)

    def _below(self, prefix: str) -> Iterator[tuple[str, Path]]:
        folder, _, begin = prefix.rpartition("/")
        for path in sorted((self.root / folder).rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if name.startswith(f"{folder}/{begin}") and path.is_file():
                yield name, path

    def flip(self, name: str, at: int) -> None:
        """Damage one byte."""
        path = self.root / name
        data = bytearray(path.read_bytes())
        data[at] ^= 4
        path.chmod(0o600)
        path.write_bytes(data)


DISK_PLACES: dict[str, DiskPlace] = {}  # by URL


class GatedDiskStore:
    """An opener of a place; see the contract of stores."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self.url = spec.url
        self.place = DISK_PLACES[spec.url]
        self._disk = DiskStore(spec)

    def _through(self, verb: str, name: str, work: Callable[[], _Result]) -> _Result:
        done = self.place.gate(verb, name)
        try:
            return work()
        finally:
            done()

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """Store the parts under a new name."""

        def work() -> int:
            written = self._disk.put(name, parts, retain_until=retain_until)
            at = self.place.clock().timestamp()
            os.utime(self.place.root / name, (at, at))
            return written

        return self._through("put", name, work)

    def get(self, name: str) -> bytes:
        """The whole object."""
        return self._through("get", name, lambda: self._disk.get(name))

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""
        return self._through("get", name, lambda: self._disk.get_range(name, offset, length))

    def size(self, name: str) -> int:
        """The object's size."""
        return self._through("size", name, lambda: self._disk.size(name))

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        return self._through("exists", name, lambda: self._disk.exists(name))

    def list(self, prefix: str) -> Iterator[str]:
        """Names below a folder, in name order."""
        return (info.name for info in self.infos(prefix))

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """The same, with what a listing says. What comes or goes meanwhile may be in it or not."""

        def look() -> dict[str, ObjectInfo]:
            return {info.name: info for info in self._disk.infos(prefix)}

        before = self._through("list", prefix, look)
        found = self.place.torn(before, self._through("listed", prefix, look))
        yield from (found[name] for name in sorted(found))

    def now(self) -> datetime:
        """The store's clock."""
        return self._through("now", "", self.place.clock)

    def delete(self, name: str) -> None:
        """Remove an object. Idempotent."""
        self._through("delete", name, lambda: self._disk.delete(name))

    def sweep(self, part: str, *, min_age_s: float = 0.0) -> int:
        """Remove what unfinished puts have left."""
        return self._disk.sweep(part, min_age_s=min_age_s)

    def space_bytes(self) -> tuple[int, int] | None:
        """Of the file system."""
        return self._disk.space_bytes()

    def close(self) -> None:
        """Let go of what is open."""
        self._disk.close()
