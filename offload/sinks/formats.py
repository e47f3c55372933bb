"""A new qcow2, VMDK or VHDX file, written through a private qemu-nbd: no raw copy on the way.

The server ends by itself when its last client has gone, so `kill -9` of this process leaves the
temporary file, closed properly, and nothing else but a socket.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

from offload import qemu_nbd, run
from offload.errors import UnavailableError
from offload.filesystem import fsync_folder
from offload.sink import write_error
from offload.sinks.nbd import NbdSink

# format → the ending of its files. QEMU's defaults otherwise: VMDK monolithicSparse, VHDX dynamic.
FORMATS = {"qcow2": ".qcow2", "vmdk": ".vmdk", "vhdx": ".vhdx"}
_START_S = 30.0
_END_S = 120.0  # for the server's last writes, on a slow disk


class FormatSink(NbdSink):
    """A sparse image under a temporary name, renamed when it is whole.

    `resume`: the temporary file is there and is gone on with. Raises UnavailableError
    (`program-missing`, `program-failed`, `server-failed`, `no-space`, `target-unavailable`).
    """

    def __init__(
        self, form: str, path: Path, temp: Path, size_bytes: int, socket: Path, *, resume: bool
    ) -> None:
        self.path = path
        self.temp = temp
        self._socket = socket
        if not resume:
            _create(form, temp, size_bytes)
        self._server = _serve(form, temp, socket)
        try:
            super().__init__(qemu_nbd.uri(socket), size_bytes, shown=str(path))
        except BaseException:
            run.terminate(self._server)
            self._socket.unlink(missing_ok=True)
            raise
        self.fresh = True

    def finish(self) -> None:
        """Flush, have the server close the file, fsync, rename, fsync the folder."""
        self.sync()
        self._end()
        try:
            fd = os.open(self.temp, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            self.temp.rename(self.path)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise write_error(str(self.path), error) from error

    def _end(self) -> None:
        super().close()
        try:
            status = self._server.wait(timeout=_END_S)
        except subprocess.TimeoutExpired as late:
            raise UnavailableError(
                f"qemu-nbd did not close {self.temp} in time", code="server-failed"
            ) from late
        if status != 0:
            raise UnavailableError(
                f"qemu-nbd closed {self.temp} with status {status}", code="server-failed"
            )

    def close(self) -> None:
        """Disconnect, which ends the server. Idempotent."""
        super().close()
        run.terminate(self._server)
        self._socket.unlink(missing_ok=True)


def end_server(socket: Path) -> None:
    """End a server that was left on this socket, whoever started it. Idempotent."""
    for ref in qemu_nbd.find(socket):
        ref.end()
    socket.unlink(missing_ok=True)


def _create(form: str, temp: Path, size_bytes: int) -> None:
    program = run.require_program("qemu-img", "qemu-utils")
    try:
        os.close(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600))
        run.run([program, "create", "-q", "-f", form, str(temp), str(size_bytes)])
        fsync_folder(temp.parent)
    except OSError as error:
        raise write_error(str(temp), error) from error


def _serve(form: str, temp: Path, socket: Path) -> subprocess.Popen[bytes]:
    """Started, and answering."""
    program = run.require_program("qemu-nbd", "qemu-utils")
    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket.unlink(missing_ok=True)
    argv = [program, f"--format={form}", "--shared=0", f"--socket={socket}", "--discard=unmap"]
    log = socket.with_suffix(".log")
    with log.open("wb") as out:
        process = run.spawn([*argv, str(temp)], stdout=out.fileno(), stderr=out.fileno())
    try:
        _wait(process, socket, log, temp)
    except BaseException:
        run.terminate(process)
        socket.unlink(missing_ok=True)
        raise
    finally:
        with contextlib.suppress(OSError):
            log.unlink()
    return process


def _wait(process: subprocess.Popen[bytes], socket: Path, log: Path, temp: Path) -> None:
    until = time.monotonic() + _START_S
    while not qemu_nbd.greets(socket):
        if process.poll() is not None:
            words = log.read_text(errors="replace").strip().splitlines()
            raise UnavailableError(
                f"qemu-nbd for {temp}: {words[-1] if words else 'it said nothing'}",
                code="server-failed",
            )
        if time.monotonic() > until:
            raise UnavailableError(
                f"qemu-nbd for {temp} did not answer in time", code="server-failed"
            )
        time.sleep(0.005)
