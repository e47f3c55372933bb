"""Timing whole processes: wall and CPU seconds, peak memory; medians and ratios pair by pair."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from offload import run


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of a process. `peak_bytes` is the largest resident set of it or a child it waited
    for."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    stdout: str


class BenchError(Exception):
    """A measured command failed."""


def once(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Sample:
    """Run a process to its end and account for it.

    GNU time starts it: a child's peak memory would else begin with that of this process, which the
    kernel carries over fork and exec.
    """
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.NamedTemporaryFile("r") as peak,
    ):
        timed = ["/usr/bin/time", "-q", "-f", "%M", "-o", peak.name, *argv]
        began = time.perf_counter()
        process = run.spawn(timed, stdout=out.fileno(), stderr=err.fileno(), env=env)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            raise BenchError(f"{' '.join(argv)}: {err.read().decode('utf-8', 'replace')}")
        return Sample(
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=int(peak.read()) * 1024,
            stdout=out.read(1 << 20).decode("utf-8", "replace"),
        )


def medians(samples: Sequence[Sample]) -> Sample:
    """The median of each figure."""
    return Sample(
        seconds=statistics.median(s.seconds for s in samples),
        cpu_seconds=statistics.median(s.cpu_seconds for s in samples),
        peak_bytes=max(s.peak_bytes for s in samples),
        stdout=samples[-1].stdout,
    )


def in_turns(
    contenders: Mapping[str, Callable[[], Sample]], rounds: int, warm_up: bool = True
) -> dict[str, list[Sample]]:
    """Run all contenders one after another, round by round, so that a drift of the machine's speed
    hits all alike."""
    if warm_up:
        for contender in contenders.values():
            contender()
    taken: dict[str, list[Sample]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken[name].append(contender())
    return taken


def ratio(a: Sequence[Sample], b: Sequence[Sample]) -> float:
    """Median of the rounds' quotients: how many times longer `a` took than `b`."""
    return statistics.median(x.seconds / y.seconds for x, y in zip(a, b, strict=True))


def percentile(values: Sequence[float], share: int) -> float:
    """The smallest value that `share` percent of them do not pass."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]
