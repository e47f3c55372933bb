"""What an RBD image or a snapshot of it holds, as librbd tells it.

librbd's "fast diff" is used for what exists, never for what changed. An object that the object map
does not know reads as zeros, whatever else may be wrong: there the map is the truth. But after a
rollback (`rbd snap rollback`) fast diff of Ceph 16 leaves out objects that differ between two
snapshots. The exact way, a question to the OSDs for each object, does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from offload.ceph import translated
from offload.errors import NotFoundError
from offload.extents import Ranges, clip, normalize

_GROUP_DIRECTORY = "rbd_group_directory"  # librbd: `name_GROUP` → id, as a counted string
_GROUP_HEADER = "rbd_group_header."  # and the group's id; of its keys, cls_rbd keeps a record of
_GROUP_SNAPSHOT = "snapshot_"  # each snapshot under this word and the snapshot's id
_MANY = 1000
_COMPLETE = 1  # rbd_group_snap_state_t: 0 incomplete, 1 complete
_GAP_OBJECTS = 16  # nothing is asked of so many objects at once that exist in neither snapshot


@contextmanager
def opened(
    pool: Any, *, name: str | None = None, image_id: str | None = None, read_only: bool = True
) -> Iterator[Any]:
    """An rbd.Image by name, or by id (also one in the trash), for the block.

    Raises NotFoundError (`image-missing`) and what `translated` gives.
    """
    import rbd

    with translated(f"open the image {name or image_id}"):
        try:
            image = rbd.Image(pool, name, image_id=image_id, read_only=read_only)
        except rbd.ImageNotFound as error:
            raise NotFoundError(
                f"there is no image {name or image_id}", code="image-missing"
            ) from error
    try:
        yield image
    finally:
        image.close()


def find_snapshot(pool: Any, image: Any, *, name: str = "", group: str = "") -> int | None:
    """The id of an ordinary snapshot by its name, or of the image's part in the complete snapshot
    of a group that has only one."""
    import rbd

    with translated(f"list the snapshots of {image.get_name()}"):
        if not group:
            return next(
                (
                    int(s["id"])
                    for s in image.list_snaps()
                    if s["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER and s["name"] == name
                ),
                None,
            )
        start = group_prefix(pool, group)
        if start is None:
            return None
        if [s["state"] for s in rbd.Group(pool, group).list_snaps()] != [_COMPLETE]:
            return None
        return next(
            (
                int(s["id"])
                for s in image.list_snaps()
                if s["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_GROUP
                and s["name"].startswith(start)
            ),
            None,
        )


def group_prefix(pool: Any, group: str) -> str | None:
    """How the names of a group's snapshots begin inside its images; None: there is no such group.

    librbd: `.group.POOL_GROUP_SNAPSHOT`, ids, the pool's in hexadecimal.
    """
    number = _group_id(pool, group)
    return None if number is None else f".group.{pool.get_pool_id():x}_{number}_"


def _group_id(pool: Any, group: str) -> str | None:
    import rados

    with translated(f"look for the group {group}"), rados.ReadOpCtx() as order:
        found, _ = pool.get_omap_vals_by_keys(order, (f"name_{group}",))
        try:
            pool.operate_read_op(order, _GROUP_DIRECTORY)
        except rados.ObjectNotFound:
            return None
        return next((value[4:].decode() for _, value in found), None)  # behind 32 bits of length


def forget_group_snapshots(pool: Any, group: str) -> None:
    """Remove a group's records of its snapshots, none of which has a part in an image any more."""
    import rados

    header = f"{_GROUP_HEADER}{_group_id(pool, group)}"
    with translated(f"forget the snapshots of the group {group}"):
        with rados.ReadOpCtx() as order:
            found, _ = pool.get_omap_vals(order, "", _GROUP_SNAPSHOT, _MANY)
            pool.operate_read_op(order, header)
            keys = tuple(key for key, _ in found)
        with rados.WriteOpCtx() as order:
            pool.remove_omap_keys(order, keys)
            pool.operate_write_op(order, header)


def allocated(image: Any, start: int, stop: int) -> Ranges:
    """Where `[start, stop)` of the image, at the snapshot it is set to, holds anything."""
    import rbd

    found: list[tuple[int, int]] = []

    def collect(at: int, length: int, there: bool) -> None:
        if there:
            found.append((at, at + length))

    with translated(f"map {image.get_name()}"):
        # Ceph before 17.2 answers with wrong offsets for a start inside an object (tracker 53784)
        begin = start // object_span(image) * object_span(image)
        fast = bool(image.features() & rbd.RBD_FEATURE_FAST_DIFF)
        image.diff_iterate(
            begin, stop - begin, None, collect, include_parent=True, whole_object=fast
        )
    return clip(normalize(found), start, stop)


def object_span(image: Any) -> int:
    """Bytes of the image that lie in one set of objects, and in no other."""
    return int(image.stat()["obj_size"]) * int(image.stripe_count())


def changed_since(image: Any, name: str, ranges: Ranges) -> Ranges:
    """Where `ranges` of the image, at the snapshot it is set to, may differ from the older ordinary
    snapshot `name`: exactly, but for writes of the same bytes and ranges that grew an object."""
    found: list[tuple[int, int]] = []
    with translated(f"compare snapshots of {image.get_name()}"):
        for start, stop in _joined(ranges, _GAP_OBJECTS * object_span(image)):
            image.diff_iterate(
                start,
                stop - start,
                name,
                lambda at, length, _: found.append((at, at + length)),
                include_parent=True,
                whole_object=False,
            )
    return normalize(found)


def _joined(ranges: Ranges, gap: int) -> Ranges:
    """Ranges that lie less than `gap` apart as one: a call for each would cost more."""
    out: Ranges = []
    for start, stop in ranges:
        if out and start - out[-1][1] < gap:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out
