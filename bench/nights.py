"""Thirty nights: what an incremental stores against what has changed, and what reading costs then.

Each night overwrites 1 % of the image's 4 KiB blocks: at random places, and again with 80 % of the
writes in a fifth of the image. What is written is blocks of files of /usr, each made unique. The
engine writes with the changed ranges given, as a provider does; the peers get the whole image file.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from bench.ground import MIB, files_of, tree_bytes
from bench.measure import once
from bench.report import Table
from offload.engine.bulkread import BulkReader, window_bytes
from offload.engine.packwriter import PackWriter
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.engine.work import run_workers
from offload.engine.writeimage import Job, write_image
from offload.extents import Ranges, data_ranges
from offload.format import layout
from offload.format.layout import encode_parameters, new_parameters
from offload.images.file import FileImage
from offload.model import RawSource
from offload.sinks.file import NewFileSink
from offload.store import Buffer
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec

BLOCK = 4096
NIGHTS = 30
_REGION = 8 * MIB  # hot spots are made of these
_HOT_WRITES, _HOT_SHARE = 0.8, 0.2
_CORPUS_MIB = 96
_FIXED = 4 * MIB
GOALS = (
    "Goals: stored ÷ changed ≤ 1.3 on the first night and ≤ 2 over all; restore of the last night "
    "at ≥ 0.6 × the speed of the full backup's. *Changed* is the night's changed blocks in "
    "image order, compressed alone as one zstd 1 stream. The 4 MiB store is computed: each touched "
    "piece, compressed alone, nothing else counted. Sizes are sums of files, all alike."
)


@dataclass(slots=True)
class _Result:
    """Bytes a night, for one contender."""

    stored: list[int] = field(default_factory=list)


class Disk:
    """The image file, and what each night does to it."""

    def __init__(self, path: Path, size_mib: int, *, hot: bool) -> None:
        self.path = path
        self.size = size_mib * MIB
        self.hot = hot
        self.changed_bytes: list[int] = []  # compressed alone
        self._random = random.Random(11)  # the same nights for everybody
        self._corpus = _corpus()
        regions = list(range(self.size // _REGION))
        self._random.shuffle(regions)
        self._hot = regions[: max(1, int(len(regions) * _HOT_SHARE))]
        self._fill()

    def _fill(self) -> None:
        """Three quarters of it files, the rest zeros."""
        with self.path.open("wb") as out:
            out.truncate(self.size)
            while out.tell() < self.size * 3 // 4:
                at = self._random.randrange(len(self._corpus) // BLOCK - MIB // BLOCK) * BLOCK
                out.write(self._corpus[at : at + MIB])

    def night(self) -> Ranges:
        """Overwrite 1 % of the blocks; returns the changed ranges."""
        alone = zstandard.ZstdCompressor(level=1).compressobj()
        count = 0
        ranges: Ranges = []
        with self.path.open("r+b") as out:
            for block in sorted(self._chosen()):
                at = self._random.randrange(len(self._corpus) // BLOCK) * BLOCK
                data = self._random.randbytes(16) + self._corpus[at + 16 : at + BLOCK]
                count += len(alone.compress(data))
                out.seek(block * BLOCK)
                out.write(data)
                ranges.append((block * BLOCK, (block + 1) * BLOCK))
        self.changed_bytes.append(count + len(alone.flush()))
        return ranges

    def _chosen(self) -> set[int]:
        chosen: set[int] = set()
        each = _REGION // BLOCK
        while len(chosen) < self.size // BLOCK // 100:
            if self.hot and self._random.random() < _HOT_WRITES:
                chosen.add(self._random.choice(self._hot) * each + self._random.randrange(each))
            else:
                chosen.add(self._random.randrange(self.size // BLOCK))
        return chosen


def _corpus() -> bytes:
    out = bytearray()
    for path in files_of("/usr"):
        data = path.read_bytes()[: 2 * MIB]
        out += data + bytes(-len(data) % BLOCK)
        if len(out) >= _CORPUS_MIB * MIB:
            break
    return bytes(out)


class Offload:
    """The engine on a disk store."""

    name = "offload"

    def __init__(self, folder: Path, disk: Disk, **parameters: int) -> None:
        self.disk = disk
        self.folder = folder / "offload"
        store = DiskStore(StoreSpec(url=str(self.folder / "store")))
        store.root.mkdir(parents=True)
        store.put(layout.STORE_OBJECT, [encode_parameters(new_parameters(**parameters))])
        self.repository = Repository.open(store, self.folder / "cache")
        self.shape = self.repository.shape(disk.size)
        self.roots: list[bytes] = []

    def backup(self, changed: Ranges | None) -> None:
        """One night; None: all of it."""
        parent = TreeReader(self.repository, self.roots[-1], self.shape) if self.roots else None
        with (
            closing(FileImage(RawSource(path=self.disk.path, size_bytes=self.disk.size))) as image,
            PackWriter(self.repository, f"w{len(self.roots):09}") as writer,
        ):
            job = Job(
                image=image,
                shape=self.shape,
                parent=parent,
                changed=changed,
                advance=lambda _: None,
            )
            root, _ = write_image(job, writer)
            writer.finish()
        self.roots.append(root)

    def size(self) -> int:
        """Bytes of the store."""
        return tree_bytes(self.folder / "store")

    def read_seconds(self, night: int) -> float:
        """How long reading all of a night takes, window by window, by one thread."""

        def put(_offset: int, _content: Buffer) -> None:
            """It was read: where it goes is not what is measured."""

        with closing(BulkReader(self._image(night))) as reader:
            began = time.perf_counter()
            for window in self._windows(reader.image):
                reader.read(window, put)
            return time.perf_counter() - began

    def restore_seconds(self, night: int) -> tuple[float, float]:
        """Wall and CPU seconds of a restore of a night into a new file, by as many threads as a
        restore has."""
        target = self.folder / "restored.raw"
        sink = NewFileSink(target, target.with_suffix(".part"), self.disk.size, resume=False)

        def put(offset: int, content: Buffer) -> None:
            sink.write(offset, memoryview(content))

        def job(window: Ranges, _tool: None) -> None:
            reader.read(window, put)

        with closing(sink), closing(BulkReader(self._image(night))) as reader:
            began, cpu = time.perf_counter(), time.process_time()
            run_workers(self._windows(reader.image), nullcontext, job)
            sink.finish()
            took = time.perf_counter() - began, time.process_time() - cpu
        target.unlink()
        return took

    def _image(self, night: int) -> StoredImage:
        return StoredImage(self.repository, self.roots[night], self.disk.size, 512)

    def _windows(self, image: StoredImage) -> Iterator[Ranges]:
        """What of each window is data."""
        length = window_bytes(self.shape.chunk_bytes)
        for at in range(0, self.disk.size, length):
            yield data_ranges(image.extents(at, min(length, self.disk.size - at)))

    def pieces(self, night: int) -> float:
        """Chunks and deltas read for one chunk of a mounted view, on average."""
        tree = TreeReader(self.repository, self.roots[night], self.shape)
        counts = [1 + len(leaf.deltas) for _, leaf in tree.data_slots()]
        return sum(counts) / len(counts)

    def close(self) -> None:
        """Close and remove the store."""
        self.repository.close()
        shutil.rmtree(self.folder)


class Peer:
    """A program that is given the whole image file every night."""

    def __init__(
        self,
        name: str,
        repo: Path,
        env: dict[str, str],
        first: Sequence[str],
        each: Callable[[int], Sequence[str]],
    ) -> None:
        self.name = name
        self._repo, self._env, self._each, self._count = repo, env, each, 0
        if first:
            once(list(first), env)

    def backup(self, changed: Ranges | None) -> None:  # noqa: ARG002 - it finds out by itself
        """One night."""
        once(list(self._each(self._count)), self._env)
        self._count += 1

    def size(self) -> int:
        """Bytes of the repository."""
        return tree_bytes(self._repo) if self._repo.exists() else 0

    def close(self) -> None:
        """Remove the repository."""
        shutil.rmtree(self._repo, ignore_errors=True)


def restic(folder: Path, disk: Disk) -> Peer:
    """Encrypted, as it always is."""
    repo = folder / "restic"
    env = {
        "RESTIC_PASSWORD": "bench",
        "RESTIC_REPOSITORY": str(repo),
        "RESTIC_CACHE_DIR": str(folder / "restic-cache"),
    }
    each = ["restic", "backup", "--compression", "auto", str(disk.path)]
    return Peer("restic", repo, env, ["restic", "init"], lambda _: each)


def borg(folder: Path, disk: Disk) -> Peer:
    """Without encryption, zstd 1."""
    repo = folder / "borg"
    env = {
        "BORG_BASE_DIR": str(folder / "borg-base"),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }
    return Peer(
        "borg",
        repo,
        env,
        ["borg", "init", "-e", "none", str(repo)],
        lambda n: ["borg", "create", "-C", "zstd,1", f"{repo}::{n}", str(disk.path)],
    )


def casync(folder: Path, disk: Disk) -> Peer:
    """Its own chunks, zstd."""
    repo = folder / "casync"
    repo.mkdir()
    return Peer(
        "casync",
        repo,
        {},
        [],
        lambda n: [
            "casync", "make", "--compression=zstd", f"--store={repo}/store.castr",
            f"{repo}/{n}.caibx", str(disk.path),
        ],
    )  # fmt: skip


class FixedChunks:
    """A store of 4 MiB pieces, computed: each piece that was touched, compressed alone."""

    name = "4 MiB pieces (computed)"

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._bytes = 0

    def backup(self, changed: Ranges | None) -> None:
        """One night."""
        if changed is None:
            touched = set(range(-(-self.disk.size // _FIXED)))
        else:
            touched = {start // _FIXED for start, _ in changed}
        codec = zstandard.ZstdCompressor(level=1)
        with self.disk.path.open("rb") as image:
            for piece in sorted(touched):
                image.seek(piece * _FIXED)
                data = image.read(_FIXED)
                if any(data):
                    self._bytes += len(codec.compress(data))

    def size(self) -> int:
        """Bytes stored so far."""
        return self._bytes

    def close(self) -> None:
        """Nothing is held."""


def measure(
    folder: Path, size_mib: int = 2048, peers_mib: int = 512, nights: int = NIGHTS
) -> Iterator[Table]:
    """Two tables of sizes for each kind of night: a large image, and a smaller one with the peers,
    of which each would take some 20 GB for the nights of 2 GiB."""
    for hot in (False, True):
        for mib, peers in ((size_mib, False), (peers_mib, True)):
            place = folder / "nights"
            place.mkdir()
            try:
                yield _nights(place, mib, nights, hot=hot, peers=peers)
            finally:
                shutil.rmtree(place)


def _nights(place: Path, size_mib: int, nights: int, *, hot: bool, peers: bool) -> Table:
    disk = Disk(place / "image.raw", size_mib, hot=hot)
    mine = Offload(place, disk)
    every: list[Offload | Peer | FixedChunks] = [mine]
    if peers:
        every += [restic(place, disk), borg(place, disk), casync(place, disk)]
    every.append(FixedChunks(disk))
    results = {one.name: _Result() for one in every}
    for night in range(nights + 1):
        changed = disk.night() if night else None
        for one in every:
            before = one.size()
            one.backup(changed)
            results[one.name].stored.append(one.size() - before)
    kind = "80 % of the writes in a fifth of the image" if hot else "random blocks"
    table = Table(
        f"{nights} nights of a {size_mib} MiB image, 1 % of its 4 KiB blocks a night: {kind}",
        ("what", "full", "first night", "last night", "all nights", "÷ changed, first", "all"),
    )
    total = sum(disk.changed_bytes)
    for name, found in results.items():
        full, first, *rest = found.stored
        last = rest[-1] if rest else first
        stored = sum(found.stored[1:])
        table.add(
            name,
            _mb(full),
            _mb(first),
            _mb(last),
            _mb(stored),
            f"{first / disk.changed_bytes[0]:.2f}",
            f"{stored / total:.2f}",
        )
    table.notes += [GOALS, "", _reading(mine, nights)]
    for one in every:
        one.close()
    return table


def _reading(mine: Offload, nights: int) -> str:
    """What a user pays is the restore; the reading alone has no writing to hide behind."""
    for night in (0, nights):  # the store's files into the page cache
        mine.read_seconds(night)
    reads, restores = [], []
    for _ in range(3):
        reads.append([mine.read_seconds(n) for n in (0, nights)])
        restores.append([mine.restore_seconds(n) for n in (0, nights)])
    first, last = (min(r[i] for r in reads) for i in (0, 1))
    whole, late = (min(r[i][0] for r in restores) for i in (0, 1))
    cpu_whole, cpu_late = (min(r[i][1] for r in restores) for i in (0, 1))
    return (
        f"Restoring the last night into a file takes {late:.2f} s ({cpu_late:.2f} CPU s), the full "
        f"backup {whole:.2f} s ({cpu_whole:.2f} CPU s): {whole / late:.2f} × the speed, start of "
        f"the program not counted. Reading alone, by one thread: {last:.2f} s and {first:.2f} s "
        f"({first / last:.2f} ×). A chunk of a mounted view is read in {mine.pieces(nights):.1f} "
        "pieces on average."
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
