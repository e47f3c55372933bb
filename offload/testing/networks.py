"""Network namespaces for tests: addresses outside loopback that no other machine has.

A namespace is entered by the calling thread alone; programs that it starts then are in it. It goes
with its last process. Needs root.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from offload import run

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_MINE = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A fresh network namespace whose loopback interface is up."""

    def __init__(self) -> None:
        with _back_again():
            _call(_libc.unshare(_CLONE_NEWNET))
            self._fd = os.open(_MINE, os.O_RDONLY | os.O_CLOEXEC)
            run.run(["ip", "link", "set", "lo", "up"])

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts, are inside."""
        with _back_again():
            _call(_libc.setns(self._fd, _CLONE_NEWNET))
            yield

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def connect(self, other: Namespace, ours: Sequence[str], theirs: Sequence[str]) -> None:
        """A cable between `wire` here and `wire` there; addresses as `192.0.2.1/24`."""
        with self.entered():
            there = f"/proc/{os.getpid()}/fd/{other._fd}"
            run.run(
                ["ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns",
                 there]
            )  # fmt: skip
            _set_up(ours)
        with other.entered():
            _set_up(theirs)

    def cut(self) -> None:
        """Take the cable out: what is sent gets no answer any more."""
        with self.entered():
            run.run(["ip", "link", "set", "wire", "down"])


def _set_up(addresses: Sequence[str]) -> None:
    for address in addresses:
        # an IPv6 address would else be usable only after a second or two
        extra = ["nodad"] if ":" in address else []
        run.run(["ip", "address", "add", address, "dev", "wire", *extra])
    run.run(["ip", "link", "set", "wire", "up"])


@contextmanager
def _back_again() -> Iterator[None]:
    home = os.open(_MINE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _call(_libc.setns(home, _CLONE_NEWNET))
        os.close(home)


def _call(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
