"""The disks that simulated hosts see: LUNs of production storage are files of this machine, LUNs of
iSCSI targets are really logged in to, read and written with libiscsi."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from offload.testing.libiscsi import Initiator, Login, ScsiError, find_luns

_T = TypeVar("_T")
_CHUNK = 1 << 18  # bytes a WRITE: under what any target takes
_PAGE_IDENTIFICATION = 0x83  # SPC-4, 7.8.6: device identification


class DiskError(Exception):
    """A disk that is not there, or does not do what it was told; `read_only`: for that reason."""

    def __init__(self, message: str, *, read_only: bool = False) -> None:
        super().__init__(message)
        self.read_only = read_only


class Disk(Protocol):
    """A LUN. Offsets and counts are multiples of 512 bytes. Raises DiskError. Thread safe."""

    @property
    def naa(self) -> str:
        """By which hosts know it: `naa.…`."""
        ...

    @property
    def size_bytes(self) -> int:
        """Its capacity."""
        ...

    def pread(self, count: int, offset: int) -> bytes:
        """Read."""
        ...

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write, durable."""
        ...

    def alive(self) -> bool:
        """Whether it answers."""
        ...

    def close(self) -> None:
        """Log out."""
        ...


@dataclass(frozen=True)
class FileDisk:
    """A LUN of production storage: a file that `offload` has as a volume."""

    path: Path
    naa: str

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size

    def pread(self, count: int, offset: int) -> bytes:
        with self._open(os.O_RDONLY) as fd:
            return os.pread(fd.number, count, offset)

    def pwrite(self, data: bytes, offset: int) -> None:
        with self._open(os.O_WRONLY) as fd:
            os.pwrite(fd.number, data, offset)

    def alive(self) -> bool:
        return self.path.exists()

    def close(self) -> None:
        """It has nothing open."""

    def _open(self, flags: int) -> _Descriptor:
        try:
            return _Descriptor(os.open(self.path, flags | os.O_CLOEXEC))
        except OSError as error:
            raise DiskError(str(error)) from error


class _Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> _Descriptor:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A target as a host's static targets name it, with the CHAP that belongs to it."""

    address: str
    port: int
    iqn: str
    login: Login

    def uri(self, lun: int) -> str:
        """Of one of its LUNs, as libiscsi has it."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"iscsi://{host}:{self.port}/{self.iqn}/{lun}"


class IscsiDisk:
    """A LUN of a target, logged in to until `close`: the target sees this host as its client."""

    def __init__(self, target: Target, lun: int) -> None:
        """Raises DiskError."""
        self.target = target
        self.lun = lun
        self._lock = threading.Lock()
        self._session: Initiator | None = None
        try:
            self._session = Initiator(target.uri(lun), target.login, timeout_s=60)
            self.naa = canonical_name(self._session.inquiry(_PAGE_IDENTIFICATION))
            head = self._session.inquiry()
        except ScsiError as error:
            self.close()
            raise DiskError(str(error)) from error
        # SPC-4, 6.6.2: standard INQUIRY: vendor in bytes 8 to 15, product in 16 to 31
        self.vendor, self.product = head[8:16].decode().strip(), head[16:32].decode().strip()
        self.size_bytes = self._session.blocks * self._session.block_size

    def pread(self, count: int, offset: int) -> bytes:
        with self._lock:
            try:
                return self._again(lambda session: session.pread(count, offset))
            except (ScsiError, ctypes.ArgumentError) as error:
                raise DiskError(str(error)) from error

    def pwrite(self, data: bytes, offset: int) -> None:
        def write(session: Initiator) -> None:
            for begin in range(0, len(data), _CHUNK):
                session.pwrite(data[begin : begin + _CHUNK], offset + begin)
            session.flush()

        with self._lock:
            try:
                self._again(write)
            except ScsiError as error:
                read_only = error.sense_key == 7  # SPC-4, table 48: DATA PROTECT
                raise DiskError(str(error), read_only=read_only) from error

    def alive(self) -> bool:
        with self._lock:
            try:
                return bool(self._again(lambda session: session.inquiry()))
            except (DiskError, ScsiError):
                return False

    def fileno(self) -> int:
        """Of its connection; below 0: it has none, or is being used."""
        if not self._lock.acquire(blocking=False):
            return -1
        try:
            return -1 if self._session is None else self._session.fileno()
        finally:
            self._lock.release()

    def attend(self) -> bool:
        """Answer what the target asks by itself; False: it has hung up. Whoever uses the disk just
        now does it instead."""
        if not self._lock.acquire(blocking=False):
            return True
        try:
            return self._session is None or self._session.attend()
        finally:
            self._lock.release()

    def close(self) -> None:
        with self._lock:
            session, self._session = self._session, None
            if session is not None:
                session.close()

    def _again(self, work: Callable[[Initiator], _T]) -> _T:
        """In the session, or, as initiators do, once more in a new one where that has broken:
        libiscsi loses count of its commands when a target asks whether it is there (NOP-In)."""
        session = self._open()
        try:
            return work(session)
        except ScsiError as error:
            if error.sense_key is not None:
                raise
        session.vanish()
        self._session = None
        self._session = Initiator(self.target.uri(self.lun), self.target.login, timeout_s=60)
        if canonical_name(self._session.inquiry(_PAGE_IDENTIFICATION)) != self.naa:
            raise ScsiError(f"{self.target.iqn} has another LUN now")
        return work(self._session)

    def _open(self) -> Initiator:
        if self._session is None:
            raise DiskError(f"{self.target.iqn} is logged out of")
        return self._session


def luns_of(target: Target) -> list[int]:
    """The LUNs of a target that are disks, by REPORT LUNS. Raises DiskError."""
    try:
        return find_luns(target.uri(0), target.login, timeout_s=60)
    except ScsiError as error:
        raise DiskError(str(error)) from error


def canonical_name(page: bytes) -> str:
    """The name of a LUN from its device identification page: a host takes the NAA designator of the
    logical unit, without one the EUI-64, then T10 vendor identification.

    Source: vSphere Storage, "Storage device names and identifiers". Page: SPC-4, 7.8.6.
    """
    found: dict[int, bytes] = {}
    offset = 4
    while offset + 4 <= len(page):
        kind, length = page[offset + 1], page[offset + 3]
        if kind >> 4 & 3 == 0:  # associated with the logical unit
            found.setdefault(kind & 0xF, page[offset + 4 : offset + 4 + length])
        offset += 4 + length
    if 3 in found:
        return f"naa.{found[3].hex()}"
    if 2 in found:
        return f"eui.{found[2].hex()}"
    return "t10." + found.get(1, b"unknown").decode(errors="replace").strip().replace(" ", "_")
