"""`offload` without the start of a Python for each command: a process that has loaded it all, and
forks.

Each command is a process of its own, as if the console script had been started: its own
environment, streams and end; it may be killed, and nothing of it stays in the next one. What it
does not show is what loading takes, and a module that is missing.

The warm process gets a datagram for each command, `{"argv": …, "env": …}` as JSON with four
descriptors: stdout, stderr, a socket for the answers and a folder. Answers are the pid, then the
status.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import pkgutil
import select
import signal
import socket as sockets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import offload.cli
import offload.engine
import offload.format
import offload.services
from offload import run
from offload.cli.main import main

_REQUEST_BYTES = 1 << 16
_PACKAGES = (offload.cli, offload.engine, offload.format, offload.services)
# what commands load on their way
_MORE = (
    "alembic.command", "alembic.runtime.environment", "argon2.low_level", "blake3", "boto3",
    "cryptography.hazmat.primitives.ciphers.aead", "cryptography.x509", "nbd", "numpy",
    "offload.images.backup", "offload.images.file", "offload.images.nbd", "offload.quiescers.local",
    "offload.snapshots.reflink", "offload.stores.disk", "offload.stores.s3", "rich.console",
    "rich.progress", "rich.table", "sqlalchemy.dialects.sqlite.pysqlite", "targets.nbd",
    "tomllib", "zstandard",
)  # fmt: skip


class WarmCli:
    """The warm process, from the first command on. It ends with this object's process, or by
    `close`. Commands of several threads run side by side."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._orders: sockets.socket | None = None

    def run(
        self, words: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 120
    ) -> run.Completed:
        """Run `offload` with these words, as `run.run` does with `check=False`."""
        began = time.monotonic()
        answers, theirs = sockets.socketpair()
        readers, writers = zip(os.pipe(), os.pipe(), strict=True)
        said: list[bytes] = [b"", b""]
        order = {"argv": ["offload", *words], "env": run.child_env(env)}
        with answers:
            try:
                data = json.dumps(order).encode()
                sockets.send_fds(self._started(), [data], [*writers, theirs.fileno()])
            finally:
                theirs.close()
                for fd in writers:
                    os.close(fd)
            listeners = [
                threading.Thread(target=_read_all, args=(fd, said, place), daemon=True)
                for place, fd in enumerate(readers)
            ]
            for thread in listeners:
                thread.start()
            status = _await(answers, began + timeout_s)
        for thread in listeners:
            thread.join(max(0.0, began + timeout_s - time.monotonic()))
        if status is None or any(thread.is_alive() for thread in listeners):
            raise run.ProgramError(order["argv"], None, time.monotonic() - began, "")
        return run.Completed(
            argv=tuple(order["argv"]),
            status=status,
            seconds=time.monotonic() - began,
            stdout=said[0].decode("utf-8", "replace"),
            stderr=said[1].decode("utf-8", "replace"),
        )
