"""The stages of the copy path alone: where the next bottleneck is, and what two cores could do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.ground import GIB, Ground
from bench.report import Table, rate
from offload.engine.packwriter import Compressor
from offload.engine.work import run_workers, worker_count
from offload.format.cipher import open_box, record_nonce
from offload.format.pack import Encoding

_CHUNK = 256 << 10
_UNIT = 16 * _CHUNK
Stage = Callable[[memoryview, Compressor], int]


def _read(_chunk: memoryview, _codec: Compressor) -> int:
    return 0


def _zero_test(chunk: memoryview, _codec: Compressor) -> int:
    return int(np.frombuffer(chunk, dtype=np.uint64).any())


def _hash(chunk: memoryview, _codec: Compressor) -> int:
    if not _zero_test(chunk, _codec):
        return 0
    return len(blake3(chunk, key=bytes(32)).digest())


def _zstd(chunk: memoryview, codec: Compressor) -> int:
    if not _zero_test(chunk, codec):
        return 0
    return len(codec.compress(chunk)[1])


STAGES: dict[str, Stage] = {
    "read": _read,
    "read + zero test": _zero_test,
    "read + zero test + BLAKE3": _hash,
    "read + zero test + zstd 1": _zstd,
}


def cpu_seconds(image: Path, stage: Stage) -> tuple[float, float, int]:
    """Wall and CPU seconds of a stage over the image, in the engine's own threads; bytes out."""
    fd = os.open(image, os.O_RDONLY)
    size = os.fstat(fd).st_size
    out: list[int] = []

    @contextmanager
    def tool() -> Iterator[tuple[memoryview, Compressor]]:
        yield memoryview(bytearray(_UNIT)), Compressor(1)

    def job(offset: int, tools: tuple[memoryview, Compressor]) -> None:
        buffer, codec = tools
        count = os.preadv(fd, [buffer], offset)
        out.append(sum(stage(buffer[at : at + _CHUNK], codec) for at in range(0, count, _CHUNK)))

    began, cpu = time.perf_counter(), time.process_time()
    try:
        run_workers(iter(range(0, size, _UNIT)), tool, job)
    finally:
        os.close(fd)
    return time.perf_counter() - began, time.process_time() - cpu, sum(out)


def guard_seconds(image: Path) -> tuple[float, float]:
    """CPU seconds of the AEAD alone, over what zstd made of the image, and of the check alone:
    decrypt, decompress, BLAKE3."""
    records: list[tuple[int, bytes]] = []
    cpu_seconds(image, lambda chunk, codec: _keep(records, chunk, codec))
    cipher = AESGCM(bytes(32))
    sealed: list[tuple[int, int, bytes]] = []

    def seal(number: int, _tool: object) -> None:
        encoding, payload = records[number]
        box = cipher.encrypt(record_nonce(number), payload, b"")
        sealed.append((number, encoding, box))

    def check(record: tuple[int, int, bytes], decoder: zstandard.ZstdDecompressor) -> None:
        number, encoding, box = record
        payload = open_box(cipher, record_nonce(number), box, b"") or b""
        raw = payload if encoding == Encoding.RAW else decoder.decompress(payload)
        blake3(raw, key=bytes(32)).digest()

    @contextmanager
    def decoder() -> Iterator[zstandard.ZstdDecompressor]:
        yield zstandard.ZstdDecompressor()

    began = time.process_time()
    run_workers(iter(range(len(records))), lambda: nullcontext(None), seal)
    records.clear()
    between = time.process_time()
    run_workers(iter(sealed), decoder, check)
    return between - began, time.process_time() - between


def _keep(records: list[tuple[int, bytes]], chunk: memoryview, codec: Compressor) -> int:
    if _zero_test(chunk, codec):
        records.append(codec.compress(chunk))
    return 0


def write_seconds(folder: Path, size: int) -> float:
    """CPU seconds to write `size` bytes of packs (32 MiB a file) into the folder."""
    block = os.urandom(1 << 20)
    cpu = time.process_time()
    left, number = size, 0
    while left > 0:
        path = folder / f"stage-{number}"
        with path.open("wb", buffering=0) as out:
            for _ in range(min(32, -(-left >> 20))):
                out.write(block)
        path.unlink()
        left -= 32 << 20
        number += 1
    return time.process_time() - cpu


def measure(ground: Ground) -> tuple[Table, float]:
    """The stage table, and the seconds that the two-core limit allows for the image.

    The limit: CPU seconds of zero test, hash, zstd, AEAD, check and pack write, each alone, over
    the cores.
    """
    table = Table(
        f"Stages of the copy path alone ({worker_count()} threads, 2 GiB mixed image)",
        ("stage", "seconds", "rate", "CPU seconds"),
    )
    cpu: dict[str, float] = {}
    out = 0
    for name, stage in STAGES.items():
        runs = sorted(cpu_seconds(ground.image, stage) for _ in range(3))
        wall, used, out = runs[1]
        cpu[name] = used
        table.add(name, f"{wall:.2f}", rate(2 * GIB, wall), f"{used:.2f}")
    guards = [guard_seconds(ground.image) for _ in range(3)]
    aead, check = (sorted(g[i] for g in guards)[1] for i in (0, 1))
    table.add(f"AES-256-GCM alone ({out / 1e6:.0f} MB)", "", "", f"{aead:.2f}")
    table.add("check alone: decrypt, decompress, BLAKE3", "", "", f"{check:.2f}")
    written = write_seconds(ground.folder, out)
    table.add(f"pack write ({out / 1e6:.0f} MB)", "", "", f"{written:.2f}")
    zero = cpu["read + zero test"]
    total = (
        zero
        + (cpu["read + zero test + BLAKE3"] - zero)
        + (cpu["read + zero test + zstd 1"] - zero)
        + aead
        + check
        + written
    )
    limit = total / len(os.sched_getaffinity(0))
    table.notes.append(
        f"The limit of {len(os.sched_getaffinity(0))} cores for a full backup of this image: "
        f"{limit:.2f} s ({rate(2 * GIB, limit)})."
    )
    return table, limit
