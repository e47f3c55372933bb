"""qemu-nbd serving a qcow2 image read-only on a unix socket: its start, its end, finding it.

qemu-nbd takes QEMU's own shared lock on the image: a VM that uses the image for writing keeps it
out (BusyError `volume-in-use`), and a VM cannot be started on the image while it is served.
"""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from offload import procs, run
from offload.errors import BusyError, NotFoundError, OffloadError, UnavailableError
from offload.model import Qcow2Source

_GREETING = b"NBDMAGIC"  # NBD protocol: first bytes of every server, then IHAVEOPT and 16 flags
_GREETING_BYTES = 18
# NBD protocol: client flags (fixed newstyle), then NBD_OPT_ABORT without data; a probe that just
# hangs up would leave a complaint in the server's log
_GOODBYE = b"\0\0\0\1IHAVEOPT\0\0\0\2\0\0\0\0"
_LOCK_SIGN = "Failed to get"  # … "write" lock, shared "write" lock: QEMU block/file-posix.c
_SNAPSHOT_SIGN = "Failed to load snapshot"


def start(
    source: Qcow2Source,
    *,
    socket_path: Path,
    pid_file: Path,
    log_path: Path,
    export_name: str = "",
    persistent: bool = True,
    timeout_s: float = 10.0,
) -> procs.ProcessRef:
    """Serve `source` to any number of clients; returns when the socket greets as NBD does.

    The server outlives this process if `persistent`; else it ends with its last client. On an
    error nothing is left. Raises BusyError (`volume-in-use`: a running QEMU holds the image),
    NotFoundError (`volume-missing`, `snapshot-missing`), UnavailableError (`program-missing`,
    `server-failed`).
    """
    program = run.require_program("qemu-nbd", "qemu-utils")
    argv = [
        program,
        "--format=qcow2",
        "--read-only",
        "--shared=0",
        f"--socket={socket_path}",
        f"--pid-file={pid_file}",
        f"--export-name={export_name}",
    ]
    if persistent:
        argv.append("--persistent")
    if source.snapshot is not None:
        argv.append(f"--load-snapshot=snapshot.name={source.snapshot}")
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        process = run.spawn([*argv, str(source.path)], stdout=log, stderr=log, new_session=True)
    finally:
        os.close(log)
    try:
        return _wait_ready(process, source, socket_path, log_path, timeout_s)
    except BaseException:
        run.terminate(process)
        _remove(socket_path, pid_file)
        raise


def stop(socket_path: Path, pid_file: Path) -> None:
    """End the server of this socket, whoever started it, and remove its files. Idempotent."""
    for ref in find(socket_path):
        ref.end()
    _remove(socket_path, pid_file)


def find(socket_path: Path) -> list[procs.ProcessRef]:
    """Live qemu-nbd processes that were told to listen on this socket.

    Looks at command lines, not at the pid file, so that a server whose start was cut off by
    `kill -9` before it wrote one is found too.
    """
    return procs.find_running("qemu-nbd", f"--socket={socket_path}")


def uri(socket_path: Path, export_name: str = "") -> str:
    """The NBD URI of an export on a unix socket."""
    return f"nbd+unix:///{quote(export_name)}?socket={quote(str(socket_path))}"


def greets(socket_path: Path, timeout_s: float = 1.0) -> bool:
    """Whether an NBD server answers on the socket."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(timeout_s)
        try:
            probe.connect(str(socket_path))
            greeting = probe.recv(_GREETING_BYTES, sockets.MSG_WAITALL)
            probe.sendall(_GOODBYE)
            return greeting.startswith(_GREETING)
        except OSError:
            return False


def _wait_ready(
    process: subprocess.Popen[bytes],
    source: Qcow2Source,
    socket_path: Path,
    log_path: Path,
    timeout_s: float,
) -> procs.ProcessRef:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        answers = greets(socket_path)
        ref = procs.ref_of(process.pid)
        if process.poll() is not None or ref is None:
            raise _explain(source, log_path)
        if answers:
            return ref
        time.sleep(0.005)
    raise UnavailableError(
        f"qemu-nbd for {source.path} did not answer within {timeout_s:g} s", code="server-failed"
    )


def _explain(source: Qcow2Source, log_path: Path) -> OffloadError:
    """What the server's last words mean."""
    with contextlib.suppress(OSError):
        words = log_path.read_text(errors="replace").strip()
        last = words.splitlines()[-1] if words else "it said nothing"
        if _LOCK_SIGN in words:
            return BusyError(
                f"{source.path} is held by a running QEMU",
                code="volume-in-use",
                hint="shut the VM down, or set qmp_socket of the volume to its QMP socket",
            )
        if _SNAPSHOT_SIGN in words:
            return NotFoundError(
                f"{source.path} has no internal snapshot {source.snapshot}", code="snapshot-missing"
            )
        if "No such file" in words:
            return NotFoundError(f"there is no file {source.path}", code="volume-missing")
        return UnavailableError(f"qemu-nbd for {source.path}: {last}", code="server-failed")
    return UnavailableError(f"qemu-nbd for {source.path} failed", code="server-failed")


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
