"""The block device under a view's backstore.

| the view is | the device |
| --- | --- |
| a block device, read-only | itself, where LIO can have it for itself alone and its sectors fit |
| a file, or such a device in use, read-only | a read-only loop device |
| composed (qcow2, backup, NBD), or writable | the kernel's NBD client, on a server of `backing` |

Loop and NBD devices bear the name of the backstore, by which they are known after `kill -9`. A loop
device goes with the backstore; an NBD device is detached.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from offload import kernel_nbd
from offload.blockdev import device_sector_size, device_size
from offload.errors import UsageError
from offload.model import RawSource
from offload.target import ExportRequest
from targets import backing, lio_kernel, lio_loop, nbdkit

_DIRECT, _LOOP, _NBD = "direct", "loop", "nbd"
_ANSWER_S = 30  # for a server under an NBD device; then initiators get an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A block device, and the record of it: strings for the catalog."""

    path: str
    kind: str
    backing: Mapping[str, str] = field(default_factory=dict)

    def to_strings(self) -> dict[str, str]:
        """For the view's server record."""
        return {"device": self.path, "device_kind": self.kind, **self.backing}


@contextmanager
def opened(request: ExportRequest, name: str) -> Iterator[Device]:
    """The device of a view; LIO takes it over within this block.

    Raises UnavailableError, IntegrityError (`size-mismatch`), UsageError (`partial-sector`), and
    what `backing` and `kernel_nbd` raise. What an error leaves is for `close`.
    """
    source = request.source
    if source.size_bytes % source.sector_size:
        raise UsageError(
            f"view {request.name}: {source.size_bytes} bytes are no whole number of sectors of "
            f"{source.sector_size} bytes, and iSCSI knows no other size",
            code="partial-sector",
            hint="mount it over NBD: --target nbd",
        )
    if request.writable or not isinstance(source, RawSource):
        device = _composed(request, name)
        _check_size(device.path, request)
        yield device
        return
    origin = backing.open_file(request).path
    if _fits(origin, source.sector_size):
        # the kernel's own name holds no comma, which is syntax to it
        yield Device(path=os.path.realpath(origin), kind=_DIRECT)
        return
    lio_kernel.load_modules(["loop"])
    with lio_loop.opened(origin, name, source.sector_size) as path:
        _check_size(path, request)
        yield Device(path=path, kind=_LOOP)


def detach(name: str) -> None:
    """Cut an NBD device off its server: requests end with an error at once. Idempotent."""
    device = kernel_nbd.find(name)
    if device is not None:
        kernel_nbd.detach(device)


def alive(server: Mapping[str, str], name: str, number: tuple[int, int] | None) -> bool:
    """Whether the device on record is still this view's, and has this number."""
    path = server.get("device", "")
    try:
        status = os.stat(path)
    except OSError:
        return False
    if number != (os.major(status.st_rdev), os.minor(status.st_rdev)):
        return False
    match server.get("device_kind"):
        case "loop":
            return lio_loop.name_of(Path(path).name) == name
        case "nbd":
            return kernel_nbd.identifier_of(path) == name
        case kind:
            return kind == _DIRECT


def _composed(request: ExportRequest, name: str) -> Device:
    server = backing.open_socket(request)
    path = kernel_nbd.attach(
        server.path,
        identifier=name,
        sector_size=request.source.sector_size,
        read_only=not request.writable,
        timeout_s=_ANSWER_S,
    )
    return Device(path=path, kind=_NBD, backing=server.record)


def _fits(origin: Path, sector_size: int) -> bool:
    """Whether it is a block device with the volume's sectors that nobody else holds."""
    if not origin.is_block_device():
        return False
    try:
        fd = os.open(origin, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return device_sector_size(fd) == sector_size
    finally:
        os.close(fd)


def _check_size(path: str, request: ExportRequest) -> None:
    """Never present something else than was asked for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        nbdkit.check_size(device_size(fd), request)
    finally:
        os.close(fd)
