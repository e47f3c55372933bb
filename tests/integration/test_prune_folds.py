"""Prune folds: after it, every kept backup reads back the same from everywhere that reads one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from offload.engine.fences import KEPT, give_up, sweep_fences
from offload.engine.manifests import read_folds
from offload.engine.pins import HeldPin, PinKind, images_of
from offload.extents import Ranges, normalize
from offload.format import layout
from offload.format.fold import Fold, encode_fold
from offload.format.layout import encode_parameters, new_parameters
from offload.images.backup import open_backup_image
from offload.journal import CRASH_ENV
from offload.model import Snapshot
from offload.retention import KeepRules
from offload.services import backups, stores
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.prune import PruneReport, prune
from offload.services.verify import verify
from offload.snapshots.copy import CopyProvider
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.warm import warm_python

CHUNK = 4096
SIZE = 40 * CHUNK
READER = Path(__file__).parents[1] / "independent_reader.py"

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
"""

# A process of its own, to be killed at a step.
SCRIPT = """
import sys
from pathlib import Path
from offload.retention import KeepRules
from offload.services.context import open_context
from offload.services.prune import prune
with open_context(Path(sys.argv[1])) as ctx:
    prune(ctx, "main", rules=KeepRules(last=1))
"""


def _compared(_provider: CopyProvider, older: Snapshot, newer: Snapshot) -> Ranges:
    """What a provider with change tracking would say, to the sector."""
    a, b = (Path(s.ref["path"]).read_bytes() for s in (older, newer))
    sectors = (at for at in range(0, len(b), 512) if a[at : at + 512] != b[at : at + 512])
    return normalize((at, min(at + 512, len(b))) for at in sectors)


@dataclass
class Site:
    """An instance, and what its backups must read back as."""

    ctx: Context
    folder: Path
    contents: dict[str, bytes] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(3))

    def night(self) -> str:
        """One sector of every second chunk changes; a backup."""
        path = self.folder / "db.raw"
        data = bytearray(path.read_bytes())
        for chunk in range(0, SIZE, 2 * CHUNK):
            at = chunk + self.random.randrange(CHUNK // 512) * 512
            data[at : at + 512] = self.random.randbytes(512)
        path.write_bytes(data)
        made = backup(self.ctx, "shop").backup
        assert made.parent is None or made.images[0].mode == "incremental"
        self.contents[made.id] = bytes(data)
        return made.id

    def prune(self, rules: KeepRules) -> PruneReport:
        report = prune(self.ctx, "main", rules=rules)
        alive = {b.id for b in self.ctx.catalog.backups()}
        self.contents = {i: data for i, data in self.contents.items() if i in alive}
        return report

    def check(self) -> None:
        """Everybody reads every backup as it was."""
        for known in self.ctx.catalog.backups():
            source = stores.backup_source(self.ctx, known, known.images[0])
            image = open_backup_image(source)
            try:
                assert image.pread(0, SIZE) == self.contents[known.id]
            finally:
                image.close()
        assert verify(self.ctx, all_backups=True).problems == ()
        assert stores.check(self.ctx, "main").problems == ()

    def check_from_the_text_alone(self) -> None:
        """The same by the independent reader."""
        out = self.folder / "out.raw"
        for ident, content in self.contents.items():
            argv = [sys.executable, str(READER), str(self.store), ident, "db", str(out)]
            subprocess.run(argv, check=True, timeout=60)
            assert out.read_bytes() == content

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def objects(self, prefix: str) -> list[str]:
        store = DiskStore(StoreSpec(url=str(self.store)))
        return list(store.list(prefix))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(CopyProvider, "changed", _compared)
    config = tmp_path / "offload.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "db.raw").write_bytes(os.urandom(SIZE))
    (tmp_path / "store").mkdir()
    store = DiskStore(StoreSpec(url=str(tmp_path / "store")))
    made = new_parameters(chunk_bytes=CHUNK, page_entries=4, pack_bytes=32 << 10)
    store.put(layout.STORE_OBJECT, [encode_parameters(made)])
    store.close()
    with open_context(config) as ctx:
        yield Site(ctx, tmp_path)


def test_prune_folds_what_no_kept_backup_needs_and_all_read_the_same(site: Site) -> None:
    for _ in range(12):
        site.night()
    report = site.prune(KeepRules(last=2))
    assert report.folded > 0
    assert len(site.objects(layout.FOLDS)) == 1
    site.check()
    site.check_from_the_text_alone()
    # The next night builds on the folded parent, and the next fold replaces the first.
    (first,) = site.objects(layout.FOLDS)
    for _ in range(9):
        site.night()
    site.check()
    site.prune(KeepRules(last=1))
    (second,) = site.objects(layout.FOLDS)
    assert first != second
    site.check()
    assert site.prune(KeepRules(last=1)).folded == 0


def test_prune_that_folds_frees_more_than_it_writes(site: Site) -> None:
    for _ in range(12):
        site.night()
    before = sum(p.stat().st_size for p in (site.store / "packs").rglob("*-*"))
    report = site.prune(KeepRules(last=1))
    after = sum(p.stat().st_size for p in (site.store / "packs").rglob("*-*"))
    assert 0 < report.folded_bytes < before - after


def test_prune_folds_nothing_that_a_pin_needs(site: Site) -> None:
    for _ in range(12):
        site.night()
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        newest = site.ctx.catalog.backups()[-1]
        with HeldPin(repository, PinKind.READER, images=images_of(newest)):
            assert site.prune(KeepRules(last=1)).folded == 0
    assert site.prune(KeepRules(last=1)).folded > 0
    site.check()


def test_diff_of_folded_backups_is_that_of_their_contents(site: Site) -> None:
    for _ in range(12):
        site.night()
    site.prune(KeepRules(last=2))
    a, b = (known.id for known in site.ctx.catalog.backups())
    (found,) = backups.diff(site.ctx, a, b)
    left, right = site.contents[a], site.contents[b]
    assert found.changed_bytes == 512 * sum(
        left[at : at + 512] != right[at : at + 512] for at in range(0, SIZE, 512)
    )


def test_catalog_made_anew_after_a_fold_reads_the_same(site: Site) -> None:
    for _ in range(12):
        site.night()
    site.prune(KeepRules(last=2))
    stores.check(site.ctx, "main", rebuild_catalog=True)
    site.check()


@pytest.mark.parametrize(
    "at", ["store.packs.written", "store.index.written", "prune.folded", "prune.fold.written"]
)
def test_prune_killed_while_it_folds_leaves_all_backups_whole(
    site: Site, tmp_path: Path, at: str
) -> None:
    for _ in range(12):
        site.night()
    argv = ("-c", SCRIPT, str(tmp_path / "offload.toml"))
    assert warm_python().run(*argv, env={CRASH_ENV: at}).status == -9
    site.ctx.journal.recover()
    site.check()
    site.night()
    site.check()
    site.prune(KeepRules(last=1))
    site.check()
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        alive = {known.id for known in site.ctx.catalog.backups()}
        folds = read_folds(repository).objects.values()
        assert all(set(fold.backups) <= alive for fold in folds)


def test_prune_deletes_the_late_fold_of_a_prune_that_was_given_up(site: Site) -> None:
    for _ in range(3):
        site.night()
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        assert give_up(repository, "aprune0001", "bprune0001")
        late = Fold(9, {known: {"db": "01" * 32} for known in site.contents})
        name = layout.fold_name("aprune0001")
        repository.store.put(name, [encode_fold(name, late, repository.keys)])
    site.check()
    site.prune(KeepRules(last=2))
    assert site.objects(layout.FOLDS) == []
    assert site.objects(layout.VOIDS) == [layout.void_name("aprune0001")]
    site.check()


def test_sweep_fences_keeps_the_void_of_a_fold_that_is_still_there(site: Site) -> None:
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        for writer in ("aprune0001", "aprune0002"):
            assert give_up(repository, writer, "bprune0001")
        repository.store.put(layout.fold_name("aprune0001"), [b"late"])
        sweep_fences(repository.store, repository.store.now() + 2 * KEPT)
    assert site.objects(layout.VOIDS) == [layout.void_name("aprune0001")]
