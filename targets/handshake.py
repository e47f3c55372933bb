"""Just enough of an NBD client to ask a server what it exports, and to hang up politely.

Numbers: NBD protocol, doc/proto.md of NetworkBlockDevice/nbd, section "Values". libnbd would do it
too, at the price of its import in every mount; it is asked where a pre-shared key is needed, which
Python's TLS has no way to give before 3.13.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass

from offload.errors import UnavailableError
from offload.nbd_tls import Certificates, PreSharedKeys, Tls, client_context

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_FLAG_FIXED_NEWSTYLE = 1  # both handshake flags have the same bits in either direction
_FLAG_NO_ZEROES = 2
_OPT_STARTTLS = 5
_OPT_GO = 7
_REP_ACK = 1
_REP_INFO = 3
_REP_FLAG_ERROR = 1 << 31
_REP_ERR_TLS_REQD = _REP_FLAG_ERROR + 5
_INFO_EXPORT = 0
_INFO_BLOCK_SIZE = 3
_CMD_DISC = 2
_REPLY_MAX = 1 << 16  # longer option replies are nothing that we asked for

Address = str | tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What a server says of an export that it opened."""

    size_bytes: int
    read_only: bool
    block_size_minimum: int  # 1 where the server does not tell


def ask(address: Address, *, name: str = "", tls: Tls | None = None, timeout_s: float) -> Export:
    """Open the export and close it again; the server has let go of it when this returns.

    `address` is a path of a unix socket, or host and port. With `tls` the server must refuse a
    client without it, and then be the one with these certificates or keys. Raises OSError where
    nobody answers (a TimeoutError where it takes longer than `timeout_s`), UnavailableError
    (`server-failed`) where the server speaks no NBD, refuses the export, or is another one.
    """
    with _connect(address, timeout_s) as wire:
        _greet(wire, address)
        if tls is None:
            return _asked(wire, name)
        _send_go(wire, name)
        kind, _ = _reply(wire)
        if kind != _REP_ERR_TLS_REQD:
            raise UnavailableError("the server serves without TLS", code="server-failed")
        if isinstance(tls, Certificates):
            return _ask_certified(wire, name, tls)
    return _ask_with_key(address, name, tls, timeout_s)


def _ask_certified(wire: socket.socket, name: str, tls: Certificates) -> Export:
    import ssl

    _send_option(wire, _OPT_STARTTLS)
    kind, _ = _reply(wire)
    if kind != _REP_ACK:
        raise UnavailableError("the server starts no TLS", code="server-failed")
    try:
        with client_context(tls).wrap_socket(wire) as secure:
            if secure.getpeercert(binary_form=True) != tls.server:
                raise UnavailableError(
                    "a server with another certificate answers", code="server-failed"
                )
            return _asked(secure, name)
    except (ssl.SSLError, ConnectionError) as error:
        raise UnavailableError(f"no TLS with the server: {error}", code="server-failed") from error


def _ask_with_key(address: Address, name: str, tls: PreSharedKeys, timeout_s: float) -> Export:
    import nbd

    until = time.monotonic() + timeout_s
    handle = nbd.NBD()
    try:
        handle.set_export_name(name)
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_username(tls.users[0])
        handle.set_tls_psk_file(str(tls.path))
        if isinstance(address, tuple):
            handle.aio_connect_tcp(address[0], str(address[1]))
        else:
            handle.aio_connect_unix(address)
        while handle.aio_is_connecting():
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("no TLS within the time")
            handle.poll(int(left * 1000) + 1)
        export = Export(
            size_bytes=handle.get_size(),
            read_only=handle.is_read_only(),
            block_size_minimum=handle.get_block_size(nbd.SIZE_MINIMUM) or 1,
        )
        handle.shutdown()
        return export
    except nbd.Error as error:
        raise UnavailableError(
            f"no TLS with the server: {error.string}", code="server-failed"
        ) from error


def _greet(wire: socket.socket, address: Address) -> None:
    magic, option, flags = struct.unpack(">QQH", _read(wire, 18))
    if magic != _NBDMAGIC or option != _IHAVEOPT or not flags & _FLAG_FIXED_NEWSTYLE:
        raise UnavailableError(f"no NBD server at {address}", code="server-failed")
    wire.sendall(struct.pack(">I", flags & (_FLAG_FIXED_NEWSTYLE | _FLAG_NO_ZEROES)))


def _asked(wire: socket.socket, name: str) -> Export:
    export = _go(wire, name)
    wire.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))
    wire.recv(1)  # the end of the stream: the server has closed its side
    return export


def _send_go(wire: socket.socket, name: str) -> None:
    label = name.encode()
    ask_for = struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
    _send_option(wire, _OPT_GO, struct.pack(">I", len(label)) + label + ask_for)


def _send_option(wire: socket.socket, number: int, data: bytes = b"") -> None:
    wire.sendall(struct.pack(">QII", _IHAVEOPT, number, len(data)) + data)


def _go(wire: socket.socket, name: str) -> Export:
    _send_go(wire, name)
    size, flags, minimum = -1, 0, 1
    while True:
        kind, payload = _reply(wire)
        if kind == _REP_ACK and size >= 0:
            # transmission flags, bit 1: NBD_FLAG_READ_ONLY
            return Export(size_bytes=size, read_only=bool(flags & 2), block_size_minimum=minimum)
        if kind & _REP_FLAG_ERROR:
            said = payload.decode("utf-8", "replace") or f"reply {kind:#x}"
            raise UnavailableError(f"the server refused the export: {said}", code="server-failed")
        if kind == _REP_INFO and len(payload) >= 2:
            (info,) = struct.unpack_from(">H", payload)
            if info == _INFO_EXPORT:
                size, flags = struct.unpack_from(">QH", payload, 2)
            elif info == _INFO_BLOCK_SIZE:
                (minimum,) = struct.unpack_from(">I", payload, 2)


def _reply(wire: socket.socket) -> tuple[int, bytes]:
    magic, _option, kind, length = struct.unpack(">QIII", _read(wire, 20))
    if magic != _REPLY_MAGIC or length > _REPLY_MAX:
        raise UnavailableError("the server broke the NBD protocol", code="server-failed")
    return kind, _read(wire, length)


def _connect(address: Address, timeout_s: float) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout=timeout_s)
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        wire.settimeout(timeout_s)
        wire.connect(address)
    except BaseException:
        wire.close()
        raise
    return wire


def _read(wire: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = wire.recv(length - len(parts))
        if not part:
            raise ConnectionResetError("the server closed the connection")
        parts += part
    return bytes(parts)
