"""Mounting: time to the first byte, 255 views of one volume, and the start of the program."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import nbd

from bench.ground import MIB, OFFLOAD, Ground
from bench.measure import medians, once
from bench.report import Table

_VIEWS = 255


def start_up(ground: Ground, rounds: int) -> Table:
    """Start-up of commands, and mount to first byte."""
    table = Table("Start of the program, and mount to first byte", ("what", "seconds", "goal"))
    help_s = medians([once([OFFLOAD, "--help"]) for _ in range(rounds + 3)]).seconds
    table.add("offload --help", f"{help_s:.3f}", "≤ 0.2")
    views_s = medians([ground.cli("views") for _ in range(rounds + 3)]).seconds
    table.add("offload views", f"{views_s:.3f}", "≤ 0.4")
    ground.fresh_store()
    backup = ground.ask("backup", "mixed")
    mark = ground.ask("timemark", "create", "mixed")
    for what, origin in (
        ("snapshot", f"timemark:{mark['id']}/mixed"),
        ("backup", f"backup:{backup['id']}/mixed"),
    ):
        times = [_first_byte(ground, origin) for _ in range(rounds + 2)]
        table.add(
            f"mount of a {what} to first byte, whole command",
            f"{statistics.median(times):.3f}",
            "≤ 0.5",
        )
    return table


def _first_byte(ground: Ground, origin: str) -> float:
    began = time.perf_counter()
    made = ground.ask("mount", origin, "--name", "first-byte")
    handle = nbd.NBD()
    handle.connect_uri((made if isinstance(made, dict) else made[0])["uri"])
    handle.pread(4096, 0)
    seconds = time.perf_counter() - began
    handle.shutdown()
    ground.cli("unmount", "first-byte")
    return seconds


def many(ground: Ground) -> Table:
    """255 views of one volume at once: total time, memory of each server."""
    ground.fresh_store()
    backup = ground.ask("backup", "mixed")
    mark = ground.ask("timemark", "create", "mixed")
    table = Table(
        f"{_VIEWS} TimeViews of one volume at once",
        ("of", "mount, all", "each", "memory each (proportional)", "unmount, all"),
    )
    origins: dict[str, Callable[[], str]] = {
        "a snapshot": lambda: f"timemark:{mark['id']}/mixed",
        "a backup": lambda: f"backup:{backup['id']}/mixed",
    }
    for name, origin in origins.items():
        began = time.perf_counter()
        ground.cli("mount", *[origin()] * _VIEWS)
        mounted = time.perf_counter() - began
        views = ground.ask("views")
        if len(views) != _VIEWS:
            raise RuntimeError(f"{len(views)} views stand, {_VIEWS} were wanted")
        _read_all([view["uri"] for view in views])
        memory = _memory_of_servers() / _VIEWS
        began = time.perf_counter()
        ground.cli("unmount", "--all")
        table.add(
            name,
            f"{mounted:.1f} s",
            f"{mounted / _VIEWS * 1000:.0f} ms",
            f"{memory / MIB:.1f} MiB",
            f"{time.perf_counter() - began:.1f} s",
        )
    return table


def _read_all(uris: list[str]) -> None:
    """All of them answer, all at the same time."""
    handles = []
    for uri in uris:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        handle.pread(1 << 20, 0)
        handles.append(handle)
    for handle in handles:
        handle.shutdown()


def _memory_of_servers() -> int:
    """Proportional set sizes of all nbdkit processes, in bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text().strip() != "nbdkit":
                continue
            text = (folder / "smaps_rollup").read_text()
        except OSError:
            continue
        total += next(
            int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")
        )
    return total
