"""Much of it: a volume of 1 TiB in which nothing has changed, and 1,000 backups of one volume.

The S3 server is Ceph's gateway on loopback; a proxy counts the requests.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.ground import GIB, MIB, Ground, tree_bytes
from bench.measure import Sample
from bench.report import Table
from offload.services.backup import backup
from offload.services.context import open_context
from offload.testing.fault_proxy import FaultProxy, fault_proxy
from offload.testing.rgw import RunningRgw, running_rgw

_TIB = 1 << 40
_PIECES, _PIECE = 64, 8 * MIB  # of the volume of 1 TiB: what is data in it
_MANY_SIZE, _MANY_DATA = 64 * GIB, 64 * MIB
_BLOCK = 4096
_BLOCKS = 16  # changed each night
_PLACES = 256  # where: few, so that the volume's own extents in the pool stay few
_KEPT = 500  # of the thousand

_CONFIG = """
state_dir = "{folder}/scale/state"
runtime_dir = "{folder}/scale/run"
[volumes.sparse]
provider = "reflink"
path = "{pool}/sparse.raw"
[groups.sparse]
volumes = ["sparse"]
[stores.near]
kind = "disk"
path = "{folder}/scale/store"
min_free = "64MiB"
[stores.near.keep]
last = {kept}
"""
_FAR = """
[stores.{name}]
kind = "s3"
bucket = "{bucket}"
endpoint = "{endpoint}"
path_style = true
credentials_file = "{credentials}"
{more}
"""
_LOCK = """[stores.locked.lock]
mode = "compliance"
retain = "1d"
"""


def measure(ground: Ground, rounds: int) -> Iterator[Table]:
    """Both."""
    yield nothing_changed(ground, rounds)
    yield thousand(ground, rounds)


def nothing_changed(ground: Ground, rounds: int) -> Table:
    """The incremental of a volume of 1 TiB in which nothing has changed: on disk, on S3, on S3 with
    object lock."""
    table = Table(
        "Incremental of a sparse volume of 1 TiB in which nothing has changed, whole command",
        ("store", "seconds", "CPU s", "requests", "peak memory", "goal"),
    )
    with (
        _ours(ground) as mine,
        running_rgw(mine.config.parent / "rgw") as rgw,
        fault_proxy(rgw.endpoint) as proxy,
    ):
        _add_far(mine.config, rgw, proxy)
        _make_sparse(mine.sparse, _TIB, _PIECES, _PIECE)
        for store, name in (("near", "disk"), ("far", "S3"), ("locked", "S3, object lock")):
            mine.cli("store", "init", store)
            mine.cli("backup", "sparse", "--store", store)
            mine.cli("backup", "sparse", "--store", store)  # which finds its parent's locks
            samples, requests = [], []
            for _ in range(rounds):
                proxy.forget()
                samples.append(mine.cli("backup", "sparse", "--store", store))
                requests.append(len(proxy.seen))
            table.add(
                name,
                f"{statistics.median(s.seconds for s in samples):.2f}",
                f"{statistics.median(s.cpu_seconds for s in samples):.2f}",
                "" if store == "near" else f"{statistics.median(requests):.0f}",
                _memory(samples),
                "< 2 s, ≤ 300 MiB",
            )
    return table


def thousand(ground: Ground, rounds: int, count: int = 1000) -> Table:
    """So many backups of one volume: what they cost to keep, list, compare and prune."""
    table = Table(
        f"{count} backups of one volume ({_BLOCKS} blocks of 4 KiB changed between two)",
        ("what", "seconds", "CPU s", "peak memory", "size"),
    )
    with _ours(ground) as mine:
        _make_sparse(mine.sparse, _MANY_SIZE, 1, _MANY_DATA)
        mine.cli("store", "init", "near")
        taken = _take(mine, count)
        table.add(
            "first tenth of the backups, mean", f"{_mean(taken[: count // 10]):.3f}", *[""] * 3
        )
        table.add(
            "last tenth of the backups, mean", f"{_mean(taken[-count // 10 :]):.3f}", *[""] * 3
        )
        listed = mine.ask("backup", "list")
        state = mine.folder / "scale/state"
        for what, size in {
            "catalog": sum(p.stat().st_size for p in state.glob("catalog.db*")),
            "local index": sum(p.stat().st_size for p in state.rglob("*.index.db*")),
            "index objects": tree_bytes(mine.folder / "scale/store/index"),
            "manifests": tree_bytes(mine.folder / "scale/store/manifests"),
            "packs": tree_bytes(mine.folder / "scale/store/packs"),
        }.items():
            table.add(what, "", "", "", f"{size / MIB:.1f} MiB")
        newest = listed[-1]["id"]
        for words in (
            ("backup", "list"),
            ("backup", "diff", listed[0]["id"], newest),
            ("backup", "diff", listed[-2]["id"], newest),
            ("backup", "sparse"),
            ("verify", "--all", "--quick"),
            ("prune", "--dry-run"),
        ):
            _row(table, words, [mine.cli(*words) for _ in range(rounds)])
        _row(table, ("prune",), [mine.cli("prune", "--yes")])
        _row(table, ("prune again",), [mine.cli("prune", "--yes")])
    return table


def _row(table: Table, words: tuple[str, ...], samples: list[Sample]) -> None:
    shown = " ".join(w for w in words if not _is_id(w))
    table.add(
        f"`offload {shown}`",
        f"{statistics.median(s.seconds for s in samples):.2f}",
        f"{statistics.median(s.cpu_seconds for s in samples):.2f}",
        _memory(samples),
        "",
    )


def _is_id(word: str) -> bool:
    return len(word) > 10 and word.isalnum()


def _take(mine: Ground, count: int) -> list[float]:
    """Seconds of each."""
    pick = random.Random(7)
    taken = []
    with open_context(mine.config) as ctx:
        for _ in range(count):
            with mine.sparse.open("r+b") as out:
                for _ in range(_BLOCKS):
                    out.seek(pick.randrange(_PLACES) * (_MANY_DATA // _PLACES))
                    out.write(pick.randbytes(_BLOCK))
            taken.append(backup(ctx, "sparse", "near").seconds)
    return taken


def _mean(values: list[float]) -> float:
    return statistics.mean(values)


def _memory(samples: list[Sample]) -> str:
    return f"{max(s.peak_bytes for s in samples) / MIB:.0f} MiB"


def _make_sparse(path: Path, size: int, pieces: int, piece: int) -> None:
    """Random bytes in pieces at even distances, holes between them."""
    with path.open("wb") as out:
        out.truncate(size)
        for number in range(pieces):
            out.seek(number * (size // pieces))
            for _ in range(piece // MIB):
                out.write(os.urandom(MIB))


def _add_far(config: Path, rgw: RunningRgw, proxy: FaultProxy) -> None:
    with config.open("a", encoding="utf-8") as out:
        for name, locked in (("far", False), ("locked", True)):
            out.write(
                _FAR.format(
                    name=name,
                    bucket=rgw.new_bucket(locked=locked),
                    endpoint=proxy.endpoint,
                    credentials=rgw.credentials_file,
                    more=_LOCK if locked else "",
                )
            )


@contextmanager
def _ours(ground: Ground) -> Iterator[Ground]:
    """The ground with an instance of this part alone."""
    folder = ground.folder / "scale"
    folder.mkdir()
    config = folder / "offload.toml"
    config.write_text(_CONFIG.format(folder=ground.folder, pool=ground.pool, kept=_KEPT))
    mine = replace(ground, config=config)
    try:
        yield mine
    finally:
        for mark in mine.ask("timemark", "list"):
            mine.cli("timemark", "delete", mark["id"], "--yes")
        shutil.rmtree(folder)
