"""Where servers listen: which addresses and ports they may have, and who may connect.

The sockets are bound here and handed to the server, so that a port that was found free stays ours.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

from offload.errors import PrivilegeError, UnavailableError, UsageError
from targets import source_filter

# A client that vanished without a word (power, network) is noticed after two minutes of silence.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds, seconds, probes

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address:
    """An address of this machine, as it was named. Raises UsageError (`bad-address`)."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError as error:
        raise UsageError(
            f"'{text}' is no IP address",
            code="bad-address",
            hint="an address of this machine, not a name; e.g. 127.0.0.1 or ::1",
        ) from error
    if found.is_multicast or found == ipaddress.IPv4Address("255.255.255.255"):
        raise UsageError(f"{text} is no address of one machine", code="bad-address")
    if isinstance(found, ipaddress.IPv6Address) and (found.scope_id or found.ipv4_mapped):
        raise UsageError(
            f"{text} cannot be listened on",
            code="bad-address",
            hint="use a global or unique local address, or the plain IPv4 address",
        )
    return found


def parse_networks(texts: Sequence[str]) -> tuple[str, ...]:
    """Client addresses and networks, each in its usual form. Raises UsageError (`bad-network`)."""
    found = []
    for text in texts:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise UsageError(
                f"'{text}' is no address or network: {error}",
                code="bad-network",
                hint="e.g. 192.0.2.7, 192.0.2.0/24 or 2001:db8::/64",
            ) from error
        alone = network.prefixlen == network.max_prefixlen
        found.append(str(network.network_address if alone else network))
    return tuple(found)


def check_allow(address: Address, allow: Sequence[str]) -> None:
    """Refuse a list that serves nobody: UsageError (`allow-for-no-one`)."""
    same = [n for text in allow if (n := ipaddress.ip_network(text)).version == address.version]
    # what comes to a loopback address comes from one
    reached = [n for n in same if not address.is_loopback or _meets_loopback(n)]
    if allow and not reached:
        raise UsageError(
            f"no client can reach {address} from {', '.join(allow)}",
            code="allow-for-no-one",
            hint=f"name {address} too, or listen on an address that they reach",
        )


def _meets_loopback(network: source_filter.Network) -> bool:
    if isinstance(network, ipaddress.IPv6Network):
        return network.overlaps(ipaddress.IPv6Network("::1"))
    return network.overlaps(ipaddress.IPv4Network("127.0.0.0/8"))


def check_tcp(address: str, port: int | None, allow: Sequence[str]) -> None:
    """Raise what `tcp` would raise. Nothing stays bound."""
    _bound(address, port, allow).close()


def tcp(address: str, port: int | None, allow: Sequence[str]) -> socket.socket:
    """A socket that listens; None: on any free port. Where `allow` is empty, for everybody.

    Raises UsageError (`bad-port`, `too-many-networks`), PrivilegeError, UnavailableError
    (`port-taken`, `bad-address`, `allow-unenforceable`).
    """
    sock = _bound(address, port, allow)
    try:
        sock.listen(socket.SOMAXCONN)
    except OSError as error:  # bound by another one that did not listen until now
        sock.close()
        raise _refused(address, port, error) from error
    return sock


def unix(path: Path) -> socket.socket:
    """A socket that listens on a path of the view's own folder."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"cannot listen on {path}: {error.strerror or error}", code="bad-address"
        ) from error
    return sock


def _bound(address: str, port: int | None, allow: Sequence[str]) -> socket.socket:
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"there is no TCP port {port}", code="bad-port")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _refused(address, port, error) from error
    try:
        _set_options(sock)
        if allow:  # before anybody can connect
            source_filter.attach(sock, allow)
        sock.bind((address, port or 0))
    except OSError as error:
        sock.close()
        raise _refused(address, port, error) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _set_options(sock: socket.socket) -> None:
    """Accepted connections inherit them."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:  # `::` is all of IPv6 and nothing else
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _refused(address: str, port: int | None, error: OSError) -> PrivilegeError | UnavailableError:
    if error.errno == errno.EACCES:
        return PrivilegeError(f"port {port} is for root only", hint="choose one from 1024 on")
    if error.errno == errno.EADDRINUSE:
        return UnavailableError(
            f"port {port} of {address} is taken" if port else f"{address} has no free port",
            code="port-taken",
            hint="choose another port, or leave it out for any free one",
        )
    return UnavailableError(
        f"cannot listen on {address}: {error.strerror}",
        code="bad-address",
        hint="name an address of this machine: ip address",
    )
