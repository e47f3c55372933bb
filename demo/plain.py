"""The site without root: two partitioned image files that nobody mounts, snapshot by copying.

An ext4 is built in one with `mke2fs -d`; the other has a tar archive in its partition. A second,
small partition of each takes the writer's number: a program on raw partitions, so to speak.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tarfile
import time
from pathlib import Path

from demo.filling import MIB, copy_files, find_files, overwrite_blocks
from demo.ground import VOLUMES, Partition, base_config, partition_volume, volume_path
from offload.run import require_program, run

_VOLUME_BYTES = 320 * MIB
_DATA_SECTORS = 600_000  # of 512 bytes: the first partition
_TABLE = f"start=2048, size={_DATA_SECTORS}, type=linux\nsize=2048, type=linux"
_GOAL_BYTES = 160 * MIB
_ADDED_BYTES = 6 * MIB
_MODIFIED_BLOCKS = 300


class PlainGround:
    """Image files that are copied while they are written to: crash consistency at the most."""

    one_instant = False
    note = (
        "Two partitioned image files on the file system that is there, and the provider copy: it "
        "is slow and two volumes are not one instant; the TimeMarks say so."
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sectors: dict[str, int] = {}
        self._data: dict[str, Partition] = {}

    @property
    def pool(self) -> Path:
        """Where the image files are."""
        return self.folder / "pool"

    def build(self) -> int:
        """Partition both images, an ext4 with files and a database into one, a tar into the other.

        Half of the files go into each volume.
        """
        self.pool.mkdir()
        for name in VOLUMES:
            path = volume_path(self.pool, name)
            self._data[name], numbers = partition_volume(path, _VOLUME_BYTES, _TABLE)
            self._sectors[name] = numbers.offset
            with path.open("r+b") as out:
                out.seek(numbers.offset)
                out.write(b"0\n")
        return self._fill_ext4() + self._fill_tar()

    def _fill_ext4(self) -> int:
        staging = self.folder / "staging"
        total = copy_files(find_files(("/usr/lib", "/usr/bin"), _GOAL_BYTES), staging)
        _write_database(staging / "orders" / "orders.db")
        part = self._data["shop-db"]
        image = volume_path(self.pool, "shop-db")
        run(
            [require_program("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4",
             "-d", str(staging), "-E", f"offset={part.offset}", str(image), f"{part.size >> 10}k"],
            timeout_s=300,
        )  # fmt: skip
        shutil.rmtree(staging)
        return total

    def _fill_tar(self) -> int:
        files = find_files(("/usr/share",), _GOAL_BYTES)
        with volume_path(self.pool, "shop-web").open("r+b") as out:
            out.seek(self._data["shop-web"].offset)
            with tarfile.open(fileobj=out, mode="w|") as archive:
                for path in files:
                    archive.add(path, recursive=False)
            os.fsync(out.fileno())
        return sum(path.stat().st_size for path in files)

    def number_sector(self, volume: str) -> int:
        """Where the writer's number is in a volume."""
        return self._sectors[volume]

    def writer_argv(self) -> list[str]:
        """A sector in each volume."""
        argv = []
        for name in VOLUMES:
            argv += ["--sector", str(volume_path(self.pool, name)), str(self._sectors[name])]
        return argv

    def config(self) -> str:
        """A group that is taken though its writers cannot be held."""
        return base_config(self.folder, self.pool, "copy") + (
            '[groups.shop]\nvolumes = ["shop-db", "shop-web"]\nconsistency = "crash"\n'
            'atomic = "record"\nstore = "main"\ndeadline_s = 60\n\n'
            '[pool]\nmin_free = "1GiB"\n'  # the file system that is there may well be nearly full
        )

    def change(self) -> int:
        """A new file in the ext4, random blocks in the tar."""
        fresh = self.folder / "new.bin"
        fresh.write_bytes(os.urandom(_ADDED_BYTES))
        image = f"{volume_path(self.pool, 'shop-db')}?offset={self._data['shop-db'].offset}"
        debugfs = require_program("debugfs", "e2fsprogs")
        run([debugfs, "-w", "-R", f"write {fresh} new.bin", image])
        fresh.unlink()
        part = self._data["shop-web"]
        web = volume_path(self.pool, "shop-web")
        return _ADDED_BYTES + overwrite_blocks(
            web, _MODIFIED_BLOCKS, 1, part.offset, part.offset + _GOAL_BYTES
        )


def _write_database(path: Path) -> None:
    path.parent.mkdir(parents=True)
    link = sqlite3.connect(path)
    with link:
        link.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY, placed REAL, goods BLOB)")
        rows = ((number, time.time(), os.urandom(300)) for number in range(1, 2001))
        link.executemany("INSERT INTO orders VALUES (?, ?, ?)", rows)
    link.close()
