"""Ceph clusters through librados and librbd: connections, their errors, names of images.

By themselves, librados and librbd wait for ever for a monitor or an OSD that does not answer. Who
only reads may have them give up (`limited`). Who writes may not: that of Ceph 16 then ends the
process now and then ("FAILED ceph_assert(m_pending_ops == 0)"), so it has one that can be killed.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
)

DEFAULT_CONF = Path("/etc/ceph/ceph.conf")
DEFAULT_USER = "client.admin"
CONNECT_S = 10  # librados takes whole seconds
ANSWER_S = 30  # of one request to a monitor or an OSD, where connections are limited
_DEVICES = Path("/dev/rbd")  # krbd's udev rule: POOL/[NAMESPACE/]IMAGE
_PART = re.compile(r"[^/@\s]+")  # RBD's own rule: no slash, no at sign
_OPTIONS = {
    "rbd_cache": "false",  # what we read does not change and is read once
    "log_to_stderr": "false",  # errors come back; their doubles would go to the user's terminal
    "err_to_stderr": "false",
}
_NEEDED = (
    "does the user's keyring lie where the configuration says, and has it the capabilities "
    "mon 'profile rbd', osd 'profile rbd pool=POOL'?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageName:
    """`POOL/IMAGE` or `POOL/NAMESPACE/IMAGE`."""

    pool: str
    image: str
    namespace: str = ""

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Raises ValueError, which says what is expected."""
        parts = text.split("/")
        if len(parts) not in {2, 3} or not all(_PART.fullmatch(part) for part in parts):
            raise ValueError("must be pool/image or pool/namespace/image")
        namespace = parts[1] if len(parts) == 3 else ""
        return cls(pool=parts[0], namespace=namespace, image=parts[-1])

    @classmethod
    def of_device(cls, path: Path) -> ImageName:
        """The inverse of `device`. Raises ConfigError (`not-an-image`)."""
        try:
            return cls.parse(str(path.relative_to(_DEVICES)))
        except ValueError as error:
            raise ConfigError(
                f"{path} names no RBD image",
                code="not-an-image",
                hint='set image = "pool/image" in the volume\'s table',
            ) from error

    @property
    def device(self) -> Path:
        """Where the kernel's client shows the image if it is mapped on this machine."""
        return _DEVICES / str(self)

    def __str__(self) -> str:
        return "/".join(part for part in (self.pool, self.namespace, self.image) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """How a cluster is reached. The user's key is found by librados, where `conf` says."""

    conf: Path
    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Of a pool, in bytes as its clients count them: without copies and parity."""

    size_bytes: int
    free_bytes: int


class Cluster:
    """One connection, made by `connect`. May be used by several threads."""

    def __init__(self, handle: Any, fsid: str) -> None:
        self.fsid = fsid
        self._handle = handle

    @contextmanager
    def pool(self, pool: str | int, namespace: str = "") -> Iterator[Any]:
        """A rados.Ioctx of a pool, by name or id. Raises NotFoundError (`pool-missing`)."""
        import rados

        with translated(f"open the pool {pool}"):
            opening = self._handle.open_ioctx if isinstance(pool, str) else self._handle.open_ioctx2
            try:
                context = opening(pool)
            except rados.ObjectNotFound as error:
                raise NotFoundError(f"there is no pool {pool}", code="pool-missing") from error
        try:
            context.set_namespace(namespace)
            yield context
        finally:
            context.close()

    def pool_name(self, pool_id: int) -> str:
        """Raises NotFoundError (`ceph-missing`)."""
        with translated(f"look for the pool {pool_id}"):
            name: str = self._handle.pool_reverse_lookup(pool_id)
        return name

    def space(self, pool_id: int) -> Space | None:
        """What the monitors say of a pool; None where they have no word from a manager."""
        order = json.dumps({"prefix": "df", "format": "json"})
        with translated("ask for the space of pools"):
            status, answer, words = self._handle.mon_command(order, b"", timeout=ANSWER_S)
        if status != 0:
            raise _of_errno(-status, "ask for the space of pools", words)
        return space_of(json.loads(answer), pool_id)


def space_of(answer: dict[str, Any], pool_id: int) -> Space | None:
    """The space of a pool in the answer to the monitors' command `df`."""
    found = next((pool["stats"] for pool in answer["pools"] if pool["id"] == pool_id), None)
    if found is None or not answer["stats"]["total_bytes"]:
        return None
    free = int(found["max_avail"])
    return Space(size_bytes=int(found["stored"]) + free, free_bytes=free)


@contextmanager
def connect(login: Login, fsid: str = "", *, limited: bool = False) -> Iterator[Cluster]:
    """A connection for the block; `fsid`: the only cluster that will do; `limited`: see above.

    Close all that came out of it before. Raises ConfigError (`conf-missing`, `other-cluster`),
    PrivilegeError (`ceph-permission`), UnavailableError (`library-missing`, `ceph-timeout`).
    """
    what = f"connect to the Ceph cluster of {login.conf} as {login.user}"
    with translated(what):
        handle = _configured(login, limited=limited)
    try:
        with translated(what):
            _connect(handle, what)
            found: str = handle.get_fsid()
        if fsid and found != fsid:
            raise ConfigError(
                f"{login.conf} leads to the Ceph cluster {found}, not to {fsid}",
                code="other-cluster",
                hint="correct the file, or conf of the volume",
            )
        yield Cluster(handle, found)
    finally:
        handle.shutdown()


def _connect(handle: Any, what: str) -> None:
    import rados

    try:
        handle.connect(timeout=CONNECT_S)
    except rados.ObjectNotFound as error:
        raise PrivilegeError(
            f"cannot {what}: no keyring of that user was found",
            code="ceph-permission",
            hint=_NEEDED,
        ) from error


def _configured(login: Login, *, limited: bool) -> Any:
    import rados

    if not login.conf.is_file():
        raise ConfigError(
            f"there is no file {login.conf}",
            code="conf-missing",
            hint="set conf of the volume to the configuration file of its Ceph cluster",
        )
    options = {**_OPTIONS, "client_mount_timeout": str(CONNECT_S)}
    if limited:
        options |= {"rados_mon_op_timeout": str(ANSWER_S), "rados_osd_op_timeout": str(ANSWER_S)}
    return rados.Rados(name=login.user, conffile=str(login.conf), conf=options)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Errors of librados and librbd as ours; `what`: a verb and its object, "open the pool x"."""
    try:
        import rados
        import rbd
    except ImportError as error:
        raise UnavailableError(
            f"cannot {what}: {error.name} for Python is not installed",
            code="library-missing",
            hint="install it: apt-get install python3-rados python3-rbd",
        ) from error
    try:
        yield
    except (rados.Error, rbd.Error) as error:
        raise _of_errno(getattr(error, "errno", None), what, str(error)) from error


def _of_errno(number: int | None, what: str, words: str) -> OffloadError:
    why = os.strerror(number) if number else words
    match number:
        case errno.ETIMEDOUT:
            return UnavailableError(
                f"cannot {what}: the cluster did not answer in time",
                code="ceph-timeout",
                hint="look at its health: ceph status",
            )
        case errno.EACCES | errno.EPERM:
            return PrivilegeError(
                f"cannot {what}: {why}",
                code="ceph-permission",
                hint=_NEEDED,
            )
        case errno.ENOENT:
            return NotFoundError(f"cannot {what}: {why}", code="ceph-missing")
        case errno.EBUSY:
            return BusyError(f"cannot {what}: it is in use", code="image-in-use")
        case errno.ENOSPC | errno.EDQUOT:
            return UnavailableError(
                f"cannot {what}: {why}",
                code="no-space",
                hint="is the pool full, or the image's limit of snapshots reached?",
            )
    return UnavailableError(
        f"cannot {what}: {why}", code="ceph-error", hint="look at the cluster's health: ceph status"
    )
