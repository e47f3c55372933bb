"""Which clients a listening socket serves, enforced by the kernel.

A classic BPF program on the socket looks at the source address of every packet: one of a client
that is not named is dropped, the first as all others, so that it gets no answer at all and the
server never hears of it. Accepted connections inherit the program. It needs no privilege.

nbdkit's own `ip` filter is of no use: that of Debian 12 (1.32) is built without inet_pton and
refuses every address.

Sources: socket(7), SO_ATTACH_FILTER and SO_LOCK_FILTER; linux/filter.h; linux/bpf_common.h; the
numbers of the options are those of asm-generic/socket.h.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import socket
import struct
from collections.abc import Sequence

from offload.errors import UnavailableError, UsageError

_SO_ATTACH_FILTER = 26
_SO_LOCK_FILTER = 44
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_ALL = 0xFFFFFFFF
_NETWORK_HEADER = 0x100000000 - 0x100000  # SKF_NET_OFF
_SOURCE_OFFSET = {4: 12, 6: 8}  # of the source address: RFC 791, RFC 8200

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def attach(sock: socket.socket, allow: Sequence[str]) -> None:
    """Let only clients of these networks through; those of another family name nobody.

    Raises UsageError (`too-many-networks`), UnavailableError (`allow-unenforceable`).
    """
    version = 6 if sock.family == socket.AF_INET6 else 4
    steps = program(allow, version)
    code = ctypes.create_string_buffer(b"".join(steps))
    try:
        sock.setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_FILTER,
            struct.pack("HP", len(steps), ctypes.addressof(code)),  # struct sock_fprog
        )
        sock.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
    except OSError as error:
        if error.errno in {errno.ENOMEM, errno.EINVAL, errno.ENOBUFS}:
            raise UsageError(
                f"the kernel takes no list of {len(allow)} client addresses and networks",
                code="too-many-networks",
                hint="name fewer, larger networks",
            ) from error
        raise UnavailableError(
            f"the kernel takes no filter of client addresses: {error.strerror}",
            code="allow-unenforceable",
        ) from error


def program(allow: Sequence[str], version: int) -> list[bytes]:
    """The instructions that let the sources in `allow` through, for IP of this version."""
    steps = []
    for network in _collapsed(allow, version):
        steps += _rule(network)
    return [*steps, _step(_RETURN, 0)]


def _collapsed(allow: Sequence[str], version: int) -> list[Network]:
    networks = [ipaddress.ip_network(text) for text in allow]
    if version == 6:
        return list(
            ipaddress.collapse_addresses(
                n for n in networks if isinstance(n, ipaddress.IPv6Network)
            )
        )
    return list(
        ipaddress.collapse_addresses(n for n in networks if isinstance(n, ipaddress.IPv4Network))
    )


def _rule(network: Network) -> list[bytes]:
    """Accept what lies in the network; else go on behind the rule."""
    wanted = struct.iter_unpack(">I", network.network_address.packed)
    masks = struct.iter_unpack(">I", network.netmask.packed)
    words = [(word, mask) for (word,), (mask,) in zip(wanted, masks, strict=True) if mask]
    length = sum(2 if mask == _ALL else 3 for _, mask in words) + 1
    steps: list[bytes] = []
    for number, (word, mask) in enumerate(words):
        place = _NETWORK_HEADER + _SOURCE_OFFSET[network.version] + 4 * number
        steps.append(_step(_LOAD_WORD, place))
        if mask != _ALL:
            steps.append(_step(_AND, mask))
        # relative to the next instruction
        steps.append(_step(_JUMP_EQUAL, word, otherwise=length - len(steps) - 1))
    return [*steps, _step(_RETURN, _ALL)]


def _step(code: int, value: int, *, otherwise: int = 0) -> bytes:
    """One struct sock_filter: code, jump if true, jump if false, value."""
    return struct.pack("HBBI", code, 0, otherwise, value)
