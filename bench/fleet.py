"""Many guests at once: frozen in parallel, and the same ones one after another."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.ground import OFFLOAD, Ground
from bench.measure import BenchError, once
from bench.quiesce import spread
from bench.report import Table
from offload import compose
from offload.model import Consistency
from offload.progress import NoProgress
from offload.quiesce import Quiescer
from offload.services.context import Context, open_context
from offload.services.held import Held, Holding
from offload.testing.production import POINTS, PlainVm, plain_vm
from offload.testing.production_load import Load, order_writer
from offload.testing.production_marks import write_configuration

_GROUP = "fleet"
_MEMORY_MIB = 320
_DEADLINE_S = 120.0  # a guest in emulation has a fourth of a core
_BETWEEN = 1


def many_guests(ground: Ground, guests: int, runs: int) -> Table:
    """Time until all are frozen, both ways in each run; TimeMarks of all of them."""
    with _fleet(ground, guests) as vms, _load(vms) as load:
        folder = ground.folder / _GROUP
        config = write_configuration(folder / "offload.toml", _configuration(vms, folder))
        times: dict[str, list[float]] = {"parallel": [], "turns": [], "held": [], "command": []}
        with open_context(config) as context:
            for _ in range(runs):
                load.wait_more(_BETWEEN)
                together = [_quiescers(context, list(vms))]
                times["parallel"].append(_frozen_after_ms(together))
                load.wait_more(_BETWEEN)
                in_turns = [_quiescers(context, [name]) for name in vms]
                times["turns"].append(_frozen_after_ms(in_turns))
                load.wait_more(_BETWEEN)
                sample = once(
                    [OFFLOAD, "--config", str(config), "--json", "timemark", "create", _GROUP]
                )
                times["held"].append(json.loads(sample.stdout)["freeze_ms"])
                times["command"].append(sample.seconds * 1000)
    return _table(times, guests, runs)


def _table(times: Mapping[str, Sequence[float]], guests: int, runs: int) -> Table:
    table = Table(
        f"{guests} guests at once, {runs} runs",
        ("milliseconds of", "p50", "p90", "max"),
    )
    names = {
        "parallel": "all frozen, in parallel",
        "turns": "all frozen, one after another",
        "held": "whole hold of a TimeMark of all",
        "command": "its command, whole",
    }
    for key, name in names.items():
        table.add(name, *spread(times[key]))
    quotients = [b / a for a, b in zip(times["parallel"], times["turns"], strict=True)]
    p50, _, most = spread([100 * q for q in quotients])
    table.notes.append(
        f"One after another takes {int(p50) / 100:.2f} × as long as in parallel (median of the "
        f"runs; at most {int(most) / 100:.2f}). Each guest is emulated, on the cores of the proxy, "
        "with an agent, ext4, XFS and a writer of small synced files of its own: what is parallel "
        "is the waiting, the work shares the cores."
    )
    return table


@contextmanager
def _fleet(ground: Ground, guests: int) -> Iterator[dict[str, PlainVm]]:
    """Booted one after another."""
    with ExitStack() as stack:
        vms = {}
        for number in range(1, guests + 1):
            name = f"vm{number}"
            folder, disks = ground.folder / _GROUP / name, ground.pool / name
            folder.mkdir(parents=True)
            disks.mkdir()
            vms[name] = stack.enter_context(plain_vm(folder, disks, memory_mib=_MEMORY_MIB))
        yield vms


@contextmanager
def _load(vms: Mapping[str, PlainVm]) -> Iterator[Load]:
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(order_writer(vm.writer_port, "file")).commit
            for name, vm in vms.items()
        }
        yield stack.enter_context(Load(writers))


def _configuration(vms: Mapping[str, PlainVm], folder: Path) -> dict[str, Any]:
    return {
        "state_dir": str(folder / "state"),
        "runtime_dir": str(folder / "run"),
        "pool": {"min_free": "0%"},
        "volumes": {
            f"{name}-{volume}": {"provider": "reflink", "path": str(path)}
            for name, vm in vms.items()
            for volume, path in vm.disks.items()
        },
        "groups": {
            _GROUP: {
                "volumes": [f"{name}-{volume}" for name in vms for volume in POINTS],
                "consistency": str(Consistency.FILESYSTEM),
                "deadline_s": _DEADLINE_S,
            }
        },
        "vms": {
            name: {
                "volumes": [f"{name}-{volume}" for volume in POINTS],
                "freeze": {
                    "kind": "qemu-ga",
                    "socket": str(vm.agent),
                    "mounts": list(POINTS.values()),
                },
            }
            for name, vm in vms.items()
        },
    }


def _quiescers(context: Context, names: Sequence[str]) -> list[Quiescer]:
    config = context.instance.config
    volumes = config.group(_GROUP).volumes
    least = Consistency.FILESYSTEM
    return [
        compose.vm_quiescer(name, config.vms[name], least, volumes, context.instance)
        for name in names
    ]


def _frozen_after_ms(batches: Sequence[Sequence[Quiescer]]) -> float:
    """From the first freeze to the last: the quiescers of a batch in parallel, as the director does
    it, the batches one after another. All are thawed then."""
    holdings = [
        Holding([Held(q, Consistency.FILESYSTEM) for q in batch], _DEADLINE_S, NoProgress())
        for batch in batches
    ]
    try:
        for holding in holdings:
            holding.check()
            holding.arm()
        began = time.perf_counter()
        for holding in holdings:
            holding.hold()
            holding.freeze()
        seconds = time.perf_counter() - began
    finally:
        for holding in holdings:
            holding.thaw()
    errors = [e.error.message for h in holdings for e in h.entries if e.error is not None]
    if errors:
        raise BenchError("; ".join(errors))
    return seconds * 1000
