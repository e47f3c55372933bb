"""Point-in-time images of disks of a running QEMU, made and served by that QEMU itself: fleeces.

A fleece is a temporary qcow2 file whose backing is the live disk. A backup job with `sync=none`
copies what the guest is about to overwrite into it, so that fleece and disk together show the
instant at which the job began. QEMU exports the fleece read-only over NBD, on a socket of ours
beside its QMP socket. A dirty bitmap begins in the same transaction; it tells a later TimeMark what
has changed since.

All names in that QEMU derive from instance, TimeMark and volume: `offload-<instance>-<rest>`, both
hashed to fit QEMU's 31 characters. So a fleece can be taken away by its planned ref alone:

| in QEMU | goes by |
| --- | --- |
| NBD export (and those made to read a bitmap) | `block-export-del` of every id that starts so |
| backup job | `block-job-cancel` |
| node of the fleece | `blockdev-del` |
| bitmaps on the disk | `block-dirty-bitmap-remove` of every name that starts so |
| NBD server | `nbd-server-stop` when it was ours and serves nothing any more |

Limits: all of it ends with that QEMU (then `exists` is False, and deleting removes the file). If
the file system of the fleece runs full, QEMU fails the *guest's* write (QEMU 7.2 has no other
choice for this job): the space watermark of the pool guards against that. QEMU has one NBD server;
if another program uses it, TimeMarks are refused (`nbd-server-busy`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket as sockets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2s
from pathlib import Path
from typing import Any

from offload import qemu_nbd, run
from offload.errors import BusyError, NotFoundError, PolicyError, UnavailableError
from offload.extents import Ranges
from offload.ids import new_id
from offload.model import Volume
from offload.nbd_bitmap import dirty_ranges
from offload.qmp import Qmp, QmpError, QmpGoneError
from offload.snapshots import naming

_PATIENCE_S = 10.0  # for jobs and exports to end
_SUN_PATH_MAX = 107  # bytes of a unix socket address, sys/un.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A disk's format node in a running QEMU."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleece:
    """One fleece: its file, the image of the disk, the QMP socket of the QEMU."""

    instance: str
    file: Path
    image: Path
    qmp: Path

    @property
    def tag(self) -> str:
        """The name of its node, job, export and bitmap (QEMU: 31 characters at most)."""
        rest = f"{self.file.parent.name}/{self.file.name}"
        return f"{_own(self.instance)}{blake2s(rest.encode(), digest_size=8).hexdigest()}"

    @property
    def socket(self) -> Path:
        """Of the NBD server in that QEMU: one for all fleeces of this instance."""
        return self.qmp.with_name(f"{self.qmp.name}.{_own(self.instance)}nbd")

    @property
    def uri(self) -> str:
        """Where the fleece is served."""
        return qemu_nbd.uri(self.socket, self.tag)


def _own(instance: str) -> str:
    return f"offload-{blake2s(instance.encode(), digest_size=3).hexdigest()}-"


def find(volume: Volume) -> Node | None:
    """The volume's disk in the QEMU of its `qmp_socket`; None if there is no such QEMU, or it does
    not have the image open.

    Raises PolicyError (`not-the-active-layer`) if the image is only a backing file there.
    """
    if volume.qmp_socket is None:
        return None
    try:
        with Qmp(volume.qmp_socket) as qmp:
            return _find(qmp, volume.path)
    except QmpGoneError:
        return None


def node_of(fleece: Fleece) -> Node:
    """The disk of a fleece. NotFoundError (`volume-missing`) if that QEMU does not have it."""
    with Qmp(fleece.qmp) as qmp:
        return _get(qmp, fleece)


def _get(qmp: Qmp, fleece: Fleece) -> Node:
    found = _find(qmp, fleece.image)
    if found is None:
        raise NotFoundError(
            f"QEMU at {fleece.qmp} does not have {fleece.image} open (any more)",
            code="volume-missing",
        )
    return found


def _find(qmp: Qmp, image: Path) -> Node | None:
    """By inode, so that links and relative names do not matter."""
    try:
        wanted = image.stat()
    except OSError:
        return None
    for entry in qmp.execute("query-named-block-nodes", {"flat": True}):
        if entry["drv"] != "qcow2":
            continue
        with contextlib.suppress(OSError):
            name = _file_name(entry["image"]["filename"])
            status = Path(f"/proc/{qmp.peer_pid()}/cwd", name).stat()
            if (status.st_dev, status.st_ino) != (wanted.st_dev, wanted.st_ino):
                continue
            if entry["ro"]:
                raise PolicyError(
                    f"{image} is not the active layer of its disk in QEMU at {qmp.socket}",
                    code="not-the-active-layer",
                    hint="set the volume's path to the file that the VM writes to",
                )
            return Node(name=entry["node-name"], size_bytes=entry["image"]["virtual-size"])
    return None


def _file_name(shown: str) -> str:
    """QEMU shows a disk with options of its own as a `json:` description of its nodes."""
    if not shown.startswith("json:"):
        return shown
    name: str = json.loads(shown.removeprefix("json:")).get("file", {}).get("filename", "")
    return name


def prepare(fleece: Fleece) -> None:
    """Make the file, give it to QEMU as a node over the live disk, start the NBD server.

    Idempotent. QEMU gets open files, not names: it may run as another user.
    """
    _check_socket(fleece)
    with Qmp(fleece.qmp) as qmp:
        disk = _get(qmp, fleece)
        _ensure_server(qmp, fleece)
        if fleece.tag in _node_names(qmp):
            return
        fleece.file.unlink(missing_ok=True)
        program = run.require_program("qemu-img", "qemu-utils")
        size = str(disk.size_bytes)
        run.run([program, "create", "-q", "-f", "qcow2", str(fleece.file), size])
        fleece.file.chmod(0o600)
        _add_node(qmp, fleece, disk)


def _add_node(qmp: Qmp, fleece: Fleece, disk: Node) -> None:
    fd = os.open(fleece.file, os.O_RDWR | os.O_CLOEXEC)
    try:
        fdset = qmp.execute("add-fd", {"opaque": fleece.tag}, fds=[fd])["fdset-id"]
    finally:
        os.close(fd)
    try:
        qmp.execute(
            "blockdev-add",
            {
                "driver": "qcow2",
                "node-name": fleece.tag,
                "backing": disk.name,
                "file": {"driver": "file", "filename": f"/dev/fdset/{fdset}"},
            },
        )
    finally:
        qmp.execute("remove-fd", {"fdset-id": fdset})  # the node keeps its own copy


def _ensure_server(qmp: Qmp, fleece: Fleece) -> None:
    if qemu_nbd.greets(fleece.socket):
        return
    fleece.socket.unlink(missing_ok=True)
    name = f"{fleece.tag}-listener"
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as listener:
        try:
            listener.bind(str(fleece.socket))
            fleece.socket.chmod(0o600)
        except OSError as error:
            raise naming.pool_error(error, fleece.socket, "make") from error
        listener.listen(64)
        try:
            qmp.execute("getfd", {"fdname": name}, fds=[listener.fileno()])
            address = {"type": "fd", "data": {"str": name}}
            qmp.execute("nbd-server-start", {"addr": address})
        except QmpError as error:
            fleece.socket.unlink(missing_ok=True)
            with contextlib.suppress(QmpError):
                qmp.execute("closefd", {"fdname": name})
            raise BusyError(
                f"cannot start the NBD server of QEMU at {fleece.qmp}: {error.description}",
                code="nbd-server-busy",
                hint="another backup program uses it: wait until it has ended",
            ) from error


def _check_socket(fleece: Fleece) -> None:
    if len(os.fsencode(fleece.socket)) > _SUN_PATH_MAX:
        raise PolicyError(
            f"{fleece.socket} is too long a path for a unix socket",
            code="runtime-path-too-long",
            hint="give the VM's QMP socket a shorter path",
        )


def begin(socket: Path, fleeces: Sequence[Fleece]) -> None:
    """All fleeces of one QEMU at one instant, then their exports. The caller takes back on errors.

    Bitmaps come first in the transaction: they must know every write after the instant.
    """
    with Qmp(socket) as qmp:
        disks = [_get(qmp, fleece).name for fleece in fleeces]
        bitmaps = [
            {"type": "block-dirty-bitmap-add", "data": {"node": disk, "name": fleece.tag}}
            for fleece, disk in zip(fleeces, disks, strict=True)
        ]
        jobs = [
            {"type": "blockdev-backup", "data": _job(fleece.tag, disk)}
            for fleece, disk in zip(fleeces, disks, strict=True)
        ]
        qmp.execute("transaction", {"actions": bitmaps + jobs})
        for fleece in fleeces:
            qmp.execute("block-export-add", _export(fleece.tag, fleece.tag))


def _job(tag: str, disk: str) -> dict[str, object]:
    return {"job-id": tag, "device": disk, "target": tag, "sync": "none"}


def _export(node: str, name: str) -> dict[str, object]:
    return {"type": "nbd", "id": name, "name": name, "node-name": node, "writable": False}


def serves(fleece: Fleece) -> bool:
    """Whether job and export are there."""
    try:
        with Qmp(fleece.qmp) as qmp:
            return fleece.tag in _jobs(qmp) and fleece.tag in _exports(qmp)
    except QmpGoneError:
        return False


def end(fleece: Fleece) -> None:
    """Take all of a fleece out of QEMU, but for its file. Idempotent; nothing to do where that
    QEMU is gone. Raises UnavailableError (`qmp-timeout`, `qmp-refused`, `fleece-stuck`)."""
    try:
        with Qmp(fleece.qmp, timeout_s=_PATIENCE_S) as qmp:
            _end_exports(qmp, fleece.tag)
            if fleece.tag in _jobs(qmp):
                qmp.execute("block-job-cancel", {"device": fleece.tag, "force": True})
                _wait(lambda: fleece.tag not in _jobs(qmp), fleece)
            if fleece.tag in _node_names(qmp):
                qmp.execute("blockdev-del", {"node-name": fleece.tag})
            for node, bitmap in _bitmaps(qmp, fleece.tag):
                qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": bitmap})
            _end_server(qmp, fleece)
    except QmpGoneError:
        if not qemu_nbd.greets(fleece.socket):
            fleece.socket.unlink(missing_ok=True)


def _end_exports(qmp: Qmp, tag: str) -> None:
    def ours() -> list[str]:
        return [export for export in _exports(qmp) if export.startswith(tag)]

    for export in ours():
        qmp.execute("block-export-del", {"id": export, "mode": "hard"})
    _wait(lambda: not ours(), tag)


def _end_server(qmp: Qmp, fleece: Fleece) -> None:
    """Only a server of ours, and only when no fleece needs it: one that is being prepared has a
    node already."""
    own = _own(fleece.instance)
    needed = _exports(qmp) or any(name.startswith(own) for name in _node_names(qmp))
    if not needed and fleece.socket.exists():
        with contextlib.suppress(QmpError):  # it was not running
            qmp.execute("nbd-server-stop")
        fleece.socket.unlink(missing_ok=True)


def changed(older: Fleece, newer: Fleece) -> Ranges | None:
    """What was written since `older` began, up to now: `newer` may differ from it nowhere else.

    The bitmap goes on recording, so that any later TimeMark can ask it too; read is a copy of it,
    through an export of its own.
    """
    name = f"{newer.tag}-{new_id()}"
    try:
        with Qmp(newer.qmp) as qmp:
            disk = _find(qmp, newer.image)
            if disk is None or not _trusted(qmp, disk, older.tag) or newer.tag not in _jobs(qmp):
                return None
            try:
                return _read_bitmap(qmp, disk, (older.tag, name), newer)
            finally:
                _end_exports(qmp, name)
                for node, bitmap in _bitmaps(qmp, name):
                    qmp.execute("block-dirty-bitmap-remove", {"node": node, "name": bitmap})
    except QmpGoneError:
        return None


def _read_bitmap(qmp: Qmp, disk: Node, names: tuple[str, str], newer: Fleece) -> Ranges:
    bitmap, copy = names
    where = {"node": disk.name, "name": copy}
    qmp.execute("block-dirty-bitmap-add", {**where, "disabled": True})
    merge = {"node": disk.name, "target": copy, "bitmaps": [bitmap]}
    qmp.execute("block-dirty-bitmap-merge", merge)
    qmp.execute("block-export-add", {**_export(newer.tag, copy), "bitmaps": [where]})
    return dirty_ranges(qemu_nbd.uri(newer.socket, copy), copy)


def _trusted(qmp: Qmp, disk: Node, bitmap: str) -> bool:
    """Whether the bitmap is there and has recorded all the time since it began."""
    for entry in qmp.execute("query-named-block-nodes", {"flat": True}):
        if entry["node-name"] == disk.name:
            for found in entry.get("dirty-bitmaps", ()):
                if found.get("name") == bitmap:
                    return bool(found["recording"]) and not found.get("inconsistent", False)
    return False


def delete_internal(socket: Path, image: Path, name: str) -> bool:
    """Delete an internal snapshot of an image that a running QEMU has open; False if it has not."""
    try:
        with Qmp(socket, timeout_s=600) as qmp:
            disk = _find(qmp, image)
            if disk is None:
                return False
            try:
                qmp.execute(
                    "blockdev-snapshot-delete-internal-sync", {"device": disk.name, "name": name}
                )
            except QmpError as error:
                if "does not exist" not in error.description:
                    raise
            return True
    except QmpGoneError:
        return False


def _jobs(qmp: Qmp) -> list[str]:
    return [job["device"] for job in qmp.execute("query-block-jobs")]


def _exports(qmp: Qmp) -> list[str]:
    return [export["id"] for export in qmp.execute("query-block-exports")]


def _node_names(qmp: Qmp) -> set[str]:
    nodes: list[dict[str, Any]] = qmp.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"] for node in nodes}


def _bitmaps(qmp: Qmp, start: str) -> list[tuple[str, str]]:
    """`(node, bitmap)` of every bitmap whose name starts so."""
    return [
        (node["node-name"], bitmap["name"])
        for node in qmp.execute("query-named-block-nodes", {"flat": True})
        for bitmap in node.get("dirty-bitmaps", ())
        if bitmap.get("name", "").startswith(start)
    ]


def _wait(condition: Callable[[], bool], what: object) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > until:
            raise UnavailableError(f"QEMU does not let go of {what}", code="fleece-stuck")
        time.sleep(0.01)
