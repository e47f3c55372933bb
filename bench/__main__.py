"""`python -m bench`: measure, print, write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench import (
    backups,
    fleet,
    instant,
    inventory,
    island,
    latency,
    mounts,
    nights,
    quiesce,
    reading,
    restores,
    scale,
    stages,
    targets,
    verifying,
    vm_snapshots,
)
from bench.ground import Ground, choose_folder, ground
from bench.report import Table, update_page, write_page

PARTS = (
    "stages", "full", "restore", "verify", "reading", "incremental", "nights", "scale", "start",
    "many", "targets", "luns", "first", "instant", "freeze", "fleet", "latency",
    "inventory", "vm-snapshots", "island",
)  # fmt: skip

_WITHOUT_GROUND = {"inventory", "vm-snapshots", "island"}


def main() -> int:
    """Run the chosen parts (all by default)."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each contender")
    parser.add_argument("--freezes", type=int, default=30, help="TimeMarks of running guests")
    parser.add_argument("--guests", type=int, default=8, help="guests at once (part fleet)")
    parser.add_argument("--folder", help="work folder (default: memory, if there is plenty)")
    parser.add_argument("--update", action="store_true", help="put chosen parts into the page")
    parser.add_argument(
        "--page", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
    )
    chosen = parser.parse_args()
    unknown = set(chosen.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if os.geteuid() != 0:
        parser.error("the pool is loop-mounted: run as root")
    folder = choose_folder(chosen.folder)
    wanted = chosen.parts or list(PARTS)
    tables = _measure(folder, wanted, chosen)
    if not chosen.parts:
        where = "memory (tmpfs)" if str(folder).startswith("/dev/shm") else "disk"  # noqa: S108
        write_page(tables, where, chosen.rounds, chosen.page)
        print(f"\nwritten: {chosen.page}")
    elif chosen.update:
        update_page(tables, PARTS, chosen.rounds, chosen.page)
        print(f"\nbrought up to date: {chosen.page}")
    return 0


def _measure(folder: Path, wanted: list[str], chosen: argparse.Namespace) -> list[Table]:
    tables: list[Table] = []
    rounds: int = chosen.rounds

    def show(part: str, *made: Table) -> None:
        for table in made:
            table.part = part
            print(table.text(), flush=True)
            tables.append(table)

    _measure_vsphere(wanted, rounds, show)
    if set(wanted) <= _WITHOUT_GROUND:
        return tables
    with ground(folder) as place:
        limit_s = 0.0
        if "stages" in wanted or "full" in wanted:
            table, limit_s = stages.measure(place)
            show("stages", table)
        if "full" in wanted:
            show("full", backups.full(place, rounds, limit_s))
        if "restore" in wanted:
            show("restore", restores.measure(place, rounds))
        if "verify" in wanted:
            show("verify", verifying.measure(place, rounds))
        if "reading" in wanted:
            show("reading", reading.measure(place, rounds))
        if "incremental" in wanted:
            show("incremental", backups.incremental(place))
        if "nights" in wanted:
            show("nights", *nights.measure(place.folder))
        if "scale" in wanted:
            show("scale", *scale.measure(place, rounds))
        _measure_views(place, wanted, rounds, show)
        _measure_guests(place, wanted, chosen, show)
    return tables


def _measure_vsphere(wanted: list[str], rounds: int, show: Callable[..., None]) -> None:
    """What needs a vCenter: the simulator of the tests."""
    if "inventory" in wanted:
        show("inventory", inventory.measure(rounds))
    if "vm-snapshots" in wanted:
        show("vm-snapshots", vm_snapshots.measure())
    if "island" in wanted:
        show("island", island.measure())


def _measure_views(
    place: Ground, wanted: list[str], rounds: int, show: Callable[..., None]
) -> None:
    """What shows points in time to others."""
    if "start" in wanted:
        show("start", mounts.start_up(place, rounds))
    if "many" in wanted:
        show("many", mounts.many(place))
    if "targets" in wanted:
        show("targets", targets.reading(place, rounds))
    if "luns" in wanted:
        show("luns", targets.many(place))
    if "first" in wanted:
        show("first", targets.first_read(place, rounds))
    if "instant" in wanted:
        show("instant", *instant.measure(rounds))


def _measure_guests(
    place: Ground, wanted: list[str], chosen: argparse.Namespace, show: Callable[..., None]
) -> None:
    """What needs running guests."""
    if "freeze" in wanted:
        show("freeze", *quiesce.one_guest(place, chosen.freezes))
    if "fleet" in wanted:
        show("fleet", fleet.many_guests(place, chosen.guests, chosen.freezes))
    if "latency" in wanted:
        show("latency", latency.of_a_guest(place, chosen.rounds))


if __name__ == "__main__":
    sys.exit(main())
