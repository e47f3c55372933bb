"""Which process is at the other end of a connection on a unix socket.

The kernel tells the other socket's inode (NETLINK_SOCK_DIAG, sock_diag(7); structures and numbers:
linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h); /proc tells who holds it. What cannot be
told is left out: a kernel without unix_diag, a process of another user, a socket that the kernel
itself reads from.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2
_NO_COOKIE = 0xFFFFFFFF
_ALL_STATES = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBHIIIII")  # unix_diag_req
_ANSWER_BYTES = 16  # unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_SOCKET_LINK = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """`name` is the program's, of 15 characters at most (proc(5), comm)."""

    pid: int
    name: str


def processes(inodes: Sequence[int]) -> dict[int, Process]:
    """Who is connected to these sockets, by their inodes."""
    peers = {inode: peer for inode in inodes if (peer := _peer(inode)) is not None}
    holders = _holders(set(peers.values())) if peers else {}
    return {inode: holders[peer] for inode, peer in peers.items() if peer in holders}


def _peer(inode: int) -> int | None:
    """The inode of the socket that this one is connected to."""
    body = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, _ALL_STATES, inode, _UDIAG_SHOW_PEER, _NO_COOKIE, _NO_COOKIE
    )
    head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as wire,
    ):
        wire.settimeout(1)
        wire.sendto(head + body, (0, 0))
        return _peer_in(wire.recv(8192))
    return None


def _peer_in(answer: bytes) -> int | None:
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:  # an error: there is no such socket any more
        return None
    place = _HEADER.size + _ANSWER_BYTES
    while place + _ATTRIBUTE.size <= length:
        size, kind = _ATTRIBUTE.unpack_from(answer, place)
        if kind == _UNIX_DIAG_PEER:
            (peer,) = struct.unpack_from("=I", answer, place + _ATTRIBUTE.size)
            return int(peer)
        place += max(_ATTRIBUTE.size, (size + 3) & ~3)
    return None


def _holders(inodes: set[int]) -> dict[int, Process]:
    """The first process, by pid, that has each of these sockets open."""
    found: dict[int, Process] = {}
    for pid in sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
        for inode in _sockets(pid):
            if inode in inodes and inode not in found:
                with contextlib.suppress(OSError):
                    name = Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
                    found[inode] = Process(pid=pid, name=name)
        if len(found) == len(inodes):
            break
    return found


def _sockets(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):  # gone, or not ours to look into
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                link = _SOCKET_LINK.fullmatch(str(entry.readlink()))
                if link:
                    yield int(link[1])
