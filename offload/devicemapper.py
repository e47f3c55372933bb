"""The kernel's device-mapper, by ioctl: what it really has, whatever a metadata file says.

No program starts, so that it can be asked while writers are held. Formats: linux/dm-ioctl.h, and
the kernel's Documentation/admin-guide/device-mapper/thin-provisioning.rst for thin pools. Devices
are named by their device-mapper uuid. All of it needs root.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from offload.errors import BusyError, OffloadError, PrivilegeError, UnavailableError

CONTROL = "/dev/mapper/control"
SECTOR_BYTES = 512

# dm_ioctl has three numbers of version, then data_size, data_start, target_count, open_count,
# flags, event_nr, padding, dev; name and uuid with their final zeros
_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")  # sector_start, length, status, next, target_type
_MESSAGE = struct.Struct("=Q")  # sector, then the text
_VERSION = (4, 0, 0)
_BUFFER = 16 << 10
_IOCTL = 0xC0000000 | _HEADER.size << 16 | 0xFD << 8  # _IOWR(0xfd, number, struct dm_ioctl)
_DEV_CREATE, _DEV_REMOVE, _DEV_STATUS, _TABLE_LOAD, _TABLE_STATUS, _TARGET_MSG = 3, 4, 7, 9, 12, 14
_READONLY, _SUSPENDED, _STATUS_TABLE = 1 << 0, 1 << 1, 1 << 4
_BUFFER_FULL, _NOFLUSH, _DEFERRED_REMOVE = 1 << 8, 1 << 11, 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A mapped device: its number, and whether it is suspended. `opened`: by how many."""

    name: str
    number: tuple[int, int]
    suspended: bool
    opened: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One line of a table or of a status. In sectors of 512 bytes."""

    kind: str
    start: int
    length: int
    text: str


def available() -> bool:
    """Whether this kernel has device-mapper, loaded."""
    try:
        with open("/proc/misc", encoding="ascii") as misc:
            return any(line.split()[1] == "device-mapper" for line in misc)
    except OSError:
        return False


def find(uuid: str) -> Device | None:
    """The device of this uuid, or None."""
    return _device(uuid=uuid)


def find_named(name: str) -> Device | None:
    """The device of this name, or None."""
    return _device(name=name)


def _device(*, name: str = "", uuid: str = "") -> Device | None:
    try:
        header = _call(_DEV_STATUS, name=name, uuid=uuid)[0]
    except _NoDeviceError:
        return None
    return Device(
        name=_text(header[11]),
        number=(os.major(header[10]), os.minor(header[10])),
        suspended=bool(header[7] & _SUSPENDED),
        opened=header[6],
    )


def table(uuid: str) -> list[Target]:
    """The live table; empty where there is no such device."""
    return _targets(uuid, _STATUS_TABLE)


def status(uuid: str) -> list[Target]:
    """What the targets say of themselves, without a flush; empty where there is no such device."""
    return _targets(uuid, _NOFLUSH)


def message(uuid: str, text: str) -> None:
    """Send a message to the first target. Raises BusyError (`dm-busy`), UnavailableError
    (`dm-failed`, `dm-missing`)."""
    _call(_TARGET_MSG, uuid=uuid, payload=_MESSAGE.pack(0) + text.encode() + b"\0")


def loads(name: str, target: Target) -> bool:
    """Whether the kernel accepts this target: a table is loaded into a read-only device of this
    name, never used, and goes with the device at once."""
    payload = _TARGET.pack(target.start, target.length, 0, 0, target.kind.encode())
    payload += target.text.encode() + b"\0"
    payload += bytes(-len(payload) % 8)
    _call(_DEV_CREATE, name=name)
    try:
        _call(_TABLE_LOAD, name=name, flags=_READONLY, payload=payload, targets=1)
    except _RefusedError:
        return False
    finally:
        remove(name)
    return True


def remove(name: str) -> None:
    """Remove a device by its name; one that is open goes when it is closed. Idempotent."""
    try:
        _call(_DEV_REMOVE, name=name, flags=_DEFERRED_REMOVE)
    except _NoDeviceError:
        return


class _NoDeviceError(UnavailableError):
    code = "dm-missing"


class _RefusedError(UnavailableError):
    code = "dm-failed"


def _targets(uuid: str, flags: int) -> list[Target]:
    try:
        header, data = _call(_TABLE_STATUS, uuid=uuid, flags=flags)
    except _NoDeviceError:
        return []
    found, at = [], 0
    for _ in range(header[5]):
        start, length, _, following, kind = _TARGET.unpack_from(data, at)
        text = _text(data[at + _TARGET.size : following])
        found.append(Target(kind=_text(kind), start=start, length=length, text=text))
        at = following  # counted from the first target of all
    return found


def _call(
    number: int,
    *,
    name: str = "",
    uuid: str = "",
    flags: int = 0,
    payload: bytes = b"",
    targets: int = 0,
) -> tuple[tuple[int, ...], bytes]:
    """One ioctl; the header's fields, and what follows it."""
    size = _BUFFER
    while True:
        header = _HEADER.pack(
            *_VERSION, size, _HEADER.size, targets, 0, flags, 0, 0, 0, name.encode(), uuid.encode()
        )
        buffer = bytearray(header + payload + bytes(size - len(header) - len(payload)))
        try:
            fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _IOCTL | number, buffer)
            finally:
                os.close(fd)
        except OSError as error:
            raise _translated(error, name or uuid) from error
        fields = _HEADER.unpack_from(buffer)
        if not fields[7] & _BUFFER_FULL:
            return fields, bytes(buffer[fields[4] : fields[3]])
        size *= 2


def _translated(error: OSError, what: str) -> OffloadError:
    if error.errno in {errno.EACCES, errno.EPERM}:
        return PrivilegeError("device-mapper needs root", code="needs-root", hint="run as root")
    if error.errno == errno.ENXIO:
        return _NoDeviceError(f"there is no device-mapper device {what}")
    if error.errno == errno.EBUSY:
        return BusyError(f"the device-mapper device {what} is in use", code="dm-busy")
    if error.errno in {errno.ENOENT, errno.ENODEV}:
        return UnavailableError(
            "this kernel has no device-mapper",
            code="no-device-mapper",
            hint="load it: modprobe dm-thin-pool; a kernel without modules needs it built in",
        )
    return _RefusedError(f"device-mapper refused {what}: {error.strerror}")


def _text(raw: object) -> str:
    return bytes(raw).partition(b"\0")[0].decode() if isinstance(raw, bytes) else ""
