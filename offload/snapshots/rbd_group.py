"""Snapshots of RBD groups: one instant of several images.

For the instant, librbd takes the exclusive locks of all images away from their writers; so it is
one for images with the feature `exclusive-lock` only. The parts of the snapshot inside the images
belong to the group: it has to stay as long as they do, but without members, because an image can be
in one group at a time. Each part can be removed by itself, by its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offload import rbd_image
from offload.ceph import translated
from offload.errors import BusyError, NotFoundError
from offload.rbd_image import opened
from offload.snapshots import rbd_snapshots
from offload.snapshots.rbd_refs import Place


def ensure_joined(pool: Any, places: Sequence[Place]) -> None:
    """Make the group and put the images into it. Idempotent.

    Raises BusyError (`in-another-group`).
    """
    import rbd

    group = places[0].group
    with translated(f"make the group {group}"):
        if group not in rbd.RBD().group_list(pool):
            rbd.RBD().group_create(pool, group)
    for place in places:
        what = f"put the image {place.shown} into a group"
        with opened(pool, image_id=place.image) as image, translated(what):
            try:
                rbd.Group(pool, group).add_image(pool, image.get_name())
            except rbd.ObjectExists as error:
                raise BusyError(
                    f"the image {place.shown} is now in the group {image.group()['name']}",
                    code="in-another-group",
                    hint="try again: it will be snapshot without a group of ours",
                ) from error


def take(pool: Any, places: Sequence[Place]) -> None:
    """Take the snapshot of the group.

    Raises BusyError (`volume-in-use`): a writer does not give its exclusive lock away.
    """
    import rbd

    group = rbd.Group(pool, places[0].group)
    shown = ", ".join(place.shown for place in places)
    with translated(f"take a snapshot of {shown} as a group"):
        try:
            group.create_snap("+".join(place.image for place in places))
        except rbd.ReadOnlyImage as error:
            raise BusyError(
                f"a client of one of {shown} does not let go of its exclusive lock",
                code="volume-in-use",
                hint="see who holds it: rbd lock list; images mapped with the option exclusive "
                "cannot be snapshot as a group",
            ) from error


def leave(pool: Any, places: Sequence[Place]) -> None:
    """Take the images out of the group; its snapshot stays. Idempotent."""
    import rbd

    for place in places:
        what = f"take the image {place.shown} out of a group"
        with opened(pool, image_id=place.image) as image, translated(what):
            if image.group()["name"] == place.group:
                rbd.Group(pool, place.group).remove_image(pool, image.get_name())


def remove_part(pool: Any, image: Any, place: Place) -> None:
    """Remove the image's part of the group's snapshot, made, or half removed. Idempotent.

    Raises BusyError (`snapshot-in-use`) where somebody has cloned it.
    """
    start = rbd_image.group_prefix(pool, place.group)
    if start is None:
        return
    for number in _parts(image, start):
        rbd_snapshots.remove(image, number, place)


def _parts(image: Any, start: str) -> list[int]:
    """Ids of an image's parts of a group's snapshots; removing one takes it to the trash first."""
    with translated(f"list the snapshots of {image.get_name()}"):
        return [
            s["id"]
            for s in image.list_snaps()
            if s.get("trash", {}).get("original_name", s["name"]).startswith(start)
        ]


def ensure_removed(pool: Any, place: Place) -> None:
    """Remove the group once no image has a part of its snapshot any more. Idempotent."""
    import rbd

    start = rbd_image.group_prefix(pool, place.group)
    if start is None:
        return
    with translated(f"list the snapshots of the group {place.group}"):
        members = [
            member
            for snapshot in rbd.Group(pool, place.group).list_snaps()
            for member in snapshot["name"].split("+")
        ]
    if any(_has_part(pool, member, start) for member in members):
        return
    with translated(f"remove the group {place.group}"):
        try:
            rbd.RBD().group_remove(pool, place.group)
        except rbd.ObjectNotFound:
            # Ceph 16 gives up at an image that is gone: without its snapshots the group can go
            rbd_image.forget_group_snapshots(pool, place.group)
            rbd.RBD().group_remove(pool, place.group)


def _has_part(pool: Any, image_id: str, start: str) -> bool:
    try:
        with opened(pool, image_id=image_id) as image:
            return bool(_parts(image, start))
    except NotFoundError:
        return False
