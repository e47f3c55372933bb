"""Snapshots of images in a Ceph cluster: of one image, or of a group of images at one instant.

| the volumes of a TimeMark | are snapshot | one instant by itself |
| --- | --- | --- |
| one image with `exclusive-lock` | by itself | yes |
| several of one pool, all with `exclusive-lock`, none in a group | as a group (`rbd_group`) | yes |
| others | each by itself, at the same time | no |

Each snapshot has to be agreed on by the monitors, which takes up to a second. All work is done by
a process that can be killed (`rbd_link`); this module decides what is to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offload.ceph import ImageName
from offload.errors import ConfigError, NotFoundError, OffloadError, UnavailableError
from offload.extents import Ranges, align, normalize
from offload.model import Instant, RbdSource, Snapshot, Volume
from offload.snapshot import Plan, VolumeState
from offload.snapshots.rbd_link import Link, WorkerLostError
from offload.snapshots.rbd_look import Look, why_not_one
from offload.snapshots.rbd_refs import Place, kind_of, login_of, name_of, place_of

_SECTOR = 512  # what librbd and krbd show, unless the configuration says otherwise
_ONE_S = 1.2  # monitors agree once a second (paxos_propose_interval) at the most
_GROUP_S = 2.0  # and the locks go from their writers to us and back
_CREW = 8  # snapshots that are made at the same time
_OBJECT_MAP_SHARE = 4  # objects whose states fit into a byte of an object map
_HEADER_BYTES = 4096

Ref = dict[str, str]


class RbdProvider:
    """Snapshots of RBD images; see `rbd_refs` for their names."""

    name = "rbd"

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._link = Link(instance)

    # -- looking -------------------------------------------------------------------------------

    def inspect(self, volume: Volume) -> VolumeState:
        """Look at an image and its pool (the one its data is in).

        Raises NotFoundError (`volume-missing`), ConfigError (`not-an-image`, `conf-missing`),
        PrivilegeError (`ceph-permission`), UnavailableError (`volume-empty`, `ceph-timeout` …).
        """
        found = self._ask("space", volume)
        if not found["size"]:
            raise UnavailableError(f"volume {volume.name}: the image is empty", code="volume-empty")
        known = found["pool_size"] > 0  # where no manager runs, nobody knows
        return VolumeState(
            size_bytes=found["size"],
            sector_size=volume.sector_size or _SECTOR,
            identity=self._place(_look(volume, found), "", grouped=False).identity,
            allocated_bytes=found["allocated"],
            extents=0,
            estimate_s=_ONE_S,
            pool=f"{found['pool_name']} of Ceph {found['fsid']}" if known else "",
            pool_size_bytes=found["pool_size"],
            pool_free_bytes=found["pool_free"],
            needed_bytes=_HEADER_BYTES + found["objects"] // _OBJECT_MAP_SHARE if known else 0,
        )

    def plan(self, timemark: str, volumes: Sequence[Volume]) -> Plan:
        """A group where that makes one instant, else snapshots one by one, and a note why.

        Raises ConfigError (`image-twice`), and what `inspect` raises.
        """
        looks = [_look(volume, self._ask("look", volume)) for volume in volumes]
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

    def _ask(self, verb: str, volume: Volume) -> Any:
        login = login_of(volume)
        image = str(ImageName.of_device(volume.path))
        try:
            return self._link.call(verb, conf=str(login.conf), user=login.user, image=image)
        except NotFoundError as error:
            error.message = f"volume {volume.name}: {error.message}"
            raise

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
        """Of a group: the snapshots that comparisons begin with, then the group. Idempotent.

        Raises BusyError (`in-another-group`).
        """
        if place_of(plan.refs[0], self._instance).grouped:
            self._link.call("prepare", refs=plan.refs)

    def snapshot(self, plan: Plan) -> tuple[Snapshot, ...]:
        """One snapshot of the group, or one of each image.

        Raises BusyError (`snapshot-exists`; `volume-in-use`: a writer keeps its lock),
        UnavailableError (`volume-replaced`).
        """
        names = [str(ImageName.of_device(volume.path)) for volume in plan.volumes]
        try:
            sizes = self._link.call("snapshot", refs=plan.refs, names=names)
        except BaseException as failure:
            if isinstance(failure, WorkerLostError) or not isinstance(failure, OffloadError):
                self._take_back(plan, failure)  # else the worker has done so
            raise
        return tuple(
            Snapshot(
                volume=volume.name,
                provider=self.name,
                ref=ref,
                size_bytes=size,
                sector_size=volume.sector_size or _SECTOR,
                identity=place_of(ref, self._instance).identity,
            )
            for volume, ref, size in zip(plan.volumes, plan.refs, sizes, strict=True)
        )

    def _take_back(self, plan: Plan, failure: BaseException) -> None:
        try:
            self._link.call("delete", refs=plan.refs)
        except OffloadError as error:
            failure.add_note(error.message)

    def settle(self, snapshots: Sequence[Snapshot]) -> None:
        """Snapshots are durable from the start; images leave their group."""
        refs = [dict(snapshot.ref) for snapshot in snapshots]
        if refs and place_of(refs[0], self._instance).grouped:
            self._link.call("settle", refs=refs)

    # -- unmaking ------------------------------------------------------------------------------

    def delete(self, ref: Ref) -> None:
        """Delete a snapshot, planned, half made or half deleted. Idempotent.

        The group goes with the last of its parts. Raises PolicyError (`foreign-snapshot`),
        BusyError (`snapshot-in-use`: it is protected, or has clones), ConfigError
        (`other-cluster`), UnavailableError.
        """
        self._link.call("delete", refs=[ref])

    def exists(self, ref: Ref) -> bool:
        """Whether the snapshot is there; of a group, only if the whole of it was made."""
        there: bool = self._link.call("exists", ref=ref)
        return there

    def leftovers(self, volumes: Sequence[Volume]) -> list[Ref]:
        """Of what each image has of ours: every snapshot of a group has a base, made before it and
        deleted after it."""
        found: list[Ref] = []
        for volume in volumes:
            try:
                answer = self._ask("names", volume)
            except NotFoundError:
                continue  # the image is gone, and so are its snapshots
            look = _look(volume, answer)
            kinds = [kind_of(name, self._instance) for name in answer["names"]]
            found += [
                self._place(look, name.rpartition(".")[2], grouped=grouped).to_ref()
                for name, grouped in filter(None, kinds)
            ]
        return found

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
        size = newer.size_bytes
        found = self._link.call("changed", older=dict(older.ref), newer=dict(newer.ref), size=size)
        exact = normalize((start, stop) for start, stop in found)
        return align(exact, newer.sector_size, size)


def _look(volume: Volume, found: dict[str, Any]) -> Look:
    return Look(
        login=login_of(volume),
        name=ImageName.of_device(volume.path),
        fsid=found["fsid"],
        pool=found["pool"],
        image=found["image"],
        exclusive=found["exclusive"],
        group=found["group"],
    )
