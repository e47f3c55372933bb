"""Snapshots of images in a Ceph cluster: of one image, or of a group of images at one instant.

| the volumes of a TimeMark | are snapshot | one instant by itself |
| --- | --- | --- |
| one image with `exclusive-lock` | by itself | yes |
| several of one pool, all with `exclusive-lock`, none in a group | as a group (`rbd_group`) | yes |
| others | each by itself, at the same time | no |

Each snapshot has to be agreed on by the monitors, which takes up to a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from offload import rbd_image
from offload.ceph import ImageName, connect, translated
from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    OffloadError,
    UnavailableError,
)
from offload.extents import Ranges, align, clip, total, union
from offload.model import Instant, RbdSource, Snapshot, Volume
from offload.rbd_image import opened
from offload.snapshot import Plan, VolumeState
from offload.snapshots import rbd_group, rbd_snapshots
from offload.snapshots.rbd_look import Look, look_at, look_of, volume_image, why_not_one
from offload.snapshots.rbd_refs import Place, kind_of, login_of, name_of, place_of
from offload.snapshots.rbd_snapshots import Pools

_SECTOR = 512  # what librbd and krbd show, unless the configuration says otherwise
_ONE_S = 1.2  # monitors agree once a second (paxos_propose_interval) at the most
_GROUP_S = 2.0  # and the locks go from their writers to us and back
_OBJECT_MAP_SHARE = 4  # objects whose states fit into a byte of an object map
_HEADER_BYTES = 4096
_CREW = 8  # snapshots at the same time: more share the monitors' next round anyway

Ref = dict[str, str]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RbdProvider:
    """Snapshots of RBD images; see `rbd_refs` for their names."""

    name = "rbd"

    def __init__(self, instance: str) -> None:
        self._instance = instance

    # -- looking -------------------------------------------------------------------------------

    def inspect(self, volume: Volume) -> VolumeState:
        """Look at an image and its pool (the one its data is in).

        Raises NotFoundError (`volume-missing`), ConfigError (`not-an-image`, `conf-missing`),
        PrivilegeError (`ceph-permission`), UnavailableError (`ceph-timeout` …).
        """
        with connect(login_of(volume)) as cluster, volume_image(cluster, volume) as (pool, image):
            with translated(f"look at the image of volume {volume.name}"):
                size = image.size()
                if size == 0:
                    raise UnavailableError(
                        f"volume {volume.name}: the image is empty", code="volume-empty"
                    )
                look = look_of(cluster, volume, pool, image)
                data_pool = image.data_pool_id()
                objects = -(-size // image.stat()["obj_size"])
            space = cluster.space(data_pool)
            return VolumeState(
                size_bytes=size,
                sector_size=volume.sector_size or _SECTOR,
                identity=self._place(look, "", grouped=False).identity,
                allocated_bytes=_allocated_bytes(image, size),
                extents=0,
                estimate_s=_ONE_S,
                pool=f"{cluster.pool_name(data_pool)} of Ceph {cluster.fsid}" if space else "",
                pool_size_bytes=space.size_bytes if space else 0,
                pool_free_bytes=space.free_bytes if space else 0,
                needed_bytes=_HEADER_BYTES + objects // _OBJECT_MAP_SHARE if space else 0,
            )

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """A group where that makes one instant, else snapshots one by one, and a note why.

        Raises ConfigError (`image-twice`), and what `inspect` raises.
        """
        looks = [look_at(volume) for volume in volumes]
        if len({(look.fsid, look.pool, look.image) for look in looks}) < len(looks):
            raise ConfigError(
                "two volumes of the group are the same RBD image",
                code="image-twice",
                hint="remove one of them",
            )
        why = why_not_one(looks, name_of(self._instance, timemark))
        grouped = len(looks) > 1 and not why
        places = [self._place(look, timemark, grouped=grouped) for look in looks]
        return Plan(
            timemark=timemark,
            volumes=tuple(volumes),
            refs=tuple(place.to_ref() for place in places),
            instant_alone=Instant.NONE if why else Instant.ONE,
            estimate_s=_GROUP_S if grouped else _ONE_S * -(-len(looks) // _CREW),
            notes=(f"not one instant by itself: {why}",) if why else (),
        )

    def _place(self, look: Look, timemark: str, *, grouped: bool) -> Place:
        return Place(
            login=look.login,
            cluster=look.fsid,
            pool=look.pool,
            namespace=look.name.namespace,
            image=look.image,
            shown=str(look.name),
            name=name_of(self._instance, timemark),
            grouped=grouped,
        )

    # -- making --------------------------------------------------------------------------------

    def prepare(self, plan: Plan) -> None:
        """Of a group: the snapshots that comparisons begin with, then the group. Idempotent."""
        places = self._places(plan)
        if not places[0].grouped:
            return
        with Pools() as pools:
            pool = pools.of(places[0])
            _at_once(places, lambda place: _ensure_base(pool, place))
            rbd_group.ensure_joined(pool, places)

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """One snapshot of the group, or one of each image.

        Raises BusyError (`snapshot-exists`, `volume-in-use`), UnavailableError
        (`volume-replaced`).
        """
        with Pools() as pools, ExitStack() as stack:
            shots = [
                _open(volume, place, pools.of(place), stack)
                for volume, place in zip(plan.volumes, self._places(plan), strict=True)
            ]
            try:
                if shots[0].place.grouped:
                    rbd_group.take(shots[0].pool, [shot.place for shot in shots])
                else:
                    _at_once(shots, _Shot.take)
                return tuple(shot.record() for shot in shots)
            except BaseException as failure:
                self._take_back(plan, failure)
                raise

    def _take_back(self, plan: Plan, failure: BaseException) -> None:
        for ref in plan.refs:
            try:
                self.delete(dict(ref))
            except OffloadError as error:
                failure.add_note(error.message)

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """Snapshots are durable from the start; images leave their group."""
        places = [place_of(snapshot.ref, self._instance) for snapshot in snapshots]
        if places and places[0].grouped:
            with Pools() as pools:
                rbd_group.leave(pools.of(places[0]), places)

    # -- unmaking ------------------------------------------------------------------------------

    def delete(self, ref: Ref) -> None:
        """Delete a snapshot, planned, half made or half deleted. Idempotent.

        The group goes with the last of its parts. Raises PolicyError (`foreign-snapshot`),
        BusyError (`snapshot-in-use`: it is protected, or has clones), UnavailableError.
        """
        place = place_of(ref, self._instance)
        try:
            with Pools() as pools:
                _delete(pools.of(place), place)
        except NotFoundError as error:
            if error.code != "pool-missing":
                raise

    def exists(self, ref: Ref) -> bool:
        """Whether the snapshot is there; of a group, only if the whole of it was made."""
        place = place_of(ref, self._instance)
        try:
            with Pools() as pools, pools.image(place) as (pool, image):
                return rbd_snapshots.find(pool, image, place) is not None
        except NotFoundError as error:
            if error.code not in {"pool-missing", "image-missing"}:
                raise
            return False

    def leftovers(self, volumes: Sequence[Volume]) -> list[Ref]:
        """Of what each image has of ours: every snapshot of a group has a base, made before it and
        deleted after it."""
        found: list[Ref] = []
        for volume in volumes:
            try:
                with (
                    connect(login_of(volume)) as cluster,
                    volume_image(cluster, volume) as (pool, image),
                ):
                    look = look_of(cluster, volume, pool, image)
                    found += self._refs_of(look, rbd_snapshots.ordinary(image).values())
            except NotFoundError:
                continue  # the image is gone, and so are its snapshots
        return found

    def _refs_of(self, look: Look, names: Iterable[str]) -> list[Ref]:
        kinds = [kind_of(name, self._instance) for name in sorted(set(names))]
        return [
            self._place(look, name.rpartition(".")[2], grouped=grouped).to_ref()
            for name, grouped in filter(None, kinds)
        ]

    # -- reading -------------------------------------------------------------------------------

    def source(self, snapshot: Snapshot) -> RbdSource:
        """The snapshot, read through librbd."""
        place = place_of(snapshot.ref, self._instance)
        return RbdSource(
            cluster=place.cluster,
            pool=place.pool,
            namespace=place.namespace,
            image=place.image,
            snapshot=place.snapshot or None,
            group=place.group or None,
            conf=place.login.conf,
            user=place.login.user,
            name=place.shown,
            size_bytes=snapshot.size_bytes,
            sector_size=snapshot.sector_size,
        )

    def changed(self, older: Snapshot, newer: Snapshot) -> Ranges | None:
        """What librbd finds between the two, object by object; None for another or a resized image.

        Of a group's snapshots it names a little more: what was written in the moment between
        `prepare` and the older one too. Raises NotFoundError (`snapshot-missing`).
        """
        if older.identity != newer.identity or older.size_bytes != newer.size_bytes:
            return None
        old = place_of(older.ref, self._instance)
        new = place_of(newer.ref, self._instance)
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
            size = newer.size_bytes
            # what was there at neither time is zeros at both: no question about it is needed
            there = union(rbd_image.allocated(before, 0, size), rbd_image.allocated(after, 0, size))
            found = rbd_image.changed_since(after, old.base, there)
        return clip(align(found, newer.sector_size, size), 0, size)

    def _places(self, plan: Plan) -> list[Place]:
        return [place_of(ref, self._instance) for ref in plan.refs]


def _allocated_bytes(image: Any, size: int) -> int:
    """By the object map; without one, counting would ask for each object, so all of it."""
    import rbd

    if not image.features() & rbd.RBD_FEATURE_FAST_DIFF:
        return size
    return total(rbd_image.allocated(image, 0, size))


def _at_once(items: Sequence[_Item], work: Callable[[_Item], _Result]) -> list[_Result]:
    """All of them, whatever becomes of one; then the first error."""
    with ThreadPoolExecutor(max_workers=_CREW) as crew:
        return [done.result() for done in [crew.submit(work, item) for item in items]]


def _ensure_base(pool: Any, place: Place) -> None:
    """One of an earlier call will do: what was written since is named as changed, no less."""
    with opened(pool, image_id=place.image, read_only=False) as image:
        if rbd_image.find_snapshot(pool, image, name=place.base) is None:
            rbd_snapshots.take(image, place.base, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shot:
    """One image whose snapshot is being taken."""

    volume: Volume
    place: Place
    pool: Any
    image: Any

    def take(self) -> None:
        rbd_snapshots.take(self.image, self.place.name, self.place)

    def record(self) -> Snapshot:
        rbd_snapshots.show(self.pool, self.image, self.place)
        return Snapshot(
            volume=self.volume.name,
            provider=RbdProvider.name,
            ref=self.place.to_ref(),
            size_bytes=self.image.size(),
            sector_size=self.volume.sector_size or _SECTOR,
            identity=self.place.identity,
        )


def _open(volume: Volume, place: Place, pool: Any, stack: ExitStack) -> _Shot:
    """The volume's image, which has to be the one that was planned, without such a snapshot."""
    name = ImageName.of_device(volume.path)
    image = stack.enter_context(opened(pool, name=name.image, read_only=False))
    with translated(f"look at the image {name}"):
        replaced = image.id() != place.image
    if replaced:
        raise UnavailableError(
            f"volume {volume.name}: {name} was replaced during the snapshot",
            code="volume-replaced",
            hint="try again",
        )
    if rbd_snapshots.find(pool, image, place) is not None:
        raise BusyError(
            f"the snapshot {place.name} of {name} exists already",
            code="snapshot-exists",
            hint="take a new TimeMark; this one was not touched",
        )
    return _Shot(volume=volume, place=place, pool=pool, image=image)


def _delete(pool: Any, place: Place) -> None:
    """The part of a group's snapshot, the group with its last part, the ordinary snapshot: in this
    order, because `leftovers` knows the first two by the last."""
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
