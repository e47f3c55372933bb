"""A small synchronous client of the QEMU guest agent's protocol.

https://www.qemu.org/docs/master/interop/qemu-ga-ref.html: JSON objects, a line each, over the
socket of a virtio-serial port. A port serves one client at a time, and keeps what an earlier one
has left: requests that are answered late, answers that nobody read. So each session, and each
command after one that was not answered, begins with `guest-sync-delimited`.

What comes is a guest's word: it is bounded in size and time, and parsed strictly. Standard library
only: the guardian, which must start in milliseconds, uses it too.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import socket as sockets
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload.errors import UnavailableError

_LINE_MAX = 4 << 20  # an agent with hundreds of file systems says some 100 KiB
_SHOWN_MAX = 400  # characters of a guest's words in a message of ours
_PIECE = 64 << 10  # bytes a guest-file-read
_DELIMITER = b"\xff"  # in no JSON text: before a sync's answer, and what resets the agent's parser
_ACCEPTED, _WAITING = "03", "02"  # /proc/net/unix: SS_CONNECTED, SS_CONNECTING (linux/net.h)


class AgentError(UnavailableError):
    """The agent refused a command; `kind` is its error class, `description` its words."""

    code = "agent-refused"

    def __init__(self, socket: Path, command: str, kind: str, description: str) -> None:
        super().__init__(f"the guest agent at {socket} refused {command}: {description}")
        self.kind = kind
        self.description = description


class AgentGoneError(UnavailableError):
    """No QEMU listens on the socket (any more)."""

    code = "agent-gone"


class AgentBusyError(UnavailableError):
    """Another client holds the socket."""

    code = "agent-busy"


class AgentSilentError(UnavailableError):
    """No answer in time: no agent runs in the guest, or it hangs, or a hook does."""

    code = "agent-silent"


class AgentProtocolError(UnavailableError):
    """What answers is no guest agent, or says what none would."""

    code = "agent-protocol"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A mounted file system of a guest. `device`: the kernel's name of what it lies on."""

    device: str
    mount: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSystem:
    """A guest's operating system. `id` as in os-release(5); Windows is `mswindows`."""

    id: str
    name: str


class GuestAgent:
    """One session. `timeout_s` bounds the connection and each answer, where a call names none.

    Raises AgentGoneError where nobody listens, AgentBusyError where another client holds the
    socket, AgentSilentError where no answer comes in time, AgentError where a command is refused,
    AgentProtocolError where an answer makes no sense.
    """

    def __init__(self, socket: Path, timeout_s: float = 5.0) -> None:
        self.socket = socket
        self.timeout_s = timeout_s
        self._pending = b""
        self._stale = True  # something may have been asked that has not been answered
        self._served = False
        self._wire = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        try:
            self._wire.settimeout(timeout_s)
            self._connect()
            self.call("guest-ping")
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        try:
            self._wire.connect(str(self.socket))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise AgentGoneError(
                f"no QEMU listens on {self.socket}",
                hint="is the VM running, and is this the socket of its guest agent's port?",
            ) from error
        except (TimeoutError, BlockingIOError) as error:  # EAGAIN: the backlog is full
            raise self._silent("the connection") from error
        except OSError as error:
            raise UnavailableError(
                f"cannot connect to the guest agent at {self.socket}: {error.strerror}",
                code="agent-unavailable",
            ) from error

    # -- commands ------------------------------------------------------------------------------

    def version(self) -> str:
        """Of the agent."""
        return self._text("guest-info", self.call("guest-info"), "version")

    def commands(self) -> frozenset[str]:
        """What the agent does, without what its administrator has blocked."""
        said = self._fields("guest-info", self.call("guest-info"))
        entries = self._list("guest-info", said.get("supported_commands"))
        fields = [self._fields("guest-info", entry) for entry in entries]
        return frozenset(str(entry.get("name")) for entry in fields if entry.get("enabled") is True)

    def frozen(self, timeout_s: float | None = None) -> bool:
        """Whether the agent says that it holds a freeze: it does not look."""
        said = self.call("guest-fsfreeze-status", timeout_s=timeout_s)
        if said not in ("frozen", "thawed"):
            raise self._nonsense("guest-fsfreeze-status")
        return bool(said == "frozen")

    def freeze(self, mounts: Sequence[str], timeout_s: float) -> int:
        """Freeze these mount points, or without any all that can be; how many file systems were.

        AgentSilentError: they may be frozen, or may be later.
        """
        if mounts:
            arguments = {"mountpoints": list(mounts)}
            said = self.call("guest-fsfreeze-freeze-list", arguments, timeout_s=timeout_s)
        else:
            said = self.call("guest-fsfreeze-freeze", timeout_s=timeout_s)
        return self._number("guest-fsfreeze-freeze", said)

    def thaw(self, timeout_s: float) -> int:
        """Thaw all that is frozen, whoever froze it; how many file systems really were."""
        said = self.call("guest-fsfreeze-thaw", timeout_s=timeout_s)
        return self._number("guest-fsfreeze-thaw", said)

    def file_systems(self) -> tuple[FileSystem, ...]:
        """Those that are mounted from a device."""
        command = "guest-get-fsinfo"
        found = []
        for entry in self._list(command, self.call(command)):
            device = self._text(command, entry, "name")
            mount = self._text(command, entry, "mountpoint")
            kind = self._text(command, entry, "type")
            found.append(FileSystem(device=device, mount=mount, kind=kind))
        return tuple(found)

    def system(self) -> GuestSystem:
        """What the guest runs; empty fields where it does not say."""
        command = "guest-get-osinfo"
        said = self._fields(command, self.call(command))
        name = said.get("pretty-name") or said.get("name") or ""
        return GuestSystem(id=shown(str(said.get("id", ""))), name=shown(str(name)))

    def host_name(self) -> str:
        """The guest's own name."""
        command = "guest-get-host-name"
        return self._text(command, self.call(command), "host-name")

    def interfaces(self) -> Any:
        """The guest's network cards and addresses, as it says them: unchecked."""
        return self.call("guest-network-get-interfaces")

    def read_file(self, path: str, max_bytes: int) -> bytes:
        """The beginning of a file of the guest, at most `max_bytes` of it.

        While anything is frozen the agent refuses this.
        """
        command = "guest-file-read"
        handle = self.call("guest-file-open", {"path": path, "mode": "r"})
        content = b""
        try:
            while len(content) < max_bytes:
                size = min(_PIECE, max_bytes - len(content))
                said = self._fields(command, self.call(command, {"handle": handle, "count": size}))
                content += self._decoded(command, said)
                if said.get("eof") is True or said.get("count") == 0:
                    break
        finally:
            self.call("guest-file-close", {"handle": handle})
        return content[:max_bytes]

    def _decoded(self, command: str, said: dict[str, Any]) -> bytes:
        try:
            return base64.b64decode(self._text(command, said, "buf-b64", short=False))
        except binascii.Error as error:
            raise self._nonsense(command) from error

    # -- the wire --------------------------------------------------------------------------------

    def call(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """Run a command and return its result.

        After one that was not answered, this one is sent behind it at once, and answered when the
        agent has done both.
        """
        until = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        sync = secrets.randbelow(1 << 31) if self._stale else None
        order = b"" if sync is None else _DELIMITER + _line("guest-sync-delimited", {"id": sync})
        self._send(order + _line(command, arguments), command, until)
        self._stale = True
        if sync is not None:
            self._skip_to(sync, command, until)
        answer = self._receive(command, until)
        self._stale = False
        self._served = True
        if "error" in answer:
            refusal = self._fields(command, answer["error"])
            said = shown(str(refusal.get("desc", "")))
            raise AgentError(self.socket, command, str(refusal.get("class", "")), said)
        if "return" not in answer:
            raise self._nonsense(command)
        return answer["return"]

    def _skip_to(self, sync: int, command: str, until: float) -> None:
        """Everything before the answer to our sync is somebody else's."""
        while True:
            while _DELIMITER not in self._pending:
                self._pending = b""
                self._read(command, until)
            self._pending = self._pending.partition(_DELIMITER)[2]
            line = self._take_line(command, until)
            if _DELIMITER in line:  # of a client that went in the middle of an answer
                self._pending = line[line.index(_DELIMITER) :] + b"\n" + self._pending
            elif _parsed(line) == {"return": sync}:
                return

    def _send(self, data: bytes, command: str, until: float) -> None:
        try:
            self._wire.settimeout(max(0.001, until - time.monotonic()))
            self._wire.sendall(data)
        except TimeoutError as error:
            raise self._silent(command) from error
        except OSError as error:
            raise self._lost(error) from error

    def _receive(self, command: str, until: float) -> dict[str, Any]:
        answer = _parsed(self._take_line(command, until))
        if not isinstance(answer, dict):
            raise self._nonsense(command)
        return answer

    def _take_line(self, command: str, until: float) -> bytes:
        while b"\n" not in self._pending:
            if len(self._pending) > _LINE_MAX:
                raise self._nonsense(command)
            self._read(command, until)
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _read(self, command: str, until: float) -> None:
        patience = until - time.monotonic()
        if patience <= 0:
            raise self._silent(command)
        self._wire.settimeout(patience)
        try:
            more = self._wire.recv(1 << 16)
        except TimeoutError as error:
            raise self._silent(command) from error
        except OSError as error:
            raise self._lost(error) from error
        if not more:
            raise self._lost(None)
        self._pending += more

    def peer_pid(self) -> int:
        """The process that listens on the socket: QEMU."""
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

    # -- what went wrong -------------------------------------------------------------------------

    def _silent(self, command: str) -> UnavailableError:
        """Who is to blame: /proc/net/unix shows which connections QEMU has accepted."""
        states = _connections(self.socket)
        if not self._served and _WAITING in states and _ACCEPTED in states:
            return AgentBusyError(
                f"another client holds the guest agent's socket {self.socket}",
                hint="a port serves one client at a time: end the other, or give the VM's agent "
                'through libvirt (freeze.kind = "libvirt")',
            )
        if not self._served and _WAITING in states:
            return AgentSilentError(f"the QEMU of {self.socket} does not answer: it hangs")
        return AgentSilentError(
            f"the guest agent at {self.socket} did not answer {command} in time",
            hint="does qemu-ga run in the guest, and do its freeze hooks end?",
        )

    def _lost(self, error: OSError | None) -> AgentGoneError:
        why = error.strerror if error is not None else "QEMU hung up"
        return AgentGoneError(f"lost the guest agent at {self.socket}: {why}")

    def _nonsense(self, command: str) -> AgentProtocolError:
        return AgentProtocolError(
            f"what answers {command} at {self.socket} is no guest agent",
            hint="is this the socket of the port org.qemu.guest_agent.0?",
        )

    # -- answers, strictly -----------------------------------------------------------------------

    def _fields(self, command: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._nonsense(command)
        return value

    def _list(self, command: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self._nonsense(command)
        return value

    def _number(self, command: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._nonsense(command)
        return value

    def _text(self, command: str, value: Any, field: str, *, short: bool = True) -> str:
        text = self._fields(command, value).get(field)
        if not isinstance(text, str):
            raise self._nonsense(command)
        return shown(text) if short else text


def shown(text: str) -> str:
    """A guest's words as they may go to a terminal: one line, no control characters, bounded."""
    line = " ".join(text[: 2 * _SHOWN_MAX].split())
    return "".join(c if c.isprintable() else "?" for c in line)[:_SHOWN_MAX]


def _line(command: str, arguments: dict[str, Any] | None) -> bytes:
    message: dict[str, Any] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _connections(socket: Path) -> list[str]:
    """The states of all connections to a socket, as in /proc/net/unix; empty if that is not
    ours to see (another network namespace)."""
    try:
        rows = Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]
    except OSError:
        return []
    # Num RefCount Protocol Flags Type St Inode Path
    fields = [row.split(maxsplit=7) for row in rows]
    listening = "00010000"  # __SO_ACCEPTCON
    return [f[5] for f in fields if len(f) == 8 and f[7] == str(socket) and f[3] != listening]
