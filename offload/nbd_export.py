"""Opens an export of an NBD server for somebody who speaks only the transmission phase: the
kernel.

Numbers: NBD protocol, doc/proto.md of NetworkBlockDevice/nbd, section "Values". Structured replies
are not negotiated: the kernel knows simple ones.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from offload.errors import NotFoundError, UnavailableError

Address = Path | tuple[str, int]  # a unix socket, or host and port

READ_ONLY = 1 << 1  # transmission flags
CAN_MULTI_CONN = 1 << 8

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE = 1  # both handshake flags have the same bits in either direction
_NO_ZEROES = 2
_OPT_GO = 7
_REP_ACK = 1
_REP_INFO = 3
_REP_FLAG_ERROR = 1 << 31
_REP_ERR_TLS_REQD = _REP_FLAG_ERROR + 5
_REP_ERR_UNKNOWN = _REP_FLAG_ERROR + 6
_INFO_EXPORT = 0
_INFO_BLOCK_SIZE = 3
_REPLY_MAX = 1 << 16  # longer option replies are nothing that we asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenExport:
    """An export that is open on `wire`, which is past the handshake. Close the wire."""

    wire: socket.socket
    size_bytes: int
    flags: int  # transmission flags
    block_size_minimum: int  # 1 where the server does not tell

    @property
    def read_only(self) -> bool:
        """Whether the server refuses writes."""
        return bool(self.flags & READ_ONLY)


def open_export(address: Address, name: str = "", *, timeout_s: float = 10.0) -> OpenExport:
    """Connect and open an export.

    Raises UnavailableError (`server-gone`, `tls-needed`, `server-failed`), NotFoundError
    (`export-missing`).
    """
    with contextlib.ExitStack() as stack:
        try:
            wire = stack.enter_context(_connected(address, timeout_s))
            size, flags, minimum = _negotiate(wire, name, address)
            wire.settimeout(None)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnavailableError(
                f"no NBD server answers at {show(address)}: {reason}",
                code="server-gone",
                hint="serve it again (offload recover), or check the address",
            ) from error
        stack.pop_all()
    return OpenExport(wire=wire, size_bytes=size, flags=flags, block_size_minimum=minimum)


def show(address: Address) -> str:
    """For people."""
    return str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"


def _connected(address: Address, timeout_s: float) -> socket.socket:
    if isinstance(address, tuple):
        wire = socket.create_connection(address, timeout=timeout_s)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return wire
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        wire.settimeout(timeout_s)
        wire.connect(str(address))
    except BaseException:
        wire.close()
        raise
    return wire


def _negotiate(wire: socket.socket, name: str, address: Address) -> tuple[int, int, int]:
    """Size in bytes, transmission flags, minimum block size."""
    magic, option, flags = struct.unpack(">QQH", _read(wire, 18))
    if magic != _NBDMAGIC or option != _IHAVEOPT or not flags & _FIXED_NEWSTYLE:
        raise UnavailableError(f"no NBD server at {show(address)}", code="server-failed")
    wire.sendall(struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))
    label = name.encode()
    data = struct.pack(">I", len(label)) + label + struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
    wire.sendall(struct.pack(">QII", _IHAVEOPT, _OPT_GO, len(data)) + data)
    size, transmission, minimum = -1, 0, 1
    while True:
        kind, payload = _reply(wire)
        if kind == _REP_ACK and size >= 0:
            return size, transmission, minimum
        if kind & _REP_FLAG_ERROR:
            raise _refused(kind, payload, name, address)
        if kind == _REP_INFO and len(payload) >= 2:
            (info,) = struct.unpack_from(">H", payload)
            if info == _INFO_EXPORT:
                size, transmission = struct.unpack_from(">QH", payload, 2)
            elif info == _INFO_BLOCK_SIZE:
                (minimum,) = struct.unpack_from(">I", payload, 2)


def _refused(
    kind: int, payload: bytes, name: str, address: Address
) -> UnavailableError | NotFoundError:
    if kind == _REP_ERR_TLS_REQD:
        return UnavailableError(
            f"the NBD server at {show(address)} wants TLS",
            code="tls-needed",
            hint="connect to nbds://HOST:PORT",
        )
    if kind == _REP_ERR_UNKNOWN:
        return NotFoundError(
            f"the NBD server at {show(address)} has no export '{name}'", code="export-missing"
        )
    said = payload.decode("utf-8", "replace") or f"reply {kind:#x}"
    return UnavailableError(
        f"the NBD server at {show(address)} refused the export: {said}", code="server-failed"
    )


def _reply(wire: socket.socket) -> tuple[int, bytes]:
    magic, _option, kind, length = struct.unpack(">QIII", _read(wire, 20))
    if magic != _REPLY_MAGIC or length > _REPLY_MAX:
        raise UnavailableError("the server broke the NBD protocol", code="server-failed")
    return kind, _read(wire, length)


def _read(wire: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = wire.recv(length - len(parts))
        if not part:
            raise ConnectionResetError("the server closed the connection")
        parts += part
    return bytes(parts)
