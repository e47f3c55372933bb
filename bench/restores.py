"""Restore of the mixed image into a file, beside restic and borg."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from bench.ground import GIB, MIB, Ground
from bench.measure import Sample, in_turns, medians, once, ratio
from bench.peers import peers_of
from bench.report import Table, rate

_NOTE = (
    "Goal: ≥ 3 × restic. Each from its own repository of the same image, out of the page cache, "
    "into a new file; offload's and borg's (`--sparse`) have holes, restic's ({}) has none. "
    "offload has synced its file when it ends, the others have not."
)


def measure(ground: Ground, rounds: int) -> Table:
    """Seconds, CPU, memory; what came back is compared with the image once each."""
    restored = ground.folder / "restored"
    contenders = _contenders(ground, restored)
    try:
        for name, contender in contenders.items():
            contender()
            _compare(ground, restored, name)
        taken = in_turns(contenders, rounds, warm_up=False)
        version = once(["restic", "version"]).stdout.split(" compiled")[0]
    finally:
        for part in ("restored", "restic", "borg", "borg-base", "restic-cache"):
            shutil.rmtree(ground.folder / part, ignore_errors=True)
    table = Table(
        "Restore of the 2 GiB mixed image into a file",
        ("what", "seconds", "rate", "CPU s", "peak memory", "offload is"),
    )
    mine = taken["offload"]
    for name, samples in taken.items():
        m = medians(samples)
        times = "" if name == "offload" else f"{ratio(samples, mine):.2f} × as fast"
        table.add(
            name,
            f"{m.seconds:.2f}",
            rate(2 * GIB, m.seconds),
            f"{m.cpu_seconds:.2f}",
            f"{m.peak_bytes / MIB:.0f} MiB",
            times,
        )
    table.notes.append(_NOTE.format(version))
    return table


def _contenders(ground: Ground, restored: Path) -> dict[str, Callable[[], Sample]]:
    """A repository of each, and how it gives the image back."""
    ground.fresh_store()
    backup = ground.ask("backup", "mixed", "--store", "main")["id"]
    restic_env, borg_env, repo = peers_of(ground)
    into_here = f'cd "{restored}" && exec borg extract --sparse "{repo}::a"'

    def fresh(make: Callable[[], Sample]) -> Callable[[], Sample]:
        def run() -> Sample:
            shutil.rmtree(restored, ignore_errors=True)
            restored.mkdir()
            return make()

        return run

    target = str(restored / "mixed.raw")
    return {
        "offload": fresh(lambda: ground.cli("restore", f"{backup}/mixed", "--to", target)),
        "restic": fresh(
            lambda: once(["restic", "restore", "latest", "--target", str(restored)], restic_env)
        ),
        "borg -e none": fresh(lambda: once(["sh", "-c", into_here], borg_env)),
    }


def _compare(ground: Ground, restored: Path, name: str) -> None:
    (found,) = (path for path in restored.rglob("mixed.raw") if path.is_file())
    if once(["cmp", str(found), str(ground.image)]).stdout:
        raise AssertionError(name)
