"""A store under object lock: what is put is locked, and what was hidden or replaced is found again.

A locked object can be neither changed nor removed, but S3 lets whoever may write put a new version
over it, or a delete marker, and then shows that. All names of a store are used once, so that of
several versions the oldest, the original, is the one that was stored, and everything newer is an
attack. Small objects (`store.json`, keys, index objects, manifests) are always read as their
originals. Packs are read as they are, since each chunk is checked against its id, and as their
originals once something in them is wrong or they are gone.

| name | locked | a delete marker |
| --- | --- | --- |
| packs, index objects | when put | hides it from listings; it can be read |
| manifests | when put | counts from the end of the lock on |
| `store.json`, keys | by the next backup | counts from the end of the lock on |
| all else | never | counts |
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby

from offload.errors import IntegrityError, NotFoundError, PolicyError
from offload.format import layout
from offload.objectlock import LockableStore, LockRules
from offload.store import Buffer, ObjectInfo, Version
from offload.storespec import StoreSpec

_LOCKED_AT_ONCE = (layout.PACKS, layout.INDEXES)
_FIRM = (layout.STORE_OBJECT, layout.KEYS, layout.INDEXES, layout.MANIFESTS)
_LISTED_WHOLE = (layout.KEYS, layout.MANIFESTS)  # by versions: what is hidden and locked is there
_CLOCKS_DIFFER_S = 900.0  # where S3 itself begins to refuse
_MANY = 20  # names of one folder, from which one listing costs less than one a name


class LockedStore:
    """See `offload.store` and `offload.objectlock.Locking`. Safe from any thread."""

    def __init__(self, inner: LockableStore, rules: LockRules) -> None:
        self.inner = inner
        self.rules = rules
        self.spec: StoreSpec = inner.spec
        self.url = inner.url
        self._mutex = threading.Lock()
        self._clock: tuple[datetime, float] | None = None
        self._placed: dict[str, datetime] = {}
        self._replaced: dict[str, Version] = {}
        self._locks: dict[tuple[str, str], datetime | None] = {}

    # -- writing ---------------------------------------------------------------------------------

    def put(
        self, name: str, parts: Sequence[Buffer], *, retain_until: datetime | None = None
    ) -> int:
        """As the contract says; packs and index objects are locked."""
        if retain_until is None and name.startswith(_LOCKED_AT_ONCE):
            retain_until = self.rules.object_until(self.clock())
        stored = self.inner.put(name, parts, retain_until=retain_until)
        if retain_until is not None:
            with self._mutex:
                self._placed[name] = retain_until
        return stored

    def delete(self, name: str) -> None:
        """Remove an object; a locked pack or index object is hidden only.

        PolicyError (`object-locked`) for what stands or falls by itself: manifests and keys.
        """
        if name == layout.STORE_OBJECT or name.startswith(_LISTED_WHOLE):
            found = self._original(name)
            until = found and self.locked_until(found)
            if until is not None:
                raise PolicyError(
                    f"{name} is locked in {self.url} until {until:%Y-%m-%d %H:%M}Z",
                    code="object-locked",
                    hint="nobody can delete it before; prune does, when the time has come",
                )
        self.inner.delete(name)

    # -- reading ---------------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        """The whole object."""
        if name.startswith(_FIRM):
            return self.inner.get_version(self._require(name), 0, None)
        return self._read(name, lambda: self.inner.get(name), 0, None)

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; see the contract."""
        if name.startswith(_FIRM):
            return self.inner.get_version(self._require(name), offset, length)
        return self._read(name, lambda: self.inner.get_range(name, offset, length), offset, length)

    def _read(
        self, name: str, usual: Callable[[], bytes], offset: int, length: int | None
    ) -> bytes:
        """What is there now, or the original where that has gone or been cut short."""
        replaced = self._replaced.get(name)
        if replaced is None:
            try:
                return usual()
            except (NotFoundError, IntegrityError):
                if not name.startswith(layout.PACKS) or not self.distrust(name):
                    raise
            replaced = self._replaced[name]
        return self.inner.get_version(replaced, offset, length)

    def size(self, name: str) -> int:
        """The object's size in bytes."""
        if name.startswith(_FIRM):
            return self._require(name).size_bytes
        replaced = self._replaced.get(name)
        return replaced.size_bytes if replaced else self.inner.size(name)

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        if name.startswith(_FIRM):
            return self._original(name) is not None
        if name.startswith(layout.VOIDS):
            return self.inner.exists(name) and self._void_counts(name)
        return self.inner.exists(name)

    def list(self, prefix: str) -> Iterator[str]:
        """Names below a folder, in name order."""
        return (info.name for info in self.infos(prefix))

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        """The same, with size and time."""
        if prefix.startswith(_LISTED_WHOLE):
            return (_info(found) for found in self._survivors(prefix))
        if prefix.startswith(layout.VOIDS):
            return (i for i in self.inner.infos(prefix) if self._void_counts(i.name))
        return self.inner.infos(prefix)

    def _survivors(self, prefix: str) -> Iterator[Version]:
        """Originals of what is visible, and of what is hidden in spite of its lock."""
        for found, visible in _originals(self.inner.versions(prefix)):
            if visible or self.locked_until(found) is not None:
                yield found

    def _void_counts(self, name: str) -> bool:
        """Not against a locked manifest: all that it needs was locked before it was put, so that
        whoever gave its writer up has destroyed nothing (docs/design/ransomware.md)."""
        manifest = self._original(layout.manifest_name(name.removeprefix(layout.VOIDS)))
        return manifest is None or self.locked_until(manifest) is None

    # -- versions --------------------------------------------------------------------------------

    def _original(self, name: str) -> Version | None:
        """The oldest version; None where there is none, or it was deleted and is not locked."""
        for found, visible in _originals(v for v in self.inner.versions(name) if v.name == name):
            if visible or self.locked_until(found) is not None:
                return found
        return None

    def _require(self, name: str) -> Version:
        found = self._original(name)
        if found is None:
            raise NotFoundError(f"no object {name} in {self.url}", code="no-object")
        return found

    def originals(self, names: Iterable[str]) -> dict[str, Version]:
        """The oldest versions of those that exist, hidden ones too."""
        found: dict[str, Version] = {}
        for folder, group in groupby(sorted(names), key=lambda name: name.partition("/")[0]):
            wanted = set(group)
            prefixes = [f"{folder}/"] if len(wanted) > _MANY else sorted(wanted)
            for prefix in prefixes:
                for version, _ in _originals(self.inner.versions(prefix)):
                    if version.name in wanted:
                        found[version.name] = version
        return found

    def hidden(self, prefix: str) -> Iterator[str]:
        """Names that are locked, and that a delete marker hides."""
        for found, visible in _originals(self.inner.versions(prefix)):
            if not visible and self.locked_until(found) is not None:
                yield found.name

    def distrust(self, name: str) -> bool:
        """Read the original of this object from now on, if there is another one."""
        if name in self._replaced:
            return False
        for found, _ in _originals(v for v in self.inner.versions(name) if v.name == name):
            if not found.latest:
                self._replaced[name] = found
                return True
        return False

    def locked_until(self, version: Version) -> datetime | None:
        """Until when a version is locked; None if it is not, or no longer."""
        key = (version.name, version.id)
        if key not in self._locks:
            self._locks[key] = self.inner.retained_until(version)
        until = self._locks[key]
        return until if until is not None and until > self.clock() else None

    def is_locked(self, name: str) -> bool:
        """Whether the original of an object is locked now."""
        found = self.originals([name]).get(name)
        return found is not None and self.locked_until(found) is not None

    def extend(self, version: Version, until: datetime) -> None:
        """Lock a version at least until then."""
        self.inner.retain(version, until)
        self._locks.pop((version.name, version.id), None)

    def placed(self) -> Mapping[str, datetime]:
        """What this process has put: until when it is locked."""
        with self._mutex:
            return dict(self._placed)

    # -- the rest --------------------------------------------------------------------------------

    def clock(self) -> datetime:
        """The store's time: asked for once, then counted on."""
        with self._mutex:
            if self._clock is None:
                there, here = self.inner.now(), datetime.now(UTC)
                if abs((there - here).total_seconds()) > _CLOCKS_DIFFER_S:
                    raise PolicyError(
                        f"refused to lock objects: here it is {here:%Y-%m-%d %H:%M}Z, in "
                        f"{self.url} {there:%Y-%m-%d %H:%M}Z, and one of the two is wrong",
                        code="clock-differs",
                        hint="set the clock of this machine: a date that is locked cannot be "
                        "taken back",
                    )
                self._clock = (there, time.monotonic())
            then, began = self._clock
        return then + timedelta(seconds=time.monotonic() - began)

    def now(self) -> datetime:
        """The store's clock."""
        return self.inner.now()

    def space_bytes(self) -> tuple[int, int] | None:
        """Of the store below."""
        return self.inner.space_bytes()

    def close(self) -> None:
        """Close the store below."""
        self.inner.close()

    def versions(self, prefix: str) -> Iterator[Version]:
        """Of the store below."""
        return self.inner.versions(prefix)

    def get_version(self, version: Version, offset: int, length: int | None) -> bytes:
        """Of the store below."""
        return self.inner.get_version(version, offset, length)

    def retained_until(self, version: Version) -> datetime | None:
        """Of the store below."""
        return self.inner.retained_until(version)

    def retain(self, version: Version, until: datetime) -> None:
        """Of the store below."""
        self.extend(version, until)


def _originals(versions: Iterable[Version]) -> Iterator[tuple[Version, bool]]:
    """Of each name the oldest version that has content, and whether the name is visible."""
    for _, group in groupby(versions, key=lambda version: version.name):
        oldest: Version | None = None
        visible = True
        for version in group:
            if version.latest and version.deleted:
                visible = False
            if not version.deleted:
                oldest = version
        if oldest is not None:
            yield oldest, visible


def _info(version: Version) -> ObjectInfo:
    return ObjectInfo(name=version.name, size_bytes=version.size_bytes, modified=version.modified)
