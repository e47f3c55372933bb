"""The Image of a qcow2 file, or of an internal snapshot in it, read through a private qemu-nbd."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from offload import qemu_nbd
from offload.images.nbd import NbdImage
from offload.model import Qcow2Source


class Qcow2Image(NbdImage):
    """Owns its server: `close` ends both.

    The server ends by itself when its last client has gone, so `kill -9` of this process leaves
    only a small folder among the temporary files (and, in the few milliseconds between the start
    and our first connection, a server that waits for a client).
    """

    def __init__(self, source: Qcow2Source) -> None:
        with contextlib.ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="offload-qcow2-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            socket = folder / "nbd.sock"
            server = qemu_nbd.start(
                source,
                socket_path=socket,
                pid_file=folder / "pid",
                log_path=folder / "log",
                persistent=False,
            )
            stack.callback(server.end)
            self._release = stack
            super().__init__(
                qemu_nbd.uri(socket), size_bytes=source.size_bytes, block_size=source.sector_size
            )
            stack.callback(super().close)
            self._release = stack.pop_all()

    def close(self) -> None:
        """End the connections and the server, remove its folder. Idempotent."""
        self._release.close()
