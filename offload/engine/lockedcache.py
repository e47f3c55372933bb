"""The block cache over a store under object lock: what was replaced is found through it, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Protocol

from offload.engine.blockcache import BlockCache, CachedStore
from offload.objectlock import Locking
from offload.store import Store, Version


class _LockedStore(Store, Locking, Protocol):
    """What is below."""


class CachedLockedStore(CachedStore):
    """See `CachedStore` and `offload.objectlock.Locking`."""

    def __init__(self, store: _LockedStore, cache: BlockCache) -> None:
        super().__init__(store, cache)
        self.locked = store
        self.rules = store.rules
        self._replaced: set[str] = set()

    def cached_as(self, name: str) -> str:
        """What was read before a pack was distrusted is not asked for again."""
        return f"{name}~original" if name in self._replaced else name

    def distrust(self, name: str) -> bool:
        """Of the store; see the contract."""
        if not self.locked.distrust(name):
            return False
        self._replaced.add(name)
        return True

    def clock(self) -> datetime:
        """Of the store."""
        return self.locked.clock()

    def placed(self) -> Mapping[str, datetime]:
        """Of the store."""
        return self.locked.placed()

    def originals(self, names: Iterable[str]) -> dict[str, Version]:
        """Of the store."""
        return self.locked.originals(names)

    def locked_until(self, version: Version) -> datetime | None:
        """Of the store."""
        return self.locked.locked_until(version)

    def is_locked(self, name: str) -> bool:
        """Of the store."""
        return self.locked.is_locked(name)

    def extend(self, version: Version, until: datetime) -> None:
        """Of the store."""
        self.locked.extend(version, until)

    def hidden(self, prefix: str) -> Iterable[str]:
        """Of the store."""
        return self.locked.hidden(prefix)


def cached(store: Store, cache: BlockCache) -> CachedStore:
    """The store through the cache, with what it can of object lock: it is a store as well."""
    if isinstance(store, Locking):
        return CachedLockedStore(store, cache)
    return CachedStore(store, cache)
