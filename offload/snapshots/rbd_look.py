"""What an RBD image is right now, and what that means for snapshots of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from offload.ceph import Cluster, ImageName, Login, connect, translated
from offload.errors import NotFoundError
from offload.model import Volume
from offload.rbd_image import opened
from offload.snapshots.rbd_refs import login_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What decides how an image is snapshot."""

    volume: Volume
    login: Login
    fsid: str
    name: ImageName
    pool: int
    image: str
    exclusive: bool  # one writer at a time
    group: str  # that it is in, or ""


@contextmanager
def volume_image(cluster: Cluster, volume: Volume) -> Iterator[tuple[Any, Any]]:
    """The pool and the image of a volume by their names; NotFoundError (`volume-missing`)."""
    name = ImageName.of_device(volume.path)
    with ExitStack() as stack:
        try:
            pool = stack.enter_context(cluster.pool(name.pool, name.namespace))
            image = stack.enter_context(opened(pool, name=name.image))
        except NotFoundError as error:
            raise NotFoundError(
                f"volume {volume.name}: there is no RBD image {name}",
                code="volume-missing",
                hint=f"see: rbd --conf {login_of(volume).conf} ls {name.pool}",
            ) from error
        yield pool, image


def look_at(volume: Volume) -> Look:
    """Raises what `connect` and `volume_image` raise."""
    with connect(login_of(volume)) as cluster, volume_image(cluster, volume) as (pool, image):
        return look_of(cluster, volume, pool, image)


def look_of(cluster: Cluster, volume: Volume, pool: Any, image: Any) -> Look:
    """Of an image that is open already."""
    import rbd

    with translated(f"look at the image of volume {volume.name}"):
        return Look(
            volume=volume,
            login=login_of(volume),
            fsid=cluster.fsid,
            name=ImageName.of_device(volume.path),
            pool=pool.get_pool_id(),
            image=image.id(),
            exclusive=bool(image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK),
            group=image.group()["name"],
        )


def why_not_one(looks: Sequence[Look], group: str) -> str:
    """Why Ceph makes no one instant of these images as `group`; "" if it does."""
    shared = [str(look.name) for look in looks if not look.exclusive]
    if shared:
        return f"{', '.join(shared)} without exclusive-lock may have several writers at once"
    if len(looks) == 1:
        return ""
    if len({(look.login, look.pool, look.name.namespace) for look in looks}) > 1:
        return "the images lie in several pools or namespaces"
    taken = [
        f"{look.name} is in the group {look.group}"
        for look in looks
        if look.group not in {"", group}
    ]
    return "; ".join(taken)
