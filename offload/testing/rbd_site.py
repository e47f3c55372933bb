"""Images in a Ceph cluster for tests, and what happens to them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import rbd

from offload import compose, run
from offload.ceph import ImageName
from offload.errors import UnavailableError
from offload.model import Snapshot, Volume
from offload.snapshots.rbd import RbdProvider
from offload.testing.ceph import POOL, USER, RunningCeph

INSTANCE = "irbdtests0"  # of the provider
MIB = 1 << 20
SIZE = 8 * MIB
_SLOTS, _SLOT = 4, 4096  # where the writer writes, in turn

_WRITER = """
import itertools, signal, struct, sys, time
import rados, rbd
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
conf, pool_name, *names = sys.argv[1:]
handle = rados.Rados(name="client.admin", conffile=conf)
handle.connect()
with handle.open_ioctx(pool_name) as pool:
    with rbd.Image(pool, names[0]) as one, rbd.Image(pool, names[1]) as two:
        for number in itertools.count(1):
            for image in (one, two):
                image.write(struct.pack(">Q", number), number % 4 * 4096)
            if number == 100:
                print("writing", flush=True)
            time.sleep(0.002)  # a snapshot has to get its turn, on a busy machine too
"""


@contextlib.contextmanager
def writing(ceph: RunningCeph, one: Volume, two: Volume) -> Iterator[None]:
    """A process puts one number on both images, first on the one, then on the other, and then the
    next. Raises UnavailableError if it got an error."""
    names = [one.path.name, two.path.name]
    process = run.spawn([sys.executable, "-c", _WRITER, str(ceph.conf), POOL, *names])
    try:
        if process.stdout is None or process.stdout.readline() != b"writing\n":
            raise UnavailableError("the writer did not begin")
        yield
        if process.poll() is not None:
            words = process.stderr.read().decode() if process.stderr else ""
            raise UnavailableError(f"the writer got an error: {words}")
    finally:
        run.terminate(process)


@dataclass
class RbdSite:
    """The images of one test; all that is left of them goes at its end."""

    ceph: RunningCeph
    provider: RbdProvider = field(default_factory=lambda: RbdProvider(INSTANCE))
    made: list[tuple[str, str]] = field(default_factory=list)

    def image(
        self, name: str, *, features: int | None = None, namespace: str = "", size: int = SIZE,
        order: int | None = None, stripe: tuple[int, int] = (0, 0),
    ) -> Volume:  # fmt: skip
        """A fresh image as a volume."""
        with self.ceph.pool(namespace=namespace) as pool:
            rbd.RBD().create(
                pool, name, size, order=order, features=features,
                stripe_unit=stripe[0], stripe_count=stripe[1],
            )  # fmt: skip
        return self.volume(name, namespace)

    def clone(self, parent: Volume, snapshot: str, name: str) -> Volume:
        """A clone of a protected snapshot, with objects of the same size."""
        with self.ceph.pool() as pool:
            rbd.RBD().clone(pool, parent.path.name, snapshot, pool, name)
        return self.volume(name)

    def volume(self, name: str, namespace: str = "") -> Volume:
        """An image that is there, or will be; `clear` removes it."""
        self.made.append((name, namespace))
        path = ImageName(pool=POOL, namespace=namespace, image=name).device
        return Volume(name=name, provider="rbd", path=path, conf=self.ceph.conf, user=USER)

    @contextlib.contextmanager
    def open(self, volume: Volume) -> Iterator[Any]:
        """The live image, as the administrator opens it."""
        name = ImageName.of_device(volume.path)
        with (
            self.ceph.pool(namespace=name.namespace) as pool,
            rbd.Image(pool, name.image) as image,
        ):
            yield image

    def write(self, volume: Volume, at: int, data: bytes) -> None:
        """As a production host does."""
        with self.open(volume) as image:
            image.write(data, at)

    def take(self, timemark: str, *volumes: Volume) -> tuple[Snapshot, ...]:
        """A settled TimeMark."""
        plan = self.provider.plan(timemark, volumes)
        self.provider.prepare(plan)
        made = self.provider.snapshot(plan)
        self.provider.settle(made)
        return made

    def read(self, snapshot: Snapshot, at: int, length: int) -> bytes:
        """Bytes of a snapshot, the way that backups read it."""
        image = compose.open_image(self.provider.source(snapshot))
        try:
            return image.pread(at, length)
        finally:
            image.close()

    def number_of(self, snapshot: Snapshot) -> int:
        """The newest number of `writing` in it."""
        data = self.read(snapshot, 0, _SLOTS * _SLOT)
        return max(int.from_bytes(data[at : at + 8]) for at in range(0, len(data), _SLOT))

    def groups(self) -> list[str]:
        """Names of all groups of the pool."""
        with self.ceph.pool() as pool:
            return list(rbd.RBD().group_list(pool))

    def snapshots(self, volume: Volume) -> list[dict[str, Any]]:
        """All of the image's, as librbd lists them."""
        with self.open(volume) as image:
            return list(image.list_snaps())

    def is_clean(self, *volumes: Volume) -> bool:
        """No group, and no snapshot of these."""
        return not self.groups() and not any(self.snapshots(volume) for volume in volumes)

    def clear(self) -> None:
        """Remove all images with their snapshots, and all groups."""
        for name, namespace in reversed(self.made):  # clones before their parents
            with self.ceph.pool(namespace=namespace) as pool:
                for group in rbd.RBD().group_list(pool):
                    rbd.RBD().group_remove(pool, group)
                with contextlib.suppress(rbd.ImageNotFound):
                    with rbd.Image(pool, name) as image:
                        for entry in list(image.list_snaps()):
                            if entry["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
                                _ensure_unprotected(image, entry["name"])
                            image.remove_snap_by_id(entry["id"])
                    rbd.RBD().remove(pool, name)


def _ensure_unprotected(image: Any, name: str) -> None:
    if image.is_protected_snap(name):
        image.unprotect_snap(name)
