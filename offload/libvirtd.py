"""A libvirt daemon, and the guest agent of a domain through it. By libvirt's own bindings.

The guardian loads this too: nothing but the standard library, the errors, and the bindings, which
belong to Debian's Python (package python3-libvirt). A link that has died is noticed by keep-alive
messages, so no call waits for ever on the network; a call waits for as long as the guest's agent
takes: one that says nothing at all is given up by libvirt after 5 s, a freeze that hangs in the
guest is not (https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainFSFreeze).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from offload.errors import NotFoundError, OffloadError, PrivilegeError, UnavailableError

T = TypeVar("T")

_KEEPALIVE_S = 5
_KEEPALIVE_COUNT = 3
_AGENT_S = 10.0  # for what the agent answers at once
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_MAC = re.compile(r"<mac address=['\"]([0-9A-Fa-f:]{17})['\"]")

# of virErrorNumber, libvirt/virterror.h
_NO_CONNECTION = frozenset({5, 6, 38, 39})  # NO_CONNECT, INVALID_CONN, SYSTEM_ERROR, RPC
_DENIED = frozenset({29, 45, 79, 88, 94})  # OPERATION_DENIED, AUTH_…, ACCESS_DENIED
_NO_SUPPORT = 3
_NO_DOMAIN = 42
_NOT_RUNNING = 55  # OPERATION_INVALID
_BUSY = 68  # OPERATION_TIMEOUT: another job has the domain
_NO_AGENT = 74  # ARGUMENT_UNSUPPORTED: no channel in the domain's definition
_AGENT_SILENT = frozenset({86, 97})  # AGENT_UNRESPONSIVE, AGENT_UNSYNCED

_loading = threading.Lock()


class DomainState(StrEnum):
    """What a domain does, as far as it matters for its writers."""

    RUNNING = "running"
    OFF = "shut off"
    MIGRATING = "being migrated"
    PAUSED = "paused"
    STOPPING = "shutting down"
    CRASHED = "crashed"
    ASLEEP = "suspended by its guest"
    UNKNOWN = "in no known state"


# of virDomainState and virDomainShutoffReason, libvirt/libvirt-domain.h
_STATES = {
    1: DomainState.RUNNING, 2: DomainState.RUNNING, 3: DomainState.PAUSED,
    4: DomainState.STOPPING, 5: DomainState.OFF, 6: DomainState.CRASHED, 7: DomainState.ASLEEP,
}  # fmt: skip
_OFF_BY_ITSELF = 1
_OFF_MIGRATED = 4
_MIGRATIONS = frozenset({4, 5})  # virDomainJobOperation: MIGRATION_IN, MIGRATION_OUT


class DomainGoneError(UnavailableError):
    """The domain does not run (any more), or is not there."""

    code = "domain-gone"


def bindings() -> str | None:
    """The folder of libvirt's Python bindings, or None where they are not installed."""
    found = importlib.util.find_spec("libvirt")
    return str(Path(found.origin).parent) if found is not None and found.origin else None


def _load(folder: str | None) -> tuple[Any, Any]:
    """The bindings; `folder` where they may be, for a Python that was started without site
    packages."""
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
    with _loading:  # VMs are looked at side by side, and there is to be one thread for events
        return _bindings()


@cache
def _bindings() -> tuple[Any, Any]:
    """libvirt and libvirt_qemu, with the one thread that answers keep-alives."""
    try:
        import libvirt
        import libvirt_qemu
    except ImportError as error:
        raise UnavailableError(
            "libvirt's Python bindings are not installed",
            code="program-missing",
            hint="install them: apt-get install python3-libvirt",
        ) from error
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # else it prints them
    libvirt.virEventRegisterDefaultImpl()

    def serve() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=serve, name="libvirt events", daemon=True).start()
    return libvirt, libvirt_qemu


class Libvirt:
    """A connection to a daemon. It can be used from several threads."""

    def __init__(self, uri: str, folder: str | None = None) -> None:
        """Raises UnavailableError (`libvirt-unavailable`), PrivilegeError."""
        self.uri = uri
        self._libvirt, self._qemu = _load(folder)
        with self.translated("cannot be reached"):
            self._connection = self._libvirt.open(_without_questions(uri))
        with contextlib.suppress(self._libvirt.libvirtError):  # drivers without a network
            self._connection.setKeepAlive(_KEEPALIVE_S, _KEEPALIVE_COUNT)

    def domain(self, name: str) -> Domain:
        """By name or UUID. Raises NotFoundError (`unknown-domain`)."""
        with self.translated(f"has no domain {name}"):
            try:
                return Domain(self, self._connection.lookupByName(name))
            except self._libvirt.libvirtError as error:
                if error.get_error_code() != _NO_DOMAIN or not _UUID.fullmatch(name):
                    raise
            return Domain(self, self._connection.lookupByUUIDString(name))

    def alive(self) -> bool:
        """Whether the connection still is one."""
        try:
            return bool(self._connection.isAlive() == 1)
        except self._libvirt.libvirtError:
            return False

    def close(self) -> None:
        """Never raises."""
        with contextlib.suppress(self._libvirt.libvirtError):
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def local(self) -> bool:
        """Whether the daemon is of this machine, as far as the URI says."""
        return not urlsplit(self.uri).hostname

    @property
    def connection(self) -> Any:
        """libvirt's own; its calls belong into `translated` or `about`."""
        return self._connection

    @property
    def api(self) -> Any:
        """libvirt's module."""
        return self._libvirt

    @contextlib.contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Translate errors of calls to the daemon: `libvirt at URI WHAT`."""
        try:
            yield
        except self._libvirt.libvirtError as error:
            raise _error(error, f"libvirt at {self.uri} {what}") from error

    def optional(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        """The answer to a call; `otherwise` where the daemon has no driver for that kind of
        thing (storage pools, networks)."""
        with self.translated(what):
            try:
                return call()
            except self._libvirt.libvirtError as error:
                if error.get_error_code() == _NO_SUPPORT:
                    return otherwise
                raise

    # -- for Domain ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def about(self, domain: str) -> Iterator[None]:
        """Translate errors of calls about a domain."""
        try:
            yield
        except self._libvirt.libvirtError as error:
            raise _error(error, f"domain {domain}") from error

    def job(self, domain: Any) -> dict[str, Any]:
        """What it is busy with; empty where the driver knows no jobs."""
        try:
            return dict(domain.jobStats())
        except self._libvirt.libvirtError as error:
            if error.get_error_code() == _NO_SUPPORT:
                return {}
            raise

    def agent(self, domain: Any, command: str, timeout_s: float) -> str:
        """One command to the guest agent, as it is. libvirt waits for whole seconds."""
        answer: str = self._qemu.qemuAgentCommand(domain, command, max(1, int(timeout_s)), 0)
        return answer


class Domain:
    """One domain of a connection."""

    def __init__(self, link: Libvirt, handle: Any) -> None:
        self._link = link
        self._handle = handle
        self.name: str = handle.name()
        self.uuid: str = handle.UUIDString()

    @property
    def handle(self) -> Any:
        """libvirt's own; its calls belong into `Libvirt.about`."""
        return self._handle

    def state(self) -> DomainState:
        """What it does now."""
        with self._link.about(self.name):
            state = _STATES.get(self._handle.state()[0], DomainState.UNKNOWN)
            if state is DomainState.RUNNING and self._migrating():
                return DomainState.MIGRATING
        return state

    def _migrating(self) -> bool:
        return self._link.job(self._handle).get("operation") in _MIGRATIONS

    def shut_itself_down(self) -> bool:
        """Of one that is off: whether its guest ended in good order, as far as libvirt knows."""
        with self._link.about(self.name):
            return bool(self._handle.state()[1] == _OFF_BY_ITSELF)

    def migrated_away(self) -> bool:
        """Of one that is off: whether it runs on another host now."""
        with self._link.about(self.name):
            return bool(self._handle.state()[1] == _OFF_MIGRATED)

    def macs(self) -> frozenset[str]:
        """Of its network cards, by its definition."""
        with self._link.about(self.name):
            return frozenset(_MAC.findall(self._handle.XMLDesc()))

    def agent(self, command: str, timeout_s: float = _AGENT_S) -> Any:
        """The answer (`return`) of the guest agent to a command without arguments."""
        with self._link.about(self.name):
            text = self._link.agent(self._handle, json.dumps({"execute": command}), timeout_s)
        try:
            return json.loads(text)["return"]
        except (ValueError, KeyError, TypeError) as error:
            raise UnavailableError(
                f"the guest agent of domain {self.name} answers {command} with nonsense",
                code="agent-protocol",
            ) from error

    def frozen(self, timeout_s: float = _AGENT_S) -> bool:
        """What the guest agent says of itself."""
        return bool(self.agent("guest-fsfreeze-status", timeout_s) == "frozen")

    def freeze(self, mounts: Sequence[str]) -> int:
        """Freeze file systems (none named: all that can be); how many were."""
        with self._link.about(self.name):
            return int(self._handle.fsFreeze(list(mounts) or None))

    def thaw(self) -> int:
        """Thaw all file systems; how many had been frozen."""
        with self._link.about(self.name):
            return int(self._handle.fsThaw())


def _without_questions(uri: str) -> str:
    """ssh must never ask a terminal (https://libvirt.org/uri.html)."""
    scheme = uri.partition(":")[0]
    if not scheme.endswith(("+ssh", "+libssh", "+libssh2")) or "no_tty=" in uri:
        return uri
    return uri + ("&" if "?" in uri else "?") + "no_tty=1"


def _error(error: Any, what: str) -> OffloadError:
    """libvirt's error as ours."""
    number = error.get_error_code()
    said = str(error.get_error_message() or error)
    if number == _NO_DOMAIN:
        return NotFoundError(
            what if "has no" in what else f"{what} is not there any more",
            code="unknown-domain",
            hint="see: virsh list --all",
        )
    if number in _DENIED:
        return PrivilegeError(f"{what}: {said}", code="libvirt-denied")
    if number == _NOT_RUNNING:
        return DomainGoneError(f"{what}: {said}")
    if number == _BUSY:
        return UnavailableError(f"{what} is busy: {said}", code="domain-busy")
    if number == _NO_AGENT:
        return UnavailableError(
            f"{what} has no guest agent: {said}",
            code="agent-missing",
            hint="give it a channel org.qemu.guest_agent.0, and its guest qemu-guest-agent",
        )
    if number in _AGENT_SILENT:
        return UnavailableError(
            f"{what}: its guest agent does not answer: {said}",
            code="agent-timeout",
            hint="is qemu-guest-agent running in the guest?",
        )
    if number in _NO_CONNECTION:
        return UnavailableError(f"{what}: {said}", code="libvirt-unavailable")
    return UnavailableError(f"{what}: {said}", code="libvirt-failed")
