"""Reading a TimeView: nbdcopy to null:, beside nbdkit's file plugin alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.ground import GIB, Ground
from bench.measure import in_turns, medians, once, ratio
from bench.report import Table, rate
from offload import run


@contextmanager
def bare_nbdkit(image: Path, folder: Path) -> Iterator[str]:
    """nbdkit's file plugin alone on the image."""
    socket, pid = folder / "bare.sock", folder / "bare.pid"
    run.run(["nbdkit", "-r", "-U", str(socket), "-P", str(pid), "file", str(image)])
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        run.run(["kill", pid.read_text().strip()])


def measure(ground: Ground, rounds: int) -> Table:
    """Rates of the three, and their ratios."""
    ground.fresh_store()
    backup = ground.ask("backup", "mixed")
    mark = ground.ask("timemark", "create", "mixed")
    shown = ground.ask("mount", f"timemark:{mark['id']}/mixed", "--name", "bench-snapshot")
    kept = ground.ask("mount", f"backup:{backup['id']}/mixed", "--name", "bench-backup")
    copy = ["nbdcopy"]
    with bare_nbdkit(ground.image, ground.folder) as bare:
        taken = in_turns(
            {
                name: partial(once, [*copy, uri, "null:"])
                for name, uri in {
                    "nbdkit file plugin alone": bare,
                    "TimeView of a snapshot": _uri(shown),
                    "TimeView of a backup": _uri(kept),
                }.items()
            },
            rounds,
        )
    ground.cli("unmount", "--all")
    base = taken["nbdkit file plugin alone"]
    table = Table(
        "TimeView read (nbdcopy to null:, 2 GiB mixed image, page cache)",
        ("what", "seconds", "rate", "× file plugin", "goal"),
    )
    goals = {"TimeView of a snapshot": "≥ 0.95", "TimeView of a backup": "≥ 0.4"}
    for name, samples in taken.items():
        seconds = medians(samples).seconds
        speed = f"{ratio(base, samples):.2f}"
        table.add(name, f"{seconds:.2f}", rate(2 * GIB, seconds), speed, goals.get(name, ""))
    return table


def _uri(answer: Any) -> str:
    """The URI of the one view that was mounted."""
    return str((answer[0] if isinstance(answer, list) else answer)["uri"])
