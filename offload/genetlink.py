"""Just enough generic netlink to ask a family of the kernel to do something.

Formats: linux/netlink.h, linux/genetlink.h. Numbers are in the machine's byte order, attributes
are padded to 4 bytes. An attribute is `(type, payload)`; a payload that is a sequence is nested.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence

from offload.errors import UnavailableError

Attribute = tuple[int, bytes | Sequence["Attribute"]]

_NETLINK_GENERIC = 16
_CTRL = 0x10  # GENL_ID_CTRL: the family of families
_CTRL_GETFAMILY = 3
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2
_REQUEST_ACK = 0x01 | 0x04  # NLM_F_REQUEST, NLM_F_ACK
_ERROR = 2  # NLMSG_ERROR; error 0 is the acknowledgement
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC = struct.Struct("=BBH")  # command, version, reserved
_ANSWER_MAX = 1 << 16


def u32(value: int) -> bytes:
    """A payload of 32 bits."""
    return struct.pack("=I", value)


def u64(value: int) -> bytes:
    """A payload of 64 bits."""
    return struct.pack("=Q", value)


def text(value: str) -> bytes:
    """A payload that is a string; it ends with a zero byte."""
    return os.fsencode(value) + b"\0"


class Family:
    """An open socket to one family. Close it."""

    def __init__(self, name: str, version: int = 1) -> None:
        """Look the family up. Raises FileNotFoundError where the kernel has none of this name, and
        UnavailableError where this process may have no netlink socket at all."""
        self._version = version
        self._sequence = 0
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        except OSError as error:  # a unit's RestrictAddressFamilies, say
            raise UnavailableError(
                f"the kernel cannot be spoken to over netlink: {error.strerror}",
                code="no-netlink",
                hint="in a unit: RestrictAddressFamilies= must name AF_NETLINK",
            ) from error
        try:
            self._socket.bind((0, 0))
            answer = self._ask(_CTRL, _CTRL_GETFAMILY, [(_CTRL_ATTR_FAMILY_NAME, text(name))])
            (self._id,) = struct.unpack_from("=H", answer[_CTRL_ATTR_FAMILY_ID])
        except BaseException:
            self._socket.close()
            raise

    def ask(self, command: int, attributes: Sequence[Attribute]) -> dict[int, bytes]:
        """Have one command done; the attributes of the answer by type, none where it has none.

        Raises OSError with the kernel's number.
        """
        return self._ask(self._id, command, attributes)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _ask(self, kind: int, command: int, attributes: Sequence[Attribute]) -> dict[int, bytes]:
        self._sequence += 1
        body = _GENERIC.pack(command, self._version, 0) + _pack(attributes)
        length = _HEADER.size + len(body)
        self._socket.send(_HEADER.pack(length, kind, _REQUEST_ACK, self._sequence, 0) + body)
        found: dict[int, bytes] = {}
        while True:
            for answer, payload in _messages(self._socket.recv(_ANSWER_MAX)):
                if answer == _ERROR:
                    (error,) = struct.unpack_from("=i", payload)
                    if error:
                        raise OSError(-error, os.strerror(-error))
                    return found
                found |= dict(_attributes(payload[_GENERIC.size :]))


def _pack(attributes: Sequence[Attribute]) -> bytes:
    packed = b""
    for kind, payload in attributes:
        if not isinstance(payload, bytes):
            kind, payload = kind | _NESTED, _pack(payload)  # noqa: PLW2901
        packed += struct.pack("=HH", 4 + len(payload), kind) + payload
        packed += b"\0" * (-len(packed) % 4)
    return packed


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each message in what was received at once."""
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & _TYPE_MASK, data[4:length]
        data = data[(length + 3) & ~3 :]
