"""The kernel's NBD client: an NBD server as a block device of this machine.

Configured over generic netlink (linux/nbd-netlink.h), which leaves no process behind and keeps an
identifier with the device (/sys/block/nbdN/backend), by which it is found again.

Our devices have numbers of their own, nbd1000 to nbd1999, which are made when they are needed and
go when they are detached. An administrator's nbd0, nbd1 … are never touched; and udev can tell
ours from the first event on, when there is no identifier yet (the kernel sets it after the size).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from offload import kernel_module
from offload.errors import BusyError, PrivilegeError, UnavailableError, UsageError
from offload.genetlink import Attribute, Family, text, u32, u64
from offload.nbd_export import CAN_MULTI_CONN, READ_ONLY, Address, OpenExport, open_export

INDEXES = range(1000, 2000)
TIMEOUT_S = 30

_SYS_BLOCK = Path("/sys/block")
_SECTOR = 512
_GONE_S = 2.0  # for the kernel to remove a device that nobody has open

# linux/nbd-netlink.h
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE_BYTES, _BLOCK_SIZE_BYTES, _TIMEOUT = 1, 2, 3, 4
_SERVER_FLAGS, _CLIENT_FLAGS, _SOCKETS, _DEAD_CONN_TIMEOUT = 5, 6, 7, 8
_BACKEND_IDENTIFIER = 10
_SOCK_ITEM, _SOCK_FD = 1, 1
_DESTROY_ON_DISCONNECT = 1  # linux/nbd.h, NBD_CFLAG_…

# What the kernel says where an index has just been taken, or is going away.
_TAKEN = {errno.EBUSY, errno.EINVAL, errno.EEXIST, errno.ENOENT}
_TRIES = 20
_LOOKED_AT_S = 5.0  # for whoever has a device open that is not connected


def attach(
    address: Address,
    *,
    identifier: str,
    sector_size: int | None,
    read_only: bool,
    export: str = "",
    connections: int = 1,
    timeout_s: int = TIMEOUT_S,
) -> str:
    """Make a block device of an export; its path.

    `identifier` names it to `find`; it is the caller's to see that there is only one. Without a
    `sector_size` it is the server's least request. The device is read-only where that is asked for
    or the server is. `connections`: at most, where the server allows several. A request that is not
    answered within `timeout_s` (a dead server) fails.

    Raises PrivilegeError, UnavailableError (`module-missing`, `no-device`, and those of
    `open_export`), UsageError (`bad-sector-size`).
    """
    check()
    with ExitStack() as wires:
        opened = _open(wires, address, export, connections, timeout_s)
        first = opened[0]
        sector_size = sector_size or max(first.block_size_minimum, _SECTOR)
        if first.block_size_minimum > sector_size or first.size_bytes % sector_size:
            raise UsageError(
                f"an export of {first.size_bytes} bytes in blocks of {first.block_size_minimum} "
                f"is no disk of {sector_size}-byte sectors",
                code="bad-sector-size",
            )
        flags = first.flags | (READ_ONLY if read_only else 0)
        return _connect(
            [
                (_SIZE_BYTES, u64(first.size_bytes)),
                (_BLOCK_SIZE_BYTES, u64(sector_size)),
                (_TIMEOUT, u64(timeout_s)),
                # how long requests wait for `reconnect` once the server is gone
                (_DEAD_CONN_TIMEOUT, u64(timeout_s)),
                (_SERVER_FLAGS, u64(flags)),
                (_CLIENT_FLAGS, u64(_DESTROY_ON_DISCONNECT)),
                (_SOCKETS, _sockets(opened)),
                (_BACKEND_IDENTIFIER, text(identifier)),
            ]
        )


def reconnect(
    device: str,
    address: Address,
    *,
    identifier: str,
    export: str = "",
    connections: int = 1,
    timeout_s: int = TIMEOUT_S,
) -> int:
    """Give a device whose server is gone new connections, in place of the dead ones; how many.

    Whoever has the device open goes on. Living connections stay as they are. Raises what `attach`
    raises; UnavailableError (`no-device`) where the device is gone or another's.
    """
    with ExitStack() as wires, _family() as family:
        opened = _open(wires, address, export, connections, timeout_s)
        try:
            family.ask(
                _RECONFIGURE,
                [
                    (_INDEX, u32(_index(device))),
                    (_SOCKETS, _sockets(opened)),
                    (_BACKEND_IDENTIFIER, text(identifier)),
                ],
            )
        except OSError as error:
            raise UnavailableError(
                f"{device} cannot be connected again: {error.strerror}", code="no-device"
            ) from error
        inodes = {os.fstat(made.wire.fileno()).st_ino for made in opened}
        wires.close()  # what is still there now is the kernel's
        return len(inodes & _open_sockets(address))


def detach(device: str) -> None:
    """Disconnect and remove a device. Idempotent.

    Whoever has it open gets errors from now on, and the kernel keeps it until they close it.
    Raises PrivilegeError, UnavailableError (`module-missing`).
    """
    if not (_SYS_BLOCK / Path(device).name).exists():
        return
    with _family() as family, contextlib.suppress(FileNotFoundError):
        try:
            family.ask(_DISCONNECT, [(_INDEX, u32(_index(device)))])
        except OSError as error:
            if error.errno != errno.EINVAL:  # the kernel's word for: there is none
                raise UnavailableError(
                    f"{device} cannot be detached: {error.strerror}", code="no-device"
                ) from error
    _wait_gone(device)


def find(identifier: str) -> str | None:
    """The device that was attached under this identifier, or None.

    One that was detached while somebody had it open is found until they close it.
    """
    for folder in _SYS_BLOCK.glob("nbd*"):
        if identifier_of(folder.name) == identifier:
            return f"/dev/{folder.name}"
    return None


def identifier_of(device: str) -> str | None:
    """What a device (`/dev/nbd1000`, or its name) was attached as, or None."""
    with contextlib.suppress(OSError):
        return (_SYS_BLOCK / Path(device).name / "backend").read_text().rstrip("\n") or None
    return None


def check() -> None:
    """Load the module if need be. Raises PrivilegeError, UnavailableError (`module-missing`)."""
    if os.geteuid() != 0:
        raise PrivilegeError(
            "block devices of NBD servers are root's to make", hint="run it as root"
        )
    kernel_module.load("a block device of an NBD server", "nbd")


def _open(
    wires: ExitStack, address: Address, export: str, connections: int, timeout_s: int
) -> Sequence[OpenExport]:
    """As many connections as are wanted and allowed; they close with `wires`, the kernel has its
    own hold on those that it took."""
    opened = []
    for _ in range(max(1, connections)):
        made = open_export(address, export, timeout_s=timeout_s)
        wires.callback(made.wire.close)
        opened.append(made)
        if not made.flags & CAN_MULTI_CONN:
            break
    return opened


def _sockets(opened: Sequence[OpenExport]) -> list[Attribute]:
    return [(_SOCK_ITEM, [(_SOCK_FD, u32(made.wire.fileno()))]) for made in opened]


def _open_sockets(address: Address) -> set[int]:
    """Inodes of the sockets of this kind, proc(5)."""
    column = 6 if isinstance(address, Path) else 9
    found = set()
    for table in ("unix",) if isinstance(address, Path) else ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                found.add(int(line.split()[column]))
    return found


def _connect(attributes: Sequence[Attribute]) -> str:
    """The first free index of ours; another process may be faster, so more than one is tried."""
    last: OSError | None = None
    until = time.monotonic() + _LOOKED_AT_S
    with _family() as family:
        for _, index in zip(range(_TRIES), _free(), strict=False):
            try:
                _connect_as(family, index, attributes, until)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise _refused(error) from error
                last = error
            else:
                return f"/dev/nbd{index}"
    if last is not None:
        raise _refused(last) from last
    raise BusyError(
        f"all {len(INDEXES)} NBD devices from nbd{INDEXES.start} on are in use",
        code="no-device",
        hint="disconnect some",
    )


def _connect_as(family: Family, index: int, attributes: Sequence[Attribute], until: float) -> None:
    """Connect this device, which is made where it is not there. Raises OSError.

    udev opens a device as soon as it is made, which may be before it is connected: the kernel calls
    it busy then. It would stay for ever if it were left like that, so it is waited for.
    """
    while True:
        try:
            family.ask(_CONNECT, [(_INDEX, u32(index)), *attributes])
        except OSError as error:
            taken = (_SYS_BLOCK / f"nbd{index}" / "pid").exists()
            if error.errno != errno.EBUSY or taken or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _free() -> Iterator[int]:
    """Indexes without a device, or whose device serves nothing."""
    for index in INDEXES:
        if not (_SYS_BLOCK / f"nbd{index}" / "pid").exists():
            yield index


def _refused(error: OSError) -> UnavailableError | PrivilegeError:
    if error.errno == errno.EPERM:
        return PrivilegeError("the kernel lets only root attach NBD devices", hint="run it as root")
    return UnavailableError(
        f"the kernel attached no NBD device: {error.strerror}",
        code="no-device",
        hint="see what it says: dmesg",
    )


@contextmanager
def _family() -> Iterator[Family]:
    check()
    try:
        family = Family("nbd")
    except FileNotFoundError as error:
        raise UnavailableError(
            "the module nbd of this kernel has no netlink interface", code="module-missing"
        ) from error
    try:
        yield family
    finally:
        family.close()


def _index(device: str) -> int:
    found = re.fullmatch(r"(?:/dev/)?nbd(\d+)", device)
    if found is None:
        raise UsageError(f"{device} is no NBD device", code="bad-device")
    return int(found[1])


def _wait_gone(device: str) -> None:
    """Until the kernel has removed it; not for ever, as somebody may have it open."""
    folder = _SYS_BLOCK / Path(device).name
    until = time.monotonic() + _GONE_S
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.005)
