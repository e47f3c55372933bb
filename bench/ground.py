"""What the figures are measured on: a pool, the mixed image, an instance, clean up after."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Sample, once
from offload import run
from offload.testing.instances import free_port

GIB = 1 << 30
MIB = 1 << 20
OFFLOAD = str(Path(__file__).resolve().parents[1] / ".venv" / "bin" / "offload")
_FILES_MIB, _RANDOM_MIB, _ZEROS_MIB = 1400, 200, 448


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Folders and the configuration of one bench run."""

    folder: Path
    pool: Path
    config: Path

    @property
    def image(self) -> Path:
        """The mixed image: files of /usr, random bytes, zeros."""
        return self.pool / "mixed.raw"

    @property
    def sparse(self) -> Path:
        """The sparse volume of 64 GiB."""
        return self.pool / "sparse.raw"

    @property
    def store(self) -> Path:
        """The disk store."""
        return self.folder / "store"

    @property
    def sealed(self) -> Path:
        """The disk store that is encrypted."""
        return self.folder / "sealed"

    def cli(self, *words: str) -> Sample:
        """Run `offload` and account for it."""
        return once([OFFLOAD, "--config", str(self.config), "--json", *words])

    def ask(self, *words: str) -> Any:
        """Run `offload` and read what it says."""
        return json.loads(self.cli(*words).stdout)

    def fresh_store(self) -> None:
        """Empty stores, and no TimeMark that could be a parent."""
        self.cli("unmount", "--all")
        if self.store.exists():
            for store in (self.store, self.sealed):
                shutil.rmtree(store)
            for mark in self.ask("timemark", "list"):
                self.cli("timemark", "delete", mark["id"], "--yes")
        self.cli("store", "init", "main")
        self.cli("store", "check", "main", "--rebuild-catalog")  # forget what was in the old one
        self.cli("store", "init", "sealed", "--no-recovery-key")
        self.cli("store", "check", "sealed", "--rebuild-catalog")


def choose_folder(explicit: str | None) -> Path:
    """Memory if there is plenty, so that disks do not blur the figures; else the checkout."""
    if explicit:
        return Path(explicit)
    space = os.statvfs("/dev/shm")  # noqa: S108 - memory, that is the point
    if space.f_bavail * space.f_frsize > 14 * GIB:
        return Path("/dev/shm/offload-bench")  # noqa: S108
    return Path("bench-work").resolve()


@contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """Make everything, and take it away again whatever happens."""
    with ExitStack() as stack:
        clean(folder)
        folder.mkdir(parents=True)
        stack.callback(clean, folder)
        pool = folder / "pool"
        pool.mkdir()
        file = folder / "pool.xfs"
        file.touch()
        os.truncate(file, 12 * GIB)
        run.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(file)])
        run.run(["mount", "-o", "loop", str(file), str(pool)])
        made = Ground(folder=folder, pool=pool, config=folder / "offload.toml")
        made.config.write_text(_CONFIG.format(folder=folder, pool=pool, port=free_port()))
        make_mixed(made.image)
        yield made


_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[volumes.mixed]
provider = "reflink"
path = "{pool}/mixed.raw"
[volumes.sparse]
provider = "reflink"
path = "{pool}/sparse.raw"
[groups.mixed]
volumes = ["mixed"]
store = "main"
[groups.sparse]
volumes = ["sparse"]
store = "main"
[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "64MiB"
[stores.sealed]
kind = "disk"
path = "{folder}/sealed"
min_free = "64MiB"
[stores.sealed.key]
file = "{folder}/sealed.key"
[iscsi]
port = {port}
"""


def clean(folder: Path) -> None:
    """End the servers, unmount the pool, remove the folder. Idempotent."""
    config = folder / "offload.toml"
    if config.exists() and (folder / "state").exists():
        run.run([OFFLOAD, "--config", str(config), "unmount", "--all", "--force"], check=False)
    if (folder / "pool").is_mount():
        run.run(["umount", str(folder / "pool")])
    if folder.exists():
        shutil.rmtree(folder)


def make_mixed(path: Path) -> None:
    """2 GiB: 1,400 MiB of files from /usr at 4 KiB boundaries, 200 MiB random, the rest zeros."""
    goal = _FILES_MIB * MIB
    with path.open("wb") as out:
        for file in files_of("/usr"):
            data = file.read_bytes()
            out.write(data + bytes(-len(data) % 4096))
            if out.tell() >= goal:
                break
        out.truncate(goal)
        out.seek(goal)
        for _ in range(_RANDOM_MIB):
            out.write(os.urandom(MIB))
        for _ in range(_ZEROS_MIB):
            out.write(bytes(MIB))


def files_of(top: str) -> Iterator[Path]:
    """Readable files below a folder, in the order of their names."""
    for folder, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                yield path


def tree_bytes(folder: Path) -> int:
    """The sum of all file sizes below a folder: how repositories are counted, all alike."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
