"""An iSCSI initiator for tests: libiscsi in this process, so that a test sees each SCSI answer.

Layout of `scsi_task`: include/scsi-lowlevel.h of libiscsi 1.19 (its library is libiscsi.so.7).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import socket
from dataclasses import dataclass
from functools import cache
from typing import Any, Self
from urllib.parse import urlsplit

_SESSION_NORMAL = 2  # include/iscsi.h: ISCSI_SESSION_NORMAL
_GOOD = 0  # SAM-5, 5.3.1
_CHECK_CONDITION = 2
_CHUNK = 1 << 18  # bytes a READ: under what any target takes
_numbers = itertools.count(1)


class ScsiError(Exception):
    """A command that the target refused, or that never got there (`sense_key` is None then).

    `sense_key` as in SPC-4, table 48: 5 ILLEGAL REQUEST, 7 DATA PROTECT.
    """

    def __init__(self, message: str, sense_key: int | None = None) -> None:
        super().__init__(message)
        self.sense_key = sense_key


class _Sense(ctypes.Structure):
    _fields_ = (
        ("error_type", ctypes.c_ubyte),
        ("key", ctypes.c_int),
        ("ascq", ctypes.c_int),
        ("flags", ctypes.c_ubyte),
        ("bit_pointer", ctypes.c_ubyte),
        ("field_pointer", ctypes.c_uint16),
    )


class _Task(ctypes.Structure):
    _fields_ = (
        ("status", ctypes.c_int),
        ("cdb_size", ctypes.c_int),
        ("xfer_dir", ctypes.c_int),
        ("expxferlen", ctypes.c_int),
        ("cdb", ctypes.c_ubyte * 16),
        ("residual_status", ctypes.c_int),
        ("residual", ctypes.c_size_t),
        ("sense", _Sense),
        ("size", ctypes.c_int),
        ("data", ctypes.POINTER(ctypes.c_ubyte)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Who logs in, and with what secrets. Without a name of its own, each has a fresh one."""

    initiator: str = ""
    user: str = ""
    secret: str = ""
    mutual_user: str = ""
    mutual_secret: str = ""


class Initiator:
    """One session with the LUN of a URI `iscsi://ADDRESS:PORT/IQN/LUN`, with LUN -1 with the target
    alone. ScsiError if refused."""

    def __init__(self, uri: str, login: Login | None = None, *, timeout_s: int = 30) -> None:
        login = login or Login()
        parts = urlsplit(uri)
        iqn, _, lun = parts.path.strip("/").rpartition("/")
        self._lun = int(lun)
        self._library = _load()
        name = login.initiator or f"iqn.2026-11.example.test:{os.getpid()}.{next(_numbers)}"
        self._context = self._library.iscsi_create_context(name.encode())
        try:
            self._call("set_targetname", iqn.encode())
            self._call("set_session_type", _SESSION_NORMAL)
            self._call("set_timeout", timeout_s)
            # a session that is lost stays lost: libiscsi would try for ever
            self._library.iscsi_set_noautoreconnect(self._context, 1)
            if login.user:
                self._call("set_initiator_username_pwd", login.user.encode(), login.secret.encode())
            if login.mutual_user:
                who, secret = login.mutual_user.encode(), login.mutual_secret.encode()
                self._call("set_target_username_pwd", who, secret)
            self._call("full_connect_sync", parts.netloc.encode(), self._lun)
            self.blocks, self.block_size = self._capacity() if self._lun >= 0 else (0, 512)
        except BaseException:
            self._library.iscsi_destroy_context(self._context)
            raise

    def pread(self, count: int, offset: int) -> bytes:
        """Read whole sectors."""
        found = bytearray()
        while len(found) < count:
            size = min(_CHUNK, count - len(found))
            lba = (offset + len(found)) // self.block_size
            found += self._task("read16_sync", ctypes.c_uint64(lba), size, self.block_size,
                                0, 0, 0, 0, 0)  # fmt: skip
        return bytes(found)

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write whole sectors with one WRITE(16)."""
        lba = ctypes.c_uint64(offset // self.block_size)
        self._task("write16_sync", lba, data, len(data), self.block_size, 0, 0, 0, 0, 0)

    def flush(self) -> None:
        """SYNCHRONIZE CACHE(16) of everything."""
        self._task("synchronizecache16_sync", ctypes.c_uint64(0), 0, 0, 0)

    def inquiry(self, page: int | None = None) -> bytes:
        """The standard INQUIRY data, or one page of vital product data."""
        return self._task("inquiry_sync", int(page is not None), page or 0, 255)

    def mode_sense(self) -> bytes:
        """All mode pages, MODE SENSE(6)."""
        return self._task("modesense6_sync", 0, 0, 0x3F, 0, 255)

    def report_luns(self) -> list[int]:
        """The numbers of the target's LUNs that are disks."""
        # SPC-4, 6.33: a header of 8 bytes, then 8 bytes each; SAM-5, 4.7: peripheral and flat space
        data = self._task("reportluns_sync", 0, 4096, of_target=True)
        entries = [data[at : at + 2] for at in range(8, len(data) - 7, 8)]
        found = []
        for number in ((entry[0] & 0x3F) << 8 | entry[1] for entry in entries):
            self._lun = number
            if self.inquiry()[0] == 0:  # connected, and a direct access block device
                found.append(number)
        return found

    def fileno(self) -> int:
        """Of its connection, to wait for what the target sends by itself; below 0: it has none."""
        return int(self._library.iscsi_get_fd(self._context))

    def attend(self) -> bool:
        """Read what the target has sent by itself, and answer a NOP-In; False: it has hung up.

        An initiator that answers with its next command only makes tgtd hold back the answer to
        that until its next NOP-In.
        """
        peer = socket.socket(fileno=os.dup(self.fileno()))
        try:
            if not peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            peer.close()
        self._library.iscsi_service(self._context, select.POLLIN)
        if self._library.iscsi_which_events(self._context) & select.POLLOUT:
            self._library.iscsi_service(self._context, select.POLLOUT)
        return True

    def close(self) -> None:
        """Log out."""
        if self._context is not None:
            self._library.iscsi_logout_sync(self._context)
            self.vanish()

    def vanish(self) -> None:
        """Close the connection without a logout."""
        self._library.iscsi_destroy_context(self._context)
        self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _capacity(self) -> tuple[int, int]:
        data = self._task("readcapacity16_sync")
        return int.from_bytes(data[:8], "big") + 1, int.from_bytes(data[8:12], "big")

    def _call(self, name: str, *args: object) -> None:
        if getattr(self._library, f"iscsi_{name}")(self._context, *args) != 0:
            raise ScsiError(self._words(name))

    def _task(self, name: str, *args: object, of_target: bool = False) -> bytes:
        function = getattr(self._library, f"iscsi_{name}")
        to = () if of_target else (self._lun,)
        task = function(self._context, *to, *args)
        if not task:
            raise ScsiError(self._words(name))
        try:
            answer = task.contents
            if answer.status != _GOOD:
                key = answer.sense.key if answer.status == _CHECK_CONDITION else None
                raise ScsiError(f"{name}: {self._words(name)}", key)
            return bytes(answer.data[: answer.size]) if answer.size > 0 else b""
        finally:
            self._library.scsi_free_scsi_task(task)

    def _words(self, name: str) -> str:
        said = self._library.iscsi_get_error(self._context) or b""
        return f"{name}: {said.decode(errors='replace')}"


def find_luns(uri: str, login: Login | None = None, *, timeout_s: int = 30) -> list[int]:
    """The LUNs of the target of a URI (its own LUN does not matter) that are disks."""
    target, _, _ = uri.rpartition("/")
    with Initiator(f"{target}/-1", login, timeout_s=timeout_s) as session:
        return session.report_luns()


@cache
def _load() -> Any:
    """The library. OSError where it is not installed (Debian: libiscsi7)."""
    library = ctypes.CDLL("libiscsi.so.7")
    context = ctypes.c_void_p
    library.iscsi_create_context.restype = context
    library.iscsi_create_context.argtypes = [ctypes.c_char_p]
    library.iscsi_get_error.restype = ctypes.c_char_p
    library.scsi_free_scsi_task.argtypes = [ctypes.POINTER(_Task)]
    for name in ("destroy_context", "logout_sync", "get_error", "get_fd", "which_events"):
        getattr(library, f"iscsi_{name}").argtypes = [context]
    texts = ctypes.c_char_p
    library.iscsi_set_targetname.argtypes = [context, texts]
    library.iscsi_set_initiator_username_pwd.argtypes = [context, texts, texts]
    library.iscsi_set_target_username_pwd.argtypes = [context, texts, texts]
    library.iscsi_full_connect_sync.argtypes = [context, texts, ctypes.c_int]
    for name in ("set_session_type", "set_timeout", "set_noautoreconnect"):
        getattr(library, f"iscsi_{name}").argtypes = [context, ctypes.c_int]
    library.iscsi_service.argtypes = [context, ctypes.c_int]
    number, flag = ctypes.c_uint64, ctypes.c_int
    tasks: dict[str, list[Any]] = {
        "readcapacity16": [],
        "inquiry": [flag] * 3,
        "modesense6": [flag] * 5,
        "synchronizecache16": [number, ctypes.c_uint32, flag, flag],
        "read16": [number, ctypes.c_uint32, *[flag] * 6],
        "write16": [number, texts, ctypes.c_uint32, *[flag] * 6],
    }
    for name, arguments in tasks.items():
        function = getattr(library, f"iscsi_{name}_sync")
        function.restype = ctypes.POINTER(_Task)
        function.argtypes = [context, ctypes.c_int, *arguments]
    library.iscsi_reportluns_sync.restype = ctypes.POINTER(_Task)
    library.iscsi_reportluns_sync.argtypes = [context, flag, flag]
    return library
