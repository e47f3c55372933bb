"""qemu-storage-daemon: QEMU's block layer as an NBD socket or as a file of the FUSE kind.

Options are JSON, so that a comma in a path is no option. The daemon locks an overlay as every QEMU
does: it has one daemon at a time (BusyError `overlay-in-use`). What it lies upon is shared with
writers, as far as locks go: origins are snapshots, and where one is the volume itself (provider
`device`), a view must not keep its VM from starting. So no lock need be gone round.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from offload import mountinfo, procs, qemu_nbd, run
from offload.errors import (
    BusyError,
    CleanupError,
    NotFoundError,
    OffloadError,
    UnavailableError,
    UsageError,
)

Node = Mapping[str, object]  # of QEMU's block graph, as `blockdev-add` takes it

_NODE = "view"
_CLUSTER_BYTES = 64 << 10  # of overlays: a window ends with a whole one
_FUSE = Path("/dev/fuse")
_READY_S = 30.0  # an overlay of many gigabytes has tables to read
_GRACE_S = 10.0  # what it holds in memory is written when it ends
_NBD_PORT = 10809  # NBD's own, of IANA
_LOCK_SIGN = "Failed to get"  # … "write" lock, shared "write" lock: QEMU block/file-posix.c


def raw_node(path: Path) -> Node:
    """A raw file or block device, read-only."""
    device = stat.S_ISBLK(path.stat().st_mode)
    return {
        "driver": "host_device" if device else "file",
        "filename": str(path),
        "read-only": True,
    }


def nbd_node(socket_path: Path) -> Node:
    """The default export of an NBD server on a unix socket, read-only."""
    server = {"type": "unix", "path": str(socket_path)}
    return {"driver": "nbd", "server": server, "read-only": True}


def overlay_node(path: Path, limit_bytes: int, base: Node) -> Node:
    """A qcow2 file on `base`. What its header says of a backing file does not count.

    A write that would make it larger than `limit_bytes` fails with ENOSPC; the file has to be that
    long already (sparse), because the daemon's `raw` driver refuses a window past the end.
    What clients discard is given back to the file system, and reads as zeros.
    """
    discard = {"discard": "unmap"}  # QEMU's default ignores it
    file = {"driver": "file", "filename": str(path), **discard}
    size = limit_bytes // _CLUSTER_BYTES * _CLUSTER_BYTES
    window = {"driver": "raw", "size": size, "file": file, **discard}
    return {"driver": "qcow2", "file": window, "backing": base, **discard}


def home_node(place: str, size_bytes: int) -> Node:
    """A raw file, a block device or an NBD export to write to, from its start.

    Raises UsageError (`bad-target`) for a URI that QEMU has no words for.
    """
    discard = {"discard": "unmap"}
    if "://" in place:
        file: Node = {"driver": "nbd", **_nbd_place(place), **discard}
    else:
        device = stat.S_ISBLK(Path(place).stat().st_mode)
        kind = "host_device" if device else "file"
        file = {"driver": kind, "filename": place, **discard}
    return {"driver": "raw", "size": size_bytes, "file": file, **discard}


def _nbd_place(uri: str) -> Node:
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    query = parse_qs(parts.query)
    if parts.scheme == "nbd+unix" and query.get("socket"):
        return {"server": {"type": "unix", "path": query["socket"][0]}, "export": export}
    if parts.scheme == "nbd" and parts.hostname:
        port = str(parts.port or _NBD_PORT)
        return {"server": {"type": "inet", "host": parts.hostname, "port": port}, "export": export}
    raise UsageError(
        f"cannot write to '{uri}'",
        code="bad-target",
        hint="a path, a device, nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
    )


def serve_nbd(
    node: Node,
    socket_path: Path,
    *,
    writable: bool,
    pid_file: Path,
    log_path: Path,
    monitor: Path | None = None,
) -> procs.ProcessRef:
    """Serve a node to any number of NBD clients; returns when the socket greets. `monitor`: where
    the daemon shall listen for QMP.

    On an error nothing is left. Raises BusyError (`overlay-in-use`), NotFoundError
    (`source-missing`), UnavailableError (`program-missing`, `server-failed`).
    """
    server = {"addr": {"type": "unix", "path": str(socket_path)}}
    export = {"type": "nbd", "name": "", **_common(writable)}
    options = ["--nbd-server", json.dumps(server), "--export", json.dumps(export)]
    options += _monitor(monitor)
    return _start(node, options, pid_file, log_path, lambda: qemu_nbd.greets(socket_path))


def serve_file(
    node: Node,
    path: Path,
    *,
    writable: bool,
    pid_file: Path,
    log_path: Path,
    monitor: Path | None = None,
) -> procs.ProcessRef:
    """Show a node as the file `path` (made for it), to this user alone.

    On an error nothing is left. Raises what `serve_nbd` raises, UnavailableError
    (`fuse-unavailable`).
    """
    if not _FUSE.exists():
        raise UnavailableError(
            f"there is no {_FUSE} on this machine",
            code="fuse-unavailable",
            hint="load the module: modprobe fuse; in a container, pass the device on",
        )
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    export = {"type": "fuse", "mountpoint": str(path), "allow-other": "off", **_common(writable)}
    options = ["--export", json.dumps(export), *_monitor(monitor)]
    try:
        return _start(node, options, pid_file, log_path, lambda: is_mounted(path))
    except BaseException:
        remove_file(path)
        raise


def stop(pid_file: Path) -> None:
    """End the daemon of this pid file, whoever started it. Idempotent."""
    for ref in find(pid_file):
        ref.end(_GRACE_S)
    pid_file.unlink(missing_ok=True)


def find(pid_file: Path) -> list[procs.ProcessRef]:
    """Live daemons that were told to write this pid file, by their command lines."""
    return procs.find_running("qemu-storage-daemon", str(pid_file))


def is_mounted(path: Path, daemon: int | None = None) -> bool:
    """Whether a FUSE file is mounted at `path`, also one whose daemon is gone or hangs: the file
    itself is not asked. With the pid of its daemon: in whatever mount namespace that lives."""
    real = path.parent.resolve() / path.name
    with contextlib.suppress(OSError):
        return any(m.point == real and m.kind == "fuse" for m in mountinfo.mounts(daemon))
    return False


def remove_file(path: Path) -> None:
    """Unmount what `serve_file` made, also while somebody has it open, and remove it. Idempotent.

    After its daemon has ended: the file then answers every request with an error, so that nothing
    waits for it. CleanupError if the kernel refuses.
    """
    if is_mounted(path):
        if os.geteuid() == 0:
            argv = [run.require_program("umount", "mount"), "--lazy", "--no-canonicalize"]
        else:
            argv = [run.require_program("fusermount3", "fuse3"), "-u", "-z"]
        done = run.run([*argv, str(path)], check=False)
        if is_mounted(path):
            raise CleanupError(f"cannot unmount {path}: {done.stderr.strip()}", code="cleanup")
    path.unlink(missing_ok=True)


def _common(writable: bool) -> Node:
    # write-through: see the guarantees in offload/overlay.py
    return {"id": "view", "node-name": _NODE, "writable": writable, "writethrough": writable}


def _monitor(path: Path | None) -> list[str]:
    if path is None:
        return []
    socket = str(path).replace(",", ",,")  # QEMU's option syntax
    chardev = f"socket,id=monitor,path={socket},server=on,wait=off"
    return ["--chardev", chardev, "--monitor", "chardev=monitor"]


def _start(
    node: Node, options: list[str], pid_file: Path, log_path: Path, ready: Callable[[], bool]
) -> procs.ProcessRef:
    program = run.require_program("qemu-storage-daemon", "qemu-system-common")
    blockdev = json.dumps({"node-name": _NODE, **node})
    argv = [program, "--blockdev", blockdev, *options, "--pidfile", str(pid_file)]
    pid_file.unlink(missing_ok=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        pid = run.spawn_detached(argv, output=log)
    finally:
        os.close(log)
    ref = procs.ref_of(pid)
    if ref is None:
        raise _explain(log_path)
    try:
        _wait_ready(ref, pid_file, log_path, ready)
    except BaseException:
        ref.end(_GRACE_S)
        raise
    return ref


def _wait_ready(
    daemon: procs.ProcessRef, pid_file: Path, log_path: Path, ready: Callable[[], bool]
) -> None:
    """Its pid file comes when all that it was told to open and to export is there."""
    until = time.monotonic() + _READY_S
    while time.monotonic() < until:
        if not daemon.alive():
            raise _explain(log_path)
        if pid_file.exists() and ready():
            return
        time.sleep(0.002)
    raise UnavailableError(
        f"qemu-storage-daemon did not answer within {_READY_S:g} s", code="server-failed"
    )


def _explain(log_path: Path) -> OffloadError:
    """What the daemon's words mean: `qemu-storage-daemon: --blockdev {…}: what is wrong`."""
    words = ""
    with contextlib.suppress(OSError):
        words = log_path.read_text(errors="replace").strip()
    first = words.splitlines()[0] if words else "it said nothing"
    said = first.rpartition("}: ")[2]
    if _LOCK_SIGN in words:
        return BusyError(
            f"the overlay is open in another QEMU: {' '.join(words.rpartition('}: ')[2].split())}",
            code="overlay-in-use",
            hint="end what has it open, perhaps a server that was left behind",
        )
    if os.strerror(2) in said:
        return NotFoundError(f"qemu-storage-daemon: {said}", code="source-missing")
    if "--export" in first and "fuse" in said.lower():
        return UnavailableError(
            f"qemu-storage-daemon cannot make a file: {said}", code="fuse-unavailable"
        )
    return UnavailableError(f"qemu-storage-daemon: {said}", code="server-failed")
