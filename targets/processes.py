"""The processes behind a view, found by their command lines, and who is connected to them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from pathlib import Path

from offload import procs
from offload.target import Client
from targets import unix_peers
from targets.command import PID_FILE

_ESTABLISHED = "01"  # st of /proc/net/tcp: include/net/tcp_states.h
_CONNECTED = "03"  # St of /proc/net/unix: SS_CONNECTED, include/uapi/linux/net.h

# A server waits for its clients to leave when asked to end. It holds nothing that must be saved,
# so it is not asked for long.
_GRACE_S = 0.5


def find_servers(run_dir: Path) -> list[procs.ProcessRef]:
    """Live nbdkits that were told to put their pid file into this folder.

    Looks at command lines, not at the pid file: a server whose start was cut off by `kill -9` is
    found too, and a client that merely names our socket is not.
    """
    return procs.find_running("nbdkit", str(run_dir / PID_FILE))


def end_servers(run_dir: Path, known: procs.ProcessRef | None) -> None:
    """End whatever serves this folder. Idempotent. Only processes that are surely ours."""
    ours = [known] if known is not None and known.alive() else find_servers(run_dir)
    for ref in ours:
        ref.end(_GRACE_S)
        with contextlib.suppress(ChildProcessError):  # reap it, if we started it ourselves
            os.waitpid(ref.pid, os.WNOHANG)


def unix_clients(pid: int, socket_path: Path) -> list[Client]:
    """Connections that the server has taken on its socket, with the processes that hold them."""
    wanted = str(socket_path)
    inodes = []
    for line in _table(pid, "unix"):
        # Num RefCount Protocol Flags Type St Inode Path
        columns = line.split(maxsplit=7)
        if len(columns) == 8 and columns[7] == wanted and columns[5] == _CONNECTED:
            inodes.append(int(columns[6]))
    known = unix_peers.processes(inodes)
    return [_unix_client(known.get(inode)) for inode in inodes]


def _unix_client(process: unix_peers.Process | None) -> Client:
    if process is None:
        return Client(address="unix")
    return Client(address="unix", name=process.name, pid=process.pid)


def tcp_clients(pid: int, address: str, port: int) -> list[Client]:
    """Connections to this address and port, with where they come from."""
    here = ipaddress.ip_address(address)
    found = []
    for line in _table(pid, "tcp6" if here.version == 6 else "tcp"):
        # sl local_address rem_address st …
        columns = line.split()
        state = columns[3]
        host, number = _endpoint(columns[1])
        if state == _ESTABLISHED and number == port and (here.is_unspecified or host == here):
            host, number = _endpoint(columns[2])
            found.append(
                Client(address=f"[{host}]:{number}" if here.version == 6 else f"{host}:{number}")
            )
    return found


def _table(pid: int, name: str) -> list[str]:
    """The lines of a table of the server's own network namespace; none if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    return []


def _endpoint(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """`0100007F:2A39`: 32-bit words in the machine's byte order, the port in plain hexadecimal."""
    raw, _, port = text.partition(":")
    words = [int(raw[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(raw), 8)]
    return ipaddress.ip_address(b"".join(words)), int(port, 16)
