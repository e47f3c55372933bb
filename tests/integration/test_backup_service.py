"""Backup, verify, diff, prune and recovery as services, on a disk store with small chunks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from offload import compose
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.errors import BusyError, IntegrityError, OffloadError
from offload.extents import Ranges, align, normalize
from offload.format import layout
from offload.format.layout import encode_parameters, new_parameters
from offload.format.pack import FILE_HEADER, Entry, Kind, read_footer
from offload.image import Image
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.model import BackupSource, Snapshot
from offload.retention import KeepRules
from offload.run import Completed
from offload.services import backups, stores
from offload.services.backup import BackupReport, backup
from offload.services.context import Context, open_context
from offload.services.prune import prune
from offload.services.verify import Problem, VerifyOptions, verify
from offload.snapshots.copy import CopyProvider
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec
from offload.testing.warm import warm_python

CHUNK = 4096
SIZES = {"db": 61 * CHUNK + 1024, "web": 20 * CHUNK}

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[volumes.web]
provider = "copy"
path = "{folder}/web.raw"

[groups.shop]
volumes = ["db", "web"]
atomic = "record"

[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
"""

# A process of its own, to be killed at a step, or to run beside another.
SCRIPT = """
import sys
from pathlib import Path
from offload.retention import KeepRules
from offload.services.backup import backup
from offload.services.context import open_context
from offload.services.prune import prune
with open_context(Path(sys.argv[1])) as ctx:
    if sys.argv[2] == "backup":
        print(backup(ctx, "shop").backup.id)
    else:
        prune(ctx, "main", rules=KeepRules(last=1))
"""


class TrackingProvider(CopyProvider):
    """A copy that says what changed: as it is told to by the test."""

    answers: ClassVar[dict[str, Callable[[Path, Path], Ranges | None]]] = {}

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        answer = self.answers.get(newer.volume, compared)
        return answer(Path(older.ref["path"]), Path(newer.ref["path"]))


def compared(older: Path, newer: Path) -> Ranges:
    """The truth, to the sector."""
    a, b = older.read_bytes(), newer.read_bytes()
    return normalize(
        (at, min(at + 512, len(b)))
        for at in range(0, len(b), 512)
        if a[at : at + 512] != b[at : at + 512]
    )


def nothing_changed(_older: Path, _newer: Path) -> Ranges:
    """A lie."""
    return []


@dataclass
class Site:
    """An instance with two volumes and a store, and what its backups must read back as."""

    folder: Path
    ctx: Context
    random: random.Random
    taken: dict[str, dict[str, bytes]]

    @property
    def config(self) -> Path:
        return self.folder / "offload.toml"

    def volume(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    def write(self, name: str, at: int, data: bytes) -> None:
        with self.volume(name).open("r+b") as out:
            out.seek(at)
            out.write(data)

    def scribble(self, name: str, count: int = 5, most: int = 2000) -> None:
        for _ in range(count):
            length = self.random.randrange(1, most)
            self.write(
                name, self.random.randrange(SIZES[name] - length), self.random.randbytes(length)
            )

    def back_up(self) -> BackupReport:
        report = backup(self.ctx, "shop")
        self.taken[report.backup.id] = self.now()
        return report

    def now(self) -> dict[str, bytes]:
        return {name: self.volume(name).read_bytes() for name in SIZES}

    def open_image(self, backup_id: str, volume: str) -> Image:
        source = BackupSource(
            store=str(self.folder / "store"), backup=backup_id, volume=volume,
            size_bytes=SIZES[volume], cache_dir=self.ctx.instance.cache_dir,
        )  # fmt: skip
        return compose.open_image(source)

    def check_readable(self) -> None:
        known = {b.id for b in self.ctx.catalog.backups(store="main")}
        for ident in known & set(self.taken):
            for volume, data in self.taken[ident].items():
                image = self.open_image(ident, volume)
                assert image.pread(0, len(data)) == data
                image.close()

    def check_clean(self) -> None:
        assert verify(self.ctx, all_backups=True).problems == ()
        report = stores.check(self.ctx, "main")
        assert report.problems == ()

    def objects(self, folder: str) -> list[str]:
        base = self.folder / "store" / folder
        return sorted(
            p.relative_to(self.folder / "store").as_posix() for p in base.rglob("*") if p.is_file()
        )

    def run(self, what: str, **env: str) -> Completed:
        return warm_python().run("-c", SCRIPT, str(self.config), what, env=env)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setitem(compose.PROVIDERS, "copy", f"{__name__}:TrackingProvider")
    monkeypatch.setattr(TrackingProvider, "answers", {})
    config = tmp_path / "offload.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    chooser = random.Random(4)
    for name, size in SIZES.items():
        data = bytearray(size)
        for slot in range(0, size // CHUNK, 2):
            data[slot * CHUNK : (slot + 1) * CHUNK] = chooser.randbytes(CHUNK)
        data[-700:] = chooser.randbytes(700)
        (tmp_path / f"{name}.raw").write_bytes(data)
    (tmp_path / "store").mkdir()
    parameters = new_parameters(chunk_bytes=CHUNK, page_entries=4, pack_bytes=32 << 10)
    store = DiskStore(StoreSpec(url=str(tmp_path / "store")))
    store.put(layout.STORE_OBJECT, [encode_parameters(parameters)])
    store.close()
    with open_context(config) as ctx:
        yield Site(tmp_path, ctx, chooser, {})


def test_backup_incremental_chain_reads_back_and_reads_only_changes(site: Site) -> None:
    first = site.back_up()
    assert [i.mode for i in first.images] == ["full", "full"]
    for _ in range(4):
        site.scribble("db")
        report = site.back_up()
        assert [i.mode for i in report.images] == ["incremental", "incremental"]
        assert report.images[0].read_bytes < SIZES["db"] / 3
        assert report.images[1].looked_at_bytes == 0
    assert report.images[1].read_bytes <= 64 << 10  # the sample of what is called unchanged
    site.check_readable()
    site.check_clean()


def test_diff_is_exact_to_the_sector(site: Site) -> None:
    a = site.back_up().backup.id
    site.scribble("db", 7)
    site.write("web", 3 * CHUNK, bytes(100))
    b = site.back_up().backup.id
    for left, right in ((a, b), (b, a), (a, a)):
        for found in backups.diff(site.ctx, left, right):
            x, y = site.taken[left][found.volume], site.taken[right][found.volume]
            wanted = [
                (at, at + 512)
                for at in range(0, len(x), 512)
                if x[at : at + 512] != y[at : at + 512]
            ]
            assert found.ranges == align(normalize(wanted), 512, len(x))
            assert found.changed_bytes == sum(e - s for s, e in found.ranges)


def test_backup_of_a_lying_change_tracking_compares_all_and_raises_an_alarm(site: Site) -> None:
    site.back_up()
    TrackingProvider.answers = {"db": nothing_changed}
    for slot in range(0, 60, 2):
        site.write("db", slot * CHUNK + 9, b"changed")
    report = site.back_up()
    assert len(report.alarms) == 1
    assert "volume db" in report.alarms[0]
    assert [i.mode for i in report.images] == ["full", "incremental"]
    assert site.ctx.catalog.backup(report.backup.id).alarms == report.alarms
    site.check_readable()


def test_backup_resized_volume_is_read_in_full(site: Site) -> None:
    site.back_up()
    with site.volume("web").open("ab") as out:
        out.write(b"more" * 300)
    report = site.back_up()
    assert report.images[1].mode == "full"
    assert "size" in report.images[1].reason
    ident = report.backup.id
    image = compose.open_image(
        BackupSource(
            store=str(site.folder / "store"),
            backup=ident,
            volume="web",
            size_bytes=SIZES["web"] + 1200,
            cache_dir=site.ctx.instance.cache_dir,
        )
    )
    assert image.pread(0, SIZES["web"] + 1200) == site.volume("web").read_bytes()
    image.close()
    site.check_clean()


def test_backup_that_fails_leaves_nothing_in_the_store(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.back_up()
    before = [site.objects(f) for f in ("packs", "index", "manifests", "tmp")]
    site.scribble("db", 20)
    real = DiskStore.put

    def failing(store: DiskStore, name: str, parts: object) -> int:
        if name.startswith("index/"):
            raise OffloadError("the store fails")
        return real(store, name, parts)  # type: ignore[arg-type]

    monkeypatch.setattr(DiskStore, "put", failing)
    with pytest.raises(OffloadError, match="the store fails"):
        backup(site.ctx, "shop")
    monkeypatch.undo()
    assert [site.objects(f) for f in ("packs", "index", "manifests", "tmp")] == before
    assert site.ctx.journal.leftovers() == []


# -- prune ---------------------------------------------------------------------------------------


def test_prune_between_backups_keeps_the_kept_readable_and_frees(site: Site) -> None:
    for turn in range(9):
        site.scribble("db", 4)
        if turn % 3 == 1:
            site.write("web", 0, site.random.randbytes(10 * CHUNK))
        site.back_up()
        if turn % 3 == 2:
            before = sum((site.folder / "store" / p).stat().st_size for p in site.objects("packs"))
            report = prune(site.ctx, "main", rules=KeepRules(last=2))
            after = sum((site.folder / "store" / p).stat().st_size for p in site.objects("packs"))
            assert len([v for v in report.verdicts if v.kept]) == 2
            assert report.packs_deleted + report.packs_rewritten > 0
            assert after < before
            site.check_readable()
            site.check_clean()
            assert stores.check(site.ctx, "main").orphan_packs == ()
    assert len(site.ctx.catalog.backups(store="main")) == 2


def test_prune_dry_run_says_the_same_and_changes_nothing(site: Site) -> None:
    for _ in range(3):
        site.scribble("db", 10)
        site.back_up()
    before = [site.objects(f) for f in ("packs", "index", "manifests")]
    would = prune(site.ctx, "main", rules=KeepRules(last=1), dry_run=True)
    assert [site.objects(f) for f in ("packs", "index", "manifests")] == before
    did = prune(site.ctx, "main", rules=KeepRules(last=1))
    assert (would.packs_deleted, would.packs_rewritten, would.freed_bytes) == (
        did.packs_deleted, did.packs_rewritten, did.freed_bytes,
    )  # fmt: skip
    assert prune(site.ctx, "main", rules=KeepRules(last=1)).freed_bytes == 0


@pytest.mark.parametrize("what", ["missing pack", "missing manifest", "damaged manifest",
                                  "missing index"])  # fmt: skip
def test_prune_of_a_store_with_something_missing_deletes_nothing(site: Site, what: str) -> None:
    for _ in range(3):
        site.scribble("db", 10)
        site.back_up()
    folder = {"missing pack": "packs", "missing index": "index"}.get(what, "manifests")
    victim = site.folder / "store" / site.objects(folder)[-1]
    if what == "damaged manifest":
        _flip(victim, 99)
    else:
        victim.unlink()
    before = [site.objects(f) for f in ("packs", "index", "manifests")]
    with pytest.raises(IntegrityError):
        prune(site.ctx, "main", rules=KeepRules(last=3))
    assert [site.objects(f) for f in ("packs", "index", "manifests")] == before
    assert len(site.ctx.catalog.backups(store="main")) == 3


def test_prune_with_a_damaged_footer_loses_no_chunk(site: Site) -> None:
    for _ in range(3):
        site.scribble("db", 10)
        site.back_up()
    pack = site.folder / "store" / site.objects("packs")[0]
    entries = _entries(site, pack)
    _flip(pack, (pack.stat().st_size - 30) * 8)
    _flip(pack, (entries[1].offset + 3) * 8)  # and a record header: the scan stops there
    prune(site.ctx, "main", rules=KeepRules(last=2))
    site.check_readable()


# -- verify finds any flipped bit ----------------------------------------------------------------


def _flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit >> 3] ^= 1 << (bit & 7)
    path.chmod(0o600)
    path.write_bytes(raw)


def _keys(site: Site) -> Repository:
    return Repository.open(
        DiskStore(StoreSpec(url=str(site.folder / "store"))), site.ctx.instance.cache_dir
    )


def _entries(site: Site, pack: Path) -> list[Entry]:
    repository = _keys(site)
    raw = pack.read_bytes()
    repository.close()
    name = pack.relative_to(site.folder / "store").as_posix()
    return read_footer(name, len(raw), lambda o, n: raw[o : o + n], repository.keys)


def _hits(site: Site, ident: bytes) -> set[tuple[str, str, int, int]]:
    """Every backup, volume and range that a data or delta chunk is part of."""
    repository = _keys(site)
    found: set[tuple[str, str, int, int]] = set()
    for known in site.ctx.catalog.backups(store="main"):
        for image in known.images:
            shape = repository.shape(image.size_bytes)
            tree = TreeReader(repository, bytes.fromhex(image.root), shape)
            for slot, leaf in tree.data_slots():
                if ident in (leaf.base, *leaf.deltas):
                    found.add((known.id, image.volume, *shape.slot_range(slot)))
    repository.close()
    return found


def _covered(problems: tuple[Problem, ...], hit: tuple[str, str, int, int]) -> bool:
    ident, volume, start, end = hit
    return any(
        p.backup == ident and p.volume == volume and p.offset <= start
        and end <= p.offset + p.length
        for p in problems
    )  # fmt: skip


@pytest.fixture
def chain(site: Site) -> Site:
    """Three backups, the later ones with deltas."""
    for _ in range(3):
        site.scribble("db", 4, 600)
        site.back_up()
    site.check_clean()
    return site


def _no_cache(site: Site) -> None:
    shutil.rmtree(site.ctx.instance.cache_dir)


@pytest.mark.parametrize("cached", [True, False])
def test_verify_all_finds_a_flipped_bit_anywhere_in_packs(chain: Site, cached: bool) -> None:
    chooser = random.Random(7)
    packs = [chain.folder / "store" / p for p in chain.objects("packs")]
    for pack in packs:
        entries, raw = _entries(chain, pack), pack.read_bytes()
        wanted = {e: _hits(chain, e.id) for e in entries if e.kind != Kind.PAGE}
        foot = entries[-1].end
        spots = [
            chooser.randrange(len(FILE_HEADER)), foot + chooser.randrange(52 * len(entries)),
            *(len(raw) - 64 + n for n in chooser.sample(range(64), 6)),
        ]  # fmt: skip
        for entry in chooser.sample(entries, min(4, len(entries))):
            spots += [chooser.randrange(entry.offset, entry.payload_offset),
                      chooser.randrange(entry.payload_offset, entry.end)]  # fmt: skip
        for spot in spots:
            _flip(pack, spot * 8 + chooser.randrange(8))
            if not cached:
                _no_cache(chain)
            problems = verify(chain.ctx, all_backups=True).problems
            assert problems, (pack.name, spot)
            for entry in entries:
                if entry.payload_offset <= spot < entry.end:
                    assert any(p.backup for p in problems)
                    for hit in wanted.get(entry, ()):
                        assert _covered(problems, hit), (hit, problems)
            pack.write_bytes(raw)
    assert verify(chain.ctx, all_backups=True).problems == ()


@pytest.mark.parametrize("folder", ["index", "manifests"])
def test_verify_all_finds_a_flipped_bit_in_small_objects(chain: Site, folder: str) -> None:
    chooser = random.Random(8)
    for name in chain.objects(folder):
        path = chain.folder / "store" / name
        raw = path.read_bytes()
        for bit in chooser.sample(range(len(raw) * 8), 6):
            _flip(path, bit)
            problems = verify(chain.ctx, all_backups=True).problems
            assert problems
            if folder == "manifests":
                assert {p.backup for p in problems} == {path.name}
            path.write_bytes(raw)


def test_verify_with_a_flipped_bit_in_the_store_description_is_an_integrity_error(
    chain: Site,
) -> None:
    path = chain.folder / "store" / "store.json"
    for bit in random.Random(9).sample(range(path.stat().st_size * 8), 10):
        raw = path.read_bytes()
        _flip(path, bit)
        with pytest.raises(IntegrityError):
            verify(chain.ctx, all_backups=True)
        path.write_bytes(raw)


def _first_pack(site: Site) -> Path:
    """The first pack of the oldest backup: all later ones need chunks of it."""
    oldest = site.ctx.catalog.backups(store="main")[0].id
    return site.folder / "store" / layout.pack_name(oldest, 1)


@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_verify_all_names_every_range_of_a_lost_pack(chain: Site, how: str) -> None:
    pack = _first_pack(chain)
    entries = _entries(chain, pack)
    cut = 0 if how != "cut" else entries[len(entries) // 2].payload_offset
    wanted = [
        hit for e in entries if e.kind != Kind.PAGE and e.end > cut for hit in _hits(chain, e.id)
    ]
    assert wanted
    if how == "missing":
        pack.unlink()
    else:
        pack.chmod(0o600)
        os.truncate(pack, cut)
    problems = verify(chain.ctx, all_backups=True).problems
    assert all(_covered(problems, hit) for hit in wanted)
    named = verify(chain.ctx, [chain.ctx.catalog.backups()[0].id]).problems
    assert {(p.volume, p.offset) for p in named if p.length} <= {
        (p.volume, at) for p in problems for at in range(p.offset, p.offset + p.length, 512)
    }
    assert named


def test_verify_sample_of_everything_finds_what_a_full_one_does(chain: Site) -> None:
    pack = _first_pack(chain)
    victim = next(e for e in _entries(chain, pack) if e.kind == Kind.DATA)
    wanted = _hits(chain, victim.id)
    _flip(pack, victim.payload_offset * 8)
    whole = verify(chain.ctx, all_backups=True)
    sampled = verify(chain.ctx, all_backups=True, options=VerifyOptions(sample=1.0))
    for report in (whole, sampled):
        assert all(_covered(report.problems, hit) for hit in wanted)
    ranges = [
        {(p.backup, p.volume, p.offset, p.length) for p in r.problems} for r in (whole, sampled)
    ]
    assert ranges[0] == ranges[1]
    assert sampled.sampled == 1.0


def test_verify_notes_the_result_in_the_catalog(chain: Site) -> None:
    assert verify(chain.ctx, all_backups=True).backups == 3
    pack = _first_pack(chain)
    pack.unlink()
    report = verify(chain.ctx, all_backups=True)
    assert {p.backup for p in report.problems if p.length} == set(chain.taken)


def test_damaged_index_object_falls_back_to_the_packs(chain: Site) -> None:
    for name in chain.objects("index"):
        _flip(chain.folder / "store" / name, 80)
    _no_cache(chain)
    chain.check_readable()
    chain.scribble("db")
    chain.back_up()
    chain.check_readable()


def test_missing_index_object_is_reported_and_reading_says_what_is_missing(chain: Site) -> None:
    """The chunks are still in the packs, which `store check` shows as known to no index object."""
    victim = chain.objects("index")[0]
    (chain.folder / "store" / victim).unlink()
    assert any(p.backup for p in verify(chain.ctx, all_backups=True).problems)
    report = stores.check(chain.ctx, "main")
    assert report.problems
    assert report.orphan_packs
    with pytest.raises(IntegrityError) as caught:
        chain.check_readable()
    assert caught.value.code == "chunk-missing"


# -- several at once, and death at any step ------------------------------------------------------


def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskStore, "lock", _impatient(DiskStore.lock))


def _impatient(real: Callable[..., object]) -> Callable[..., object]:
    def lock(store: DiskStore, *, exclusive: bool, wait_s: float = 0.0) -> object:
        return real(store, exclusive=exclusive, wait_s=min(wait_s, 0.1))

    return lock


def test_two_backups_at_once_both_succeed_and_share(site: Site) -> None:
    site.scribble("db", 20)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(site.config), "backup"],
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    try:
        for child in children:
            out, _ = child.communicate(timeout=60)
            assert child.returncode == 0
            site.taken[out.strip()] = site.now()
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert len(site.ctx.catalog.backups(store="main")) == 3
    site.check_readable()
    assert all(
        "readers use another" not in p.what for p in verify(site.ctx, all_backups=True).problems
    )
    site.check_clean()


def test_prune_beside_others_goes_on_and_who_needs_the_store_alone_is_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        site.write("web", 0, site.random.randbytes(10 * CHUNK))
        site.back_up()
    _short_waits(monkeypatch)
    with stores.opened(site.ctx, "main", exclusive=False):
        report = prune(site.ctx, "main", rules=KeepRules(last=1))
        assert report.freed_bytes > 0
        assert report.waiting == ()
    assert len(site.ctx.catalog.backups(store="main")) == 1
    with stores.opened(site.ctx, "main", exclusive=True):
        with pytest.raises(BusyError) as refused:
            backup(site.ctx, "shop")
        assert refused.value.code == "store-busy"
    assert len(site.ctx.catalog.backups(store="main")) == 1
    assert site.ctx.journal.leftovers() == []
    site.check_readable()
    site.check_clean()


def _traced(site: Site, what: str) -> list[str]:
    trace = site.folder / "trace"
    done = site.run(what, **{TRACE_ENV: str(trace)})
    assert done.status == 0, done.stderr
    found = trace.read_text().splitlines()
    trace.unlink()
    return [s for s in dict.fromkeys(found) if not s.startswith(("undo.", "timemark."))]


def test_backup_killed_at_any_step_leaves_no_garbage_or_a_whole_backup(site: Site) -> None:
    steps = _traced(site, "backup")
    assert {"backup.images.written", "store.packs.written", "store.index.written",
            "backup.manifest.before", "backup.manifest.written"} <= set(steps)  # fmt: skip
    for step in steps:
        site.scribble("db", 6)
        before = [site.objects(f) for f in ("packs", "index", "manifests")]
        done = site.run("backup", **{CRASH_ENV: step})
        if done.status == 0:
            continue  # a step of the first backup only
        assert done.status == -signal.SIGKILL, done.stderr
        site.ctx.journal.recover()
        assert site.objects("tmp") == []
        known = {b.id for b in site.ctx.catalog.backups(store="main")}
        assert {n.rpartition("/")[2] for n in site.objects("manifests")} == known
        after = [site.objects(f) for f in ("packs", "index", "manifests")]
        if step in ("store.index.written", "backup.manifest.before"):
            # other writers may have built on it from here on: only a prune may tell
            assert after[2] == before[2]
        elif after[2] == before[2]:
            assert after == before, step
        site.check_clean()
    prune(site.ctx, "main", rules=KeepRules(last=1))
    site.check_clean()
    assert stores.check(site.ctx, "main").orphan_packs == ()
    assert len(site.objects("index")) == 1
    site.back_up()
    site.check_readable()


def test_prune_killed_at_any_step_keeps_what_is_kept_and_the_next_frees_the_rest(
    site: Site,
) -> None:
    def fill() -> None:
        for _ in range(2):
            site.scribble("db", 15)
            site.write("web", 0, site.random.randbytes(8 * CHUNK))
            site.back_up()

    # which chunks lie together is chance, and with it whether any has to be copied
    wanted = {"prune.packs.copied", "prune.index.written", "prune.indexes.deleted",
              "prune.pack.deleted"}  # fmt: skip
    steps: list[str] = []
    for _ in range(8):
        fill()
        steps = _traced(site, "prune")
        if wanted <= set(steps):
            break
    assert wanted <= set(steps)
    for step in steps:
        for _ in range(8):
            fill()
            done = site.run("prune", **{CRASH_ENV: step})
            if done.status != 0:
                break
        assert done.status == -signal.SIGKILL, (step, done.stderr)
        site.ctx.journal.recover()
        known = {b.id for b in site.ctx.catalog.backups(store="main")}
        assert {n.rpartition("/")[2] for n in site.objects("manifests")} == known
        site.check_readable()
        site.check_clean()
        prune(site.ctx, "main", rules=KeepRules(last=1))
        site.check_readable()
        site.check_clean()
        assert stores.check(site.ctx, "main").orphan_packs == ()
        assert prune(site.ctx, "main", rules=KeepRules(last=1)).freed_bytes == 0


def test_backup_that_built_on_one_killed_before_its_manifest_stays_whole(site: Site) -> None:
    """Another host's backup may find the chunks of one that never got its manifest."""
    site.back_up()
    site.scribble("db", 10)
    done = site.run("backup", **{CRASH_ENV: "backup.manifest.before"})
    assert done.status == -signal.SIGKILL
    site.back_up()  # before anybody has recovered
    site.ctx.journal.recover()
    site.check_readable()
    site.check_clean()
    prune(site.ctx, "main", rules=KeepRules(last=1))
    site.check_readable()
    site.check_clean()


def test_verify_of_chunks_stored_twice_reports_the_damaged_copy(site: Site) -> None:
    """Two writers at once may both store a chunk; readers use one copy."""
    site.back_up()
    name = site.objects("packs")[0]
    pack = site.folder / "store" / name
    twin = site.folder / "store" / "packs/zz/zzzzzzzzzz-000001"
    twin.parent.mkdir()
    shutil.copyfile(pack, twin)
    entry = _entries(site, pack)[0]
    _flip(twin, entry.payload_offset * 8)
    problems = verify(site.ctx, all_backups=True).problems
    assert {p.backup for p in problems} == {""}
    assert any("another copy" in p.what for p in problems)


# -- a reader made from the specification alone --------------------------------------------------

READER = Path(__file__).parents[1] / "independent_reader.py"


@pytest.mark.parametrize("options", [[], ["--packs"]])
def test_independent_reader_restores_every_backup(chain: Site, options: list[str]) -> None:
    deltas = [
        e for p in chain.objects("packs") for e in _entries(chain, chain.folder / "store" / p)
        if e.kind == Kind.DELTA
    ]  # fmt: skip
    assert deltas
    out = chain.folder / "out.raw"
    for ident, volumes in chain.taken.items():
        for volume, data in volumes.items():
            argv = [str(chain.folder / "store"), ident, volume, str(out), *options]
            done = subprocess.run(
                [sys.executable, "-I", str(READER), *argv], capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
            assert out.read_bytes() == data


def test_independent_reader_stops_at_damage_and_is_short(chain: Site) -> None:
    pack = _first_pack(chain)
    victim = next(e for e in _entries(chain, pack) if e.kind == Kind.DATA)
    _flip(pack, victim.payload_offset * 8)
    ident = next(iter(chain.taken))
    argv = [str(chain.folder / "store"), ident, "db", str(chain.folder / "out.raw")]
    done = subprocess.run(
        [sys.executable, "-I", str(READER), *argv], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "damaged" in done.stderr
    source = READER.read_text()
    assert len(source.splitlines()) <= 200
    assert "import offload" not in source
    assert "from offload" not in source


# -- bounded memory ------------------------------------------------------------------------------

MEMORY = """
import os, random, sys
from pathlib import Path
from offload.engine.packwriter import PackWriter
from offload.engine.repository import Repository
from offload.engine.writeimage import Job, write_image
from offload.format import layout
from offload.images.file import FileImage
from offload.model import RawSource
from offload.storespec import StoreSpec
from offload.stores.disk import DiskStore
folder = Path(sys.argv[1])
store = DiskStore(StoreSpec(url=str(folder / "store")))
store.put(layout.STORE_OBJECT, [layout.encode_parameters(layout.new_parameters())])
repository = Repository.open(store, folder / "cache")
size = (folder / "image.raw").stat().st_size
image = FileImage(RawSource(path=folder / "image.raw", size_bytes=size))
with PackWriter(repository, "abcdefghjk") as writer:
    job = Job(image=image, shape=repository.shape(size), parent=None, changed=None,
              advance=lambda n: None)
    _, counts = write_image(job, writer)
    writer.finish()
# not getrusage: its peak begins with that of the process that started this one
status = open("/proc/self/status").read()
print(counts.read_bytes, status.partition("VmHWM:")[2].split()[0])
"""


def test_backup_of_a_large_image_stays_in_bounded_memory(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    chooser, data = random.Random(1), 0
    with (tmp_path / "image.raw").open("wb") as out:
        for at in range(0, 64 << 30, 64 << 27):  # 8 GiB apart: 64 GiB, sparse
            out.seek(at)
            for _ in range(8):
                data += out.write(chooser.randbytes(6 << 20))
        out.truncate(64 << 30)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "image.raw").unlink()
    read, peak_kib = map(int, done.stdout.split())
    assert read >= data
    assert peak_kib < 300 << 10


def test_lost_index_objects_are_made_anew_from_the_packs(site: Site) -> None:
    site.back_up()
    for name in site.objects("index"):
        (site.folder / "store" / name).unlink()
    assert stores.check(site.ctx, "main").problems != ()
    report = stores.check(site.ctx, "main", rebuild_index=True)
    assert (report.problems, report.orphan_packs) == ((), ())
    site.check_readable()
    site.scribble("db")
    site.back_up()
    site.check_readable()
    site.check_clean()
