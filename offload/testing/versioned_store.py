"""A store in memory that keeps versions and locks them, as a bucket with object lock does.

What is not locked and was deleted or replaced is gone at once: no lifecycle rule is harsher. A name
that is put again has one more version, as on servers that know no conditional put.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from offload.errors import IntegrityError, NotFoundError
from offload.store import Buffer, Version
from offload.storespec import StoreSpec
from offload.testing.memory_store import PLACES, MemoryStore, Place, StoredObject


@dataclass
class Kept:
    """One version, or a delete marker (`known` is None)."""

    id: str
    known: StoredObject | None
    modified: datetime
    until: datetime | None = None


@dataclass
class VersionedPlace(Place):
    """Where the objects are. `objects` is what is shown; `past` has all versions, oldest first."""

    past: dict[str, list[Kept]] = field(default_factory=dict)
    count: int = 0

    def add(self, name: str, known: StoredObject | None, until: datetime | None) -> None:
        """A new version or a delete marker over what there is."""
        self.count += 1
        at = known.modified if known else self.stamp()
        made = Kept(id=f"v{self.count:06d}", known=known, modified=at, until=until)
        self.past.setdefault(name, []).append(made)
        if known is None:
            self.objects.pop(name, None)
        else:
            self.objects[name] = known

    def versions(self, name: str) -> list[Kept]:
        """Those that are left, oldest first."""
        found = self.past.get(name, [])
        now = self.clock()
        left = [v for v in found[:-1] if v.known and v.until and v.until > now] + found[-1:]
        if len(left) == 1 and left[0].known is None:
            left = []
        self.past[name] = left
        return left

    def flip(self, name: str, at: int) -> None:
        """Damage one byte of what is shown, which is the newest version."""
        super().flip(name, at)
        self.past[name][-1].known = self.objects[name]


class VersionedMemoryStore(MemoryStore):
    """See `offload.store`: the contract of stores, `Versioned` and `Lockable`."""

    def __init__(self, spec: StoreSpec) -> None:
        place = PLACES.setdefault(spec.url, VersionedPlace())
        if not isinstance(place, VersionedPlace):
            raise ValueError(f"{spec.url} has no versions")  # noqa: TRY004 - it is no type of ours
        super().__init__(spec)
        self.bucket = place

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """Store the parts, as the newest version."""
        data = b"".join(parts)
        done = self.bucket.gate("put", name)
        self.bucket.add(name, StoredObject(data, self.bucket.stamp()), retain_until)
        done()
        return len(data)

    def delete(self, name: str) -> None:
        """Put a delete marker. Idempotent."""
        done = self.bucket.gate("delete", name)
        if name in self.bucket.objects:
            self.bucket.add(name, None, None)
        done()

    def versions(self, prefix: str) -> Iterator[Version]:
        """All versions below a prefix, in name order, newest first."""
        done = self.bucket.gate("versions", prefix)
        found = []
        for name in sorted(n for n in self.bucket.past if n.startswith(prefix)):
            kept = self.bucket.versions(name)
            found += [_version(name, v, latest=v is kept[-1]) for v in reversed(kept)]
        done()
        yield from found

    def get_version(self, version: Version, offset: int, length: int | None) -> bytes:
        """`length` bytes (None: all from there) of one version."""
        done = self.bucket.gate("get", version.name)
        kept = self._version(version)
        done()
        if kept is None or kept.known is None:
            raise NotFoundError(f"no version of {version.name} in {self.url}", code="no-object")
        end = None if length is None else offset + length
        data = kept.known.data[offset:end]
        if length is not None and len(data) != length:
            raise IntegrityError(f"{version.name} ends too early", code="object-short")
        return data

    def retained_until(self, version: Version) -> datetime | None:
        """Until when a version is locked; None if it is not."""
        done = self.bucket.gate("retained", version.name)
        kept = self._version(version)
        done()
        if kept is None:
            raise NotFoundError(f"no version of {version.name} in {self.url}", code="no-object")
        return kept.until

    def retain(self, version: Version, until: datetime) -> None:
        """Extend the lock of a version; an earlier date than it has changes nothing."""
        done = self.bucket.gate("retain", version.name)
        kept = self._version(version)
        if kept is not None:
            kept.until = max(until, kept.until or until)
        done()
        if kept is None:
            raise NotFoundError(f"no version of {version.name} in {self.url}", code="no-object")

    def _version(self, version: Version) -> Kept | None:
        found = self.bucket.versions(version.name)
        return next((v for v in found if v.id == version.id), None)


def _version(name: str, kept: Kept, *, latest: bool) -> Version:
    return Version(
        name=name,
        id=kept.id,
        size_bytes=len(kept.known.data) if kept.known else 0,
        modified=kept.modified,
        latest=latest,
        deleted=kept.known is None,
    )
