"""What goes over the wire between the host and the agent in the guest. Standard library only.

A frame is a kind (one byte), the number of a command (4 bytes, big-endian), a length (4 bytes,
big-endian), and so many bytes. Kinds from the host: START (JSON: argv, stdin, env, cwd), STDIN (a
piece; empty: its end), KILL. From the guest: HELLO (the agent listens), STDOUT and STDERR (a
piece), EXIT (the status as text, negative for a signal; all streams are complete), FAILED (why the
command did not start, in words).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

PORT = "offload.lab"  # the virtio-serial port's name
PIECE = 1 << 16  # bytes of a stream in one frame, at most

START, STDIN, KILL = b"S", b"I", b"K"
HELLO, STDOUT, STDERR, EXIT, FAILED = b"H", b"O", b"E", b"X", b"F"

_HEAD = struct.Struct(">cII")


class Frame(NamedTuple):
    """One message."""

    kind: bytes
    number: int
    body: bytes


def pack(kind: bytes, number: int, body: bytes = b"") -> bytes:
    """The bytes of a frame."""
    return _HEAD.pack(kind, number, len(body)) + body


def unpack(pending: bytearray) -> Iterator[Frame]:
    """The whole frames at the start of `pending`, which are removed from it."""
    while len(pending) >= _HEAD.size:
        kind, number, length = _HEAD.unpack_from(pending)
        end = _HEAD.size + length
        if len(pending) < end:
            return
        body = bytes(pending[_HEAD.size : end])
        del pending[:end]
        yield Frame(kind, number, body)
