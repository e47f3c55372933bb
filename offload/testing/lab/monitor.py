"""QEMU's monitor of a lab guest, for several threads."""

from __future__ import annotations

import socket as sockets
import threading
import time
from pathlib import Path
from typing import Any

from offload.qmp import Qmp
from offload.testing.lab.channel import GuestError

_ANSWER_S = 60.0  # emulation on a busy machine


class Monitor:
    """One session for the machine's whole life. Raises what `Qmp` raises."""

    def __init__(self, wire: sockets.socket) -> None:
        """Speak over a connected socket."""
        self._qmp = Qmp(Path("the lab guest's monitor"), _ANSWER_S, wire=wire)
        self._lock = threading.Lock()

    def ask(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command; its result."""
        with self._lock:
            return self._qmp.execute(command, arguments)

    def human(self, line: str) -> str:
        """Run a command of the human monitor; what it says, which for most is nothing."""
        return str(self.ask("human-monitor-command", {"command-line": line})).strip()

    def delete_device(self, name: str, timeout_s: float) -> None:
        """Pull a device out. GuestError where the guest does not let go of it in time."""
        with self._lock:
            self._qmp.execute("device_del", {"id": name})
            until = time.monotonic() + timeout_s
            while event := self._qmp.wait_event("DEVICE_DELETED", until - time.monotonic()):
                if event["data"].get("device") == name:
                    return
        raise GuestError(f"the guest did not let go of the device {name}")
