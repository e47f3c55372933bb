"""The process that works with librbd: what `rbd_link` starts, and kills if it falls silent.

It reads lines of JSON, `{"verb": NAME, "args": {…}}`, and answers each with one: `{"value": …}` or
`{"error": {…}}`; before that, `{}` says that it goes on. It ends at once when its standard input
closes: its parent may have died, and whoever recovers must not find it at work.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from offload import errors, rbd_image
from offload.ceph import Cluster, ImageName, Login, connect, translated
from offload.errors import BusyError, NotFoundError, OffloadError, UnavailableError
from offload.extents import Ranges, clip, total, union
from offload.rbd_image import opened
from offload.snapshots import rbd_group, rbd_snapshots
from offload.snapshots.rbd_refs import Place, place_of
from offload.snapshots.rbd_snapshots import Pools

_CREW = 8  # snapshots at the same time: more share the monitors' next round anyway
_STEP_OBJECTS = 4096  # compared before the worker says that it goes on

Ref = dict[str, str]
_Item = TypeVar("_Item")


def main(instance: str) -> None:
    """Answer until standard input closes."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    worker = Worker(instance, lambda: _say({}))
    while True:
        question = json.loads(lines.get())
        try:
            answer = {"value": worker.answer(question["verb"], question["args"])}
        except OffloadError as error:
            answer = {"error": _record(error)}
        _say(answer)


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _record(error: OffloadError) -> dict[str, Any]:
    families = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return {
        "family": next(families),
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "notes": getattr(error, "__notes__", []),
    }


class Worker:
    """The verbs. `go_on` is called now and then where one takes long."""

    def __init__(self, instance: str, go_on: Callable[[], None]) -> None:
        self._instance = instance
        self._go_on = go_on

    def answer(self, verb: str, args: dict[str, Any]) -> Any:
        """Raises what the verb raises."""
        verbs: dict[str, Callable[..., Any]] = {
            "look": self.look, "space": self.space, "names": self.names, "prepare": self.prepare,
            "snapshot": self.snapshot, "settle": self.settle, "delete": self.delete,
            "exists": self.exists, "changed": self.changed,
        }  # fmt: skip
        return verbs[verb](**args)

    # -- looking -------------------------------------------------------------------------------

    def look(self, conf: str, user: str, image: str) -> dict[str, Any]:
        """What decides how an image is snapshot. NotFoundError (`volume-missing`)."""
        with ExitStack() as stack:
            return _look(*_named(stack, conf, user, image))

    def names(self, conf: str, user: str, image: str) -> dict[str, Any]:
        """The same, and the names of its ordinary snapshots."""
        with ExitStack() as stack:
            cluster, pool, found = _named(stack, conf, user, image)
            return {
                **_look(cluster, pool, found),
                "names": sorted(set(rbd_snapshots.ordinary(found).values())),
            }

    def space(self, conf: str, user: str, image: str) -> dict[str, Any]:
        """The same as `look`, and the image's and its pool's space; the pool is the one its data is
        in."""
        import rbd

        with ExitStack() as stack:
            cluster, pool, found = _named(stack, conf, user, image)
            look = _look(cluster, pool, found)
            with translated(f"look at the image {image}"):
                size = found.size()
                objects = -(-size // found.stat()["obj_size"])
                data_pool = found.data_pool_id()
                mapped = bool(found.features() & rbd.RBD_FEATURE_FAST_DIFF)
            # without an object map, counting would ask for each object
            allocated = total(rbd_image.allocated(found, 0, size)) if mapped else size
            space = cluster.space(data_pool)
            return {
                **look,
                "size": size,
                "objects": objects,
                "allocated": allocated,
                "pool_name": cluster.pool_name(data_pool),
                "pool_size": space.size_bytes if space else 0,
                "pool_free": space.free_bytes if space else 0,
            }

    # -- making --------------------------------------------------------------------------------

    def prepare(self, refs: Sequence[Ref]) -> None:
        """Of a group: the snapshots that comparisons begin with, then the group."""
        places = self._places(refs)
        with Pools() as pools:
            pool = pools.of(places[0])
            _at_once(places, lambda place: _ensure_base(pool, place))
            rbd_group.ensure_joined(pool, places)

    def snapshot(self, refs: Sequence[Ref], names: Sequence[str]) -> list[int]:
        """One of the group, or one of each image. Returns their sizes in bytes.

        `names` are the images as the volumes name them now. Raises UnavailableError
        (`volume-replaced`), BusyError (`snapshot-exists`, `volume-in-use`).
        """
        with Pools() as pools, ExitStack() as stack:
            shots = [
                (place, pools.of(place), _checked(stack, pools.of(place), place, name))
                for place, name in zip(self._places(refs), names, strict=True)
            ]
            try:
                if shots[0][0].grouped:
                    rbd_group.take(shots[0][1], [place for place, _, _ in shots])
                else:
                    _at_once(shots, lambda shot: rbd_snapshots.take(shot[2], shot[0].name, shot[0]))
                return [_size(pool, image, place) for place, pool, image in shots]
            except OffloadError as failure:
                self._take_back(refs, failure)
                raise

    def _take_back(self, refs: Sequence[Ref], failure: OffloadError) -> None:
        try:
            self.delete(refs)
        except OffloadError as error:
            failure.add_note(error.message)

    def settle(self, refs: Sequence[Ref]) -> None:
        """Images leave their group."""
        places = self._places(refs)
        with Pools() as pools:
            rbd_group.leave(pools.of(places[0]), places)

    # -- unmaking ------------------------------------------------------------------------------

    def delete(self, refs: Sequence[Ref]) -> None:
        """Each is tried; then the first error."""
        failed: list[OffloadError] = []
        with Pools() as pools:
            for place in self._places(refs):
                try:
                    _delete(pools.of(place), place)
                except NotFoundError as error:
                    if error.code != "pool-missing":
                        failed.append(error)
                except OffloadError as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    def exists(self, ref: Ref) -> bool:
        """Whether the snapshot is there; of a group, only if the whole of it was made."""
        (place,) = self._places([ref])
        try:
            with Pools() as pools, pools.image(place) as (pool, image):
                return rbd_snapshots.find(pool, image, place) is not None
        except NotFoundError as error:
            if error.code not in {"pool-missing", "image-missing"}:
                raise
            return False

    # -- comparing -----------------------------------------------------------------------------

    def changed(self, older: Ref, newer: Ref, size: int) -> Ranges:
        """What librbd finds between the two. NotFoundError (`snapshot-missing`)."""
        old, new = self._places([older, newer])
        with (
            Pools() as pools,
            pools.image(old) as (_, before),
            pools.image(new) as (pool, after),
        ):
            rbd_snapshots.show(pool, before, old)
            rbd_snapshots.show(pool, after, new)
            if old.name == new.name:
                return []
            if rbd_image.find_snapshot(pool, before, name=old.base) is None:
                raise rbd_snapshots.missing(old, old.base)
            found: Ranges = []
            step = _STEP_OBJECTS * rbd_image.object_span(after)
            for start in range(0, size, step):
                stop = min(start + step, size)
                # what was there at neither time is zeros at both: no question about it is needed
                there = union(
                    rbd_image.allocated(before, start, stop),
                    rbd_image.allocated(after, start, stop),
                )
                found += clip(rbd_image.changed_since(after, old.base, there), start, stop)
                self._go_on()
        return found

    def _places(self, refs: Sequence[Ref]) -> list[Place]:
        return [place_of(ref, self._instance) for ref in refs]


def _named(stack: ExitStack, conf: str, user: str, image: str) -> tuple[Cluster, Any, Any]:
    """An image by its name, with its cluster and pool. NotFoundError (`volume-missing`)."""
    name = ImageName.parse(image)
    cluster = stack.enter_context(connect(Login(conf=Path(conf), user=user)))
    try:
        pool = stack.enter_context(cluster.pool(name.pool, name.namespace))
        return cluster, pool, stack.enter_context(opened(pool, name=name.image))
    except NotFoundError as error:
        raise NotFoundError(
            f"there is no RBD image {name}",
            code="volume-missing",
            hint=f"see: rbd --conf {conf} ls {name.pool}",
        ) from error


def _look(cluster: Cluster, pool: Any, image: Any) -> dict[str, Any]:
    import rbd

    with translated(f"look at the image {image.get_name()}"):
        return {
            "fsid": cluster.fsid,
            "pool": pool.get_pool_id(),
            "image": image.id(),
            "exclusive": bool(image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK),
            "group": image.group()["name"],
        }


def _at_once(items: Sequence[_Item], work: Callable[[_Item], None]) -> None:
    """All of them, whatever becomes of one; then the first error."""
    with ThreadPoolExecutor(max_workers=_CREW) as crew:
        for done in [crew.submit(work, item) for item in items]:
            done.result()


def _ensure_base(pool: Any, place: Place) -> None:
    """One of an earlier call will do: what was written since is named as changed, no less."""
    with opened(pool, image_id=place.image, read_only=False) as image:
        if rbd_image.find_snapshot(pool, image, name=place.base) is None:
            rbd_snapshots.take(image, place.base, place)


def _checked(stack: ExitStack, pool: Any, place: Place, name: str) -> Any:
    """The image of that name, which has to be the one that was planned, without such a snapshot."""
    short = ImageName.parse(name).image
    image = stack.enter_context(opened(pool, name=short, read_only=False))
    with translated(f"look at the image {name}"):
        replaced = image.id() != place.image
    if replaced:
        raise UnavailableError(
            f"the image {name} was replaced during the snapshot",
            code="volume-replaced",
            hint="try again",
        )
    if rbd_snapshots.find(pool, image, place) is not None:
        raise BusyError(
            f"the snapshot {place.name} of {name} exists already",
            code="snapshot-exists",
            hint="take a new TimeMark; this one was not touched",
        )
    return image


def _size(pool: Any, image: Any, place: Place) -> int:
    rbd_snapshots.show(pool, image, place)
    size: int = image.size()
    return size


def _delete(pool: Any, place: Place) -> None:
    """The part of a group's snapshot, the group with its last part, the ordinary snapshot: in this
    order, because leftovers of the first two are known by the last."""
    try:
        with opened(pool, image_id=place.image, read_only=False) as image:
            if place.grouped:
                rbd_group.remove_part(pool, image, place)
                rbd_group.ensure_removed(pool, place)
            for number, name in rbd_snapshots.ordinary(image).items():
                if name == place.base:
                    rbd_snapshots.remove(image, number, place)
    except NotFoundError as error:
        if error.code != "image-missing":
            raise
        if place.grouped:
            rbd_group.ensure_removed(pool, place)
