"""A real LVM thin pool in a file, for tests that run in the lab guest, with udev as hosts have it.

Needs root, device-mapper with thin pools, loop devices, lvm2 and udev.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from offload import devicemapper
from offload.ids import new_id
from offload.run import require_program, run
from offload.snapshots import lvmthin_pool
from offload.snapshots.lvmthin_lvm import LogicalVolume, look_up
from offload.testing.pools import loop_device

_PATIENCE_S = 120.0
_BATCH = 8
_QUICK = "backup { backup = 0 archive = 0 }"


@dataclass
class ThinPool:
    """A volume group with one thin pool in it, which is also called `pool`."""

    vg: str
    volumes: list[str] = field(default_factory=list)
    _stock: list[str] = field(default_factory=list)
    _used: list[str] = field(default_factory=list)

    def add(self, name: str, size_bytes: int) -> Path:
        """A fresh thin volume; its device."""
        self.volumes.append(name)
        lvm("lvcreate", "--virtualsize", f"{size_bytes}b", "--thinpool", f"{self.vg}/pool",
            "--name", name)  # fmt: skip
        return Path("/dev") / self.vg / name

    @contextmanager
    def lend(self, size_bytes: int) -> Iterator[Path]:
        """The device of a fresh thin volume. Always of the same size: eight are made, and earlier
        ones removed, at once, for most of an LVM command's time is its start."""
        if not self._stock:
            self._stock = [new_id() for _ in range(_BATCH)]
            config = f'--config "{_QUICK}"'
            make = f"lvcreate {config} -V {size_bytes}b --thinpool {self.vg}/pool --name"
            lvm_script(
                [f"lvremove {config} --yes {self.vg}/{name}" for name in self._used]
                + [f"{make} {name}" for name in self._stock]
            )
            self._used = []
        name = self._stock.pop()
        try:
            yield Path("/dev") / self.vg / name
        finally:
            self._used.append(name)

    def row(self, name: str) -> LogicalVolume | None:
        """What LVM knows of a volume."""
        return look_up([f"{self.vg}/{name}"]).get(f"{self.vg}/{name}")

    def names(self) -> list[str]:
        """All volumes but the pool."""
        said = run(["lvs", "--noheadings", "--options", "lv_name", self.vg]).stdout
        return sorted(name for name in said.split() if name != "pool")

    @cached_property
    def dm_uuid(self) -> str:
        """Of the thin pool's device."""
        pool = self.row("pool")
        assert pool is not None  # noqa: S101
        return f"{pool.dm_uuid}-tpool"

    def status(self) -> lvmthin_pool.PoolStatus:
        """What the kernel says of the pool."""
        return lvmthin_pool.look_at(f"{self.vg}/pool", self.dm_uuid)

    def message(self, text: str) -> None:
        """A message to the pool, as an administrator sends it with dmsetup."""
        devicemapper.message(self.dm_uuid, text)


def lvm(*argv: str) -> str:
    """Run a command of LVM; its output."""
    program = require_program(argv[0], "lvm2")
    done = run([program, "--quiet", "--yes", "--config", _QUICK, *argv[1:]], timeout_s=_PATIENCE_S)
    return done.stdout


def lvm_script(lines: Iterable[str]) -> None:
    """Many commands in one process of LVM."""
    done = run(
        [require_program("lvm", "lvm2")],
        stdin="\n".join(lines).encode(),
        timeout_s=600,
    )
    assert "rror" not in done.stderr, done.stderr  # noqa: S101


@contextmanager
def thin_pool(
    folder: Path,
    *,
    size_bytes: int = 512 << 20,
    metadata_bytes: int = 8 << 20,
    chunk_bytes: int = 64 << 10,
) -> Iterator[ThinPool]:
    """A volume group on a loop device over a sparse file; all of it goes at the end."""
    vg = f"lab-{new_id()}"  # the hyphen: device-mapper doubles it
    image = folder / f"{vg}.img"
    with image.open("xb") as out:
        os.ftruncate(out.fileno(), size_bytes + 2 * metadata_bytes + (16 << 20))
    try:
        with loop_device(image) as device:
            lvm("pvcreate", str(device))
            lvm("vgcreate", "--physicalextentsize", "1m", vg, str(device))
            try:
                lvm("lvcreate", "--type", "thin-pool", "--size", f"{size_bytes}b",
                    "--poolmetadatasize", f"{metadata_bytes}b",
                    "--chunksize", f"{chunk_bytes}b", "--name", "pool", vg)  # fmt: skip
                yield ThinPool(vg)
            finally:
                _remove(vg)
    finally:
        image.unlink()


def _remove(vg: str) -> None:
    """The volume group, whatever a failed test left of it."""
    start = f"{vg.replace('-', '--')}-"
    for line in run(["dmsetup", "info", "--columns", "--noheadings", "-o", "name,suspended"]
                    ).stdout.splitlines():  # fmt: skip
        name, _, state = line.partition(":")
        if name.startswith(start) and state == "Suspended":
            run(["dmsetup", "resume", name])
    lvm("vgremove", "--force", vg)


@contextmanager
def udev() -> Iterator[None]:
    """udevd runs while the block does; one that runs already is left alone."""
    if run(["udevadm", "control", "--ping"], check=False, timeout_s=20).status == 0:
        yield
        return
    run([require_program("/lib/systemd/systemd-udevd", "udev"), "--daemon"])
    try:
        run(["udevadm", "control", "--ping"])
        yield
    finally:
        run(["udevadm", "control", "--exit"])
        # device-mapper's library takes the socket alone for a udevd, and waits for it without end
        Path("/run/udev/control").unlink(missing_ok=True)
