"""The client of tgtd's management protocol, against servers that do not keep to it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from targets import tgt_mgmt
from targets.tgt_mgmt import Management, Refusal, TgtGoneError, TgtRefusedError, TgtSilentError

LISTING = """LLDs:
    iscsi: ready
        Target 7: iqn.2026-11.internal.offload:i.v1.one
        Target 268435455: iqn.2026-11.internal.offload:i.v2
    iser: error
"""
CONNECTIONS = """Session: 2
    Connection: 0
        Initiator: iqn.2004-10.com.example:a
        IP Address: 192.0.2.1
Session: 1
    Connection: 3
        Initiator: odd
        Initiator: name
        IP Address: ::1
Session: 9
    Connection: 0
        Initiator: iqn.2004-10.com.example:gone
        
"""  # noqa: W293 - as tgtd writes the address of a peer that has gone

Answering = Callable[[bytes], Management]


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Answering]:
    """A server that reads one request and says what it is told to."""
    path = tmp_path / "control.0"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        threads = []

        def start(answer: bytes) -> Management:
            def serve() -> None:
                wire, _ = listening.accept()
                with wire:
                    wire.recv(65536)
                    wire.sendall(answer)

            threads.append(threading.Thread(target=serve))
            threads[-1].start()
            return Management(path)

        yield start
        for thread in threads:
            thread.join(60)


def _reply(text: str = "", *, error: int = 0, length: int | None = None) -> bytes:
    data = text.encode() + b"\0" if text else b""
    return struct.pack("@II", error, 8 + len(data) if length is None else length) + data


def test_targets_are_read_from_the_listing_of_drivers(answering: Answering) -> None:
    assert answering(_reply(LISTING)).targets() == {
        7: "iqn.2026-11.internal.offload:i.v1.one",
        268435455: "iqn.2026-11.internal.offload:i.v2",
    }


def test_connections_are_told_apart_whatever_their_names_hold(answering: Answering) -> None:
    found = answering(_reply(CONNECTIONS)).connections(7)
    assert [(one.session, one.connection, one.address) for one in found] == [
        (2, 0, "192.0.2.1"),
        (1, 3, "::1"),
        (9, 0, ""),
    ]
    assert found[1].initiator == "odd\n        Initiator: name"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\0\0",
        _reply("x")[:-1],
        _reply(length=7),
        _reply(length=0),
        _reply("x", length=1 << 31),
    ],
)
def test_answer_cut_short_or_of_an_impossible_length_is_no_answer(
    answering: Answering, answer: bytes
) -> None:
    with pytest.raises(TgtGoneError):
        answering(answer).targets()


@pytest.mark.parametrize(
    ("error", "refusal"),
    [(4, Refusal.NO_TARGET), (19, Refusal.TARGET_ACTIVE), (77, Refusal.UNKNOWN)],
)
def test_refusal_is_named(answering: Answering, error: int, refusal: Refusal) -> None:
    with pytest.raises(TgtRefusedError) as refused:
        answering(_reply(error=error)).delete_target(1)
    assert refused.value.refusal is refusal
    assert "to delete a target" in refused.value.message


def test_nobody_there_is_gone(tmp_path: Path) -> None:
    with pytest.raises(TgtGoneError):
        Management(tmp_path / "control.0").targets()


def test_no_answer_in_time_is_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tgt_mgmt, "_ANSWER_S", 0.2)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control.0"))
        listening.listen()
        with pytest.raises(TgtSilentError):
            Management(tmp_path / "control.0").targets()


def test_parameters_that_tgtd_would_not_take_are_not_sent(tmp_path: Path) -> None:
    with pytest.raises(TgtRefusedError):
        Management(tmp_path / "control.0").new_target(1, "x" * 9000)
