"""An instance with two volumes and two stores of small chunks; what its backups must read as."""
# ruff: noqa: S101, S311 - assertions are what a test suite is made of; its data is pseudo-random

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from offload import compose, run
from offload.engine.chunkindex import Location
from offload.engine.manifests import read_manifest
from offload.engine.readimage import StoredImage
from offload.engine.repository import Repository
from offload.engine.tree import TreeReader
from offload.extents import Ranges, normalize
from offload.format import layout
from offload.format.layout import encode_parameters, new_parameters
from offload.format.tree import Leaf
from offload.model import Snapshot
from offload.services.backup import BackupReport, backup
from offload.services.context import Context, open_context
from offload.snapshots.copy import CopyProvider
from offload.storespec import StoreSpec

CHUNK = 4096
SIZES = {"db": 61 * CHUNK + 1024, "web": 20 * CHUNK}
PROVIDER = f"{__name__}:ComparingProvider"

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[volumes.web]
provider = "copy"
path = "{folder}/web.raw"

[groups.shop]
volumes = ["db", "web"]
atomic = "record"

[stores.main]
kind = "disk"
path = "{folder}/main"
min_free = "0%"
grace = "0s"

[stores.away]
kind = "disk"
path = "{folder}/away"
min_free = "0%"
grace = "0s"
"""


class ComparingProvider(CopyProvider):
    """A copy that says what changed, to the sector, by comparing."""

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        """The truth."""
        a, b = Path(older.ref["path"]).read_bytes(), Path(newer.ref["path"]).read_bytes()
        return normalize(
            (at, min(at + 512, len(b)))
            for at in range(0, len(b), 512)
            if a[at : at + 512] != b[at : at + 512]
        )


@dataclass
class BackupSite:
    """See the module. `taken`: backup → volume → its bytes."""

    folder: Path
    ctx: Context
    random: random.Random
    taken: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "offload.toml"

    def make_store(self, name: str, *, id_key: bytes | None = None, **parameters: int) -> None:
        """A store in its folder: small chunks, pages and packs unless said otherwise."""
        chosen = {"chunk_bytes": CHUNK, "page_entries": 4, "pack_bytes": 32 << 10, **parameters}
        (self.folder / name).mkdir()
        store = compose.open_store(StoreSpec(url=str(self.folder / name)))
        made = new_parameters(**chosen)
        made = replace(made, id_key=id_key or made.id_key)
        store.put(layout.STORE_OBJECT, [encode_parameters(made)])
        store.close()

    @contextmanager
    def repository(self, name: str = "main") -> Iterator[Repository]:
        """A store, opened."""
        store = compose.open_store(self.ctx.instance.config.store(name).spec())
        repository = Repository.open(store, self.ctx.instance.cache_dir)
        try:
            yield repository
        finally:
            repository.close()

    # -- volumes ---------------------------------------------------------------------------------

    def volume(self, name: str) -> Path:
        """The file of a volume."""
        return self.folder / f"{name}.raw"

    def write(self, name: str, at: int, data: bytes) -> None:
        """Change a volume."""
        with self.volume(name).open("r+b") as out:
            out.seek(at)
            out.write(data)

    def scribble(self, name: str, count: int = 5, most: int = 600) -> None:
        """Small random writes."""
        for _ in range(count):
            length = self.random.randrange(1, most)
            at = self.random.randrange(SIZES[name] - length)
            self.write(name, at, self.random.randbytes(length))

    def back_up(self, store: str = "main") -> BackupReport:
        """A backup, remembered."""
        report = backup(self.ctx, "shop", store)
        self.taken[report.backup.id] = {n: self.volume(n).read_bytes() for n in SIZES}
        return report

    # -- what must be true -----------------------------------------------------------------------

    def check(self, ident: str, as_of: str, store: str) -> None:
        """A backup in a store reads as what was taken, bit for bit."""
        with self.repository(store) as repository:
            found = read_manifest(repository, ident, store).backup
            assert {image.volume for image in found.images} == set(SIZES)
            for image in found.images:
                stored = StoredImage(repository, bytes.fromhex(image.root), image.size_bytes, 512)
                data = stored.pread(0, image.size_bytes)
                assert data == self.taken[as_of][image.volume], (ident, image.volume)

    def check_all(self, store: str = "main") -> None:
        """Every backup of a store that was taken there."""
        for known in self.ctx.catalog.backups(store=store):
            if known.id in self.taken:
                self.check(known.id, known.id, store)

    # -- damage ----------------------------------------------------------------------------------

    def objects(self, store: str, folder: str) -> list[str]:
        """Names of objects, sorted."""
        base = self.folder / store
        found = (base / folder).rglob("*")
        return sorted(p.relative_to(base).as_posix() for p in found if p.is_file())

    def flip(self, store: str, name: str, byte: int) -> None:
        """Turn one bit of an object."""
        path = self.folder / store / name
        raw = bytearray(path.read_bytes())
        raw[byte] ^= 4
        path.chmod(0o600)
        path.write_bytes(raw)

    def leaves(self, ident: str, volume: str, store: str = "main") -> dict[int, Leaf]:
        """The entries of one volume's tree, by slot."""
        with self.repository(store) as repository:
            return dict(self._tree(repository, ident, volume).data_slots())

    def page_ids(self, ident: str, volume: str, store: str = "main") -> list[bytes]:
        """The ids of its pages, the root first, then by level and place."""
        with self.repository(store) as repository:
            tree = self._tree(repository, ident, volume)
            levels = reversed(range(tree.shape.levels))
            found = [
                tree.page_id(level, page)
                for level in levels
                for page in range(tree.shape.pages(level))
            ]
            return [page for page in found if page is not None]

    def _tree(self, repository: Repository, ident: str, volume: str) -> TreeReader:
        image = read_manifest(repository, ident).backup.image(volume)
        assert image is not None
        shape = repository.shape(image.size_bytes)
        return TreeReader(repository, bytes.fromhex(image.root), shape)

    def places(self, ident: bytes, store: str = "main") -> list[Location]:
        """Where a chunk is."""
        with self.repository(store) as repository:
            return repository.index.places(ident)

    def spoil(self, ident: bytes, store: str = "main") -> list[Location]:
        """Turn a bit in each place of a chunk; returns the places."""
        found = self.places(ident, store)
        assert found
        for place in found:
            self.flip(
                store, place.pack, place.entry.payload_offset + place.entry.stored_length // 2
            )
        return found

    # -- processes of their own ------------------------------------------------------------------

    def run(self, script: str, **env: str) -> run.Completed:
        """A piece of Python with `ctx`, in a process that may be killed at a step."""
        prelude = (
            "import sys\nfrom pathlib import Path\nfrom offload import compose\n"
            "from offload.services.context import open_context\n"
            f"compose.PROVIDERS['copy'] = {PROVIDER!r}\n"
            "with open_context(Path(sys.argv[1])) as ctx:\n"
        )
        body = "".join(f"    {line}\n" for line in script.splitlines())
        argv = [sys.executable, "-c", prelude + body, str(self.config)]
        return run.run(argv, env=env, timeout_s=120, check=False)


def unnamed_steps(steps: Iterable[str], page: str) -> list[str]:
    """Steps that the page on recovery does not name; its names are general."""
    found = []
    for step in steps:
        name = re.sub(r"-\d+(?=\.)", "-N", step)
        name = re.sub(r"image\.(db|web)$", "image.VOLUME", name)
        if f"`{name}`" not in page:
            found.append(name)
    return found


@contextmanager
def backup_site(folder: Path) -> Iterator[BackupSite]:
    """A fresh site below a folder, with the store `main`; the caller patches PROVIDERS."""
    config = folder / "offload.toml"
    config.write_text(_CONFIG.format(folder=folder))
    chooser = random.Random(4)
    for name, size in SIZES.items():
        data = bytearray(size)
        for slot in range(0, size // CHUNK, 2):
            data[slot * CHUNK : (slot + 1) * CHUNK] = chooser.randbytes(CHUNK)
        data[-700:] = chooser.randbytes(700)
        (folder / f"{name}.raw").write_bytes(data)
    with open_context(config) as ctx:
        site = BackupSite(folder, ctx, chooser)
        site.make_store("main")
        yield site
