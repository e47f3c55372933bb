"""One nbdkit: its start, its readiness, what its last words mean."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload import errors, procs, run
from offload.errors import IntegrityError, OffloadError, UnavailableError
from offload.model import BackupSource, RbdSource, VmfsSource
from offload.nbd_tls import Tls
from offload.target import ExportRequest
from targets import handshake
from targets.command import Command

_READY_S = 30.0  # of a busy machine
_GRACE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a server answers, and its files."""

    address: handshake.Address
    listening: tuple[socket.socket, ...] = ()  # none: it makes its own, by its command line
    tls: Tls | None = None
    pid_file: Path
    log: Path


def start(
    built: Command, place: Place, request: ExportRequest, *, writable: bool
) -> procs.ProcessRef:
    """Start one server and wait until it serves what was asked; on an error it is ended.

    It takes over the sockets in `place.listening`, which are closed here. Raises UnavailableError
    (`server-failed`, `program-missing`), IntegrityError (`size-mismatch`), and whatever opening the
    image raises in the server.
    """
    fd = os.open(
        place.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
    )
    sockets = [sock.fileno() for sock in place.listening]
    try:
        pid = run.spawn_detached(built.argv, output=fd, env=built.env, listening=sockets)
    finally:
        os.close(fd)
        for sock in place.listening:  # or whoever connects would wait for a server that has ended
            sock.close()
    ref = procs.ref_of(pid)
    if ref is None:
        raise _explain(place, request)
    try:
        check_export(_wait_ready(ref, place, request), request, writable=writable)
    except BaseException:
        ref.end(_GRACE_S)
        raise
    return ref


def check_export(export: handshake.Export, request: ExportRequest, *, writable: bool) -> None:
    """Never present something else than was asked for."""
    check_size(export.size_bytes, request)
    if export.read_only is writable or export.block_size_minimum != request.source.sector_size:
        raise UnavailableError(
            f"the server of view {request.name} does not keep to what was asked of it "
            f"(read-only {export.read_only}, sectors of {export.block_size_minimum} bytes)",
            code="server-failed",
        )


def check_size(size_bytes: int, request: ExportRequest) -> None:
    """Refuse an image that is not as long as its record says: IntegrityError (`size-mismatch`)."""
    if size_bytes != request.source.size_bytes:
        raise IntegrityError(
            f"view {request.name} would show {size_bytes} bytes, "
            f"{request.source.size_bytes} are on record",
            code="size-mismatch",
            hint="the image was changed behind our back",
        )


def _wait_ready(server: procs.ProcessRef, place: Place, request: ExportRequest) -> handshake.Export:
    """Ask what is exported until the server answers or ends."""
    until = time.monotonic() + _READY_S
    while (left := until - time.monotonic()) > 0:
        if not server.alive():
            raise _explain(place, request)
        if place.pid_file.exists():
            try:
                return handshake.ask(place.address, tls=place.tls, timeout_s=left)
            except UnavailableError as error:
                raise _explain(place, request, error.message) from error
            except OSError:
                pass  # it listens but does not serve yet, or it has just ended
        time.sleep(0.002)
    raise UnavailableError(
        f"the server of view {request.name} did not answer within {_READY_S:g} s",
        code="server-failed",
        hint=_last_words(place),
    )


def _explain(place: Place, request: ExportRequest, seen: str = "") -> OffloadError:
    """What the server's last words mean; `seen` is how it looked from here."""
    words = _read_log(place)
    for line in words.splitlines():
        if line.startswith("offload-error "):
            return _raised_in_server(json.loads(line.removeprefix("offload-error ")))
    composed = isinstance(request.source, BackupSource | RbdSource | VmfsSource)
    if composed and "nbdkit-python-plugin.so" in words:
        return UnavailableError(
            "nbdkit has no Python plugin here",
            code="program-missing",
            hint="install it: apt-get install nbdkit-plugin-python",
        )
    said = "; ".join(text for text in (seen, _last_words(place)) if text)
    return UnavailableError(
        f"the server of view {request.name} failed: {said or 'it said nothing'}",
        code="server-failed",
    )


def _raised_in_server(record: Mapping[str, str]) -> OffloadError:
    """An error of opening the image, as it was raised inside the server."""
    family = getattr(errors, record["family"], None)
    made = family if isinstance(family, type) and issubclass(family, OffloadError) else OffloadError
    return made(record["message"], hint=record["hint"], code=record["code"])


def _read_log(place: Place) -> str:
    with contextlib.suppress(OSError):
        return place.log.read_text(errors="replace").strip()
    return ""


def _last_words(place: Place) -> str:
    lines = _read_log(place).splitlines()
    return lines[-1].strip() if lines else ""
