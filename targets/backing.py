"""The bytes of a view, for targets that read them from a socket or from a file.

| source | read-only: socket | read-only: file | with an overlay |
| --- | --- | --- | --- |
| raw | nbdkit | the origin itself | daemon on the origin |
| qcow2 | qemu-nbd | daemon on qemu-nbd | daemon on qemu-nbd |
| backup, NBD | nbdkit | daemon on nbdkit | daemon on nbdkit |

The daemon is a qemu-storage-daemon, which exports a socket or a FUSE file. In the view's folder:

| | |
| --- | --- |
| `base.sock`, `base.pid`, `base-log` | the nbdkit of the source |
| `qemu.sock`, `qemu-nbd.pid`, `qemu-log` | the qemu-nbd of the source |
| `top.sock` or `disk`, `top.pid`, `top-log` | the daemon |
| `top.qmp` | its monitor, where the view is writable |

A view that was migrated is the daemon alone, on the place where its bytes are now.

Only nbdkit tells NBD clients the sector size: who presents one of the other sockets sets it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload import procs, qemu_nbd, qemu_storage, run
from offload.blockdev import device_size
from offload.errors import CleanupError, IntegrityError, NotFoundError, UnavailableError
from offload.model import HomeSource, Qcow2Source, RawSource
from offload.qemu_storage import Node
from offload.target import ExportRequest, Overlay
from targets import command, handshake, nbdkit

_BASE_LOG = "base-log"
_FILE = "disk"
_PID_FILE = "top.pid"
_LOG = "top-log"
_MONITOR = "top.qmp"
_ANSWER_S = 10.0
# What has nothing to save when it is asked to end.
_GRACE_S = 0.5

_DAEMON, _BASE, _MOUNT = "backing_", "backing_base_", "backing_mount"
_OLD = "backend_"  # the qemu-nbd of records of version 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Backing:
    """Where the bytes of a view are. All keys of `record`, a part of the view's server record,
    begin with `backing_`."""

    path: Path
    record: Mapping[str, str]


def open_socket(request: ExportRequest) -> Backing:
    """The bytes of the view over NBD, as the default export of a unix socket in its folder.

    On an error nothing is left but the folder, which the caller made. Raises NotFoundError
    (`source-missing`, `overlay-missing`), BusyError (`volume-in-use`, `overlay-in-use`),
    IntegrityError (`size-mismatch`), UnavailableError (`program-missing`, `server-failed`), and
    whatever opening the image raises.
    """
    with _closed_on_error(request):
        if not request.writable:
            return _serve_source(request)
        node, base = _base_node(request)
        path = request.run_dir / command.OVERLAY_SOCKET
        ref = qemu_storage.serve_nbd(
            _top_node(request, node), path, writable=True, **_files(request)
        )
        nbdkit.check_size(handshake.ask(str(path), timeout_s=_ANSWER_S).size_bytes, request)
        return Backing(path=path, record={**base, **_record(_DAEMON, ref)})


def open_file(request: ExportRequest) -> Backing:
    """The bytes of the view as a file, or as a block device: the origin's own where it is raw and
    the view read-only. Only this user may open it.

    Raises what `open_socket` raises, and UnavailableError (`fuse-unavailable`).
    """
    if request.overlay is None and isinstance(request.source, RawSource):
        _check_raw(request, request.source)
        return Backing(path=request.source.path, record={})
    with _closed_on_error(request):
        node, base = _base_node(request)
        path = request.run_dir / _FILE
        ref = qemu_storage.serve_file(
            _top_node(request, node), path, writable=request.writable, **_files(request)
        )
        nbdkit.check_size(path.stat().st_size, request)
        record = {**base, **_record(_DAEMON, ref), _MOUNT: str(path)}
        return Backing(path=path, record=record)


def close(run_dir: Path, server: Mapping[str, str]) -> None:
    """End what either started and remove its files; `server` may be empty. Idempotent.

    After the target's own server: what has the file or the socket open gets errors from now on.
    Raises CleanupError if a file cannot be unmounted or removed.
    """
    if server and not any(key.startswith((_DAEMON, _OLD)) for key in server):
        return
    try:
        _close(run_dir)
    except OSError as error:
        raise CleanupError(
            f"cannot remove {error.filename or run_dir}: {error.strerror}", code="cleanup"
        ) from error


def alive(run_dir: Path, server: Mapping[str, str]) -> bool:  # noqa: ARG001
    """Whether all that was started for this record still serves; True where nothing was."""
    for prefix in (_DAEMON, _BASE):
        if prefix + "pid" in server:
            ref = procs.ProcessRef.from_strings(
                {key: server.get(prefix + key, "") for key in ("pid", "start", "boot")}
            )
            if ref is None or not ref.alive():
                return False
    return _MOUNT not in server or qemu_storage.is_mounted(
        Path(server[_MOUNT]), int(server[f"{_DAEMON}pid"])
    )


def _close(run_dir: Path) -> None:
    qemu_storage.stop(run_dir / _PID_FILE)
    qemu_storage.remove_file(run_dir / _FILE)
    end_source(run_dir)
    for name in (command.OVERLAY_SOCKET, _MONITOR, _LOG):
        (run_dir / name).unlink(missing_ok=True)


@contextmanager
def _closed_on_error(request: ExportRequest) -> Iterator[None]:
    try:
        yield
    except BaseException:
        close(request.run_dir, {})
        raise


def _base_node(request: ExportRequest) -> tuple[Node, Mapping[str, str]]:
    """QEMU's name for the source, and the record of what was started for it."""
    if isinstance(request.source, HomeSource):
        return _home_node(request, request.source), {}
    if isinstance(request.source, RawSource):
        _check_raw(request, request.source)
        return qemu_storage.raw_node(request.source.path), {}
    served = _serve_source(request)
    return qemu_storage.nbd_node(served.path), served.record


def monitor(run_dir: Path) -> Path:
    """The QMP socket of the daemon behind a writable view."""
    return run_dir / _MONITOR


def settled(server: Mapping[str, str]) -> dict[str, str]:
    """The record without what served the source."""
    return {key: value for key, value in server.items() if not key.startswith(_BASE)}


def end_source(run_dir: Path) -> None:
    """End what serves the source, and leave the daemon. Idempotent."""
    for ref in procs.find_running("nbdkit", str(run_dir / command.BASE_PID_FILE)):
        ref.end(_GRACE_S)
    qemu_nbd.stop(run_dir / command.BACKEND_SOCKET, run_dir / command.BACKEND_PID_FILE)
    for name in (command.BACKEND_LOG, command.BASE_SOCKET, command.BASE_PID_FILE, _BASE_LOG,
                 command.SOURCE):  # fmt: skip
        (run_dir / name).unlink(missing_ok=True)


def _top_node(request: ExportRequest, base: Node) -> Node:
    if request.overlay is None:
        return base
    _check_overlay(request, request.overlay)
    return qemu_storage.overlay_node(request.overlay.path, request.overlay.limit_bytes, base)


def _serve_source(request: ExportRequest) -> Backing:
    """The source alone, read-only, on a socket."""
    folder, source = request.run_dir, request.source
    if isinstance(source, Qcow2Source):
        path = folder / command.BACKEND_SOCKET
        ref = qemu_nbd.start(
            source,
            socket_path=path,
            pid_file=folder / command.BACKEND_PID_FILE,
            log_path=folder / command.BACKEND_LOG,
        )
        nbdkit.check_size(handshake.ask(str(path), timeout_s=_ANSWER_S).size_bytes, request)
        return Backing(path=path, record=_record(_BASE, ref))
    if isinstance(source, RawSource):
        _check_raw(request, source)
    path = folder / command.BASE_SOCKET
    place = nbdkit.Place(
        address=str(path), pid_file=folder / command.BASE_PID_FILE, log=folder / _BASE_LOG
    )
    built = command.build_base(run.require_program("nbdkit", "nbdkit"), request)
    return Backing(
        path=path, record=_record(_BASE, nbdkit.start(built, place, request, writable=False))
    )


def _home_node(request: ExportRequest, source: HomeSource) -> Node:
    """A place that is gone or too short now is refused: a new one would be all zeros."""
    if "://" in source.place:
        return qemu_storage.home_node(source.place, source.size_bytes)
    have = _size_of(Path(source.place))
    if have < source.size_bytes:
        raise IntegrityError(
            f"view {request.name} has {source.size_bytes} bytes, {source.place} only {have}",
            code="size-mismatch",
            hint="it was changed behind our back",
        )
    return qemu_storage.home_node(source.place, source.size_bytes)


def _check_raw(request: ExportRequest, source: RawSource) -> None:
    """An origin that is missing or of another size is refused: a base that is too short would be
    read as zeros behind its end."""
    nbdkit.check_size(_size_of(source.path), request)


def _size_of(path: Path) -> int:
    """Bytes of a file or block device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            return device_size(fd) if stat.S_ISBLK(status.st_mode) else status.st_size
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", code="source-missing") from None
    except OSError as error:
        raise UnavailableError(
            f"cannot open {path}: {error.strerror}", code="source-unreadable"
        ) from error


def _check_overlay(request: ExportRequest, overlay: Overlay) -> None:
    """Never the bare origin in its place."""
    if not overlay.path.is_file():
        raise NotFoundError(
            f"the overlay {overlay.path} is gone, and with it what was written to the view",
            code="overlay-missing",
            hint=f"put it back, or give the view up: offload unmount {request.name}",
        )


def _files(request: ExportRequest) -> dict[str, Path]:
    found = {"pid_file": request.run_dir / _PID_FILE, "log_path": request.run_dir / _LOG}
    return {**found, "monitor": request.run_dir / _MONITOR} if request.writable else found


def _record(prefix: str, ref: procs.ProcessRef) -> dict[str, str]:
    return {prefix + key: value for key, value in ref.to_strings().items()}
