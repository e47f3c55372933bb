"""What a broken or hostile iSCSI initiator may send: sessions that no target may fall over.

Source of the format: RFC 7143, 11 (PDU formats) and 6 (login). Everything is made from a seed, so
that a session that kills a server can be sent again. What one initiator may rightly do to another
(reservations, resets, ejecting the medium) is left out: it proves nothing.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LOGIN, _COMMAND, _NOP, _TMF, _TEXT, _DATA_OUT, _LOGOUT, _SNACK = 3, 1, 0, 2, 4, 5, 6, 16
_IMMEDIATE = 0x40
_TRANSIT = 0x80
_OPERATIONAL, _FULL_FEATURE = 1, 3
_LUN_BYTES = 8
# SCSI operation codes: reads, writes, inquiries, copies, and some that do not exist
_CDBS = bytes.fromhex(
    "00 03 08 0a 12 1a 25 28 2a 2f 35 3c 41 42 4d 5a 7f83 84 88 89 8a 8f 91 93 9e a0 a3 a8 aa c0 ff"
)
_ANSWER_S = 0.02  # how long a session listens to what the server says to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The target under attack and the LUN that it has."""

    connect: Callable[[], socket.socket]
    iqn: str
    lun: int


Session = Callable[[random.Random, socket.socket, Peer], None]


def pdu(
    opcode: int,
    flags: int,
    data: bytes = b"",
    *,
    specific: bytes = b"",
    ahs_words: int = 0,
    length: int | None = None,
) -> bytes:
    """A PDU: `specific` fills the header from byte 8 on; `length` lies about the data."""
    told = len(data) if length is None else length
    head = struct.pack(">BB2xB", opcode, flags, ahs_words) + (told & 0xFFFFFF).to_bytes(3, "big")
    return (head + specific).ljust(48, b"\0")[:48] + data + bytes(-len(data) % 4)


def login(keys: Mapping[str, str], *, stage: int = _OPERATIONAL, following: int = 3) -> bytes:
    """A login request that asks for the next stage."""
    text = b"".join(f"{key}={value}\0".encode() for key, value in keys.items())
    flags = _TRANSIT | stage << 2 | following
    isid = b"\x80\0\0\0\0\1" + bytes(2)  # random format, RFC 7143 11.12.5; TSIH 0: a new session
    numbers = struct.pack(">IIII", 1, 0, 1, 0)  # task tag, connection, CmdSN, ExpStatSN
    return pdu(_LOGIN | _IMMEDIATE, flags, text, specific=isid + numbers)


def proper_keys(peer: Peer) -> dict[str, str]:
    """What an initiator without authentication says."""
    return {
        "InitiatorName": "iqn.2026-11.internal.offload:broken",
        "SessionType": "Normal",
        "TargetName": peer.iqn,
        "HeaderDigest": "None",
        "DataDigest": "None",
        "ImmediateData": "Yes",
        "InitialR2T": "No",
    }


def command(cdb: bytes, *, lun: int, serial: int, expected: int, flags: int = 0xC1) -> bytes:
    """A SCSI command; `expected` is the length of data that it announces."""
    address = struct.pack(">H", lun).ljust(_LUN_BYTES, b"\0")
    numbers = struct.pack(">IIII", serial, expected, serial, 0)
    return pdu(_COMMAND, flags, specific=address + numbers + cdb.ljust(16, b"\0"))


def garbage(chance: random.Random, wire: socket.socket, peer: Peer) -> None:  # noqa: ARG001
    """Anything at all in place of a login."""
    wire.sendall(chance.randbytes(chance.randint(1, 4096)))


def broken_headers(chance: random.Random, wire: socket.socket, peer: Peer) -> None:  # noqa: ARG001
    """Login requests that lie about their lengths, with additional headers that do not come."""
    data = chance.randbytes(chance.choice((0, 3, 64, 8192)))
    length = chance.choice((None, 0, len(data) + 1, 0xFFFF, 0xFFFFFF))
    opcode = chance.choice((_LOGIN | _IMMEDIATE, _LOGIN, chance.getrandbits(8)))
    flags = chance.getrandbits(8)
    specific = chance.randbytes(40)
    words = chance.choice((0, 0, 1, 255))
    wire.sendall(pdu(opcode, flags, data, specific=specific, ahs_words=words, length=length))


def broken_keys(chance: random.Random, wire: socket.socket, peer: Peer) -> None:
    """Login keys without a value, without an end, twice, endless, or of another world."""
    keys = proper_keys(peer)
    for _ in range(chance.randint(1, 4)):
        name = chance.choice((*keys, "AuthMethod", "CHAP_A", "CHAP_R", "X-nonsense", ""))
        keys[name] = chance.choice(
            ("", "0", "-1", "99999999999", "None,None", "CHAP", "=" * 40, "x" * 4000, "\ud7ff")
        )
    raw = login(keys, stage=chance.choice((0, 1, 2, 3)), following=chance.choice((0, 1, 2, 3)))
    wire.sendall(raw if chance.random() < 0.7 else raw[:-1] + b"=")
    _listen(wire)
    wire.sendall(login(keys))


def broken_chap(chance: random.Random, wire: socket.socket, peer: Peer) -> None:
    """A login with CHAP (RFC 7143, 12.1.3) whose names and answers are none, or too long."""
    names = ("InitiatorName", "SessionType", "TargetName")
    first = {name: proper_keys(peer)[name] for name in names} | {"AuthMethod": "CHAP"}
    wire.sendall(login(first, stage=0, following=chance.choice((0, 1))))
    _listen(wire)
    wire.sendall(login({"CHAP_A": chance.choice(("5", "5,7", "0", "", "x" * 300))}, stage=0))
    _listen(wire)
    digits = chance.choice((0, 1, 15, 32, 33, 2000, 7000))
    answer = {
        "CHAP_N": "n" * chance.choice((0, 1, 255, 256, 4000)),
        "CHAP_R": chance.choice(("0x", "0X", "0b", "", "0z")) + "a" * digits,
        "CHAP_I": chance.choice(("0", "255", "256", "-1", "x")),
        "CHAP_C": "0x" + "c" * chance.choice((0, 2, 2048, 3001)),
    }
    for name in chance.sample(sorted(answer), chance.randint(0, 2)):
        del answer[name]
    wire.sendall(login(answer, stage=0, following=chance.choice((1, 3))))


def wrong_order(chance: random.Random, wire: socket.socket, peer: Peer) -> None:
    """Commands before a login, a login after the login, a discovery that asks for sectors."""
    keys = proper_keys(peer)
    if chance.random() < 0.5:
        keys = {"InitiatorName": keys["InitiatorName"], "SessionType": "Discovery"}
    steps = [
        login(keys),
        login(proper_keys(peer)),
        command(b"\x12\0\0\0\xff", lun=peer.lun, serial=1, expected=255),
        pdu(
            _TEXT, 0x80, b"SendTargets=All\0", specific=bytes(8) + struct.pack(">IIII", 2, 0, 2, 0)
        ),
        pdu(_LOGOUT | _IMMEDIATE, 0x80, specific=bytes(8) + struct.pack(">IIII", 3, 0, 3, 0)),
    ]
    chance.shuffle(steps)
    for part in steps:
        wire.sendall(part)


def broken_commands(chance: random.Random, wire: socket.socket, peer: Peer) -> None:
    """A proper login, then commands outside of the disk, of unknown kind, for LUNs that are not."""
    _log_in(wire, peer)
    for serial in range(1, chance.randint(2, 20)):
        code = chance.choice(_CDBS)
        lun = chance.choice((peer.lun, peer.lun, peer.lun, 0, 77, 0x3FFF, 0xFFFF))
        cdb = bytes((code,)) + chance.choice((bytes(15), b"\xff" * 15, chance.randbytes(15)))
        expected = chance.choice((0, 1, 511, 4096, 1 << 20, (1 << 32) - 1))
        flags = chance.choice((0xC1, 0xA1, 0x81, 0xE1, 0x41, chance.getrandbits(8)))
        number = serial if chance.random() < 0.9 else chance.getrandbits(32)
        wire.sendall(command(cdb, lun=lun, serial=number, expected=expected, flags=flags))


def stray_pdus(chance: random.Random, wire: socket.socket, peer: Peer) -> None:
    """A proper login, then data that nobody asked for and requests that refer to nothing."""
    _log_in(wire, peer)
    for _ in range(chance.randint(1, 10)):
        opcode = chance.choice((_NOP, _TMF, _TEXT, _DATA_OUT, _SNACK, 7, 0x1C, 0x31, 0x3F))
        # task management: functions that do not exist; 5 to 7 are resets
        flags = 0x80 | chance.choice((0, 1, 99)) if opcode == _TMF else chance.getrandbits(8)
        data = chance.randbytes(chance.choice((0, 0, 4, 4096)))
        length = chance.choice((None, None, len(data) + 4, 0xFFFFFF))
        specific = chance.randbytes(40)
        wire.sendall(pdu(opcode | _IMMEDIATE, flags, data, specific=specific, length=length))


def many_reads_no_listener(chance: random.Random, wire: socket.socket, peer: Peer) -> None:
    """Many reads whose answers nobody takes; then gone."""
    _log_in(wire, peer)
    for serial in range(1, 65):
        cdb = struct.pack(">BBIBHB", 0x28, 0, 8 * chance.randint(0, 200), 0, 128, 0)  # READ(10)
        wire.sendall(command(cdb, lun=peer.lun, serial=serial, expected=65536))


def cut_in_two(chance: random.Random, wire: socket.socket, peer: Peer) -> None:
    """A proper session that ends in the middle of a PDU."""
    read = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0)
    whole = login(proper_keys(peer)) + command(read, lun=peer.lun, serial=1, expected=4096)
    wire.sendall(whole[: chance.randint(1, len(whole) - 1)])


SESSIONS: tuple[Session, ...] = (
    garbage,
    broken_headers,
    broken_keys,
    broken_chap,
    wrong_order,
    broken_commands,
    stray_pdus,
    many_reads_no_listener,
    cut_in_two,
)


def send(peer: Peer, seed: int) -> str:
    """Send the session of this seed, and go: politely or with a reset. Returns its name."""
    chance = random.Random(seed)  # noqa: S311 - it must be repeatable
    session = SESSIONS[seed % len(SESSIONS)]
    with peer.connect() as wire:
        wire.settimeout(5)
        try:
            session(chance, wire, peer)
            if chance.random() < 0.5:
                wire.shutdown(socket.SHUT_WR)
            _listen(wire)
        except OSError:
            pass  # the server has hung up, or says nothing: both are its right
        if chance.random() < 0.5:
            # close with a reset instead of an end: socket(7), SO_LINGER
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return session.__name__


def _log_in(wire: socket.socket, peer: Peer) -> None:
    wire.sendall(login(proper_keys(peer), following=_FULL_FEATURE))
    wire.recv(8192)


def _listen(wire: socket.socket) -> None:
    wire.settimeout(_ANSWER_S)
    with contextlib.suppress(TimeoutError):  # it may have nothing to say
        wire.recv(65536)
    wire.settimeout(5)
