"""Names and refs of RBD snapshots.

| in the cluster | is |
| --- | --- |
| snapshot `offload.INSTANCE.TIMEMARK` | of one image by itself |
| snapshot `offload.INSTANCE.TIMEMARK.base` | made just before the snapshot of a group; first to come, last to go |
| group `offload.INSTANCE.TIMEMARK` | of several images of one pool; has one snapshot |
| its snapshot `ID+ID+…` | the ids of the images that it is of |

A ref names pool and image by their ids, so that it still fits a renamed image, or one in the trash,
and never another of the same name. How the cluster was reached, and what the image was called, are
hints: see `offload.snapshot_ref`.
"""  # noqa: E501 - a table

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload.ceph import DEFAULT_CONF, DEFAULT_USER, Login
from offload.errors import PolicyError
from offload.model import Volume

_PREFIX = "offload"
_BASE = ".base"
_PART = r"[a-z0-9]+"  # ids of instances and TimeMarks: no dot
_FIELDS = ("cluster", "pool", "namespace", "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the snapshot of one image is, or will be. `image` is an id, `shown` a name."""

    login: Login
    cluster: str
    pool: int
    namespace: str
    image: str
    shown: str
    name: str
    grouped: bool

    @property
    def base(self) -> str:
        """The ordinary snapshot that comparisons begin with: of a group's snapshot, the one made
        just before it. Ceph 16 compares with ordinary snapshots only."""
        return self.name + _BASE if self.grouped else self.name

    @property
    def snapshot(self) -> str:
        """The ordinary snapshot to be read, or none."""
        return "" if self.grouped else self.name

    @property
    def group(self) -> str:
        """The group whose snapshot is to be read, or none."""
        return self.name if self.grouped else ""

    @property
    def identity(self) -> str:
        """Of the image: a re-created one has another id."""
        return f"rbd:{self.cluster}/{self.pool}/{self.image}"

    def to_ref(self) -> dict[str, str]:
        """Strings only."""
        return {
            "cluster": self.cluster,
            "pool": str(self.pool),
            "namespace": self.namespace,
            "image": self.image,
            "group" if self.grouped else "snapshot": self.name,
            "hint_image": self.shown,
            "hint_conf": str(self.login.conf),
            "hint_user": self.login.user,
        }


def login_of(volume: Volume) -> Login:
    """How the volume's cluster is reached."""
    return Login(conf=volume.conf or DEFAULT_CONF, user=volume.user or DEFAULT_USER)


def name_of(instance: str, timemark: str) -> str:
    """The name of a TimeMark's snapshots, or of its group."""
    return f"{_PREFIX}.{instance}.{timemark}"


def kind_of(name: str, instance: str) -> tuple[str, bool] | None:
    """Of the name of an ordinary snapshot of ours: the name of its TimeMark's snapshots, and
    whether they are a group's. None: not of this instance."""
    found = re.fullmatch(rf"({_PREFIX}\.{re.escape(instance)}\.{_PART})({re.escape(_BASE)})?", name)
    return (found[1], found[2] is not None) if found else None


def place_of(ref: Mapping[str, str], instance: str) -> Place:
    """The inverse of `to_ref`, sure to be of our scheme; PolicyError (`foreign-snapshot`).

    Guards every delete: a damaged ref never names what is not ours.
    """
    name = ref.get("snapshot", ref.get("group", ""))
    known = all(field in ref for field in _FIELDS)
    if not known or kind_of(name, instance) != (name, False) or not ref["pool"].isdecimal():
        raise PolicyError(
            f"'{name}' is no snapshot of this instance ({instance}) and is left alone",
            code="foreign-snapshot",
            hint="the record that names it is damaged, or of another state_dir",
        )
    return Place(
        login=Login(
            conf=Path(ref.get("hint_conf", DEFAULT_CONF)), user=ref.get("hint_user", DEFAULT_USER)
        ),
        cluster=ref["cluster"],
        pool=int(ref["pool"]),
        namespace=ref["namespace"],
        image=ref["image"],
        shown=ref.get("hint_image", ref["image"]),
        name=name,
        grouped="group" in ref,
    )
