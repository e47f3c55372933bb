"""Prune beside backups, views and other prunes: any of them killed, or standing still for longer
than its pin lives, at every step. What was reported as made and not forgotten stays readable."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
from prune_site import CHUNK, SHARED, SIZE, Site, make_site, shift_clock

from offload import run
from offload.engine.fences import give_up, look_for_fences
from offload.engine.pins import HeldPin, PinKind, read_pins
from offload.engine.tombstones import put_tombstone
from offload.errors import BusyError, IntegrityError, UnavailableError
from offload.format import layout
from offload.journal import CRASH_ENV
from offload.retention import KeepRules
from offload.services import mount as mounts
from offload.services import stores
from offload.services.context import open_context
from offload.services.prune import prune


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A folder that is said to be shared with other hosts: its lock says nothing."""
    config, chooser = make_site(tmp_path, getattr(request, "param", SHARED))
    with open_context(config) as ctx:
        made = Site(tmp_path, ctx, chooser)
        made.fill()
        yield made
        for child in made.children:
            child.kill()


# -- at every step -------------------------------------------------------------------------------


def test_backup_stalled_at_any_step_beside_prunes_is_whole_or_fails(site: Site) -> None:
    steps = site.steps("backup")
    assert {"writer.pinned", "writer.looked", "writer.parent.pinned", "store.index.written",
            "backup.manifest.written", "backup.confirmed"} <= set(steps)  # fmt: skip
    given_up = []
    for step in steps:
        site.fill(1)
        site.change()
        child = site.stalled("backup", step)
        site.prune()  # its pin is young: it is waited for
        with pytest.MonkeyPatch.context() as patch:
            shift_clock(patch, 2)
            site.prune()
            site.prune()
        site.check_but_for_running()
        ended = child.resume()
        if ended.status == 0:
            site.taken[ended.out] = site.now()
        else:
            assert ended.err.startswith("given-up:"), (step, ended)
            given_up.append(step)
        site.check()
    assert "backup.manifest.before" in given_up
    assert "backup.confirmed" not in given_up
    site.check_swept()


def test_backup_killed_at_any_step_beside_prunes_is_whole_or_never_was(site: Site) -> None:
    for step in site.steps("backup"):
        site.fill(1)
        site.change()
        ended = site.start("backup", step, CRASH_ENV).resume()
        assert ended.status == -signal.SIGKILL, (step, ended)
        site.prune()  # another host's, before anybody has recovered
        site.adopt_unreported()
        site.check()
    site.check_swept()


def test_prune_stalled_at_any_step_and_woken_after_others_does_no_harm(site: Site) -> None:
    site.fill()
    steps = site.steps("prune")
    assert {"prune.pinned", "prune.forgotten", "prune.packs.copied", "prune.tombstone.put",
            "prune.sweep.before", "prune.index.written", "prune.indexes.deleted",
            "prune.pack.deleted", "prune.tombstone.deleted"} <= set(steps)  # fmt: skip
    for step in steps:
        site.fill()
        child = site.stalled("prune", step)
        site.change()
        site.back_up()
        with pytest.MonkeyPatch.context() as patch:
            shift_clock(patch, 2)
            site.prune()
            site.change()
            site.back_up()
            site.prune()
        ended = child.resume()
        assert ended.status == 0 or ended.err.startswith("given-up:"), (step, ended)
        site.change()
        site.back_up()  # on what the store says it has
        site.check()
    site.check_swept()


def test_prune_killed_at_any_step_beside_others_is_finished_by_the_next(site: Site) -> None:
    site.fill()
    for step in site.steps("prune"):
        for _ in range(8):  # which chunks lie together is chance: not each prune has each step
            site.fill()
            ended = site.start("prune", step, CRASH_ENV).resume()
            if ended.status != 0:
                break
        assert ended.status == -signal.SIGKILL, (step, ended)
        site.change()
        site.back_up()
        site.ctx.journal.recover()
        site.check()
        site.prune()
        site.check()
        assert site.objects("tombstones") == site.objects("pins") == []
    site.check_swept()


# -- who waits for whom --------------------------------------------------------------------------


def test_prune_beside_a_backup_frees_what_it_may_and_says_whom_the_rest_waits_for(
    site: Site,
) -> None:
    site.change()
    child = site.stalled("backup", "writer.pinned")  # it has not read any tombstone
    report = site.prune()
    assert report.freed_bytes == 0
    (waiting,) = report.waiting
    assert waiting.packs > 0
    assert waiting.frees_bytes > 0
    assert f"pid {child.pid}" in waiting.holders[0]
    assert len(site.objects("tombstones")) == 1
    rehearsed = prune(site.ctx, "main", rules=KeepRules(last=1), dry_run=True)
    assert [w.holders for w in rehearsed.waiting] == [waiting.holders]
    ended = child.resume()
    assert ended.status == 0, ended
    site.taken[ended.out] = site.now()
    site.check()
    after = site.prune()
    assert after.waiting == ()
    assert after.freed_bytes >= waiting.frees_bytes
    site.check()
    site.check_swept()


def test_prune_does_not_wait_for_a_backup_that_has_read_its_tombstone(site: Site) -> None:
    early = site.stalled("backup", "writer.pinned")
    assert site.prune().waiting != ()
    early.kill()
    late = site.stalled("backup", "backup.images.written")
    report = site.prune()
    assert report.waiting == ()
    assert report.freed_bytes > 0
    ended = late.resume()
    assert ended.status == 0, ended
    site.taken[ended.out] = site.now()
    site.check()


def test_prune_while_another_is_at_work_gives_way_until_that_is_late(site: Site) -> None:
    child = site.stalled("prune", "prune.forgotten")
    with pytest.raises(BusyError) as caught:
        site.prune()
    assert caught.value.code == "prune-running"
    assert f"pid {child.pid}" in caught.value.message
    with pytest.MonkeyPatch.context() as patch:
        shift_clock(patch, 2)
        site.prune()
    assert child.resume().err.startswith("given-up:")
    site.check()
    site.check_swept()


@pytest.mark.parametrize("site", ['shared = true\ngrace = "3h"'], indirect=True)
def test_prune_with_a_grace_deletes_when_it_is_over(site: Site) -> None:
    report = site.prune()
    assert report.freed_bytes == 0
    (waiting,) = report.waiting
    assert waiting.until is not None
    assert waiting.holders == ()
    again = site.prune()
    assert [w.prune for w in again.waiting] == [waiting.prune]
    with pytest.MonkeyPatch.context() as patch:
        shift_clock(patch, 3.1)
        rehearsed = prune(site.ctx, "main", rules=KeepRules(last=1), dry_run=True)
        done = site.prune()
    assert done.freed_bytes == rehearsed.freed_bytes > 0
    assert done.waiting == rehearsed.waiting == ()
    site.check()


@pytest.mark.parametrize("site", ['shared = true\ngrace = "3h"'], indirect=True)
def test_backup_takes_what_has_a_tombstone_for_absent(site: Site) -> None:
    kept = site.back_up()
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        packs = list(repository.store.list(layout.PACKS))
        put_tombstone(repository, "aprune0001", packs)
    (site.folder / "db.raw").write_bytes(site.now()[CHUNK:] + bytes(CHUNK))  # all of it moved
    site.back_up()
    assert len(site.objects("packs")) >= len(packs) + SIZE // (24 << 10) - 1
    with pytest.MonkeyPatch.context() as patch:
        shift_clock(patch, 3.1)
        report = prune(site.ctx, "main", rules=KeepRules(last=2))
    assert report.packs_deleted >= len(packs)  # what the other backup needed was copied out
    assert not set(packs) & set(site.objects("packs"))
    assert kept in {b.id for b in site.ctx.catalog.backups()}
    site.check()


# -- readers -------------------------------------------------------------------------------------


def test_reader_of_a_forgotten_backup_reads_on_until_it_closes(site: Site) -> None:
    oldest = site.ctx.catalog.backups(store="main")[0].id
    image = site.open_image(oldest)
    report = site.prune()
    assert oldest not in {b.id for b in site.ctx.catalog.backups(store="main")}
    assert report.waiting == ()  # readers are never waited for
    assert image.pread(0, SIZE) == site.taken[oldest]
    image.close()
    assert site.prune().freed_bytes > 0
    site.check_swept()


def test_reader_finds_what_a_prune_has_moved(site: Site) -> None:
    newest = site.ctx.catalog.backups(store="main")[-1].id
    image = site.open_image(newest)
    assert image.pread(0, CHUNK) == site.taken[newest][:CHUNK]
    report = site.prune()
    assert report.packs_rewritten > 0
    assert image.pread(0, SIZE) == site.taken[newest]
    image.close()


def test_reader_that_stalled_past_its_pin_gets_an_error_and_holds_nothing_up(site: Site) -> None:
    oldest = site.ctx.catalog.backups(store="main")[0].id
    image = site.open_image(oldest)
    with pytest.MonkeyPatch.context() as patch:
        shift_clock(patch, 2)
        site.prune()
    assert site.prune().waiting == ()
    with pytest.raises(IntegrityError, match="missing"):
        image.pread(0, SIZE)
    image.close()
    site.check()
    site.check_swept()


def test_reader_of_a_backup_that_went_before_its_pin_is_told_so(site: Site) -> None:
    oldest = site.ctx.catalog.backups(store="main")[0].id
    (site.folder / "store" / layout.manifest_name(oldest)).unlink()
    with pytest.raises(Exception, match=oldest) as caught:
        site.open_image(oldest)
    assert getattr(caught.value, "code", "") == "unknown-backup"
    assert site.objects("pins") == []


# -- giving up -----------------------------------------------------------------------------------


def test_fence_of_one_prune_outlives_that_of_another_which_saw_the_manifest(site: Site) -> None:
    """One prune has seen no manifest and is about to make the writer void; a later one sees the
    manifest and takes its own fence away. The writer must still learn of the first."""
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        store = repository.store
        writer = "awriter001"
        repository.put_sealed(layout.fence_name(writer, "aprune0001"), {"writer": writer})
        store.put(layout.manifest_name(writer), [b"x"])
        assert not give_up(repository, writer, "aprune0002")
        assert look_for_fences(store, writer)
        store.delete(layout.manifest_name(writer))
        assert give_up(repository, writer, "aprune0003")
        assert store.exists(layout.void_name(writer))


def test_pin_whose_prune_ended_between_the_void_and_it_goes_with_the_next(site: Site) -> None:
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        pin = HeldPin(repository, PinKind.READER)
        pin.stop()
        assert give_up(repository, pin.id, "aprune0001")
    assert site.objects("pins") != []
    site.prune()
    assert site.objects("pins") == []


def test_pins_of_this_machines_dead_processes_count_as_expired(site: Site) -> None:
    child = site.stalled("backup", "backup.images.written")
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        (pin,) = read_pins(repository)
        assert not pin.expired(repository.store.now())
        child.kill()
        assert pin.expired(repository.store.now())


def test_pin_that_is_renewed_is_never_missing_in_a_listing(site: Site) -> None:
    with stores.opened(site.ctx, "main", exclusive=False) as repository:
        with HeldPin(repository, PinKind.WRITER) as pin:
            for count in range(12):
                pin.seen([f"t{count}"])
                (found,) = read_pins(repository)
                assert found.tombstones == frozenset({f"t{count}"})
                assert f"pins/{pin.id}.000001" in site.objects("pins")
        assert read_pins(repository) == []


def test_backup_that_lost_a_pack_it_built_on_is_made_again(site: Site) -> None:
    with (site.folder / "db.raw").open("r+b") as out:  # content that the store has, elsewhere
        whole = site.now()
        out.write(whole[20 * CHUNK : 30 * CHUNK])
    child = site.stalled("backup", "backup.manifest.written")
    needed = whole[20 * CHUNK : 30 * CHUNK]
    victims = [
        p for p in site.objects("packs")
        if any(needed[at : at + CHUNK] in (site.folder / "store" / p).read_bytes()
               for at in range(0, len(needed), CHUNK))
    ]  # fmt: skip
    assert victims
    for name in victims:
        (site.folder / "store" / name).unlink()
    ended = child.resume()
    assert ended.status == 0, ended
    assert site.objects("manifests")[-1:] != []
    assert len([n for n in site.objects("manifests") if n.endswith(ended.out)]) == 1
    new = {p for p in site.objects("packs") if ended.out in p}
    stored = b"".join((site.folder / "store" / p).read_bytes() for p in new)
    assert all(needed[at : at + CHUNK] in stored for at in range(0, len(needed), CHUNK))


@pytest.mark.needs_root
def test_store_that_cannot_be_written_to_is_read_without_a_pin_and_not_written(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    newest = site.ctx.catalog.backups(store="main")[-1].id
    folder = str(site.folder / "store")
    run.run(["mount", "--bind", folder, folder], timeout_s=60)
    try:
        run.run(["mount", "-o", "remount,bind,ro", folder], timeout_s=60)
        image = site.open_image(newest)
        assert image.pread(0, SIZE) == site.taken[newest]
        image.close()
        assert "read without a pin" in caplog.text
        for write in (site.back_up, site.prune):
            with pytest.raises(UnavailableError) as caught:
                write()
            assert caught.value.code == "store-read-only"
    finally:
        run.run(["umount", folder], timeout_s=60)
    assert site.ctx.journal.leftovers() == []
    site.check()


@pytest.mark.parametrize("site", [""], indirect=True)
def test_prune_beside_a_mounted_view_and_a_backup_on_a_folder_of_this_machine(site: Site) -> None:
    """Nobody has the folder alone: the view's server and the backup hold it, and both go on."""
    oldest = site.ctx.catalog.backups(store="main")[0].id
    (view,) = mounts.mount(site.ctx, [f"backup:{oldest}/db"])
    try:
        site.change()
        child = site.stalled("backup", "backup.images.written")
        report = site.prune()
        shown = {v.backup.id: v.reasons for v in report.verdicts}[oldest]
        assert shown == (f"shown by view {view.name}",)
        handle: Any = nbd.NBD()
        handle.connect_uri(view.uri)
        assert handle.pread(SIZE, 0) == site.taken[oldest]
        handle.shutdown()
        ended = child.resume()
        assert ended.status == 0, ended
        site.taken[ended.out] = site.now()
        site.check()
    finally:
        mounts.unmount(site.ctx, [view.name], force=True)
    assert site.prune().freed_bytes > 0
    site.check()
    site.check_swept()
