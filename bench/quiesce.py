"""One guest under load: for how long it is held, and what its databases replay afterwards."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ground import OFFLOAD, Ground
from bench.measure import BenchError, once, percentile
from bench.report import Table
from offload.model import Consistency
from offload.services.context import Context
from offload.testing.production import ProductionVm, production_vm
from offload.testing.production_databases import Started, start_mariadb, start_postgres
from offload.testing.production_images import replayed
from offload.testing.production_load import Load, full_load
from offload.testing.production_marks import GROUP, Taken, instances, take

_RECOVERED = 5  # TimeMarks of a level on which the databases are started
_BETWEEN = 1  # numbers that each writer commits between two TimeMarks
_GOAL = "≤ 1000"
# what is read off a TimeMark: the part of this kind of quiescer, and how the row is called
_PARTS = {
    Consistency.FILESYSTEM: {"qemu-ga": "file systems frozen"},
    Consistency.APPLICATION: {
        "qemu-ga": "file systems frozen",
        "mysql": "commits of MariaDB held",
    },
}
_WHOLE = "whole hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What the command said of one TimeMark, and its seconds."""

    answer: Any
    seconds: float

    def held_ms(self, kind: str) -> float:
        """Of the part of this kind."""
        (held,) = [
            part["held_ms"]
            for report in self.answer["reports"]
            for part in report["parts"]
            if part["kind"] == kind
        ]
        return float(held)


def one_guest(ground: Ground, runs: int) -> list[Table]:
    """Tables of the hold and of the recovery, from one boot."""
    frozen: dict[Consistency, list[Frozen]] = {}
    with _production(ground) as (vm, folder):
        with (
            instances(vm, folder) as contexts,
            full_load(vm.writer_port, vm.postgres, vm.mariadb) as (load, _),
        ):
            # the application level makes checkpoints: first all without one
            frozen[Consistency.FILESYSTEM] = _frozen(folder, Consistency.FILESYSTEM, load, runs)
            crash = _taken(contexts[Consistency.CRASH], vm, load)
            frozen[Consistency.APPLICATION] = _frozen(folder, Consistency.APPLICATION, load, runs)
            application = _taken(contexts[Consistency.APPLICATION], vm, load)
        vm.guest.close()  # the databases are started on an idle machine
        return [_hold_table(frozen, runs), _recovery_table(ground, crash, application)]


@contextmanager
def _production(ground: Ground) -> Iterator[tuple[ProductionVm, Path]]:
    """A production VM; its folder is one that the databases' users can reach."""
    disks = ground.pool / "production"
    disks.mkdir()
    with tempfile.TemporaryDirectory(prefix="quiesce", dir=ground.folder) as name:
        folder = Path(name)
        folder.chmod(0o755)
        with production_vm(folder, disks) as vm:
            yield vm, folder


def _frozen(folder: Path, level: Consistency, load: Load, runs: int) -> list[Frozen]:
    """TimeMarks by the command line."""
    config = folder / str(level) / "offload.toml"
    samples = []
    for _ in range(runs):
        load.wait_more(_BETWEEN)
        sample = once([OFFLOAD, "--config", str(config), "--json", "timemark", "create", GROUP])
        samples.append(Frozen(answer=json.loads(sample.stdout), seconds=sample.seconds))
    return samples


def _taken(context: Context, vm: ProductionVm, load: Load) -> list[Taken]:
    """TimeMarks with what is known of the load."""
    marks = []
    for _ in range(_RECOVERED):
        load.wait_more(_BETWEEN)
        marks.append(take(context, vm, load))
    return marks


def _hold_table(frozen: dict[Consistency, list[Frozen]], runs: int) -> Table:
    table = Table(
        f"One guest under load, {runs} TimeMarks of each level",
        ("level", "milliseconds of", "p50", "p90", "max", "goal of max"),
    )
    for level, samples in frozen.items():
        for kind, name in _PARTS[level].items():
            table.add(level, name, *spread([s.held_ms(kind) for s in samples]), _GOAL)
        table.add(level, _WHOLE, *spread([s.answer["freeze_ms"] for s in samples]), "")
        table.add(level, "the command, whole", *spread([s.seconds * 1000 for s in samples]), "")
    table.notes.append(
        "The guest is emulated (no KVM), on the cores of the proxy: ext4 with PostgreSQL and "
        "SQLite, XFS with MariaDB, seven writers."
    )
    return table


def spread(values: Sequence[float]) -> tuple[str, str, str]:
    """p50, p90 and the maximum, in whole numbers."""
    return f"{percentile(values, 50):.0f}", f"{percentile(values, 90):.0f}", f"{max(values):.0f}"


# -- what is replayed ------------------------------------------------------------------------------


def _recovery_table(ground: Ground, crash: Sequence[Taken], application: Sequence[Taken]) -> Table:
    table = Table(
        f"What the databases replay, {_RECOVERED} TimeMarks of each level (medians)",
        ("level", "PostgreSQL redo", "its redo took", "MariaDB redo", "it answered after"),
    )
    for marks in (crash, application):
        started = [_start(ground, taken) for taken in marks]
        postgres, mariadb = [s[0] for s in started], [s[1] for s in started]
        table.add(
            marks[0].level,
            f"{_median_kib(postgres):.0f} KiB",
            f"{statistics.median(s.recovery_s for s in postgres):.2f} s",
            f"{_median_kib(mariadb):.0f} KiB",
            f"{statistics.median(s.recovery_s for s in mariadb):.2f} s",
        )
    table.notes.append(
        "The crash TimeMarks were taken with no checkpoint since the databases started: "
        "PostgreSQL's redo grows until the next one (its `checkpoint_timeout` here is 1 h); at "
        "application level it begins at the TimeMark's own. MariaDB checkpoints only where its "
        "account has SUPER, which this one has not. All of them started without an error."
    )
    return table


def _start(ground: Ground, taken: Taken) -> tuple[Started, Started]:
    """PostgreSQL and MariaDB on copies; BenchError where one is not whole."""
    work = ground.pool / "work"
    work.mkdir(exist_ok=True)
    with (
        replayed(taken, work) as points,
        tempfile.TemporaryDirectory(prefix="run", dir=ground.folder) as name,
    ):
        runs = Path(name)
        runs.chmod(0o755)
        started = (
            start_postgres(taken, points, runs / "p"),
            start_mariadb(taken, points, runs / "m"),
        )
    faults = [fault for one in started for fault in one.faults]
    if faults:
        raise BenchError(f"{taken.level}: {faults}")
    return started


def _median_kib(started: Sequence[Started]) -> float:
    return statistics.median(s.redo_bytes for s in started) / 1024
