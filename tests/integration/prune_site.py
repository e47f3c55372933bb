"""A store that several processes use at once, some of them killed or standing still."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from offload.format import layout
from offload.format.layout import encode_parameters, new_parameters
from offload.images.backup import BackupImage, open_backup_image
from offload.journal import STALL_ENV, TRACE_ENV
from offload.model import BackupSource
from offload.retention import KeepRules
from offload.services import stores
from offload.services.backup import backup
from offload.services.context import Context
from offload.services.prune import PruneReport, prune
from offload.services.verify import verify
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.warm import warm_python

CHUNK = 4096
SIZE = 40 * CHUNK
LAST = KeepRules(last=1)

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[groups.shop]
volumes = ["db"]
atomic = "record"

[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
{more}
"""
SHARED = 'shared = true\ngrace = "0s"'

SCRIPT = """
import sys
from pathlib import Path
from offload.errors import OffloadError
from offload.retention import KeepRules
from offload.services.backup import backup
from offload.services.context import open_context
from offload.services.prune import prune
with open_context(Path(sys.argv[1])) as ctx:
    try:
        if sys.argv[2] == "backup":
            print(backup(ctx, "shop").backup.id)
        else:
            prune(ctx, "main", rules=KeepRules(last=1))
    except OffloadError as error:
        sys.exit(f"{error.code}: {error.message}")
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str


class Child:
    """A command in a process of its own, which may stand still at a step."""

    def __init__(self, config: Path, what: str, **env: str) -> None:
        self._program = warm_python().start("-c", SCRIPT, str(config), what, env=env)
        self.pid = self._program.pid
        self._ended = False

    def stands(self) -> bool:
        """Wait until it stands still (True) or has ended."""
        return self._program.stands()

    def resume(self) -> Ended:
        """Let it go on, each time it stands, to its end."""
        while self.stands():
            os.kill(self.pid, signal.SIGCONT)
        done = self._program.wait(60)
        self._ended = True
        return Ended(done.status, done.stdout.strip(), done.stderr.strip())

    def kill(self) -> None:
        """End it whatever it does. Idempotent."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._program.wait(60)
            self._ended = True


@dataclass
class Site:
    """An instance with one volume, and what its backups must read back as."""

    folder: Path
    ctx: Context
    random: random.Random
    taken: dict[str, bytes] = field(default_factory=dict)
    children: list[Child] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "offload.toml"

    def change(self, chunks: int = 6) -> None:
        """Random bytes into some chunks, and one chunk that was elsewhere before."""
        with (self.folder / "db.raw").open("r+b") as out:
            for slot in self.random.sample(range(SIZE // CHUNK), chunks):
                out.seek(slot * CHUNK)
                out.write(self.random.randbytes(CHUNK))
            source, to = self.random.sample(range(SIZE // CHUNK), 2)
            out.seek(source * CHUNK)
            moved = out.read(CHUNK)
            out.seek(to * CHUNK)
            out.write(moved)

    def now(self) -> bytes:
        return (self.folder / "db.raw").read_bytes()

    def back_up(self) -> str:
        ident = backup(self.ctx, "shop").backup.id
        self.taken[ident] = self.now()
        return ident

    def fill(self, count: int = 2) -> None:
        for _ in range(count):
            self.change(12)
            self.back_up()

    def prune(self) -> PruneReport:
        return prune(self.ctx, "main", rules=LAST)

    def start(self, what: str, step: str, how: str = STALL_ENV) -> Child:
        child = Child(self.config, what, **{how: step})
        self.children.append(child)
        return child

    def stalled(self, what: str, step: str) -> Child:
        child = self.start(what, step)
        assert child.stands(), child.resume()
        return child

    def steps(self, what: str) -> list[str]:
        """The steps of a command, each once, from where it deals with the store."""
        self.change()
        trace = self.folder / "trace"
        ended = self.start(what, str(trace), TRACE_ENV).resume()
        assert ended.status == 0, ended
        if what == "backup":
            self.taken[ended.out] = self.now()
        found = list(dict.fromkeys(trace.read_text().splitlines()))
        trace.unlink()
        heads = ("writer.", "store.", "backup.", "prune.", "deletion.")
        repeated = re.compile(r"erase-([2-9]|1\d)|image\.")  # how often depends on what there is
        return [s for s in found if s.startswith(heads) and not repeated.search(s)]

    def open_image(self, ident: str) -> BackupImage:
        return open_backup_image(
            BackupSource(
                store=stores.spec_of(self.ctx, "main").text(), backup=ident, volume="db",
                size_bytes=SIZE, cache_dir=self.ctx.instance.cache_dir,
            )
        )  # fmt: skip

    def check_but_for_running(self) -> None:
        """Every backup that was reported as made and is not forgotten reads back."""
        for known in self.ctx.catalog.backups(store="main"):
            if known.id in self.taken:  # not yet, where its process stands still
                image = self.open_image(known.id)
                assert image.pread(0, SIZE) == self.taken[known.id], known.id
                image.close()

    def check(self) -> None:
        """The same, and nothing that a backup needs is missing or damaged."""
        self.check_but_for_running()
        problems = verify(self.ctx, all_backups=True).problems
        assert [p for p in problems if p.backup or "missing" not in p.what] == []

    def adopt_unreported(self) -> None:
        """Recover; what was made and not reported, because its process died, holds what is now."""
        self.ctx.journal.recover()
        for known in self.ctx.catalog.backups(store="main"):
            self.taken.setdefault(known.id, self.now())

    def check_swept(self) -> None:
        """Nothing is left that nobody needs."""
        self.prune()
        assert stores.check(self.ctx, "main").orphan_packs == ()
        assert self.prune().freed_bytes == 0
        assert verify(self.ctx, all_backups=True).problems == ()
        for folder in ("tombstones", "pins", "fences"):
            assert self.objects(folder) == []

    def objects(self, folder: str) -> list[str]:
        base = self.folder / "store" / folder
        return sorted(
            p.relative_to(self.folder / "store").as_posix() for p in base.rglob("*") if p.is_file()
        )


def make_site(folder: Path, ctx_config: str = SHARED) -> tuple[Path, random.Random]:
    """The files of a site; returns its configuration."""
    chooser = random.Random(6)
    config = folder / "offload.toml"
    config.write_text(CONFIG.format(folder=folder, more=ctx_config))
    (folder / "db.raw").write_bytes(chooser.randbytes(SIZE))
    (folder / "store").mkdir()
    parameters = new_parameters(chunk_bytes=CHUNK, page_entries=4, pack_bytes=24 << 10)
    store = DiskStore(StoreSpec(url=str(folder / "store")))
    store.put(layout.STORE_OBJECT, [encode_parameters(parameters)])
    store.close()
    return config, chooser


def shift_clock(monkeypatch: pytest.MonkeyPatch, hours: float) -> None:
    """The store's clock, for this process: what is given up depends on it, and nothing else."""
    real = DiskStore.now

    def shifted(store: DiskStore) -> datetime:
        return real(store) + timedelta(hours=hours)

    monkeypatch.setattr(DiskStore, "now", shifted)
