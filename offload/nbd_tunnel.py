"""TLS for the kernel's NBD client, which has none: an nbdkit of ours is the client of the server,
and serves what that serves on a private unix socket.

| in the folder | |
| --- | --- |
| `sock` | the socket |
| `pid` | written by nbdkit when it listens |
| `log` | what nbdkit says |

It outlives us. nbdkit opens a connection to the server for each one that it gets.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from offload import procs, run
from offload.endpoint import NbdEndpoint, TlsClient
from offload.errors import CleanupError, ConfigError, OffloadError, UnavailableError

_SOCKET, _PID_FILE, _LOG = "sock", "pid", "log"
_READY_S = 10.0
_GRACE_S = 0.5


def start(folder: Path, endpoint: NbdEndpoint) -> Path:
    """Start it in a folder of its own, which is made; the socket. On an error nothing is left.

    Raises ConfigError (`tls-files-missing`), UnavailableError (`program-missing`, `server-failed`).
    """
    program = run.require_program("nbdkit", "nbdkit")
    stop(folder)
    try:
        folder.mkdir(parents=True, mode=0o700)
        _start(program, folder, endpoint)
    except BaseException:
        stop(folder)
        raise
    return socket_in(folder)


def socket_in(folder: Path) -> Path:
    """Where the tunnel of this folder listens."""
    return folder / _SOCKET


def stop(folder: Path) -> None:
    """End whatever serves this folder, and remove it. Idempotent."""
    for ref in _find(folder):
        ref.end(_GRACE_S)
    try:
        for path in list(folder.iterdir()):
            path.unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CleanupError(f"cannot remove {folder}: {error.strerror}", code="cleanup") from error


def explain(folder: Path, error: OffloadError) -> OffloadError:
    """What nbdkit had to say when the server behind it could not be opened; else the error."""
    words = _last_words(folder)
    if not words:
        return error
    return UnavailableError(
        f"no TLS connection to the NBD server: {words}",
        code="tls-failed",
        hint="the client's certificates or key must fit the server's",
    )


def _start(program: str, folder: Path, endpoint: NbdEndpoint) -> None:
    argv = [program, "--foreground", "--log=stderr", "--pidfile", str(folder / _PID_FILE)]
    argv += ["--unix", str(folder / _SOCKET), "nbd", *_plugin(endpoint)]
    log = os.open(folder / _LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        pid = run.spawn_detached(argv, output=log)
    finally:
        os.close(log)
    ref = procs.ref_of(pid)
    until = time.monotonic() + _READY_S
    while not (folder / _PID_FILE).exists():
        if ref is None or not ref.alive() or time.monotonic() > until:
            raise UnavailableError(
                f"nbdkit, for TLS, failed: {_last_words(folder) or 'it said nothing'}",
                code="server-failed",
            )
        time.sleep(0.005)


def _plugin(endpoint: NbdEndpoint) -> list[str]:
    """Parameters of nbdkit-nbd-plugin(1). Files only, so that no secret is on a command line."""
    if not isinstance(endpoint.address, tuple) or endpoint.tls is None:
        raise ValueError(f"no TLS over {endpoint.address}")
    host, port = endpoint.address
    where = [f"hostname={host}", f"port={port}", f"export={endpoint.export}", "tls=require"]
    return where + _credentials(endpoint.tls)


def _credentials(tls: TlsClient) -> list[str]:
    if tls.pre_shared:
        if tls.psk is None or not tls.psk.is_file():
            raise _missing("pre-shared key", tls.psk, "[nbd] psk", "tls-psk-file")
        user = [f"tls-username={tls.user}"] if tls.user else []
        return [f"tls-psk={tls.psk}", *user]
    if tls.certificates is None or not (tls.certificates / "ca-cert.pem").is_file():
        raise _missing("ca-cert.pem", tls.certificates, "[nbd] certificates", "tls-certificates")
    return [f"tls-certificates={tls.certificates}"]


def _missing(what: str, place: Path | None, key: str, parameter: str) -> ConfigError:
    where = "configured" if place is None else f"in {place}"
    return ConfigError(
        f"no {what} is {where}",
        code="tls-files-missing",
        hint=f"set {key}, or add ?{parameter}=PATH to the URI",
    )


def _find(folder: Path) -> list[procs.ProcessRef]:
    """By command line: also one whose start was cut off before it wrote its pid."""
    return procs.find_running("nbdkit", str(folder / _PID_FILE))


def alive(folder: Path) -> bool:
    """Whether it runs."""
    return bool(_find(folder))


def _last_words(folder: Path) -> str:
    with contextlib.suppress(OSError):
        lines = (folder / _LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""
