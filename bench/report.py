"""Tables, on the terminal and in docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

_MARK = "<!-- {} -->"


@dataclass(slots=True)
class Table:
    """A title, a head, rows of text."""

    title: str
    head: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    part: str = ""  # of the benchmark that it is a table of

    def add(self, *cells: str) -> None:
        """One row."""
        self.rows.append(cells)

    def markdown(self) -> str:
        """As Markdown."""
        lines = [
            _MARK.format(self.part),
            f"## {self.title}",
            "",
            _row(self.head),
            _row(["---"] * len(self.head)),
        ]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, "", *self.notes, ""])

    def text(self) -> str:
        """For a terminal."""
        table = [tuple(self.head), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.head))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([f"\n{self.title}", *lines, *self.notes])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def rate(count_bytes: float, seconds: float) -> str:
    """`1.23 GB/s` (10⁹ bytes) or `45 MB/s`."""
    speed = count_bytes / seconds
    return f"{speed / 1e9:.2f} GB/s" if speed >= 1e9 else f"{speed / 1e6:.0f} MB/s"


def machine() -> str:
    """One paragraph about where it was measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown processor",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux "
        f"{platform.release()}, Python {platform.python_version()}, "
        f"{datetime.now(UTC):%Y-%m-%d}."
    )


def write_page(tables: Sequence[Table], where: str, rounds: int, path: Path) -> None:
    """docs/benchmarks.md."""
    head = (
        "# Benchmarks\n\n"
        "Made by `make bench`. Medians of whole processes; ratios are medians of the rounds'\n"
        "quotients, the contenders running in turns. Each figure stands beside its peer of the\n"
        f"same run. Rounds: {rounds}. Data: {where}.\n\n"
        f"Machine: {machine()}\n\n"
    )
    path.write_text(head + "\n".join(table.markdown() for table in tables))


def update_page(tables: Sequence[Table], order: Sequence[str], rounds: int, path: Path) -> None:
    """Put the tables of some parts into the page, in the place of older ones of the same parts."""
    new: dict[str, str] = {}
    for table in tables:
        table.notes.append(f"Measured by itself: {rounds} rounds, {datetime.now(UTC):%Y-%m-%d}.")
        new[table.part] = new.get(table.part, "") + table.markdown() + "\n"
    head, *rest = re.split(r"^(?=<!-- \w+ -->$)", path.read_text(), flags=re.MULTILINE)
    old: dict[str, str] = {}
    for text in rest:
        part = text[len("<!-- ") :].partition(" ")[0]
        old[part] = old.get(part, "") + text.rstrip("\n") + "\n\n"
    parts = sorted(old.keys() | new.keys(), key=list(order).index)
    path.write_text(head + "".join({**old, **new}[part] for part in parts).rstrip("\n") + "\n")
