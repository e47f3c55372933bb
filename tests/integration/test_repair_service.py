"""Real damage on disk: found, noted, mended from wherever the bytes still are, else listed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock

import pytest

from offload import compose
from offload.engine.damage import DamageMap
from offload.engine.manifests import read_manifest
from offload.engine.verified import choose_packs
from offload.errors import IntegrityError
from offload.format.pack import Kind
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.progress import NoProgress
from offload.services import backups as finished
from offload.services.copy import copy
from offload.services.copy_plan import CopyRequest
from offload.services.prune import PruneReport, prune
from offload.services.repair import repair
from offload.services.verify import VerifyOptions, verify
from offload.testing.backup_site import CHUNK, PROVIDER, BackupSite, backup_site, unnamed_steps

PAGE = Path(__file__).parents[2] / "docs" / "design" / "recovery.md"
REPAIR = "from offload.services.repair import repair\nrepair(ctx, 'main')"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackupSite]:
    """Three backups in `main`, the later ones with deltas."""
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    with backup_site(tmp_path) as made:
        for _ in range(3):
            made.scribble("db", 3)
            made.back_up()
        yield made


def last_of(site: BackupSite) -> str:
    return list(site.taken)[-1]


def drop_timemarks(site: BackupSite) -> None:
    """The storage has lost its TimeMarks: nothing of the source is left but what the volume is."""
    for mark in site.ctx.catalog.timemarks():
        for snapshot in mark.snapshots:
            Path(snapshot.ref["path"]).unlink(missing_ok=True)


def check_mended(site: BackupSite) -> None:
    """Everything reads; what is still damaged hits no backup, and repair has no more to do."""
    site.check_all()
    problems = verify(site.ctx, all_backups=True, store="main").problems
    assert [p for p in problems if p.backup] == []
    assert repair(site.ctx, "main").mended_chunks == 0


def copy_to_away(site: BackupSite, *, same_key: bool) -> None:
    with site.repository() as repository:
        key = repository.parameters.id_key
    site.make_store("away", id_key=key if same_key else None)
    done = copy(site.ctx, CopyRequest(source="main", target="away")).copies
    assert [entry.how for entry in done] == ["same-key" if same_key else "new-key"] * len(done)


# -- quarantine ----------------------------------------------------------------------------------


def test_verify_notes_a_bad_chunk_once_and_lifts_the_note_when_it_reads_well(
    site: BackupSite,
) -> None:
    leaf = site.leaves(last_of(site), "db")[0]
    (place,) = site.spoil(leaf.base)
    first = verify(site.ctx, all_backups=True, store="main")
    assert first.quarantined == (place.pack,)
    (name,) = site.objects("main", "quarantine")
    with site.repository() as repository:
        (note,) = repository.quarantine.notes
        assert (note.name, note.pack, note.gone) == (name, place.pack, False)
        assert note.offsets == {place.entry.offset}
    assert verify(site.ctx, all_backups=True, store="main").quarantined == ()
    assert site.objects("main", "quarantine") == [name]
    site.spoil(leaf.base)  # back as it was
    again = verify(site.ctx, all_backups=True, store="main")
    assert (again.problems, again.lifted) == ((), (place.pack,))
    assert site.objects("main", "quarantine") == []


@pytest.mark.parametrize("level", ["quick", "sampled", "named"])
def test_verify_of_every_level_notes_a_missing_pack(site: BackupSite, level: str) -> None:
    pack = site.places(site.leaves(last_of(site), "db")[0].base)[0].pack
    (site.folder / "main" / pack).unlink()
    if level == "named":
        report = verify(site.ctx, [last_of(site)])
    else:
        options = VerifyOptions(quick=level == "quick", sample=1.0 if level == "sampled" else None)
        report = verify(site.ctx, all_backups=True, store="main", options=options)
    assert any(p.backup == last_of(site) and p.length for p in report.problems)
    with site.repository() as repository:
        assert [(n.pack, n.gone) for n in repository.quarantine.notes] == [(pack, True)]


def test_backup_stores_anew_what_is_noted_as_bad_and_so_mends_the_older_ones(
    site: BackupSite,
) -> None:
    """Incrementally: the slot is read again although the storage says that nothing changed."""
    leaves = site.leaves(last_of(site), "db")
    slot = next(slot for slot, leaf in leaves.items() if not leaf.deltas)
    site.spoil(leaves[slot].base)
    drop_timemarks(site)
    assert verify(site.ctx, all_backups=True, store="main").quarantined
    with pytest.raises(IntegrityError):
        site.check_all()
    report = site.back_up()
    assert [image.mode for image in report.images]
    site.check_all()


def test_incremental_backup_reads_slots_with_bad_pieces_again(site: BackupSite) -> None:
    leaves = site.leaves(last_of(site), "db")
    plain = next(slot for slot, leaf in leaves.items() if not leaf.deltas)
    chain = next(slot for slot, leaf in leaves.items() if leaf.deltas)
    site.spoil(leaves[plain].base)
    site.spoil(leaves[chain].base)
    verify(site.ctx, all_backups=True, store="main")
    report = site.back_up()
    assert [image.mode for image in report.images] == ["incremental", "incremental"]
    assert report.images[0].looked_at_bytes < 4 * CHUNK
    now = report.backup.id
    site.check(now, now, "main")
    assert site.leaves(now, "db")[chain].deltas == ()
    lost = repair(site.ctx, "main").lost
    assert {(p.volume, p.offset) for p in lost} == {("db", chain * CHUNK)}


def test_prune_keeps_the_readable_rest_of_a_bad_pack(site: BackupSite) -> None:
    leaves = site.leaves(last_of(site), "db")
    (place,) = site.spoil(leaves[0].base)
    verify(site.ctx, all_backups=True, store="main")
    finished.delete(site.ctx, [next(iter(site.taken))])
    prune(site.ctx, "main")
    whole = site.folder / "main" / place.pack
    assert whole.exists()
    site.flip("main", place.pack, place.entry.payload_offset + place.entry.stored_length // 2)
    site.check_all()  # but for that bit nothing is missing


@pytest.mark.parametrize("hurt", [False, True])
def test_prune_does_not_fold_what_is_noted_as_bad(site: BackupSite, hurt: bool) -> None:
    for turn in range(4):
        site.write("db", 2 * CHUNK + turn * 512, site.random.randbytes(1500))
        last = site.back_up().backup.id
    leaf = site.leaves(last, "db")[2]
    assert len(leaf.deltas) >= 4
    if hurt:
        site.spoil(leaf.base)
        verify(site.ctx, all_backups=True, store="main")
    finished.delete(site.ctx, [ident for ident in site.taken if ident != last])
    report = prune(site.ctx, "main")
    assert (report.folded > 0) == (not hurt)
    if hurt:
        site.spoil(leaf.base)  # back as it was
    site.check(last, last, "main")


# -- in parts ------------------------------------------------------------------------------------


def test_verify_in_parts_reads_what_has_gone_longest_unread(site: BackupSite) -> None:
    sizes = {
        name: (site.folder / "main" / name).stat().st_size for name in site.objects("main", "packs")
    }
    budget = VerifyOptions(budget_bytes=max(sizes.values()))
    rounds = []
    for _ in range(len(sizes)):
        rounds.append(verify(site.ctx, all_backups=True, store="main", options=budget))
        if rounds[-1].oldest is not None:
            break
    assert len(rounds) > 1
    assert sum(report.packs_read for report in rounds) <= 2 * len(sizes)
    assert all(report.checked_bytes <= budget.budget_bytes for report in rounds)  # type: ignore[operator]
    known = site.ctx.catalog.last_verified(last_of(site))
    assert known is not None
    assert known.how.startswith("in parts, all since")
    young = VerifyOptions(older_than_s=3600)
    assert verify(site.ctx, all_backups=True, store="main", options=young).packs_read == 0


def test_verify_in_parts_finds_damage_only_where_it_reads_but_quick_everywhere(
    site: BackupSite,
) -> None:
    verify(site.ctx, all_backups=True, store="main")
    leaf = site.leaves(last_of(site), "db")[0]
    (place,) = site.spoil(leaf.base)
    young = VerifyOptions(older_than_s=3600)
    assert verify(site.ctx, all_backups=True, store="main", options=young).problems == ()
    (site.folder / "main" / place.pack).unlink()
    assert verify(site.ctx, all_backups=True, store="main", options=young).problems
    assert verify(
        site.ctx, all_backups=True, store="main", options=VerifyOptions(quick=True)
    ).problems


def test_choose_packs_oldest_first_within_the_budget_and_never_none() -> None:
    now = datetime(2026, 11, 21, tzinfo=UTC)
    sizes = {"a": 10, "b": 10, "c": 10, "d": 10}
    seen = {"a": now - timedelta(days=9), "b": now - timedelta(days=40), "d": now + timedelta(1)}

    def chosen(older: float | None, budget: int | None) -> list[str]:
        return choose_packs(sizes, seen, now, older_than_s=older, budget_bytes=budget)

    assert chosen(None, None) == ["a", "b", "c", "d"]
    assert chosen(30 * 86400, None) == ["b", "c", "d"]
    assert chosen(None, 30) == ["b", "c", "d"]  # a time that is yet to come says nothing
    assert chosen(None, 20) == ["c", "d"]
    assert chosen(None, 1) == ["c"]
    assert chosen(100 * 86400, 5) == ["c"]


# -- repair --------------------------------------------------------------------------------------


def test_repair_takes_whole_chunks_deltas_and_pages_from_timemarks(site: BackupSite) -> None:
    last = last_of(site)
    leaves = site.leaves(last, "db")
    plain = next(leaf for leaf in leaves.values() if not leaf.deltas)
    before = list(site.taken)[-2]
    newest = next(
        leaf for slot, leaf in leaves.items()
        if leaf.deltas and leaf != site.leaves(before, "db").get(slot)
    )  # fmt: skip
    site.spoil(plain.base)
    site.spoil(newest.deltas[-1])
    verify(site.ctx, all_backups=True, store="main")
    would = repair(site.ctx, "main", dry_run=True)
    assert (would.mended_chunks, would.lost) == (2, ())
    report = repair(site.ctx, "main")
    assert (report.mended_chunks, dict(report.found_in)) == (2, {"a TimeMark": 2})
    assert (report.lost, report.unreadable) == ((), ())
    check_mended(site)


def test_repair_of_all_pages_of_a_full_backup_from_its_timemark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    with backup_site(tmp_path) as site:
        ident = site.back_up().backup.id
        for page in site.page_ids(ident, "db"):
            site.spoil(page)
        assert verify(site.ctx, all_backups=True, store="main").problems
        report = repair(site.ctx, "main")
        assert report.lost == ()
        assert report.mended_chunks > 3
        check_mended(site)


@pytest.mark.parametrize("same_key", [True, False])
@pytest.mark.parametrize("what", ["data", "delta", "root", "leaf page", "pack", "all packs"])
def test_repair_from_another_store(site: BackupSite, what: str, same_key: bool) -> None:
    copy_to_away(site, same_key=same_key)
    drop_timemarks(site)
    last = last_of(site)
    leaf = next(leaf for leaf in site.leaves(last, "db").values() if leaf.deltas)
    match what:
        case "data":
            site.spoil(leaf.base)
        case "delta":
            site.spoil(leaf.deltas[-1])
        case "root":
            site.spoil(site.page_ids(last, "db")[0])
        case "leaf page":
            site.spoil(site.page_ids(last, "db")[-1])
        case "pack":
            (site.folder / "main" / site.places(leaf.base)[0].pack).unlink()
        case _:
            for name in site.objects("main", "packs"):
                (site.folder / "main" / name).unlink()
    assert verify(site.ctx, all_backups=True, store="main").problems
    report = repair(site.ctx, "main")
    assert report.lost == ()
    assert set(report.found_in) == {"store away"}
    check_mended(site)
    site.scribble("db")
    site.back_up()
    prune(site.ctx, "main")
    site.check_all()


def test_repair_finds_packs_that_no_index_object_names(site: BackupSite) -> None:
    drop_timemarks(site)
    victim = site.objects("main", "index")[0]
    (site.folder / "main" / victim).unlink()
    shutil.rmtree(site.ctx.instance.cache_dir)
    assert verify(site.ctx, all_backups=True, store="main").problems
    report = repair(site.ctx, "main")
    assert report.lost == ()
    assert set(report.found_in) == {"this store"}
    check_mended(site)


def test_repair_lists_what_is_nowhere_and_the_rest_stays_right(site: BackupSite) -> None:
    drop_timemarks(site)
    last = last_of(site)
    leaves = site.leaves(last, "db")
    slot = next(slot for slot, leaf in leaves.items() if leaf.deltas)
    site.spoil(leaves[slot].base)
    verify(site.ctx, all_backups=True, store="main")
    report = repair(site.ctx, "main")
    assert report.mended_chunks == 0
    hit = {(p.backup, p.volume, p.offset, p.length) for p in report.lost}
    wanted = set()
    with site.repository() as repository:
        for ident in site.taken:
            for image in read_manifest(repository, ident).backup.images:
                for found in DamageMap(repository, {leaves[slot].base}).image(image):
                    wanted.add((ident, image.volume, found.start, found.end - found.start))
    assert hit == wanted
    assert (last, "db", slot * CHUNK, CHUNK) in hit
    assert site.objects("main", "pins") == []


def test_repair_never_takes_what_is_not_the_very_chunk(site: BackupSite) -> None:
    """The TimeMarks show other bytes at that place."""
    leaves = site.leaves(last_of(site), "db")
    slot = next(slot for slot, leaf in leaves.items() if not leaf.deltas)
    for mark in site.ctx.catalog.timemarks():
        for snapshot in mark.snapshots:
            path = Path(snapshot.ref["path"])
            path.chmod(0o600)
            path.write_bytes(os.urandom(path.stat().st_size))
    site.spoil(leaves[slot].base)
    verify(site.ctx, all_backups=True, store="main")
    report = repair(site.ctx, "main")
    assert report.mended_chunks == 0
    assert (slot * CHUNK, CHUNK) in {(p.offset, p.length) for p in report.lost}


def test_repair_with_a_damaged_manifest_says_so(site: BackupSite) -> None:
    name = site.objects("main", "manifests")[0]
    site.flip("main", name, 40)
    report = repair(site.ctx, "main")
    assert [line.partition(":")[0] for line in report.unreadable] == [name.rpartition("/")[2]]


def test_repair_killed_at_any_step_leaves_no_pin_and_the_next_one_mends(
    site: BackupSite, tmp_path: Path
) -> None:
    leaves = site.leaves(last_of(site), "db")
    bases = [leaf.base for leaf in leaves.values() if not leaf.deltas][:3]
    trace = tmp_path / "trace"
    site.spoil(bases[0])
    verify(site.ctx, all_backups=True, store="main")
    assert site.run(REPAIR, **{TRACE_ENV: str(trace)}).status == 0
    assert unnamed_steps(trace.read_text().split(), PAGE.read_text()) == []
    steps = [s for s in dict.fromkeys(trace.read_text().split()) if "commit" not in s]
    for name in steps:
        for place in site.places(bases[1]):
            with site.repository() as repository:
                readable = not repository.quarantine.has(place.pack, place.entry.offset)
            if readable:
                at = place.entry.payload_offset + place.entry.stored_length // 2
                site.flip("main", place.pack, at)
        verify(site.ctx, all_backups=True, store="main")
        assert site.run(REPAIR, **{CRASH_ENV: name}).status == -signal.SIGKILL, name
        site.ctx.journal.recover()
        assert site.objects("main", "pins") == [], name
        repair(site.ctx, "main")
        site.check_all()
    assert site.ctx.journal.leftovers() == []


def test_pieces_have_the_kinds_that_the_tests_take_them_for(site: BackupSite) -> None:
    leaf = next(leaf for leaf in site.leaves(last_of(site), "db").values() if leaf.deltas)
    assert site.places(leaf.base)[0].entry.kind == Kind.DATA
    assert site.places(leaf.deltas[-1])[0].entry.kind == Kind.DELTA
    assert site.places(site.page_ids(last_of(site), "db")[-1])[0].entry.kind == Kind.PAGE


# -- beside prune --------------------------------------------------------------------------------


class _PrunesOnce(NoProgress):
    """A prune that comes while the first pack has been read."""

    def __init__(self, site: BackupSite) -> None:
        self.site = site
        self.report: PruneReport | None = None
        self._mutex = Lock()

    def advance(self, task: str, count_bytes: int) -> None:  # noqa: ARG002 - of the Protocol
        with self._mutex:
            if self.report is None and task.startswith("store "):
                self.report = prune(self.site.ctx, "main")


def test_verify_takes_packs_that_a_prune_moves_meanwhile_for_no_damage(site: BackupSite) -> None:
    for _ in range(3):
        site.write("web", 0, site.random.randbytes(12 * CHUNK))
        site.scribble("db", 20)
        site.back_up()
    finished.delete(site.ctx, list(site.taken)[:5])
    beside = _PrunesOnce(site)
    report = verify(site.ctx, all_backups=True, store="main", progress=beside)
    assert beside.report is not None
    assert beside.report.packs_deleted > 0
    assert (report.problems, report.quarantined) == ((), ())
    site.check_all()
