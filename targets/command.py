"""The command line of the nbdkit that serves a source.

One thread a connection, in place of 16: when a client of nbdkit 1.32 is gone while several threads
have answers for it, the second one that notices ends the whole server, and every other client with
it ("raw_send_socket: Assertion `sock >= 0' failed"). A client that is killed while it reads is
enough. Clients that want parallel requests open several connections, as nbdcopy does.
"""

from __future__ import annotations

import json
import os
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never
from urllib.parse import quote

import offload
from offload.model import (
    BackupSource,
    HomeSource,
    NbdSource,
    Qcow2Source,
    RawSource,
    RbdSource,
    VmfsSource,
)
from offload.nbd_tls import Certificates, PreSharedKeys, Tls
from offload.sources import lun_of, source_to_dict
from offload.target import ExportRequest

SOCKET = "nbd.sock"
PID_FILE = "nbdkit.pid"
LOG = "log"
BASE_SOCKET = "base.sock"
BASE_PID_FILE = "base.pid"
BACKEND_SOCKET = "qemu.sock"
BACKEND_PID_FILE = "qemu-nbd.pid"
BACKEND_LOG = "qemu-log"
OVERLAY_SOCKET = "top.sock"
SOURCE = "source.json"

_PLUGIN = Path(__file__).resolve().parents[1] / "nbd_plugins" / "image.py"
# Preferred and maximum request, in bytes. The minimum is the volume's logical sector size: clients
# take it for theirs. Requests that do not keep to it are served all the same.
_LIMITS = ("blocksize-preferred=4096", "blocksize-maximum=32M", "blocksize-error-policy=allow")
# what AWS's tools read: a store in S3 is opened inside the server
_STORE_ENV = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_EC2_METADATA_DISABLED", "AWS_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to start."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def build(program: str, request: ExportRequest, tls: Tls | None) -> Command:
    """The server of the view.

    Over TCP the server takes listening sockets over, and so no option says where it listens.

    Writes the source's record into the run folder where a plugin needs one.
    """
    folder = request.run_dir
    argv = [*_options(program, folder / PID_FILE), *_tls_options(tls)]
    if request.exposure.transport != "tcp":
        argv += ["--unix", str(folder / SOCKET)]
    if request.writable:
        plugin = _compiled(request, "nbd", f"socket={folder / OVERLAY_SOCKET}")
        return Command(argv=(*argv, *plugin.filters, *plugin.argv))
    plugin = _plugin(request)
    return Command(argv=(*argv, *plugin.filters, "--readonly", *plugin.argv), env=plugin.env)


def build_base(program: str, request: ExportRequest) -> Command:
    """The server of the source alone, read-only, on a socket of its own: behind an overlay, or
    behind another target. Writes what `build` writes."""
    folder = request.run_dir
    argv = _options(program, folder / BASE_PID_FILE)
    plugin = _plugin(request)
    argv += ["--unix", str(folder / BASE_SOCKET), *plugin.filters, "--readonly", *plugin.argv]
    return Command(argv=tuple(argv), env=plugin.env)


def _options(program: str, pid_file: Path) -> list[str]:
    """In the foreground, because a server in the background has no standard error: ours is the log.
    One thread: see above."""
    argv = [program, "--foreground", "--log=stderr", "--pidfile", str(pid_file)]
    return [*argv, "--threads=1"]


def _tls_options(tls: Tls | None) -> tuple[str, ...]:
    """File names only: no secret is on a command line. Without a word nbdkit would take the
    certificates in /etc/pki/nbdkit, and leave TLS to the client."""
    match tls:
        case None:
            return ("--tls=off",)
        case PreSharedKeys():
            return ("--tls=require", f"--tls-psk={tls.path}")
        case Certificates():
            verify = ("--tls-verify-peer",) if tls.verify_clients else ()
            return ("--tls=require", f"--tls-certificates={tls.folder}", *verify)
    assert_never(tls)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plugin:
    argv: tuple[str, ...]
    filters: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


def _plugin(request: ExportRequest) -> _Plugin:
    source = request.source
    match source:
        case RawSource():
            return _compiled(request, "file", f"file={source.path}")
        case Qcow2Source():
            return _compiled(request, "nbd", f"socket={request.run_dir / BACKEND_SOCKET}")
        case HomeSource():
            return _compiled(request, "nbd", f"socket={request.run_dir / OVERLAY_SOCKET}")
        case NbdSource():
            return _compiled(request, "nbd", f"uri={source.uri}")
        case BackupSource() | RbdSource() | VmfsSource():
            return _composed(request)
    assert_never(source)


def _compiled(request: ExportRequest, *plugin: str) -> _Plugin:
    """One of nbdkit's C plugins, which know nothing of sectors: a filter tells the clients."""
    sector = f"blocksize-minimum={request.source.sector_size}"
    return _Plugin(argv=(*plugin, sector, *_LIMITS), filters=("--filter=blocksize-policy",))


def _composed(request: ExportRequest) -> _Plugin:
    """Our own plugin, which reads any source."""
    path = request.run_dir / SOURCE
    _write_source(path, request)
    return _Plugin(
        argv=("python", str(_PLUGIN), f"source={path}"),
        env={"PYTHONPATH": _python_path(), **_store_environment(request)},
    )


def _store_environment(request: ExportRequest) -> dict[str, str]:
    """Where a store's credentials are found, if by the environment: as ours, never as arguments."""
    source = request.source
    if isinstance(source, VmfsSource):
        source = lun_of(source)
    if not isinstance(source, BackupSource):
        return {}
    return {name: os.environ[name] for name in _STORE_ENV if name in os.environ}


def unix_uri(path: Path) -> str:
    """The NBD URI of the default export on a unix socket."""
    return f"nbd+unix:///?socket={quote(str(path))}"


def tcp_uri(address: str, port: int, tls: Tls | None) -> str:
    """The NBD URI of the default export on a TCP port; an IPv6 address goes in brackets.

    With pre-shared keys it names the user where there is only one. Where a client's certificate or
    keys lie is its own to add: `?tls-certificates=`, `?tls-psk-file=`.
    """
    host = f"[{address}]" if ":" in address else address
    if tls is None:
        return f"nbd://{host}:{port}"
    user = ""
    if isinstance(tls, PreSharedKeys) and len(tls.users) == 1:
        (name,) = tls.users
        # one with other characters is the client's own to add, too
        user = f"{name}@" if quote(name, safe="") == name else ""
    return f"nbds://{user}{host}:{port}"


def _write_source(path: Path, request: ExportRequest) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as out:
        json.dump(source_to_dict(request.source), out)


def _python_path() -> str:
    """The project and the packages of its environment, for the system Python inside nbdkit."""
    project = Path(offload.__file__).resolve().parents[1]
    places = (str(project), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return os.pathsep.join(dict.fromkeys(places))
