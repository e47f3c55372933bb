"""Object lock: until when what is written cannot be destroyed.

A backup is locked for `retain`. Packs and index objects are locked longer, by a generation at
least, and always to a border between two generations: so that a pack that new backups go on to use
has its date moved once a generation, not every night.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, runtime_checkable

from offload.errors import PolicyError
from offload.store import Lockable, Store, Version, Versioned
from offload.storespec import StoreSpec

DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LockRules:
    """`[stores.NAME.lock]`. Times in seconds."""

    mode: str  # governance, compliance
    retain_s: float
    generation_s: float
    max_s: float

    @classmethod
    def of(cls, spec: StoreSpec) -> LockRules | None:
        """From a store's options; None where nothing is locked."""
        if "lock_mode" not in spec.options:
            return None
        return cls(
            mode=spec.options["lock_mode"],
            retain_s=float(spec.options["lock_retain"]),
            generation_s=float(spec.options["lock_generation"]),
            max_s=float(spec.options["lock_max"]),
        )

    def options(self) -> dict[str, str]:
        """The inverse of `of`."""
        return {
            "lock_mode": self.mode,
            "lock_retain": str(self.retain_s),
            "lock_generation": str(self.generation_s),
            "lock_max": str(self.max_s),
        }

    def backup_until(self, now: datetime) -> datetime:
        """Until when a backup that is finished now is locked, to the second."""
        return self._capped(now + timedelta(seconds=self.retain_s), now).replace(microsecond=0)

    def object_until(self, now: datetime) -> datetime:
        """Until when packs and index objects that are written or extended now are locked."""
        least = now.timestamp() + self.retain_s + self.generation_s
        border = math.ceil(least / self.generation_s) * self.generation_s
        return self._capped(datetime.fromtimestamp(border, UTC), now)

    def _capped(self, until: datetime, now: datetime) -> datetime:
        if (until - now).total_seconds() > self.max_s:
            raise PolicyError(
                f"refused to lock objects until {until:%Y-%m-%d}: that is more than "
                f"{self.max_s / DAY_S:g} days ahead, and nobody could take it back",
                code="lock-too-long",
                hint="shorten retain, or raise max of the store's lock",
            )
        return until


@runtime_checkable
class LockableStore(Store, Versioned, Lockable, Protocol):
    """What object lock needs of a store."""


@runtime_checkable
class Locking(Protocol):
    """A store that locks what it is given. Of an object with several versions the *original* is
    the oldest: names are used once, so that every later version was put by somebody else."""

    rules: LockRules

    def clock(self) -> datetime:
        """The store's time, without a request. PolicyError (`clock-differs`)."""
        ...

    def placed(self) -> Mapping[str, datetime]:
        """What this process has put: until when it is locked."""
        ...

    def originals(self, names: Iterable[str]) -> dict[str, Version]:
        """The originals of those that exist, hidden ones too."""
        ...

    def locked_until(self, version: Version) -> datetime | None:
        """Until when a version is locked; None if it is not, or no longer."""
        ...

    def is_locked(self, name: str) -> bool:
        """Whether the original of an object is locked now."""
        ...

    def extend(self, version: Version, until: datetime) -> None:
        """Lock a version at least until then."""
        ...

    def hidden(self, prefix: str) -> Iterable[str]:
        """Objects that are locked, and that somebody has put a delete marker on."""
        ...

    def distrust(self, name: str) -> bool:
        """The content of this object is not what was stored: whether there is an original to read
        instead. It is read from now on."""
        ...
