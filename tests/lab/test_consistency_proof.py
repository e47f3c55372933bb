"""What each level of consistency means, proved with a real guest under load.

One boot of a production VM (ext4 and XFS disks, PostgreSQL, MariaDB, SQLite, files), TimeMarks of
all levels while its writers go on, and all checks afterwards, on the snapshots alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from offload.model import Consistency, Instant, Snapshot, TimeMark
from offload.run import ProgramError, run
from offload.services import director, mount
from offload.services.context import Context
from offload.services.held import Holding
from offload.testing.pools import loop_pool
from offload.testing.production import EXT4, XFS, ProductionVm, production_vm
from offload.testing.production_databases import (
    Started,
    disagreement,
    start_mariadb,
    start_postgres,
)
from offload.testing.production_images import (
    as_they_are,
    ext4_faults,
    file_faults,
    pair_faults,
    replayed,
    row_faults,
    xfs_faults_after_a_mount,
)
from offload.testing.production_load import Load, full_load
from offload.testing.production_marks import Taken, instances, take

# in this order: the only checkpoints are those of the application level
COUNTS = {Consistency.FILESYSTEM: 15, Consistency.CRASH: 6, Consistency.APPLICATION: 15}
STARTED = 4  # TimeMarks of a level on which the databases are started
REPAIRED = 5  # on which xfs_repair looks, after a mount
TOO_LATE = 2  # TimeMarks of a director with a fault
BETWEEN = 2  # numbers that every writer commits between two TimeMarks
POOL_BYTES = 8 << 30  # sparse

pytestmark = [pytest.mark.needs_root, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was left when the guest was gone. `work` is in the pool."""

    marks: Mapping[Consistency, list[Taken]]
    too_late: list[Taken]  # labelled `filesystem` by a director that thawed before its snapshots
    contexts: Mapping[Consistency, Context]
    digests: Mapping[int, str]  # of the small files
    folder: Path
    work: Path

    @property
    def quiesced(self) -> list[Taken]:
        """All that are more than `crash`."""
        return [*self.marks[Consistency.FILESYSTEM], *self.marks[Consistency.APPLICATION]]


@pytest.fixture(scope="module")
def evidence() -> Iterator[Evidence]:
    # a short path, for sockets, which the databases' own users can reach
    with tempfile.TemporaryDirectory(prefix="proof") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        pool = stack.enter_context(loop_pool(folder / "pool", "xfs", size_bytes=POOL_BYTES))
        with production_vm(folder, pool) as vm:
            contexts = stack.enter_context(instances(vm, folder))
            marks, too_late, digests = _take_all(vm, contexts)
        work = pool / "work"
        work.mkdir()
        yield Evidence(
            marks=marks,
            too_late=too_late,
            contexts=contexts,
            digests=digests,
            folder=folder,
            work=work,
        )


def _take_all(
    vm: ProductionVm, contexts: Mapping[Consistency, Context]
) -> tuple[dict[Consistency, list[Taken]], list[Taken], dict[int, str]]:
    marks: dict[Consistency, list[Taken]] = {}
    with full_load(vm.writer_port, vm.postgres, vm.mariadb) as (load, files):
        for level, count in COUNTS.items():
            marks[level] = _take(contexts[level], vm, load, count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(director._Director, "_hold_and_snapshot", _thaw_then_snapshot(load))
            too_late = _take(contexts[Consistency.FILESYSTEM], vm, load, TOO_LATE)
        load.wait_more(BETWEEN)  # it went on after the last one too
    return marks, too_late, files.digests


def _take(ctx: Context, vm: ProductionVm, load: Load, count: int) -> list[Taken]:
    taken = []
    for _ in range(count):
        load.wait_more(BETWEEN)
        taken.append(take(ctx, vm, load))
    return taken


def _thaw_then_snapshot(load: Load) -> Callable[[Any, Any, Holding], list[Snapshot]]:
    """The director's heart with its worst fault: all was held, and it says so; but it was let go
    before the snapshots."""

    def hold_and_snapshot(self: Any, plans: Any, held: Holding) -> list[Snapshot]:
        held.arm()
        held.hold()
        held.freeze()
        held.check_unbroken()
        self.freeze_ms = held.thaw()
        load.wait_more(2)  # one was in flight while it was held; the next one was not
        return [made for provider, plan in plans for made in provider.snapshot(plan)]

    return hold_and_snapshot


def spread(marks: list[Taken], count: int) -> list[Taken]:
    """So many of them, over the whole time."""
    return marks[:: max(1, len(marks) // count)][:count]


@contextmanager
def databases(evidence: Evidence, taken: Taken) -> Iterator[tuple[Started, Started]]:
    """PostgreSQL's and MariaDB's, started on copies of a TimeMark's images."""
    with (
        replayed(taken, evidence.work) as points,
        tempfile.TemporaryDirectory(dir=evidence.folder) as runs,
    ):
        Path(runs).chmod(0o755)
        yield (
            start_postgres(taken, points, Path(runs, "p")),
            start_mariadb(taken, points, Path(runs, "m")),
        )


# -- quiesced --------------------------------------------------------------------------------------


def test_quiesced_marks_under_load_are_labelled_with_what_was_asked_for(evidence: Evidence) -> None:
    assert len(evidence.quiesced) >= 30
    for level in (Consistency.FILESYSTEM, Consistency.APPLICATION):
        for taken in evidence.marks[level]:
            assert taken.level is level
            assert taken.timemark.instant is Instant.HELD
            assert taken.timemark.skew_ms == 0
            assert taken.timemark.warnings == ()


def test_load_went_on_between_all_timemarks(evidence: Evidence) -> None:
    before = dict.fromkeys(evidence.quiesced[0].acknowledged, 0)
    for taken in (t for level in COUNTS for t in evidence.marks[level]):
        assert all(taken.acknowledged[w] >= before[w] + BETWEEN for w in before)
        before = dict(taken.acknowledged)


def test_quiesced_marks_without_replay_hold_all_that_was_synced_and_nothing_later(
    evidence: Evidence,
) -> None:
    for taken in evidence.quiesced:
        assert ext4_faults(taken.image(EXT4)) == []
        with as_they_are(taken, evidence.work) as points:
            assert file_faults(taken, points, evidence.digests) == []
            assert pair_faults(taken, points) == []
            assert row_faults(taken, points, evidence.work) == []


def test_quiesced_xfs_after_one_mount_is_clean_for_xfs_repair(evidence: Evidence) -> None:
    for taken in spread(evidence.quiesced, REPAIRED):
        assert xfs_faults_after_a_mount(taken.image(XFS), evidence.work) == []


def test_application_marks_start_databases_with_all_that_was_acknowledged(
    evidence: Evidence,
) -> None:
    for taken in spread(evidence.marks[Consistency.APPLICATION], STARTED):
        with databases(evidence, taken) as (postgres, mariadb):
            assert postgres.faults == ()
            assert mariadb.faults == ()
            assert disagreement(postgres, mariadb) == []
            # all of the redo is of after the command's own checkpoint
            assert postgres.redo_from >= taken.wal_before


def test_filesystem_marks_start_databases_with_redo_that_nothing_bounds(
    evidence: Evidence,
) -> None:
    taken = evidence.marks[Consistency.FILESYSTEM][-1]
    with databases(evidence, taken) as (postgres, mariadb):
        assert postgres.faults == ()
        assert mariadb.faults == ()
        assert disagreement(postgres, mariadb) == []
        assert postgres.redo_from < taken.wal_before


def test_view_of_an_application_mark_shows_the_image_that_was_checked(evidence: Evidence) -> None:
    taken = evidence.marks[Consistency.APPLICATION][0]
    context = evidence.contexts[Consistency.APPLICATION]
    for volume in (EXT4, XFS):
        (view,) = mount.mount(context, [f"timemark:{taken.timemark.id}/{volume}"])
        copy = evidence.work / "view.raw"
        try:
            run(["nbdcopy", view.uri, str(copy)], timeout_s=300)
            run(["cmp", str(copy), str(taken.image(volume))], timeout_s=300)
        finally:
            mount.unmount(context, [view.name])
            copy.unlink(missing_ok=True)


# -- and what the same checks say of snapshots that nobody has quiesced ----------------------------


def test_crash_marks_of_the_same_load_are_labelled_and_fail_the_same_checks(
    evidence: Evidence,
) -> None:
    found: list[str] = []
    for taken in evidence.marks[Consistency.CRASH]:
        assert taken.level is Consistency.CRASH
        assert taken.timemark.instant is Instant.NONE
        assert taken.timemark.warnings
        faults = ext4_faults(taken.image(EXT4))
        try:
            with as_they_are(taken, evidence.work) as points:
                faults += file_faults(taken, points, evidence.digests)
                faults += pair_faults(taken, points)
                faults += row_faults(taken, points, evidence.work)
        except ProgramError as error:  # an image that cannot even be mounted so
            faults.append(error.message)
        found += faults
        assert faults, "synced files are in the journal alone, and yet all was there without it"
    assert any("synced files missing" in fault for fault in found)


def test_images_of_two_timemarks_together_are_a_tear_that_is_seen(evidence: Evidence) -> None:
    early, late = evidence.marks[Consistency.APPLICATION][:2]
    mixed = replace(late, timemark=_mixed(early, late))
    with as_they_are(mixed, evidence.work) as points:
        (lost, torn) = sorted(pair_faults(mixed, points))
    assert lost.startswith("an acknowledged pair is lost")
    assert torn.startswith("cross-volume tear")
    with databases(evidence, mixed) as (postgres, mariadb):
        assert any("acknowledged and lost" in fault for fault in postgres.faults)
        assert mariadb.faults == ()
        assert disagreement(postgres, mariadb) != []


def _mixed(ext4: Taken, xfs: Taken) -> TimeMark:
    """One's snapshot of the disk with ext4 beside another's of that with XFS."""
    first, second = ext4.timemark.snapshot(EXT4), xfs.timemark.snapshot(XFS)
    assert first is not None
    assert second is not None
    return replace(xfs.timemark, snapshots=(first, second))


def test_image_of_a_later_timemark_holds_numbers_that_are_seen_as_later(evidence: Evidence) -> None:
    early, late = evidence.marks[Consistency.FILESYSTEM][:2]
    exchanged = replace(early, timemark=late.timemark)
    with as_they_are(exchanged, evidence.work) as points:
        assert "after the hold" in str(file_faults(exchanged, points, evidence.digests))
        assert "after the hold" in str(pair_faults(exchanged, points))
        assert "after the hold" in str(row_faults(exchanged, points, evidence.work))


def test_marks_of_a_director_that_thaws_too_early_hold_what_came_after(evidence: Evidence) -> None:
    for taken in evidence.too_late:
        assert taken.level is Consistency.FILESYSTEM  # it believes so
        with as_they_are(taken, evidence.work) as points:
            assert "after the hold" in str(pair_faults(taken, points))
        with databases(evidence, taken) as (postgres, mariadb):
            assert "after the hold" in str(postgres.faults)
            assert "after the hold" in str(mariadb.faults)


def test_crash_mark_beside_an_application_mark_replays_more(evidence: Evidence) -> None:
    redo: dict[Consistency, list[int]] = {}
    for level in (Consistency.CRASH, Consistency.APPLICATION):
        taken = evidence.marks[level][-1]
        with databases(evidence, taken) as (postgres, _):
            redo[level] = [postgres.redo_from, postgres.redo_bytes]
            if level is Consistency.CRASH:
                assert postgres.redo_from < taken.wal_before
    assert redo[Consistency.APPLICATION][1] < redo[Consistency.CRASH][1]
