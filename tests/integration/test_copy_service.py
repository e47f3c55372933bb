"""Copies between stores: by subtrees, under new ids, cut anew; twice, killed, and from damage."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import compose
from offload.engine.manifests import read_folds, read_manifest
from offload.engine.packwriter import Compressor, PackWriter
from offload.engine.readimage import read_leaf
from offload.engine.tree import TreeBuilder, TreeReader
from offload.errors import NotFoundError, UsageError
from offload.format import layout
from offload.format.fold import Fold, encode_fold
from offload.format.pack import Kind
from offload.format.tree import Leaf
from offload.ids import new_id
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.progress import NoProgress
from offload.retention import KeepRules
from offload.services.copy import copy
from offload.services.copy_plan import Copied, CopyRequest
from offload.services.prune import prune
from offload.services.verify import VerifyOptions, verify
from offload.testing.backup_site import CHUNK, PROVIDER, BackupSite, backup_site, unnamed_steps

PAGE = Path(__file__).parents[2] / "docs" / "design" / "recovery.md"
WAYS = ["same-key", "new-key", "new-cut"]
COPY = "from offload.services.copy import copy\nfrom offload.services.copy_plan import CopyRequest\ncopy(ctx, CopyRequest(source='main', target='away'))"  # noqa: E501


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackupSite]:
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    with backup_site(tmp_path) as made:
        yield made


def make_away(site: BackupSite, way: str) -> None:
    with site.repository() as repository:
        key = repository.parameters.id_key
    match way:
        case "same-key":
            site.make_store("away", id_key=key)
        case "new-key":
            site.make_store("away")
        case _:
            site.make_store("away", chunk_bytes=2 * CHUNK, page_entries=8)


def copy_all(site: BackupSite, **chosen: object) -> tuple[Copied, ...]:
    request = CopyRequest(source="main", target="away", **chosen)  # type: ignore[arg-type]
    return copy(site.ctx, request).copies


@pytest.mark.parametrize("way", WAYS)
def test_copy_all_reads_back_and_a_second_run_sends_nothing(site: BackupSite, way: str) -> None:
    make_away(site, way)
    for _ in range(4):
        site.scribble("db")
        site.back_up()
    done = copy_all(site)
    assert [(entry.backup, entry.how) for entry in done] == [(ident, way) for ident in site.taken]
    for entry in done:
        site.check(entry.copy, entry.backup, "away")
        assert site.ctx.catalog.backup(entry.copy).store == "away"
    before = site.objects("away", "packs")
    again = copy_all(site)
    assert [(e.backup, e.copy, e.how, e.stored_bytes) for e in again] == [
        (e.backup, e.copy, "already-there", 0) for e in done
    ]
    assert site.objects("away", "packs") == before
    assert verify(site.ctx, all_backups=True).problems == ()
    assert site.objects("away", "pins") == []


@pytest.mark.parametrize("way", WAYS)
def test_copy_of_an_incremental_sends_what_changed(site: BackupSite, way: str) -> None:
    make_away(site, way)
    site.back_up()
    (first,) = copy_all(site)
    site.write("db", 2 * CHUNK + 600, b"x" * 40)
    second = site.back_up().backup.id
    (_, done) = copy_all(site)
    assert done.backup == second
    assert done.read_bytes <= (CHUNK if way == "new-cut" else 1024)
    assert done.stored_bytes < first.stored_bytes / 10
    site.check(done.copy, second, "away")
    with site.repository("away") as repository:
        manifest = read_manifest(repository, done.copy, "away")
    assert manifest.backup.parent == first.copy
    assert manifest.copied_from is not None
    assert manifest.copied_from["backup"] == second


@pytest.mark.parametrize("way", ["same-key", "new-key"])
def test_copy_keeps_lists_of_deltas(site: BackupSite, way: str) -> None:
    make_away(site, way)
    for turn in range(3):
        site.write("db", 2 * CHUNK + 512 * turn, b"x" * 40)
        last = site.back_up().backup.id
    done = copy_all(site)
    here, there = site.leaves(last, "db"), site.leaves(done[-1].copy, "db", "away")
    assert {s: len(leaf.deltas) for s, leaf in here.items()} == {
        s: len(leaf.deltas) for s, leaf in there.items()
    }
    assert len(here[2].deltas) == 2
    assert (here == there) == (way == "same-key")


def test_copy_under_new_ids_onto_a_copy_in_other_pieces_is_right(site: BackupSite) -> None:
    """One of the stores was folded since the last copy: its pieces do not match by their place."""
    make_away(site, "new-key")
    site.write("db", 2 * CHUNK + 512, b"x" * 600)
    site.back_up()
    site.write("db", 2 * CHUNK + 1024, b"y" * 600)
    middle = site.back_up().backup.id
    copy_all(site)
    site.write("db", 2 * CHUNK + 2048, b"z" * 600)
    last = site.back_up().backup.id
    fold_in(site, middle, "db", 2)
    fold_in(site, last, "db", 2, keep=1)
    done = copy_all(site)
    site.check(done[-1].copy, last, "away")
    site.check(middle, middle, "main")
    site.check(last, last, "main")


def fold_in(site: BackupSite, backup: str, volume: str, slot: int, *, keep: int = 0) -> None:
    """What a fold does to one slot: all but the last `keep` deltas go into a new base."""
    with site.repository() as repository:
        folds = read_folds(repository)
        image = read_manifest(repository, backup).backup.image(volume)
        assert image is not None
        shape = repository.shape(image.size_bytes)
        tree = TreeReader(repository, bytes.fromhex(image.root), shape)
        leaf = tree.leaf(slot)
        assert leaf is not None
        assert leaf.deltas
        cut = len(leaf.deltas) - keep
        base = bytes(read_leaf(repository, Leaf(leaf.base, leaf.deltas[:cut]), CHUNK))
        writer_id = new_id()
        with PackWriter(repository, writer_id) as writer:
            codec = Compressor(1)
            ident, _ = writer.add(Kind.DATA, base, codec.compress)
            builder = TreeBuilder(
                shape, tree, lambda raw: writer.add(Kind.PAGE, raw, codec.compress)[0]
            )
            page, at = divmod(slot, shape.page_entries)
            entries = list(tree.leaf_page(page))
            entries[at] = Leaf(ident, leaf.deltas[cut:])
            builder.put_leaf_page(page, entries)
            root = builder.finish()
            writer.finish()
        fold = Fold(sequence=folds.next_sequence, backups={backup: {volume: root.hex()}})
        name = layout.fold_name(writer_id)
        repository.store.put(name, [encode_fold(name, fold, repository.keys)])


class _PrunesBoth(NoProgress):
    """Prunes of both stores while an image has been sent, and the manifest is not out yet."""

    def __init__(self, site: BackupSite) -> None:
        self.site = site
        self.prunes = 0

    def finish(self, task: str) -> None:
        if task.startswith("web of "):
            for store in ("main", "away"):
                prune(self.site.ctx, store, rules=KeepRules(last=1))
                self.prunes += 1


@pytest.mark.parametrize("way", WAYS)
def test_copy_beside_prunes_of_both_stores_is_whole(site: BackupSite, way: str) -> None:
    make_away(site, way)
    for _ in range(3):
        site.scribble("db", 20)
        site.write("web", 0, site.random.randbytes(12 * CHUNK))
        site.back_up()
    beside = _PrunesBoth(site)
    request = CopyRequest(source="main", target="away")
    done = copy(site.ctx, request, beside).copies
    assert beside.prunes >= 2
    taken = list(site.taken)
    assert [(e.backup, e.how) for e in done] == [
        (taken[0], way), (taken[1], "gone"), (taken[2], way)
    ]  # fmt: skip
    site.check(done[-1].copy, taken[-1], "away")
    site.check_all()
    assert verify(site.ctx, all_backups=True).problems == ()


def test_copy_chooses_by_id_group_and_last(site: BackupSite) -> None:
    make_away(site, "same-key")
    ids = [site.back_up().backup.id for _ in range(3)]
    assert [e.backup for e in copy_all(site, ids=(f"backup:{ids[1][:8]}",))] == [ids[1]]
    assert [e.backup for e in copy_all(site, group="shop", last=1)] == [ids[2]]
    assert [e.how for e in copy_all(site)] == ["same-key", "already-there", "already-there"]
    assert copy_all(site, group="other") == ()
    with pytest.raises(NotFoundError):
        copy_all(site, ids=("nothing",))
    with pytest.raises(UsageError, match="one store"):
        copy(site.ctx, CopyRequest(source="main", target="main"))


def test_copy_back_knows_its_own_and_copies_of_copies_count_as_the_first(site: BackupSite) -> None:
    make_away(site, "same-key")
    first = site.back_up().backup.id
    (there,) = copy_all(site)
    (back,) = copy(site.ctx, CopyRequest(source="away", target="main")).copies
    assert (back.how, back.copy) == ("already-there", first)
    assert there.copy != first


@pytest.mark.parametrize("way", ["same-key", "new-key"])
def test_copy_from_a_damaged_store_says_which_failed_and_copies_the_rest(
    site: BackupSite, way: str
) -> None:
    make_away(site, way)
    whole = site.back_up().backup.id
    site.write("db", 7 * CHUNK, b"z" * CHUNK)
    hurt = site.back_up().backup.id
    assert 7 not in site.leaves(whole, "db")
    site.spoil(site.leaves(hurt, "db")[7].base)
    done = {entry.backup: entry for entry in copy_all(site)}
    assert done[whole].how == way
    assert (done[hurt].how, done[hurt].copy) == ("failed", "")
    assert "damaged" in done[hurt].error
    assert [n.rpartition("/")[2] for n in site.objects("away", "manifests")] == [done[whole].copy]
    assert site.ctx.journal.leftovers() == []
    site.check(done[whole].copy, whole, "away")


@pytest.mark.parametrize("way", ["same-key", "new-key"])
def test_copy_killed_at_any_step_is_taken_back_or_whole_and_goes_on(
    site: BackupSite, way: str, tmp_path: Path
) -> None:
    make_away(site, way)
    for _ in range(2):
        site.scribble("db")
        site.back_up()
    trace = tmp_path / "trace"
    assert site.run(COPY, **{TRACE_ENV: str(trace)}).status == 0
    steps = list(dict.fromkeys(trace.read_text().split()))
    assert "copy.manifest.written" in steps
    assert unnamed_steps(steps, PAGE.read_text()) == []
    if way == "new-key":  # what differs from the other way is how packs are filled
        steps = [name for name in steps if name.startswith(("store.", "copy.batch-1."))]
    for name in steps:
        for ident in site.objects("away", "manifests"):
            (site.folder / "away" / ident).unlink()
        prune_away(site)
        assert site.run(COPY, **{CRASH_ENV: name}).status == -signal.SIGKILL, name
        site.ctx.journal.recover()
        assert site.ctx.journal.leftovers() == []
        assert site.objects("away", "pins") == [], name
        assert site.objects("away", "tmp") == []
        done = copy_all(site)
        assert len(done) == 2
        for entry in done:
            site.check(entry.copy, entry.backup, "away")
            assert site.ctx.catalog.backup(entry.copy).store == "away"
        assert len(site.objects("away", "manifests")) == 2
    assert verify(site.ctx, all_backups=True).problems == ()


def prune_away(site: BackupSite) -> None:
    """Forget all that is there, as `store check --rebuild-catalog` and prune would."""
    site.ctx.catalog.replace_backups("away", [])
    prune(site.ctx, "away", rules=KeepRules(last=1))


def test_copy_killed_late_sends_only_the_rest(site: BackupSite, tmp_path: Path) -> None:
    """The images are sent with index objects of their own: what was sent is found again."""
    make_away(site, "same-key")
    site.back_up()
    crash = {CRASH_ENV: "copy.images.written"}
    assert site.run(COPY, **crash).status == -signal.SIGKILL
    site.ctx.journal.recover()
    (done,) = copy_all(site)
    assert (done.read_bytes, done.stored_bytes) == (0, 0)
    site.check(done.copy, done.backup, "away")
    trace = tmp_path / "trace"
    assert not trace.exists()


def test_copy_verify_quick_finds_a_pack_that_went(site: BackupSite) -> None:
    make_away(site, "new-key")
    site.back_up()
    (done,) = copy_all(site)
    quick = VerifyOptions(quick=True)
    assert verify(site.ctx, [done.copy], options=quick).problems == ()
    (site.folder / "away" / site.objects("away", "packs")[0]).unlink()
    assert verify(site.ctx, [done.copy], options=quick).problems


def test_copy_manifest_says_what_it_is_a_copy_of(site: BackupSite) -> None:
    make_away(site, "same-key")
    site.back_up()
    (done,) = copy_all(site)
    raw = (site.folder / "away" / layout.manifest_name(done.copy)).read_bytes()
    value = json.loads(raw.partition(b"\n")[0])
    with site.repository() as repository:
        origin = {"store": repository.parameters.store_id, "backup": done.backup}
    assert value["copied_from"] == origin
