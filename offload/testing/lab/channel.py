"""The host's end of the wire to the guest's agent."""

from __future__ import annotations

import itertools
import json
import socket as sockets
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from offload.errors import UnavailableError
from offload.testing.lab import frames

_SEND_S = 60  # a guest that takes nothing for so long is gone


class GuestError(UnavailableError):
    """The guest, or a command in it, did not do as asked."""

    code = "lab-guest"


class RemoteCommand:
    """A command in the guest. Its streams grow as they come; `status` is None until it has ended.

    A status below 0 is a signal's number, as with subprocess.
    """

    def __init__(self, channel: Channel, number: int, argv: Sequence[str]) -> None:
        self.argv = tuple(argv)
        self._channel = channel
        self._number = number
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.status: int | None = None
        self.failure = ""  # why it did not start, or why nothing more is known of it

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended, or failed, in time."""
        with self._channel.changed:
            return self._channel.changed.wait_for(lambda: self.ended, timeout_s)

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self.status is not None or bool(self.failure)

    def lines(self, until: float, position: int = 0) -> Iterator[str]:
        """Whole lines of its output as they come, to its end or until this monotonic time."""
        while (end := self._next_newline(position, until)) >= 0:
            line = bytes(self.stdout[position:end])
            position = end + 1
            yield line.decode("utf-8", "replace")

    def _next_newline(self, position: int, until: float) -> int:
        """Wait for it; -1 where none came."""
        with self._channel.changed:
            self._channel.changed.wait_for(
                lambda: self.ended or self.stdout.find(b"\n", position) >= 0,
                max(0.0, until - time.monotonic()),
            )
            return self.stdout.find(b"\n", position)

    def feed(self, data: bytes) -> None:
        """More for its standard input, where it was started to be fed: at most a frame."""
        self._channel.send(frames.STDIN, self._number, data)

    def kill(self) -> None:
        """End it and all processes of its session. Idempotent."""
        if not self.ended:
            self._channel.send(frames.KILL, self._number)

    def take(self, kind: bytes, body: bytes) -> None:
        """A frame from the guest; the caller holds the channel's condition."""
        if kind == frames.STDOUT:
            self.stdout += body
        elif kind == frames.STDERR:
            self.stderr += body
        elif kind == frames.EXIT:
            self.status = int(body)
        elif kind == frames.FAILED:
            self.failure = body.decode("utf-8", "replace")


class Channel:
    """Frames to and from one agent. Safe to use from several threads."""

    def __init__(self, wire: sockets.socket) -> None:
        """Take the connected socket; whoever made it closes it."""
        self._wire = wire
        limit = struct.pack("ll", _SEND_S, 0)  # struct timeval
        wire.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDTIMEO, limit)
        self.changed = threading.Condition()
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._commands: dict[int, RemoteCommand] = {}
        self._ready = False
        self.hung_up = False
        threading.Thread(target=self._receive, name="lab channel", daemon=True).start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether the agent has said hello in time."""
        with self.changed:
            self.changed.wait_for(lambda: self._ready or self.hung_up, timeout_s)
            return self._ready and not self.hung_up

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        feed: bool = False,
    ) -> RemoteCommand:
        """Start a command. GuestError where the guest has gone."""
        number = next(self._numbers)
        command = RemoteCommand(self, number, argv)
        with self.changed:
            if self.hung_up:
                raise GuestError("the lab guest has gone")
            self._commands[number] = command
        request = {
            "argv": list(argv),
            "stdin": feed or stdin is not None,
            "env": dict(env or {}),
            "cwd": cwd,
        }
        self.send(frames.START, number, json.dumps(request).encode())
        if stdin is not None:
            for offset in range(0, len(stdin), frames.PIECE):
                self.send(frames.STDIN, number, stdin[offset : offset + frames.PIECE])
            self.send(frames.STDIN, number)
        return command

    def send(self, kind: bytes, number: int, body: bytes = b"") -> None:
        """Send a frame whole. GuestError where the guest does not take it."""
        try:
            with self._sending:
                self._wire.sendall(frames.pack(kind, number, body))
        except OSError as error:
            raise GuestError(f"the lab guest takes no orders any more: {error}") from error

    def _receive(self) -> None:
        pending = bytearray()
        while data := self._more():
            pending += data
            with self.changed:
                for frame in frames.unpack(pending):
                    self._dispatch(frame)
                self.changed.notify_all()
        with self.changed:
            self.hung_up = True
            for command in self._commands.values():
                command.failure = "the lab guest went away"
            self.changed.notify_all()

    def _more(self) -> bytes:
        try:
            return self._wire.recv(1 << 18)
        except OSError:  # reset, or closed under us: the machine has gone
            return b""

    def _dispatch(self, frame: frames.Frame) -> None:
        if frame.kind == frames.HELLO:
            self._ready = True
        elif command := self._commands.get(frame.number):
            command.take(frame.kind, frame.body)
            if command.ended:
                del self._commands[frame.number]
