"""What a broken or hostile NBD client may send: sessions that no server may fall over.

Source of the format: doc/proto.md of NetworkBlockDevice/nbd. Everything is made from a seed, so
that a session that kills a server can be sent again.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable

IHAVEOPT = 0x49484156454F5054
REQUEST_MAGIC = 0x25609513
_GREETING_BYTES = 18
_CLIENT_FLAGS = struct.pack(">I", 3)  # fixed newstyle, no zeroes
_OPTIONS = (1, 2, 3, 5, 6, 7, 8, 9, 10)  # export name … set meta context
_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7)  # read … block status
_ANSWER_S = 0.02  # how long a session listens to what the server says to it

Session = Callable[[random.Random, socket.socket], None]


def option(number: int, data: bytes, *, length: int | None = None, magic: int = IHAVEOPT) -> bytes:
    """An option request; `length` lies about the data."""
    told = len(data) if length is None else length
    return struct.pack(">QII", magic, number, told) + data


def request(
    kind: int, offset: int, length: int, *, flags: int = 0, magic: int = REQUEST_MAGIC
) -> bytes:
    """A request of the transmission phase."""
    return struct.pack(">IHHQQI", magic, flags, kind, 1, offset, length)


def go(name: bytes = b"") -> bytes:
    """NBD_OPT_GO, as it should be."""
    return option(7, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))


def garbage_greeting(chance: random.Random, wire: socket.socket) -> None:
    """Anything at all in place of the handshake."""
    wire.sendall(chance.randbytes(chance.randint(1, 4096)))


def broken_flags(chance: random.Random, wire: socket.socket) -> None:
    """Client flags that do not exist, or half of them."""
    wire.sendall(chance.randbytes(chance.randint(1, 4)))


def broken_options(chance: random.Random, wire: socket.socket) -> None:
    """Options that are unknown, lie about their length, or have another magic number."""
    wire.sendall(_CLIENT_FLAGS)
    for _ in range(chance.randint(1, 8)):
        data = chance.randbytes(chance.choice((0, 1, 4, 7, 64, 4096)))
        length = chance.choice((None, 0, len(data) + 9, 1 << 16, (1 << 32) - 1))
        magic = IHAVEOPT if chance.random() < 0.9 else chance.getrandbits(64)
        number = chance.choice((*_OPTIONS, 0, 11, 255, chance.getrandbits(32)))
        wire.sendall(option(number, data, length=length, magic=magic))


def lying_names(chance: random.Random, wire: socket.socket) -> None:
    """NBD_OPT_GO, LIST and meta contexts whose inner lengths point outside of the option."""
    wire.sendall(_CLIENT_FLAGS)
    for _ in range(chance.randint(1, 6)):
        name = chance.randbytes(chance.randint(0, 40))
        inner = chance.choice((len(name) + 1, 1 << 12, 1 << 31, (1 << 32) - 1))
        data = struct.pack(">I", inner) + name + struct.pack(">H", chance.getrandbits(16))
        wire.sendall(option(chance.choice((6, 7, 9, 10)), data))


def broken_requests(chance: random.Random, wire: socket.socket) -> None:
    """A proper start, then requests outside of the image, of unknown kind, or of no kind."""
    _start(wire)
    for _ in range(chance.randint(1, 12)):
        kind = chance.choice((*_COMMANDS, 8, 99, 65535))
        offset = chance.choice((0, 1, 511, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
        length = chance.choice((0, 1, 511, 4096, 1 << 26, (1 << 32) - 1))
        magic = REQUEST_MAGIC if chance.random() < 0.9 else chance.getrandbits(32)
        flags = chance.choice((0, 0, 1, 2, 4, 16, 65535))
        wire.sendall(request(kind, offset, length, flags=flags, magic=magic))
        if kind == 1:  # a write: less data than was told
            wire.sendall(chance.randbytes(min(length, chance.randint(0, 4096))))


def many_reads_no_listener(chance: random.Random, wire: socket.socket) -> None:
    """Many reads whose answers nobody takes; then gone."""
    _start(wire)
    for _ in range(64):
        wire.sendall(request(0, 4096 * chance.randint(0, 200), 65536))


def cut_in_two(chance: random.Random, wire: socket.socket) -> None:
    """A proper session that ends in the middle of a message."""
    whole = _CLIENT_FLAGS + go() + request(0, 0, 4096)
    wire.sendall(whole[: chance.randint(1, len(whole) - 1)])


SESSIONS: tuple[Session, ...] = (
    garbage_greeting,
    broken_flags,
    broken_options,
    lying_names,
    broken_requests,
    many_reads_no_listener,
    cut_in_two,
)


def send(connect: Callable[[], socket.socket], seed: int) -> str:
    """Send the session of this seed, and go: politely or with a reset. Returns its name."""
    chance = random.Random(seed)  # noqa: S311 - it must be repeatable
    session = SESSIONS[seed % len(SESSIONS)]
    with connect() as wire:
        wire.settimeout(5)
        try:
            _read_up_to(wire, _GREETING_BYTES)
            session(chance, wire)
            if chance.random() < 0.5:
                wire.shutdown(socket.SHUT_WR)
            wire.settimeout(_ANSWER_S)
            wire.recv(65536)
        except OSError:
            pass  # the server has hung up, or says nothing: both are its right
        if chance.random() < 0.5 and wire.family != socket.AF_UNIX:
            # close with a reset instead of an end: socket(7), SO_LINGER
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return session.__name__


def _start(wire: socket.socket) -> None:
    wire.sendall(_CLIENT_FLAGS + go())
    wire.recv(4096)


def _read_up_to(wire: socket.socket, length: int) -> None:
    while length > 0:
        part = wire.recv(length)
        if not part:
            return
        length -= len(part)
