"""The site with root: an XFS with reflinks in a file, two partitioned volumes in it, mounted."""

from __future__ import annotations

import os
from pathlib import Path

from demo.filling import MIB, copy_files, find_files, overwrite_blocks
from demo.ground import VOLUMES, Partition, base_config, partition_volume, volume_path
from offload.run import require_program, run

_POOL_BYTES = 3072 * MIB
_VOLUME_BYTES = 512 * MIB
_GOAL_BYTES = {"shop-db": 180 * MIB, "shop-web": 170 * MIB}
_TOPS = {
    "shop-db": ("/usr/lib", "/usr/bin", "/usr/share"),
    "shop-web": ("/usr/share", "/usr/include", "/usr/lib"),
}
_MAKE = {
    "shop-db": ("mke2fs", "e2fsprogs", ("-q", "-F", "-t", "ext4")),
    "shop-web": ("mkfs.xfs", "xfsprogs", ("-q", "-f")),
}
_ADDED_BYTES = 6 * MIB
_MODIFIED_BLOCKS = 300


class PoolGround:
    """Real file systems that are frozen for the instant of a TimeMark."""

    one_instant = True
    note = (
        "Two production volumes with GPT, one ext4 and one XFS, as image files in an XFS pool with "
        "reflinks; all of it in loop-mounted files."
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounts = {name: folder / "srv" / name for name in VOLUMES}

    @property
    def pool(self) -> Path:
        """Where the pool is mounted."""
        return self.folder / "pool"

    def make_pool(self) -> None:
        """The pool alone: what fails here fails for want of root, loop devices or XFS."""
        image = self.folder / "pool.xfs"
        with image.open("xb") as out:
            os.ftruncate(out.fileno(), _POOL_BYTES)
        run([require_program("mkfs.xfs", "xfsprogs"), "-q", "-m", "reflink=1", str(image)])
        self.pool.mkdir()
        run(["mount", "-o", "loop", str(image), str(self.pool)])

    def build(self) -> int:
        """Partition, make file systems, mount, fill. The pool is there already."""
        total = 0
        for name in VOLUMES:
            path = volume_path(self.pool, name)
            (partition,) = partition_volume(path, _VOLUME_BYTES, "type=linux")
            self._mount(name, path, partition)
            total += copy_files(find_files(_TOPS[name], _GOAL_BYTES[name]), self.mounts[name])
            _flush(self.mounts[name])
        return total

    def _mount(self, name: str, path: Path, partition: Partition) -> None:
        """Through a loop device over the partition: the kernel need not scan for it."""
        span = ["--offset", str(partition.offset), "--sizelimit", str(partition.size)]
        device = run(["losetup", "--find", "--show", *span, str(path)]).stdout.strip()
        try:
            program, package, options = _MAKE[name]
            run([require_program(program, package), *options, device])
            self.mounts[name].mkdir(parents=True)
            run(["mount", device, str(self.mounts[name])])
        finally:
            run(["losetup", "--detach", device])  # once mounted, it goes with the mount

    def writer_argv(self) -> list[str]:
        """A database on the ext4, a file on the XFS."""
        return [
            "--database", str(self.mounts["shop-db"] / "orders" / "orders.db"),
            "--file", str(self.mounts["shop-web"] / "number"),
        ]  # fmt: skip

    def config(self) -> str:
        """A group whose file systems are frozen for the instant of a snapshot."""
        mounts = ", ".join(f'"{point}"' for point in self.mounts.values())
        return base_config(self.folder, self.pool, "reflink") + (
            '[groups.shop]\nvolumes = ["shop-db", "shop-web"]\nconsistency = "filesystem"\n'
            f'store = "main"\n\n[[groups.shop.quiesce]]\nkind = "local"\nmounts = [{mounts}]\n'
        )

    def change(self) -> int:
        """New files, and random blocks of the largest old ones."""
        total = 0
        for seed, point in enumerate(self.mounts.values()):
            (point / "added").mkdir(exist_ok=True)
            (point / "added" / "new.bin").write_bytes(os.urandom(_ADDED_BYTES))
            total += _ADDED_BYTES
            old = sorted((p for p in (point / "usr").rglob("*") if p.is_file()), key=_size)
            for largest in old[-3:]:
                total += overwrite_blocks(largest, _MODIFIED_BLOCKS // 3, seed)
            _flush(point)
        return total


def _size(path: Path) -> tuple[int, str]:
    return path.stat().st_size, str(path)


def _flush(point: Path) -> None:
    run(["sync", "--file-system", str(point)], timeout_s=120)
