"""Full backups beside restic and borg; the incremental of a large sparse volume."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from bench.ground import GIB, MIB, Ground, tree_bytes
from bench.measure import Sample, in_turns, medians, once, ratio
from bench.report import Table, rate

_BLOCK = 4096
_MINE = "offload, encrypted"
_RESTIC = "restic --compression auto"
_BORG = "borg -e repokey-blake2 -C zstd,1"
_NOTE = (
    "Goals: ≥ 3 × restic, ≥ 2.5 × borg, size within 7 % of the smaller, ≥ 0.8 × the limit, "
    "≤ 300 MiB; all of them encrypted. offload decrypts, decompresses and hashes each chunk again "
    "before it writes it, the peers do not. Size: {:+.1%} against the smaller of the peers. "
    "Against the limit of the cores (start of the program, catalog and fsync included): {:.2f}. "
    "All read their input from the page cache."
)


def full(ground: Ground, rounds: int, limit_s: float) -> Table:
    """Full backup of the mixed image: seconds, size, memory; the peers in the same run."""
    sizes: dict[str, int] = {}
    contenders: dict[str, Callable[[], Sample]] = {
        _MINE: lambda: _offload(ground, sizes, _MINE, "sealed", ground.sealed),
        "offload, plain": lambda: _offload(ground, sizes, "offload, plain", "main", ground.store),
        _RESTIC: lambda: _restic(ground, sizes),
        _BORG: lambda: _borg(ground, sizes),
    }
    taken = in_turns(contenders, rounds)
    table = Table(
        "Full backup of the 2 GiB mixed image to disk",
        ("what", "seconds", "rate", "CPU s", "stored", "peak memory", f"{_MINE}, is"),
    )
    mine = taken[_MINE]
    for name, samples in taken.items():
        m = medians(samples)
        times = "" if name == _MINE else f"{ratio(samples, mine):.2f} × as fast"
        table.add(
            name,
            f"{m.seconds:.2f}",
            rate(2 * GIB, m.seconds),
            f"{m.cpu_seconds:.2f}",
            f"{sizes[name] / 1e6:.0f} MB",
            f"{m.peak_bytes / MIB:.0f} MiB",
            times,
        )
    smaller = min(sizes[name] for name in (_RESTIC, _BORG))
    share = limit_s / medians(mine).seconds
    table.notes.append(_NOTE.format(sizes[_MINE] / smaller - 1, share))
    return table


def _offload(ground: Ground, sizes: dict[str, int], name: str, store: str, path: Path) -> Sample:
    """From a TimeMark that is in the page cache, as the peers' file is."""
    ground.fresh_store()
    mark = ground.ask("timemark", "create", "mixed")["id"]
    for snapshot in (ground.pool / ".offload").rglob("mixed.raw"):
        once(["dd", f"if={snapshot}", "of=/dev/null", "bs=1M", "status=none"])
    sample = ground.cli("backup", f"timemark:{mark}/mixed", "--store", store)
    sizes[name] = tree_bytes(path)
    return sample


def _restic(ground: Ground, sizes: dict[str, int]) -> Sample:
    repo = ground.folder / "restic"
    shutil.rmtree(repo, ignore_errors=True)
    env = {
        "RESTIC_PASSWORD": "bench",
        "RESTIC_REPOSITORY": str(repo),
        "RESTIC_CACHE_DIR": str(ground.folder / "restic-cache"),
    }
    once(["restic", "init"], env)
    sample = once(["restic", "backup", "--compression", "auto", str(ground.image)], env)
    sizes[_RESTIC] = tree_bytes(repo)
    shutil.rmtree(repo)
    return sample


def _borg(ground: Ground, sizes: dict[str, int]) -> Sample:
    repo = ground.folder / "borg"
    shutil.rmtree(repo, ignore_errors=True)
    env = {"BORG_BASE_DIR": str(ground.folder / "borg-base"), "BORG_PASSPHRASE": "bench"}
    once(["borg", "init", "-e", "repokey-blake2", str(repo)], env)
    sample = once(["borg", "create", "-C", "zstd,1", f"{repo}::a", str(ground.image)], env)
    sizes[_BORG] = tree_bytes(repo)
    shutil.rmtree(repo)
    return sample


def incremental(ground: Ground) -> Table:
    """64 GiB sparse, 2 GiB of data, then 1 % of it changed: in random blocks and in runs."""
    image = ground.image.read_bytes()
    with ground.sparse.open("wb") as out:
        out.truncate(64 * GIB)
        for piece in range(64):  # 32 MiB of data at each GiB
            out.seek(piece * GIB)
            out.write(image[piece * 32 * MIB : (piece + 1) * 32 * MIB])
    del image
    ground.fresh_store()
    first = ground.cli("backup", "sparse")
    table = Table(
        "Incremental of a 64 GiB sparse volume with 2 GiB of data",
        ("night", "seconds", "changed", "read", "read ÷ changed", "stored"),
    )
    table.add("first (full)", f"{first.seconds:.2f}", "2.0 GiB", *_said(ground, 2 * GIB))
    nights: dict[str, Callable[[], int]] = {
        "nothing changed": lambda: 0,
        "1 % in random 4 KiB blocks": lambda: _change(ground, 1),
        "1 % in runs of 1 MiB": lambda: _change(ground, 256),
    }
    for name, change in nights.items():
        changed = change()
        sample = ground.cli("backup", "sparse")
        table.add(
            name, f"{sample.seconds:.2f}", f"{changed / MIB:.1f} MiB", *_said(ground, changed)
        )
    table.notes.append(
        "Goal: read ≤ 1.5 × changed, time following the change. What is read includes the sample "
        "of unchanged blocks that is read again to check the storage's change tracking."
    )
    return table


def _said(ground: Ground, changed: int) -> tuple[str, str, str]:
    last = ground.ask("backup", "list")[-1]
    shown = ground.ask("backup", "show", last["id"])
    read = sum(i["read_bytes"] for i in shown["images"])
    stored = sum(i["stored_bytes"] for i in shown["images"])
    quotient = f"{read / changed:.2f}" if changed else "-"
    return f"{read / MIB:.1f} MiB", quotient, f"{stored / MIB:.1f} MiB"


def _change(ground: Ground, run_blocks: int) -> int:
    """Overwrite 1 % of the data with runs of so many blocks; returns the bytes changed."""
    pick = random.Random(run_blocks)
    blocks = 2 * GIB // _BLOCK
    per_piece = 32 * MIB // _BLOCK
    chosen: set[int] = set()
    while len(chosen) < blocks // 100:
        start = pick.randrange(blocks - run_blocks) // run_blocks * run_blocks
        chosen.update(range(start, start + run_blocks))
    with ground.sparse.open("r+b") as out:
        for block in sorted(chosen):
            piece, inside = divmod(block, per_piece)
            out.seek(piece * GIB + inside * _BLOCK)
            out.write(pick.randbytes(_BLOCK))
        out.flush()
        os.fsync(out.fileno())
    return len(chosen) * _BLOCK
