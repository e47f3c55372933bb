"""Which addresses and ports of this machine a plain NBD server may have."""

from __future__ import annotations

import errno
import ipaddress
import socket

from offload.errors import PrivilegeError, UnavailableError, UsageError


def check(address: str, port: int | None) -> None:
    """Refuse an address that is not loopback, and a port that cannot be had.

    Raises UsageError (`not-loopback`, `bad-port`), PrivilegeError, UnavailableError (`port-taken`,
    `bad-address`).
    """
    if not _is_loopback(address):
        raise UsageError(
            f"{address} is no loopback address: NBD without TLS has neither authentication nor "
            "encryption",
            code="not-loopback",
            hint="use 127.0.0.1 or ::1, or the unix socket through an SSH tunnel",
        )
    if port is None:
        return
    if not 0 < port < 65536:
        raise UsageError(f"there is no TCP port {port}", code="bad-port")
    try:
        bind(address, port)
    except PermissionError as error:
        raise PrivilegeError(
            f"port {port} is for root only", hint="choose one from 1024 on"
        ) from error
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UnavailableError(
                f"cannot listen on {address}: {error.strerror}", code="bad-address"
            ) from error
        raise port_taken(address, port) from error


def port_taken(address: str, port: int | None) -> UnavailableError:
    """The error for a port that another server has."""
    return UnavailableError(
        f"port {port} of {address} is taken",
        code="port-taken",
        hint="choose another port, or leave it out for any free one",
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def bind(address: str, port: int) -> int:
    """The port that a server would get: 0 asks for any free one. Nothing stays bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nbdkit does
        probe.bind((address, port))
        got: int = probe.getsockname()[1]
        return got
