"""A small synchronous client of QEMU's machine protocol (QMP).

QEMU serves one client at a time on a monitor socket; the next waits in the backlog without a
greeting. So connections are short: open, speak, close. Standard library only: the guardian, which
must start in milliseconds, uses it too.
"""

from __future__ import annotations

import json
import socket as sockets
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload.errors import UnavailableError

_LINE_MAX = 64 << 20  # no answer is nearly so long; what is longer is no QMP


class QmpError(UnavailableError):
    """QEMU refused a command; `kind` is its error class, `description` its words."""

    code = "qmp-refused"

    def __init__(self, socket: Path, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU at {socket} refused {command}: {description}")
        self.kind = kind
        self.description = description


class QmpGoneError(UnavailableError):
    """No QEMU listens on the socket (any more)."""

    code = "qmp-gone"


class QmpBusyError(UnavailableError):
    """QEMU did not answer in time; perhaps another client holds its monitor."""

    code = "qmp-timeout"


class Qmp:
    """One session. `timeout_s` bounds the greeting and each answer.

    Raises QmpGoneError where nobody listens, QmpBusyError where no answer comes in time, QmpError
    where a command is refused. Events that arrive in between are kept in `events`.
    """

    def __init__(
        self, socket: Path, timeout_s: float = 5.0, *, wire: sockets.socket | None = None
    ) -> None:
        """Connect to `socket`, or speak over `wire`, already connected (it is closed with this)."""
        self.socket = socket
        self.timeout_s = timeout_s
        self.events: list[dict[str, Any]] = []
        self._pending = b""
        self._count = 0
        self._wire = wire or sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        try:
            self._wire.settimeout(timeout_s)
            if wire is None:
                self._connect()
            greeting = self._receive(time.monotonic() + timeout_s)
            version = greeting["QMP"]["version"]["qemu"]
            self.version = (int(version["major"]), int(version["minor"]))
            self.execute("qmp_capabilities")
        except (KeyError, TypeError) as error:
            self.close()
            raise UnavailableError(f"{socket} is no QMP socket", code="qmp-protocol") from error
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        try:
            self._wire.connect(str(self.socket))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise QmpGoneError(
                f"no QEMU listens on {self.socket}",
                hint="is the VM running, and is this its QMP socket?",
            ) from error
        except TimeoutError as error:
            raise self._late() from error
        except OSError as error:
            raise UnavailableError(
                f"cannot connect to QMP at {self.socket}: {error.strerror}", code="qmp-unavailable"
            ) from error

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
    ) -> Any:
        """Run a command and return its result. `fds` go with it (for `getfd` and `add-fd`)."""
        self._count += 1
        message: dict[str, Any] = {"execute": command, "id": self._count}
        if arguments:
            message["arguments"] = arguments
        try:
            self._wire.settimeout(self.timeout_s)
            line = json.dumps(message).encode() + b"\n"
            sent = sockets.send_fds(self._wire, [line], list(fds)) if fds else 0
            self._wire.sendall(line[sent:])
        except OSError as error:
            raise self._lost(error) from error
        until = time.monotonic() + self.timeout_s
        while True:
            answer = self._receive(until)
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id") == self._count:
                break
        if "error" in answer:
            refusal = answer["error"]
            raise QmpError(self.socket, command, refusal["class"], refusal["desc"])
        return answer.get("return")

    def wait_event(self, name: str, timeout_s: float) -> dict[str, Any] | None:
        """The next (or a kept) event of this name, removed from `events`; None if none came."""
        until = time.monotonic() + timeout_s
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(index)
            try:
                message = self._receive(until)
            except QmpBusyError:
                return None
            if "event" in message:
                self.events.append(message)

    def peer_pid(self) -> int:
        """The process that listens on the socket."""
        size = struct.calcsize("3i")  # struct ucred, linux/socket.h: pid, uid, gid
        raw = self._wire.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, size)
        pid: int = struct.unpack("3i", raw)[0]
        return pid

    def close(self) -> None:
        """End the session. Idempotent."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\n" not in self._pending:
            patience = until - time.monotonic()
            if patience <= 0:
                raise self._late()
            self._wire.settimeout(patience)
            try:
                more = self._wire.recv(1 << 16)
            except TimeoutError as error:
                raise self._late() from error
            except OSError as error:
                raise self._lost(error) from error
            if not more or len(self._pending) > _LINE_MAX:
                raise self._lost(None)
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise UnavailableError(
                f"{self.socket} is no QMP socket", code="qmp-protocol"
            ) from error
        if not isinstance(message, dict):
            raise UnavailableError(f"{self.socket} is no QMP socket", code="qmp-protocol")
        return message

    def _late(self) -> QmpBusyError:
        return QmpBusyError(
            f"QEMU at {self.socket} did not answer within {self.timeout_s:g} s",
            hint="a QMP socket serves one client at a time: give this project one of its own",
        )

    def _lost(self, error: OSError | None) -> QmpGoneError:
        why = error.strerror if error is not None else "it hung up"
        return QmpGoneError(f"lost QEMU at {self.socket}: {why}")


def write_counts(qmp: Qmp) -> dict[str, int]:
    """How many bytes the guest has written (or discarded) on each of its disks, by device."""
    counts = {}
    for entry in qmp.execute("query-blockstats"):
        stats = entry["stats"]
        name = entry.get("qdev") or entry.get("device") or entry.get("node-name", "")
        counts[name] = int(stats["wr_bytes"]) + int(stats.get("unmap_bytes", 0))
    return counts
