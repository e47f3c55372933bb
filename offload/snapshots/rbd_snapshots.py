"""The snapshots of one RBD image: finding, making, showing and removing them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from offload import rbd_image
from offload.ceph import Cluster, Login, connect, translated
from offload.errors import BusyError, NotFoundError
from offload.rbd_image import opened
from offload.snapshots.rbd_refs import Place


class Pools:
    """The pools of several places, each opened once, over one connection to each cluster."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._clusters: dict[tuple[Login, str], Cluster] = {}
        self._pools: dict[tuple[Login, str, int, str], Any] = {}

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, place: Place) -> Any:
        """Raises what `ceph.connect` raises, and NotFoundError (`pool-missing`)."""
        key = (place.login, place.cluster, place.pool, place.namespace)
        if key not in self._pools:
            cluster = self._cluster(place)
            pool = self._stack.enter_context(cluster.pool(place.pool, place.namespace))
            self._pools[key] = pool
        return self._pools[key]

    def _cluster(self, place: Place) -> Cluster:
        key = (place.login, place.cluster)
        if key not in self._clusters:
            cluster = self._stack.enter_context(connect(place.login, place.cluster))
            self._clusters[key] = cluster
        return self._clusters[key]

    @contextmanager
    def image(self, place: Place, *, read_only: bool = True) -> Iterator[tuple[Any, Any]]:
        """The pool and the image, also one in the trash. NotFoundError (`image-missing`)."""
        pool = self.of(place)
        with opened(pool, image_id=place.image, read_only=read_only) as image:
            yield pool, image


def find(pool: Any, image: Any, place: Place) -> int | None:
    """The id of the snapshot; None where it is not there, or its group's is not complete."""
    return rbd_image.find_snapshot(pool, image, name=place.snapshot, group=place.group)


def show(pool: Any, image: Any, place: Place) -> None:
    """Let the image show the snapshot. NotFoundError (`snapshot-missing`)."""
    number = find(pool, image, place)
    if number is None:
        raise missing(place, place.name)
    with translated(f"open a snapshot of {place.shown}"):
        image.set_snap_by_id(number)


def missing(place: Place, name: str) -> NotFoundError:
    """The error for a snapshot that should be there."""
    return NotFoundError(
        f"the image {place.shown} has no snapshot {name}",
        code="snapshot-missing",
        hint="it was deleted outside of offload; delete its TimeMark",
    )


def take(image: Any, name: str, place: Place) -> None:
    """An ordinary snapshot of the image."""
    with translated(f"take a snapshot of {place.shown}"):
        image.create_snap(name)


def ordinary(image: Any) -> dict[int, str]:
    """Id → name of the image's ordinary snapshots, also of those whose removal was cut short.

    Removing a snapshot takes it to the trash first. One that is there for its clones is not
    counted: Ceph removes it with the last of them.
    """
    import rbd

    found: dict[int, str] = {}
    with translated(f"list the snapshots of {image.get_name()}"):
        for entry in list(image.list_snaps()):
            if entry["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER:
                found[entry["id"]] = entry["name"]
            elif "trash" in entry and not _has_clones(image, entry["id"]):
                found[entry["id"]] = entry["trash"]["original_name"]
    return found


def _has_clones(image: Any, number: int) -> bool:
    image.set_snap_by_id(number)
    try:
        return any(True for _ in image.list_children2())
    finally:
        image.set_snap(None)


def remove(image: Any, number: int, place: Place) -> None:
    """Remove a snapshot by its id; already gone is success. BusyError (`snapshot-in-use`)."""
    import rbd

    with translated(f"delete a snapshot of {place.shown}"):
        try:
            image.remove_snap_by_id(number)
        except rbd.ImageNotFound:
            pass  # another process was faster
        except rbd.ImageBusy as error:
            raise BusyError(
                f"the snapshot {place.name} of {place.shown} is protected, or has clones",
                code="snapshot-in-use",
                hint="see: rbd children; flatten or remove the clones, then: rbd snap unprotect",
            ) from error
