"""Hosts of the model: each with its own configuration, catalog, journal and cache, and one volume;
what each can be told to do with the store that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from offload.config import load_config
from offload.retention import KeepRules
from offload.services.backup import backup
from offload.services.backups import delete
from offload.services.context import Context, open_context
from offload.services.copy import copy
from offload.services.copy_plan import CopyRequest
from offload.services.legalholds import hold, release
from offload.services.prune import PruneReport, prune
from offload.services.repair import RepairReport, repair
from offload.services.stores import CheckReport, check
from offload.services.verify import VerifyReport, verify
from offload.storespec import StoreSpec
from offload.testing.model_schedule import Chooser

_Result = TypeVar("_Result")

CHUNK = 4096
SLOTS = 14
SIZE = SLOTS * CHUNK + 1024

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.{name}]
provider = "copy"
path = "{folder}/{name}.raw"

[groups.{name}]
volumes = ["{name}"]
atomic = "record"

{main}
[stores.away]
kind = "disk"
path = "{away}"
shared = true
min_free = "0%"
grace = "0s"
"""

_FOLDER = """
[stores.main]
kind = "disk"
path = "{path}"
shared = true
min_free = "0%"
grace = "{grace}s"
"""

_BUCKET = """
[stores.main]
kind = "s3"
bucket = "{bucket}"
grace = "{grace}s"

[stores.main.lock]
mode = "compliance"
retain = "20m"
generation = "20m"
max = "3h"
"""

_KEY = """
[stores.main.key]
file = "{key}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the store `main` is like: a name of `KINDS`, with a key or without."""

    name: str
    key: Path | None
    grace_s: float


def main_store(kind: Kind, path: str) -> str:
    """Its table."""
    table = _BUCKET if kind.name == "locked" else _FOLDER
    text = table.format(
        path=path, bucket=path.strip("/").replace("/", "-"), grace=int(kind.grace_s)
    )
    return text + (_KEY.format(key=kind.key) if kind.key else "")


@dataclass
class Host:
    """One machine. `skew` is what its clock is wrong by; `busy` while an actor is at work here."""

    name: str
    folder: Path
    chooser: Chooser
    skew: timedelta
    busy: bool = False

    def make(self, main: str, away: str) -> None:
        """Its files. `main` is the table of the store that all share, `away` a folder."""
        self.folder.mkdir()
        self.config.write_text(
            _CONFIG.format(folder=self.folder, name=self.name, main=main, away=away)
        )
        data = bytearray(self.chooser.randbytes(SIZE))
        data[3 * CHUNK : 6 * CHUNK] = bytes(3 * CHUNK)
        self.volume.write_bytes(data)

    @property
    def config(self) -> Path:
        """Its configuration."""
        return self.folder / "offload.toml"

    def spec(self, store: str) -> StoreSpec:
        """How it opens a store."""
        return load_config(self.config).store(store).spec()

    @property
    def volume(self) -> Path:
        """The file of its volume."""
        return self.folder / f"{self.name}.raw"

    @contextmanager
    def context(self) -> Iterator[Context]:
        """The instance, opened."""
        with open_context(self.config) as ctx:
            yield ctx

    def change(self, known: Sequence[bytes]) -> bytes:
        """Write to the volume: nothing, a little, a lot; much of it content that is `known`, which
        some backup of some host may have had before. Returns what it holds now."""
        data = bytearray(self.volume.read_bytes())
        choose = self.chooser
        for _ in range(choose.choice((0, 1, 2, 4, 12))):
            slot = choose.randrange(SLOTS)
            at, end = slot * CHUNK, (slot + 1) * CHUNK
            match choose.randrange(8):
                case 0:
                    data[at:end] = choose.randbytes(CHUNK)
                case 1:
                    small = at + choose.randrange(CHUNK - 64)
                    data[small : small + 50] = choose.randbytes(50)
                case 2:
                    data[at:end] = bytes(CHUNK)
                case _:
                    data[at:end] = choose.choice(known)
        self.volume.write_bytes(data)
        return bytes(data)

    # -- what it can be told; each opens its own context, as a command does ------------------------

    def back_up(self) -> str:
        """A backup; its id."""
        return self._with(lambda ctx: str(backup(ctx, self.name, "main").backup.id))

    def prune(self, store: str, rules: KeepRules) -> PruneReport:
        """Forget and free."""
        return self._with(lambda ctx: prune(ctx, store, rules=rules))

    def rehearse(self, store: str) -> PruneReport:
        """What a prune that forgets nothing would free."""
        return self._with(lambda ctx: prune(ctx, store, rules=KeepRules(), dry_run=True))

    def known(self, store: str) -> list[str]:
        """Backups in its catalog."""
        return self._with(lambda ctx: [str(b.id) for b in ctx.catalog.backups(store=store)])

    def delete(self, backup_id: str) -> None:
        """Delete a backup."""
        self._with(lambda ctx: delete(ctx, [backup_id]))

    def hold(self, backup_id: str) -> None:
        """Place a legal hold."""
        self._with(lambda ctx: hold(ctx, [backup_id]))

    def release(self, backup_id: str) -> None:
        """End a legal hold."""
        self._with(lambda ctx: release(ctx, [backup_id]))

    def copy(self) -> None:
        """Copy all to the second store."""
        self._with(lambda ctx: copy(ctx, CopyRequest(source="main", target="away")))

    def verify(self, store: str) -> VerifyReport:
        """Verify a whole store."""
        return self._with(lambda ctx: verify(ctx, all_backups=True, store=store))

    def repair(self, store: str) -> RepairReport:
        """Mend a store."""
        return self._with(lambda ctx: repair(ctx, store))

    def recover(self) -> None:
        """Take back what dead processes left."""
        self._with(lambda ctx: ctx.journal.recover())

    def catch_up(self, store: str) -> CheckReport:
        """Check a store, and enter what it holds into the catalog."""
        return self._with(lambda ctx: check(ctx, store, rebuild_catalog=True))

    def _with(self, use: Callable[[Context], _Result]) -> _Result:
        with self.context() as ctx:
            return use(ctx)
