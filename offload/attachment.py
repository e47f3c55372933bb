"""A view as a block device: how it is made, found again, mended and ended.

Everything works from an `Attachment` alone, whether or not it was ever carried out: that is what
the journal keeps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from offload import kernel_nbd, nbd_tunnel, openiscsi
from offload.endpoint import IscsiEndpoint, NbdEndpoint, parse
from offload.errors import BusyError, OffloadError, UnavailableError
from offload.iscsi import Chap
from offload.model import ConnectionKind
from offload.nbd_export import Address

TIMEOUT_S = 30

_CONNECTIONS_MAX = 4  # more gained nothing with as many cores
_MEND_S = 15.0  # for iscsid to log in again, for the kernel to notice that a server has gone
_BLOCK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """Where from, and under which name. Nothing in it is secret."""

    uri: str
    identifier: str  # of a kernel NBD device
    folder: Path  # of a TLS tunnel, if there is one
    timeout_s: int

    @property
    def kind(self) -> ConnectionKind:
        """What makes the block device."""
        nbd = isinstance(parse(self.uri), NbdEndpoint)
        return ConnectionKind.NBD if nbd else ConnectionKind.ISCSI

    def to_strings(self) -> dict[str, str]:
        """For the journal and the catalog."""
        return {
            "uri": self.uri,
            "identifier": self.identifier,
            "folder": str(self.folder),
            "timeout_s": str(self.timeout_s),
        }

    @classmethod
    def from_strings(cls, fields: Mapping[str, str]) -> Attachment:
        """The inverse of `to_strings`."""
        return cls(
            uri=fields["uri"],
            identifier=fields["identifier"],
            folder=Path(fields["folder"]),
            timeout_s=int(fields["timeout_s"]),
        )


def check(wanted: Attachment) -> None:
    """Refuse what `attach` would refuse before it changes anything.

    Raises PrivilegeError, UnavailableError (`module-missing`, `program-missing`), BusyError
    (`already-connected`: somebody else is logged in to this target, or set it up).
    """
    match parse(wanted.uri):
        case NbdEndpoint():
            kernel_nbd.check()
        case IscsiEndpoint() as endpoint:
            openiscsi.check()
            if openiscsi.known(endpoint):
                raise BusyError(
                    f"open-iscsi has {endpoint.iqn} at {endpoint.portal} already, and not from us",
                    code="already-connected",
                    hint=f"iscsiadm -m node -T {endpoint.iqn} -u; iscsiadm -m node "
                    f"-T {endpoint.iqn} -o delete",
                )


def attach(
    wanted: Attachment, chap: Chap | None, *, sector_size: int | None, read_only: bool
) -> str:
    """Make the block device; its path. What an error leaves is for `detach`.

    Raises what `kernel_nbd.attach` and `openiscsi.login` raise, and ConfigError
    (`tls-files-missing`), UnavailableError (`tls-failed`).
    """
    match parse(wanted.uri):
        case IscsiEndpoint() as endpoint:
            return openiscsi.login(endpoint, chap, timeout_s=wanted.timeout_s)
        case NbdEndpoint() as endpoint:
            address, export = _served(wanted, endpoint)
            try:
                return kernel_nbd.attach(
                    address,
                    identifier=wanted.identifier,
                    sector_size=sector_size,
                    read_only=read_only,
                    export=export,
                    connections=_connections(),
                    timeout_s=wanted.timeout_s,
                )
            except OffloadError as error:
                raise _explained(wanted, endpoint, error) from error


def detach(wanted: Attachment) -> None:
    """End it, half made or whole, whoever uses it. Idempotent."""
    match parse(wanted.uri):
        case IscsiEndpoint() as endpoint:
            openiscsi.logout(endpoint)
        case NbdEndpoint():
            device = kernel_nbd.find(wanted.identifier)
            if device is not None:
                kernel_nbd.detach(device)
            nbd_tunnel.stop(wanted.folder)


def find(wanted: Attachment) -> str | None:
    """Its block device, or None."""
    match parse(wanted.uri):
        case IscsiEndpoint() as endpoint:
            return openiscsi.find_disk(endpoint)
        case NbdEndpoint():
            return kernel_nbd.find(wanted.identifier)


def mend(wanted: Attachment, device: str) -> bool:
    """Have a device answer again whose server was gone for a while; whether it needed that.

    Raises UnavailableError (`server-gone`, `session-lost`, …).
    """
    match parse(wanted.uri):
        case IscsiEndpoint() as endpoint:
            return _mend_session(endpoint)
        case NbdEndpoint() as endpoint:
            return _mend_nbd(wanted, endpoint, device)


def answers(device: str) -> bool:
    """Whether its first block can be read now; not from memory."""
    buffer = mmap(-1, _BLOCK)
    try:
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            return os.preadv(fd, [buffer], 0) > 0
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        buffer.close()


def _mend_nbd(wanted: Attachment, endpoint: NbdEndpoint, device: str) -> bool:
    address, export = _address(wanted, endpoint)
    if endpoint.tls is not None and not (nbd_tunnel.alive(wanted.folder) and answers(device)):
        address = nbd_tunnel.start(wanted.folder, endpoint)
    until = time.monotonic() + _MEND_S
    while True:
        try:
            taken = kernel_nbd.reconnect(
                device,
                address,
                identifier=wanted.identifier,
                export=export,
                connections=_connections(),
            )
        except OffloadError as error:
            raise _explained(wanted, endpoint, error) from error
        if taken or answers(device):
            return taken > 0
        if time.monotonic() > until:  # it has answered with an error; its connections are alive
            raise UnavailableError(
                f"{device} gives errors, but its server answers", code="no-device"
            )


def _mend_session(endpoint: IscsiEndpoint) -> bool:
    if openiscsi.logged_in(endpoint):
        return False
    if not openiscsi.wait_logged_in(endpoint, _MEND_S):
        raise UnavailableError(
            f"iscsid did not log in again to {endpoint.iqn} within {_MEND_S:g} s",
            code="session-lost",
            hint="see whether the view is served (offload views); then: offload recover",
        )
    return True


def _served(wanted: Attachment, endpoint: NbdEndpoint) -> tuple[Address, str]:
    """Where the kernel connects to; a tunnel is started."""
    if endpoint.tls is not None:
        nbd_tunnel.start(wanted.folder, endpoint)
    return _address(wanted, endpoint)


def _address(wanted: Attachment, endpoint: NbdEndpoint) -> tuple[Address, str]:
    if endpoint.tls is not None:
        return nbd_tunnel.socket_in(wanted.folder), ""
    return endpoint.address, endpoint.export


def _explained(wanted: Attachment, endpoint: NbdEndpoint, error: OffloadError) -> OffloadError:
    return error if endpoint.tls is None else nbd_tunnel.explain(wanted.folder, error)


def _connections() -> int:
    return min(_CONNECTIONS_MAX, len(os.sched_getaffinity(0)))
