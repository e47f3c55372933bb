"""tgtd's management protocol, spoken on its unix socket: tgtadm has secrets on its command line.

Source: tgt 1.0.85, usr/tgtadm.h (both structures), usr/mgmt.c (what each request takes),
usr/target.c and usr/iscsi/target.c (what is answered). One request a connection; structures are in
the machine's own layout, parameters are `key=value` texts with commas in between, and end in NUL.
tgtd answers only to its own user and group.

What initiators say of themselves (name, alias) stands unescaped in the long listings. Therefore
the targets are read from the listing of drivers, which holds nothing of theirs.
"""

from __future__ import annotations

import os
import re
import socket as sockets
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from pydantic import SecretStr

from offload.errors import UnavailableError

_REQUEST = struct.Struct("@II64sIiQQIIIIII")  # struct tgtadm_req: 120 bytes
_REPLY = struct.Struct("@II")  # struct tgtadm_rsp: error, length with these 8 bytes
_DRIVER = b"iscsi"
_CREDENTIALS = struct.Struct("@iII")  # struct ucred, unix(7): pid, uid, gid
_ANSWER_S = 10.0  # tgtd answers in milliseconds, unless it opens a device that does not
_REPLY_MAX = 64 << 20  # a thousand targets take less than 1 MiB
_PARAMETERS_MAX = 8 << 10  # MAX_MGT_BUFSIZE
_ALL = -1  # tid of a listing of all targets
_DISK = 0  # SPC-4, table 138: direct access block device

_TARGET_LINE = re.compile(r"^ {8}Target (\d+): (.+)$", re.MULTILINE)
_PORTAL_LINE = re.compile(r"^Portal: \[?([0-9a-fA-F.:]+)\]?:(\d+),\d+$", re.MULTILINE)
# a name may hold anything but NUL: what follows it ends it
_CONNECTION = re.compile(
    r"Session: (\d+)\n {4}Connection: (\d+)\n {8}Initiator: (.*?)\n {8}"
    r"(?:IP Address: ([^\n]*))?\n(?=Session: |\Z)",
    re.DOTALL,
)


class _Mode(IntEnum):
    SYSTEM = 0
    TARGET = 1
    UNIT = 2
    PORTAL = 3
    DRIVER = 4
    CONNECTION = 6
    ACCOUNT = 7


class _Op(IntEnum):
    NEW = 0
    DELETE = 1
    SHOW = 2
    BIND = 3
    UPDATE = 5
    STATS = 6


class Refusal(IntEnum):
    """enum tgtadm_errno, usr/tgtadm_error.h."""

    UNKNOWN = 1
    NO_MEMORY = 2
    NO_DRIVER = 3
    NO_TARGET = 4
    NO_UNIT = 5
    NO_SESSION = 6
    NO_CONNECTION = 7
    NO_BINDING = 8
    TARGET_EXISTS = 9
    UNIT_EXISTS = 10
    BINDING_EXISTS = 11
    ACL_EXISTS = 12
    NO_ACL = 13
    USER_EXISTS = 14
    NO_USER = 15
    TOO_MANY_USERS = 16
    INVALID_REQUEST = 17
    OUTGOING_ACCOUNT_EXISTS = 18
    TARGET_ACTIVE = 19
    UNIT_ACTIVE = 20
    DRIVER_ACTIVE = 21
    UNSUPPORTED = 22
    UNKNOWN_PARAMETER = 23
    PREVENT_REMOVAL = 24


class TgtRefusedError(UnavailableError):
    """tgtd refused a request; `refusal` says why."""

    code = "server-failed"

    def __init__(self, what: str, refusal: Refusal) -> None:
        super().__init__(f"tgtd refused {what}: {refusal.name.lower().replace('_', ' ')}")
        self.refusal = refusal


class TgtGoneError(UnavailableError):
    """No tgtd listens on the socket, or it ended before it answered."""

    code = "server-failed"


class TgtDeniedError(UnavailableError):
    """tgtd belongs to another user or group, and answers to those alone."""

    code = "server-denied"


class TgtSilentError(UnavailableError):
    """tgtd does not answer. It has one thread for us and its initiators: it serves nobody then."""

    code = "server-silent"


@dataclass(frozen=True, slots=True, kw_only=True)
class IscsiConnection:
    """A connection of a logged-in session; the address is empty where the peer is gone."""

    session: int
    connection: int
    initiator: str
    address: str


class Management:
    """Requests to the tgtd of one socket. Each may raise the errors of this module."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def portals(self) -> list[tuple[str, int]]:
        """Where it listens: addresses and ports."""
        text = self._ask("its portals", _Mode.PORTAL, _Op.SHOW)
        return [(address, int(port)) for address, port in _PORTAL_LINE.findall(text)]

    def targets(self) -> dict[int, str]:
        """Target ids and names."""
        text = self._ask("its targets", _Mode.DRIVER, _Op.SHOW)
        return {int(tid): name for tid, name in _TARGET_LINE.findall(text)}

    def new_target(self, tid: int, iqn: str) -> None:
        """Make a target that nobody may log in to yet. It has a controller as LUN 0."""
        self._ask("a new target", _Mode.TARGET, _Op.NEW, tid=tid, fields={"targetname": iqn})

    def close_target(self, tid: int) -> None:
        """Refuse logins and commands from now on."""
        self._ask("to close a target", _Mode.TARGET, _Op.UPDATE, tid=tid,
                  fields={"state": "offline"})  # fmt: skip

    def delete_target(self, tid: int) -> None:
        """Remove a target and its units; refused while it has sessions or commands.

        Never by force: tgtd exits if a session outlives that (usr/iscsi/target.c).
        """
        self._ask("to delete a target", _Mode.TARGET, _Op.DELETE, tid=tid)

    def new_unit(self, tid: int, lun: int, path: Path, block_size: int) -> None:
        """Open a file or block device as a disk.

        Backing store `rdwr`: threads with pread and pwrite. `aio` blocks the thread that all
        views share wherever the kernel does not take a request asynchronously: in the page cache,
        and on FUSE.
        """
        fields = {"path": str(path), "bstype": "rdwr", "blocksize": str(block_size)}
        self._ask(f"to open {path}", _Mode.UNIT, _Op.NEW, tid=tid, lun=lun, fields=fields)

    def update_unit(self, tid: int, lun: int, fields: Mapping[str, str]) -> None:
        """Set attributes of a disk; tgtd looks at no value, so look after it with `unit`."""
        self._ask("attributes of a disk", _Mode.UNIT, _Op.UPDATE, tid=tid, lun=lun, fields=fields)

    def unit(self, tid: int, iqn: str, lun: int) -> dict[str, str]:
        """What tgtd says of a disk: `Type`, `SCSI SN`, `Online`, `Readonly` …

        Before anybody could log in to the target. A foreign initiator's name could only make the
        answer ambiguous: TgtRefusedError.
        """
        text = self._ask("its targets", _Mode.TARGET, _Op.SHOW, tid=_ALL)
        sections = re.split(r"^(?=Target \d+: )", text, flags=re.MULTILINE)
        ours = [part for part in sections if part.startswith(f"Target {tid}: {iqn}\n")]
        units = re.split(r"^ {8}LUN: ", ours[0], flags=re.MULTILINE)[1:] if len(ours) == 1 else []
        found = [part for part in units if part.startswith(f"{lun}\n")]
        if len(found) != 1:
            raise TgtRefusedError(f"LUN {lun} of {iqn}", Refusal.NO_UNIT)
        lines = re.findall(r"^ {12}([^:\n]+): (.*)$", found[0], flags=re.MULTILINE)
        size = re.findall(r"Block size: (\d+)$", found[0], flags=re.MULTILINE)
        return {**dict(lines), "Block size": size[0] if size else ""}

    def allow_everybody(self, tid: int) -> None:
        """Let every initiator log in, once CHAP lets it."""
        self._ask("an ACL", _Mode.TARGET, _Op.BIND, tid=tid, fields={"initiator-address": "ALL"})

    def allow_initiator(self, tid: int, iqn: str) -> None:
        """Let one initiator log in, by its name."""
        self._ask("an ACL", _Mode.TARGET, _Op.BIND, tid=tid, fields={"initiator-name": iqn})

    def accounts(self) -> list[str]:
        """Users whose secrets it keeps; it keeps one a name, for all its targets."""
        text = self._ask("its accounts", _Mode.ACCOUNT, _Op.SHOW)
        return [line.strip() for line in text.splitlines()[1:]]

    def new_account(self, user: str, secret: SecretStr) -> None:
        """Keep a user's secret."""
        fields = {"user": user, "password": secret.get_secret_value()}  # in this order
        self._ask("a new account", _Mode.ACCOUNT, _Op.NEW, fields=fields)

    def delete_account(self, user: str) -> None:
        """Forget a user; he is unbound from every target, which then may ask for no CHAP."""
        self._ask("to delete an account", _Mode.ACCOUNT, _Op.DELETE, fields={"user": user})

    def bind_account(self, tid: int, user: str, *, outgoing: bool = False) -> None:
        """Ask initiators of a target for CHAP as this user, or answer them as this user."""
        self._ask("an account of a target", _Mode.ACCOUNT, _Op.BIND, tid=tid,
                  fields={"user": user}, outgoing=outgoing)  # fmt: skip

    def has_unit(self, tid: int, lun: int) -> bool:
        """Whether a target is there and has this disk."""
        try:
            self._ask("figures of a disk", _Mode.UNIT, _Op.STATS, tid=tid, lun=lun)
        except TgtRefusedError as error:
            if error.refusal in {Refusal.NO_TARGET, Refusal.NO_UNIT}:
                return False
            raise
        return True

    def connections(self, tid: int) -> list[IscsiConnection]:
        """Who is logged in."""
        text = self._ask("connections", _Mode.CONNECTION, _Op.SHOW, tid=tid)
        return [
            IscsiConnection(session=int(sid), connection=int(cid), initiator=name, address=address)
            for sid, cid, name, address in _CONNECTION.findall(text)
        ]

    def close_connection(self, tid: int, which: IscsiConnection) -> None:
        """Hang up: soon, where the peer sends or can be sent to; else when tgtd gives it up."""
        self._ask("to hang up", _Mode.CONNECTION, _Op.DELETE, tid=tid,
                  sid=which.session, cid=which.connection)  # fmt: skip

    def shut_down(self) -> None:
        """End a tgtd that has no targets (SIGTERM does nothing to it)."""
        self._ask("to end", _Mode.SYSTEM, _Op.DELETE)

    def _ask(
        self,
        what: str,
        mode: _Mode,
        op: _Op,
        *,
        tid: int = 0,
        sid: int = 0,
        lun: int = 0,
        cid: int = 0,
        outgoing: bool = False,
        fields: Mapping[str, str] | None = None,
    ) -> str:
        text = ",".join(f"{key}={value}" for key, value in (fields or {}).items()).encode()
        data = text + b"\0" if text else b""
        if len(data) > _PARAMETERS_MAX:
            raise TgtRefusedError(what, Refusal.INVALID_REQUEST)
        request = _REQUEST.pack(mode, op, _DRIVER, _REQUEST.size + len(data), tid, sid, lun, cid,
                                0, _DISK, outgoing, 0, 0)  # fmt: skip
        try:
            error, answer = self._exchange(request + data)
        except TimeoutError as late:
            raise TgtSilentError(
                f"the tgtd at {self.socket} did not answer within {_ANSWER_S:g} s",
                hint="unmount a view of it with --force: that ends it; then: offload recover",
            ) from late
        except OSError as gone:
            raise TgtGoneError(f"no tgtd answers at {self.socket}: {gone}") from gone
        if error:
            known = error in set(Refusal)
            raise TgtRefusedError(what, Refusal(error) if known else Refusal.UNKNOWN)
        return answer.rstrip(b"\0").decode("utf-8", "replace")

    def _exchange(self, request: bytes) -> tuple[int, bytes]:
        until = time.monotonic() + _ANSWER_S
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as wire:
            wire.settimeout(_ANSWER_S)
            wire.connect(str(self.socket))
            self._check_owner(wire)
            wire.sendall(request)
            error, length = _REPLY.unpack(_read(wire, _REPLY.size, until))
            if not _REPLY.size <= length <= _REPLY_MAX:
                raise ConnectionAbortedError(f"an answer of {length} bytes")
            return error, _read(wire, length - _REPLY.size, until)

    def _check_owner(self, wire: sockets.socket) -> None:
        """tgtd hangs up on others without a word, as if it had ended (usr/mgmt.c, ipc_perm)."""
        raw = wire.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
        _, user, group = _CREDENTIALS.unpack(raw)
        if (user, group) != (os.getuid(), os.getgid()):
            raise TgtDeniedError(
                f"the tgtd at {self.socket} answers to uid {user}, gid {group} alone",
                hint="run offload as the user that mounted the views",
            )


def _read(wire: sockets.socket, length: int, until: float) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        wire.settimeout(left)
        part = wire.recv(length - len(parts))
        if not part:
            raise ConnectionResetError("it hung up")
        parts += part
    return bytes(parts)
