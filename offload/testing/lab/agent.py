"""The agent in the guest: runs what the host asks for, any number of commands at once.

It is started by `start` with Debian's own Python and loads the standard library only. One thread
reads frames (`frames.py`), one more a command passes its output on.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from offload import run
from offload.errors import OffloadError
from offload.testing.lab import frames


class Port:
    """The guest's end of the wire."""

    def __init__(self) -> None:
        """Open it. FileNotFoundError where QEMU was given no such port."""
        self._fd = os.open(_device(), os.O_RDWR | os.O_CLOEXEC)
        self._lock = threading.Lock()

    def send(self, kind: bytes, number: int, body: bytes = b"") -> None:
        """Send a frame whole, whatever other threads send."""
        data = memoryview(frames.pack(kind, number, body))
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]

    def receive(self) -> bytes:
        """What has come, at least a byte; nothing at all when the host has hung up."""
        return os.read(self._fd, 1 << 16)


def _device() -> Path:
    for entry in Path("/sys/class/virtio-ports").iterdir():
        name = entry / "name"
        if name.exists() and name.read_text().strip() == frames.PORT:
            return Path("/dev", entry.name)
    raise FileNotFoundError(f"there is no virtio-serial port {frames.PORT}")


class Command:
    """One command, from its start to its status; its session is its own."""

    def __init__(self, port: Port, number: int, request: dict[str, Any]) -> None:
        self._port = port
        self._number = number
        self._stdin: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        cwd = request["cwd"] or "/"
        if not Path(cwd).is_dir():
            raise NotADirectoryError(f"{cwd} is no folder in the guest")
        self._process = run.spawn(
            request["argv"],
            stdin=subprocess.PIPE if request["stdin"] else None,
            env=request["env"],
            cwd=Path(cwd),
            new_session=True,
        )

    def start(self) -> None:
        """Pass its streams on, in threads of their own."""
        threading.Thread(target=self._serve, daemon=True).start()
        if self._process.stdin is not None:
            threading.Thread(target=self._feed, daemon=True).start()

    def feed(self, piece: bytes) -> None:
        """More for its standard input; an empty piece ends it."""
        self._stdin.put(piece)

    def kill(self) -> None:
        """End every process of its session; what made a session of its own (a daemon) stays.

        Looks again as long as it finds new ones. One that hangs in the kernel may stay: nobody
        else is to wait for that.
        """
        told: set[int] = set()
        while members := _session(self._process.pid) - told:
            told |= members
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _feed(self) -> None:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        with contextlib.suppress(BrokenPipeError), self._process.stdin as out:
            while piece := self._stdin.get():
                out.write(piece)
                out.flush()

    def _serve(self) -> None:
        """Output as it comes, all of it before the status.

        A daemon that the command leaves behind may hold its streams: what that says later is read,
        so that it does not block, and dropped.
        """
        streams = {
            stream.fileno(): kind
            for stream, kind in (
                (self._process.stdout, frames.STDOUT),
                (self._process.stderr, frames.STDERR),
            )
            if stream is not None
        }
        ended = os.pidfd_open(self._process.pid)
        poll = select.poll()
        for fd in (ended, *streams):
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        running = True
        while running:
            ready = [fd for fd, _ in poll.poll()]
            running = ended not in ready
            for fd in list(streams) if not running else [fd for fd in ready if fd in streams]:
                self._pass_on(fd, streams, poll)
        os.close(ended)
        poll.unregister(ended)
        self._port.send(frames.EXIT, self._number, str(self._process.wait()).encode())
        while streams:
            for fd, _ in poll.poll():
                self._pass_on(fd, streams, poll, drop=True)

    def _pass_on(
        self, fd: int, streams: dict[int, bytes], poll: select.poll, *, drop: bool = False
    ) -> None:
        """All that a stream holds now; it leaves `streams` at its end."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(fd, frames.PIECE):
                if not drop:
                    self._port.send(streams[fd], self._number, piece)
            poll.unregister(fd)
            del streams[fd]


def _session(leader: int) -> set[int]:
    """Live processes of a session. proc(5): the session is field 6 of stat."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found.add(int(entry.name))
    return found


def serve(port: Port) -> None:
    """Do as the host says until it hangs up."""
    commands: dict[int, Command] = {}
    pending = bytearray()
    port.send(frames.HELLO, 0)
    while data := port.receive():
        pending += data
        for kind, number, body in frames.unpack(pending):
            if kind == frames.START:
                try:
                    commands[number] = Command(port, number, json.loads(body))
                except (OffloadError, OSError) as error:
                    port.send(frames.FAILED, number, str(error).encode())
                else:
                    commands[number].start()
            elif number in commands:
                if kind == frames.KILL:
                    commands[number].kill()
                else:
                    commands[number].feed(body)


if __name__ == "__main__":
    serve(Port())
