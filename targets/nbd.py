"""The `nbd` target: one nbdkit a view, in a folder of its own.

| in the folder | |
| --- | --- |
| `nbd.sock` | the socket, where the view is on a unix socket |
| `nbdkit.pid` | written by the server when it listens |
| `log` | what the server says |
| `source.json` | what the Python plugin opens, for images that no C plugin reads |
| others | what the server reads from, where that is no plain file: see `targets/backing.py` |

A raw file or block device is read by nbdkit's C `file` plugin; overlays, qcow2 and foreign NBD
servers through its `nbd` plugin; everything else by `nbd_plugins/image.py`. The server is no child
that must be kept: it has its own session, no descriptor of ours, and outlives us.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from offload import nbd_tls, procs, run
from offload.errors import (
    BusyError,
    CleanupError,
    ConfigError,
    NotFoundError,
    UsageError,
)
from offload.instance import Instance
from offload.model import Exposure, Qcow2Source, RawSource
from offload.nbd_tls import Certificates, Tls
from offload.target import Client, Endpoint, ExportRequest
from targets import backing, command, listen, nbdkit, processes


class NbdTarget:
    """Presents views over NBD: on a unix socket, on a TCP port of the loopback interface, with TLS
    on one of any interface."""

    name = "nbd"

    def __init__(self, instance: Instance) -> None:
        self._config = instance.config.nbd

    def check(self, exposure: Exposure) -> Exposure:
        """Refuse what cannot be served; see `offload.target`.

        Raises UsageError (`bad-transport`, `tcp-only`, `iscsi-only`, `bad-address`, `bad-port`,
        `bad-network`, `allow-for-no-one`, `bad-tls`, `not-loopback`), PrivilegeError,
        UnavailableError (`program-missing`, `port-taken`, `bad-address`), ConfigError
        (`clients-unchecked`, and what `offload.nbd_tls.load` raises).
        """
        transport = exposure.transport or "unix"
        if transport not in {"unix", "tcp"}:
            raise UsageError(
                f"the target nbd has no transport '{transport}'",
                code="bad-transport",
                hint="it has unix and tcp",
            )
        if exposure.initiators or exposure.insecure_network:
            raise UsageError(
                "initiators and insecure networks are for iSCSI",
                code="iscsi-only",
                hint="NBD has TLS and client addresses",
            )
        run.require_program("nbdkit", "nbdkit")
        exposure = replace(exposure, transport=transport)
        return self._check_tcp(exposure) if transport == "tcp" else _check_unix(exposure)

    def _check_tcp(self, asked: Exposure) -> Exposure:
        address = listen.parse_address(asked.address or self._config.address)
        found = replace(
            asked,
            address=str(address),
            allow=listen.parse_networks(asked.allow or self._config.allow),
            tls=asked.tls or self._config.tls,
        )
        listen.check_allow(address, found.allow)
        tls = self._tls(found)
        if not address.is_loopback:
            _check_network(found, tls)
        listen.check_tcp(found.address, found.port, found.allow)
        return found

    def _tls(self, exposure: Exposure) -> Tls | None:
        if exposure.tls in {"", "off"}:
            return None
        if exposure.tls not in {"certificates", "psk"}:
            raise UsageError(
                f"there is no TLS with '{exposure.tls}'",
                code="bad-tls",
                hint="it goes with certificates or psk, or is off",
            )
        return nbd_tls.load(self._config, exposure.tls)

    def export(self, request: ExportRequest) -> Endpoint:
        """Present the image; see `offload.target`.

        Raises what `check` raises, NotFoundError (`source-missing`), UnavailableError
        (`server-failed`), IntegrityError (`size-mismatch`), and whatever opening the image raises
        in the server.
        """
        request = replace(request, exposure=self.check(request.exposure))
        source = request.source
        if isinstance(source, RawSource | Qcow2Source) and not source.path.exists():
            raise NotFoundError(f"there is no {source.path}", code="source-missing")
        program = run.require_program("nbdkit", "nbdkit")
        try:
            request.run_dir.mkdir(parents=True, mode=0o700)
        except FileExistsError:
            raise BusyError(
                f"the folder {request.run_dir} belongs to another view", code="view-exists"
            ) from None
        try:
            return _serve(program, request, self._tls(request.exposure))
        except BaseException:
            self.withdraw(request.run_dir, {})
            raise

    def withdraw(self, run_dir: Path, server: Mapping[str, str]) -> None:
        """Stop the server if it is ours and still lives, remove its files.

        Raises CleanupError if the folder cannot be removed.
        """
        processes.end_servers(run_dir, _ref(server))
        backing.close(run_dir, server)
        _remove(run_dir)

    def alive(self, run_dir: Path, server: Mapping[str, str]) -> bool:
        """Whether the server of this record still runs, and what it reads from, if it has that."""
        ref = _ref(server)
        return ref is not None and ref.alive() and backing.alive(run_dir, server)

    def clients(self, run_dir: Path, server: Mapping[str, str]) -> list[Client]:
        """Who is connected now; nobody where the server is gone."""
        ref = _ref(server)
        if ref is None or not ref.alive():
            return []
        if server.get("port"):
            return processes.tcp_clients(ref.pid, server["address"], int(server["port"]))
        return processes.unix_clients(ref.pid, run_dir / command.SOCKET)

    def monitor(self, run_dir: Path) -> Path:
        """The QMP socket of the daemon behind a writable view; see `offload.target.Movable`."""
        return backing.monitor(run_dir)

    def settled(self, server: Mapping[str, str]) -> dict[str, str]:
        """The record without what served the source."""
        return backing.settled(server)

    def end_source(self, run_dir: Path) -> None:
        """End what served the source."""
        backing.end_source(run_dir)


def _check_unix(exposure: Exposure) -> Exposure:
    if exposure.port is not None:
        raise UsageError(
            "a port goes with the transport tcp only", code="bad-port", hint="leave it out"
        )
    if exposure.address or exposure.allow or exposure.tls not in {"", "off"}:
        raise UsageError(
            "addresses, clients and TLS go with the transport tcp only: a unix socket is open to "
            "its owner alone",
            code="tcp-only",
            hint="leave them out, or say --tcp",
        )
    return replace(exposure, tls="")


def _check_network(exposure: Exposure, tls: Tls | None) -> None:
    """Outside loopback nobody may read a view who has not proved to be allowed to."""
    if tls is None:
        raise UsageError(
            f"{exposure.address} is no loopback address: NBD without TLS has neither "
            "authentication nor encryption",
            code="not-loopback",
            hint="set tls in [nbd] or say --tls; or use 127.0.0.1 or ::1 through an SSH tunnel",
        )
    if isinstance(tls, Certificates) and not (tls.verify_clients or exposure.allow):
        raise ConfigError(
            f"whoever reaches {exposure.address} could read the view: clients are neither "
            "verified nor named",
            code="clients-unchecked",
            hint="set verify_clients = true in [nbd], or name the clients in allow",
        )


def _serve(program: str, request: ExportRequest, tls: Tls | None) -> Endpoint:
    behind: Mapping[str, str] = {}
    if request.writable or isinstance(request.source, Qcow2Source):
        behind = backing.open_socket(request).record
    if request.exposure.transport == "unix":
        record = _start(program, request, (), None)
        uri = command.unix_uri(request.run_dir / command.SOCKET)
        return Endpoint(uri=uri, server={**record, **behind})
    record = _start_on_port(program, request, tls)
    uri = command.tcp_uri(request.exposure.address, int(record["port"]), tls)
    return Endpoint(uri=uri, server={**record, **behind})


def _start_on_port(program: str, request: ExportRequest, tls: Tls | None) -> dict[str, str]:
    """The server is asked what it exports over a second socket, in the view's folder: this process
    need not be one of the clients that are served."""
    exposure = request.exposure
    private = request.run_dir / command.SOCKET
    with ExitStack() as held:
        public = held.enter_context(listen.tcp(exposure.address, exposure.port, exposure.allow))
        port: int = public.getsockname()[1]
        listening = public, held.enter_context(listen.unix(private))
        record = _start(program, request, listening, tls)
    private.unlink()
    return {**record, "address": exposure.address, "port": str(port)}


def _start(
    program: str, request: ExportRequest, listening: tuple[socket.socket, ...], tls: Tls | None
) -> dict[str, str]:
    """Start one server and wait until it serves what was asked; on an error it is ended."""
    folder = request.run_dir
    place = nbdkit.Place(
        address=str(folder / command.SOCKET),
        listening=listening,
        tls=tls,
        pid_file=folder / command.PID_FILE,
        log=folder / command.LOG,
    )
    built = command.build(program, request, tls)
    return nbdkit.start(built, place, request, writable=request.writable).to_strings()


def _ref(server: Mapping[str, str]) -> procs.ProcessRef | None:
    fields = {key: server.get(key, "") for key in ("pid", "start", "boot")}
    return procs.ProcessRef.from_strings(fields)


def _remove(run_dir: Path) -> None:
    """The folder and its files; it has no folders, and whatever has is not a view's."""
    try:
        for path in list(run_dir.iterdir()):
            path.unlink(missing_ok=True)
        run_dir.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CleanupError(
            f"cannot remove {error.filename or run_dir}: {error.strerror}", code="cleanup"
        ) from error
