"""What an RBD image is right now, and what that means for snapshots of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.ceph import ImageName, Login


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What decides how an image is snapshot."""

    login: Login
    name: ImageName
    fsid: str
    pool: int
    image: str
    exclusive: bool  # one writer at a time
    group: str  # that it is in, or ""


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
