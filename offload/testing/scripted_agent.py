"""A guest agent that answers as it is told, for answers that no agent here gives.

It is no stand-in for a real one, which tests in the lab have: it shows what the client does with
another system's answers, and with nonsense.
"""

from __future__ import annotations

import contextlib
import json
import socket as sockets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Answer = Any  # what goes under `return`; bytes: these, and no more; a function gives one of them

LINUX: Mapping[str, Answer] = {
    "guest-ping": {},
    "guest-info": {
        "version": "7.2.22",
        "supported_commands": [
            {"name": name, "enabled": True, "success-response": True}
            for name in (
                "guest-fsfreeze-status", "guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list",
                "guest-fsfreeze-thaw", "guest-get-fsinfo", "guest-get-osinfo", "guest-file-open",
            )
        ],
    },
    "guest-fsfreeze-status": "thawed",
    "guest-fsfreeze-freeze": 2,
    "guest-fsfreeze-thaw": 2,
    "guest-get-osinfo": {"id": "debian", "pretty-name": "Debian GNU/Linux 12 (bookworm)"},
    "guest-get-host-name": {"host-name": "shop"},
    "guest-network-get-interfaces": [],
    "guest-get-fsinfo": [
        {"name": "vda1", "mountpoint": "/", "type": "ext4", "disk": []},
        {"name": "vdb", "mountpoint": "/srv", "type": "xfs", "disk": []},
        {"name": "vda15", "mountpoint": "/boot/efi", "type": "vfat", "disk": []},
    ],
    "guest-file-open": b'{"error": {"class": "GenericError", "desc": "failed to open file"}}\n',
}  # fmt: skip

# as the agent of virtio-win answers, by its documentation and source (qga/commands-win32.c)
WINDOWS: Mapping[str, Answer] = {
    **LINUX,
    "guest-get-osinfo": {
        "id": "mswindows",
        "name": "Microsoft Windows",
        "pretty-name": "Windows Server 2022 Standard",
        "kernel-release": "20348",
        "variant": "server",
    },
    "guest-get-fsinfo": [
        {
            "name": "\\\\?\\Volume{5f2a0c8e-0000-0000-0000-100000000000}\\",
            "mountpoint": "System Reserved",
            "type": "NTFS",
            "disk": [],
        },
        {
            "name": "\\\\?\\Volume{5f2a0c8e-0000-0000-0000-602200000000}\\",
            "mountpoint": "C:\\",
            "type": "NTFS",
            "disk": [],
        },
    ],
}
VSS_TIMEOUT = (
    b'{"error": {"class": "GenericError", "desc": "couldn\'t hold writes: fsfreeze is limited up '
    b'to 10 seconds: (error: 80042314)"}}\n'
)


class ScriptedAgent:
    """Serves one client at a time, as QEMU does. `asked`: the commands that came."""

    def __init__(self, socket: Path, answers: Mapping[str, Answer]) -> None:
        self.socket = socket
        self.answers = dict(answers)
        self.asked: list[str] = []
        self.greeting = b""  # left for the next client by the one before
        self._listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self._listener.bind(str(socket))
        self._listener.listen(5)
        self._client: sockets.socket | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            try:
                self._client = self._listener.accept()[0]
            except OSError:
                return
            with self._client, contextlib.suppress(OSError):  # a client that has gone
                self._client.sendall(self.greeting)
                self._serve(self._client)

    def _serve(self, client: sockets.socket) -> None:
        pending = b""
        while more := client.recv(1 << 16):
            *lines, pending = (pending + more).split(b"\n")
            for line in lines:
                client.sendall(self._answer(json.loads(line.replace(b"\xff", b""))))

    def _answer(self, order: dict[str, Any]) -> bytes:
        command = order["execute"]
        if command == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": order["arguments"]["id"]}).encode() + b"\n"
        self.asked.append(command)
        answer = self.answers.get(command)
        if callable(answer):
            answer = answer()
        if answer is None:
            said = f"The command {command} has not been found"
            refusal = {"error": {"class": "CommandNotFound", "desc": said}}
            return json.dumps(refusal).encode() + b"\n"
        if isinstance(answer, bytes):
            return answer
        return json.dumps({"return": answer}).encode() + b"\n"

    def hang_up(self) -> None:
        """As a QEMU that ends. Idempotent."""
        self._ended = True
        self.socket.unlink(missing_ok=True)
        for end in (self._listener, self._client):
            if end is not None:
                with contextlib.suppress(OSError):  # not connected any more
                    end.shutdown(sockets.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=60)


@contextmanager
def scripted_agent(socket: Path, answers: Mapping[str, Answer]) -> Iterator[ScriptedAgent]:
    """One that is ended with the block."""
    agent = ScriptedAgent(socket, answers)
    try:
        yield agent
    finally:
        agent.hang_up()
