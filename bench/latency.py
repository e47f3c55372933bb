"""What a guest notices: its write latency while it is backed up, by us and by its own QEMU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench.guest_writes
from bench.ground import MIB, Ground
from bench.measure import BenchError, percentile
from bench.report import Table
from offload import run
from offload.model import Consistency
from offload.testing import guest_agent
from offload.testing.lab.channel import RemoteCommand
from offload.testing.lab.guest import Guest
from offload.testing.production_marks import write_configuration

_DATA_MIB, _DISK_MIB = 2048, 2560
_POINT = "/srv/data"
_GROUP = "vm"
_LEAST_S = 5.0  # of each phase of a round; what ends sooner is done again
_JOB_S = 600.0
_LEAST = 40  # writes while something runs; fewer have no p99


@dataclass(slots=True)
class Writes:
    """The latencies in milliseconds while one thing ran, of all rounds; the seconds of each run."""

    latencies: list[float]
    seconds: list[float]

    def row(self) -> tuple[str, ...]:
        """For the table."""
        each = [percentile(self.latencies, 50), percentile(self.latencies, 99), max(self.latencies)]
        lasted = sum(self.seconds) / len(self.seconds)
        return (f"{len(self.latencies)}", *(f"{ms:.1f}" for ms in each), f"{lasted:.1f} s")


def of_a_guest(ground: Ground, rounds: int) -> Table:
    """Alone, during our backup, during QEMU's, in turns."""
    with _machine(ground) as (guest, ours):
        writer = guest.start(
            ["/usr/bin/python3", "-I", "-S", bench.guest_writes.__file__, f"{_POINT}/data"]
        )
        phases: dict[str, Callable[[], None]] = {
            "nothing": lambda: time.sleep(_LEAST_S),
            "TimeMark + backup from it": lambda: _our_backup(ours),
            "QEMU's backup job": lambda: _qemu_backup(guest, ours.folder / "copy.raw"),
        }
        taken = {name: Writes(latencies=[], seconds=[]) for name in phases}
        for _ in range(rounds):
            for name, work in phases.items():
                spent = 0.0
                while spent < _LEAST_S:
                    ours.fresh_store()
                    spent += _during(writer, work, taken[name])
        writer.kill()
    return _table(taken, rounds)


def _table(taken: dict[str, Writes], rounds: int) -> Table:
    table = Table(
        f"Synced 4 KiB writes of a guest while {_DATA_MIB} MiB of its disk are backed up, "
        f"{rounds} rounds",
        ("while", "writes", "p50 ms", "p99 ms", "max ms", "it lasted (mean)"),
    )
    for name, writes in taken.items():
        if len(writes.latencies) < _LEAST:
            raise BenchError(f"{name}: {len(writes.latencies)} writes only")
        table.add(name, *writes.row())
    ours, theirs = taken["TimeMark + backup from it"], taken["QEMU's backup job"]
    quotients = [
        percentile(theirs.latencies, share) / percentile(ours.latencies, share)
        for share in (50, 99, 100)
    ]
    table.notes.append(
        "QEMU's job copies what the guest is about to overwrite before each such write "
        "(`blockdev-backup`, full, to a raw file beside our store). QEMU ÷ ours: p50 "
        "{:.2f}, p99 {:.2f}, max {:.2f}. ".format(*quotients)
        + "Ours reads, hashes and compresses on the guest's own two cores here; on a proxy of its "
        "own it would not. The maximum of ours has the freeze in it."
    )
    return table


def _during(writer: RemoteCommand, work: Callable[[], None], writes: Writes) -> float:
    """Do it once, and note what the guest's writes took meanwhile; its seconds."""
    before = bytes(writer.stdout).count(b"\n")
    began = time.perf_counter()
    work()
    writes.seconds.append(time.perf_counter() - began)
    if writer.ended:
        raise BenchError(f"the writer ended: {writer.failure}{writer.stderr.decode()}")
    lines = bytes(writer.stdout).decode().split("\n")[before:-1]
    writes.latencies += [int(line) / 1000 for line in lines]
    return writes.seconds[-1]


def _our_backup(ours: Ground) -> None:
    ours.cli("backup", _GROUP)


def _qemu_backup(guest: Guest, target: Path) -> None:
    """To a raw file, until the job has ended. BenchError if it failed."""
    size = _DISK_MIB * MIB
    with target.open("wb") as out:
        out.truncate(size)
    node = {"driver": "raw", "node-name": "copy"}
    guest.ask_qemu("blockdev-add", {**node, "file": {"driver": "file", "filename": str(target)}})
    try:
        guest.ask_qemu(
            "blockdev-backup",
            {"job-id": "copy", "device": "lab1", "target": "copy", "sync": "full",
             "auto-dismiss": False},
        )  # fmt: skip
        until = time.monotonic() + _JOB_S
        while (job := _job(guest))["status"] != "concluded":
            if time.monotonic() > until:
                raise BenchError("QEMU's backup does not end")
            time.sleep(0.02)
        guest.ask_qemu("job-dismiss", {"id": "copy"})
        if "error" in job:
            raise BenchError(f"QEMU's backup failed: {job['error']}")
    finally:
        guest.ask_qemu("blockdev-del", {"node-name": "copy"})
        target.unlink()


def _job(guest: Guest) -> dict[str, Any]:
    (job,) = guest.ask_qemu("query-jobs", {})
    found: dict[str, Any] = job
    return found


@contextmanager
def _machine(ground: Ground) -> Iterator[tuple[Guest, Ground]]:
    """A guest with its data disk, and an instance that backs it up with the guest agent."""
    folder = ground.folder / "latency"
    folder.mkdir()
    pool = ground.pool / "latency"
    pool.mkdir()
    disk, agent = pool / "data.raw", folder / "agent.sock"
    _make_disk(disk, folder / "content")
    config = write_configuration(folder / "offload.toml", _configuration(folder, disk, agent))
    with Guest(
        folder,
        memory_mib=768,
        visible=[Path(bench.guest_writes.__file__).parent],
        ports={guest_agent.PORT: agent},
    ) as guest:
        device = guest.attach(disk)
        guest.shell(f"mkdir -p {_POINT}; mount {device} {_POINT}")
        guest_agent.start_agent(guest, agent)
        yield guest, Ground(folder=folder, pool=pool, config=config)


def _make_disk(disk: Path, content: Path) -> None:
    """ext4 with one file of random bytes: nothing is skipped, by neither."""
    content.mkdir()
    pick = random.Random(7)
    with (content / "data").open("wb") as out:
        for _ in range(_DATA_MIB):
            out.write(pick.randbytes(MIB))
    run.run(
        ["mkfs.ext4", "-q", "-F", "-d", str(content), str(disk), f"{_DISK_MIB}M"], timeout_s=300
    )
    (content / "data").unlink()


def _configuration(folder: Path, disk: Path, agent: Path) -> dict[str, Any]:
    return {
        "state_dir": str(folder / "state"),
        "runtime_dir": str(folder / "run"),
        "pool": {"min_free": "0%"},
        "volumes": {"data": {"provider": "reflink", "path": str(disk)}},
        "groups": {
            _GROUP: {
                "volumes": ["data"],
                "consistency": str(Consistency.FILESYSTEM),
                "deadline_s": 60.0,
                "store": "main",
            }
        },
        "vms": {
            "guest": {
                "volumes": ["data"],
                "freeze": {"kind": "qemu-ga", "socket": str(agent), "mounts": [_POINT]},
            }
        },
        "stores": {"main": {"kind": "disk", "path": str(folder / "store"), "min_free": "64MiB"}},
    }
