"""Verify of every stored byte, beside the two stages that it cannot do without, restic and borg."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

from bench.ground import GIB, MIB, Ground
from bench.measure import Sample, in_turns, medians, once, ratio
from bench.peers import peers_of
from bench.report import Table, rate
from offload.engine.repository import Repository
from offload.engine.work import run_workers
from offload.format.pack import Encoding, Entry, chunk_id
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec

_NOTE = (
    "Goal: ≥ 0.7 × decompress + BLAKE3 alone (every payload of the store, in memory already, one "
    "thread a core), which takes {alone:.2f} s: offload reaches {share:.2f} of it, start of the "
    "program, reading, headers, footers and trees included. restic: `check --read-data`; borg: "
    "`check --verify-data`."
)


def measure(ground: Ground, rounds: int) -> Table:
    """Seconds, CPU, memory of a verify of the mixed image; out of the page cache."""
    contenders = _contenders(ground)
    try:
        alone = statistics.median(_alone(ground) for _ in range(rounds))
        taken = in_turns(contenders, rounds)
    finally:
        for part in ("restic", "borg", "borg-base", "restic-cache"):
            shutil.rmtree(ground.folder / part, ignore_errors=True)
    table = Table(
        "Verify of the 2 GiB mixed image",
        ("what", "seconds", "rate", "CPU s", "peak memory", "offload is"),
    )
    mine = taken["offload"]
    for name, samples in taken.items():
        m = medians(samples)
        table.add(
            name,
            f"{m.seconds:.2f}",
            rate(2 * GIB, m.seconds),
            f"{m.cpu_seconds:.2f}",
            f"{m.peak_bytes / MIB:.0f} MiB",
            "" if name == "offload" else f"{ratio(samples, mine):.2f} × as fast",
        )
    share = alone / medians(mine).seconds
    table.notes.append(_NOTE.format(alone=alone, share=share))
    return table


def _contenders(ground: Ground) -> dict[str, Callable[[], Sample]]:
    ground.fresh_store()
    ground.cli("backup", "mixed", "--store", "main")
    restic_env, borg_env, repo = peers_of(ground)
    return {
        "offload": lambda: ground.cli("verify", "--all", "--store", "main"),
        "restic": lambda: once(["restic", "check", "--read-data"], restic_env),
        "borg -e none": lambda: once(["borg", "check", "--verify-data", repo], borg_env),
    }


def _alone(ground: Ground) -> float:
    """Seconds to decompress and hash every payload of the store, threads as in verify."""
    return stages_alone(ground.store, ground.folder / "alone")


def stages_alone(store: Path, cache: Path) -> float:
    """The same of any disk store that is not encrypted."""
    repository = Repository.open(DiskStore(StoreSpec(url=str(store))), cache)
    try:
        payloads = [
            (entry, repository.store.get_range(pack, entry.payload_offset, entry.stored_length))
            for pack in repository.index.packs()
            for entry in repository.index.entries(pack)
        ]
        keys = repository.keys

        @contextmanager
        def decoder() -> Iterator[zstandard.ZstdDecompressor]:
            yield zstandard.ZstdDecompressor()

        def job(item: tuple[Entry, bytes], tool: zstandard.ZstdDecompressor) -> None:
            entry, payload = item
            raw = payload if entry.encoding == Encoding.RAW else tool.decompress(payload)
            chunk_id(entry.kind, raw, keys)

        began = time.perf_counter()
        run_workers(iter(payloads), decoder, job)
        return time.perf_counter() - began
    finally:
        repository.close()
        shutil.rmtree(cache, ignore_errors=True)
