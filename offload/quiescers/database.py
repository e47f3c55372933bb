"""What parts of databases share: where a server is, and waiting no longer than is allowed."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.errors import UnavailableError

AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")  # those of this machine (Debian)


def on_this_machine(host: str) -> bool:
    """Whether `host` is a unix socket, or loopback: nobody listens in between."""
    if host.startswith(("/", "@")) or host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


@contextmanager
def cut_off(fd: int, until: float) -> Iterator[None]:
    """For the block, the connection `fd` lasts until `until` (of `time.monotonic`) at most.

    A server may hang with its connection alive; whoever waits for its answer then sees the
    connection end.
    """
    connection = socket.socket(fileno=os.dup(fd))
    timer = threading.Timer(max(0.0, until - time.monotonic()), _shut, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        connection.close()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


def hung_up(fd: int) -> bool:
    """Whether the other end of an idle connection has gone. Sends nothing: while its file systems
    are frozen a server may be unable to answer, if it writes a log."""
    watch = select.poll()
    watch.register(fd, select.POLLRDHUP)
    return bool(watch.poll(0))  # POLLHUP and POLLERR are always watched


def failed(name: str, what: str, error: Exception, until: float) -> UnavailableError:
    """What went wrong with `name`, which had until `until`."""
    if time.monotonic() >= until:
        return UnavailableError(
            f"{name}: {what} was not done in time", code="freeze-late", hint="see timeout_s"
        )
    return UnavailableError(f"{name}: {what} failed: {one_line(error)}", code="freeze-failed")


def unreachable(name: str, error: Exception, hint: str) -> UnavailableError:
    """No connection: nobody there, or refused."""
    return UnavailableError(
        f"{name} cannot be reached: {one_line(error)}", code="application-unreachable", hint=hint
    )


def one_line(error: Exception) -> str:
    """What a library said, without its line breaks."""
    args = error.args
    said = args[1] if len(args) > 1 and isinstance(args[1], str) else error
    return " ".join(str(said).split())
