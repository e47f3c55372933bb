"""The QMP client and the QMP hold against a scripted QEMU."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.errors import UnavailableError
from offload.qmp import Qmp, QmpError, QmpGoneError
from offload.quiescers.guardian import QmpHold

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}}}


class FakeQemu:
    """Knows what a hold asks for; counts the writes that a test makes."""

    def __init__(self, path: Path, greeting: bytes | None = None) -> None:
        self.path = path
        self.running = True
        self.written = 0
        self.asked: list[str] = []
        self.hang_up_on = ""
        self._greeting = greeting or json.dumps(GREETING).encode() + b"\n"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                wire, _ = self._server.accept()
            except OSError:
                return
            with wire, wire.makefile("rwb", buffering=0) as stream:
                stream.write(self._greeting)
                for line in stream:
                    order = json.loads(line)
                    if order["execute"] == self.hang_up_on:
                        break
                    event = {"event": "NOISE", "data": {}}
                    answer = {**self._answer(order["execute"]), "id": order["id"]}
                    stream.write(b"".join(json.dumps(m).encode() + b"\n" for m in (event, answer)))

    def _answer(self, command: str) -> dict[str, Any]:
        self.asked.append(command)
        match command:
            case "stop" | "cont":
                self.running = command == "cont"
                return {"return": {}}
            case "query-status":
                return {"return": {"running": self.running, "status": "?"}}
            case "query-blockstats":
                return {"return": [{"qdev": "d", "stats": {"wr_bytes": self.written}}]}
            case "qmp_capabilities":
                return {"return": {}}
        return {"error": {"class": "CommandNotFound", "desc": "no such command"}}

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@pytest.fixture
def qemu() -> Iterator[FakeQemu]:
    with tempfile.TemporaryDirectory(prefix="ol-") as folder:
        made = FakeQemu(Path(folder) / "q")
        yield made
        made.close()


def test_client_refused_command_carries_class_and_words(qemu: FakeQemu) -> None:
    with Qmp(qemu.path) as qmp:
        assert qmp.version == (7, 2)
        with pytest.raises(QmpError, match="no such command") as caught:
            qmp.execute("nonsense")
        assert caught.value.kind == "CommandNotFound"
        assert qmp.execute("query-status")["running"], "the session goes on"


def test_client_lost_qemu_says_so(qemu: FakeQemu) -> None:
    qemu.hang_up_on = "query-status"
    with Qmp(qemu.path) as qmp, pytest.raises(QmpGoneError):
        qmp.execute("query-status")


@pytest.mark.parametrize("greeting", [b"SSH-2.0-x\n", b"{}\n", b"[1]\n"])
def test_client_of_another_protocol_is_refused(greeting: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="ol-") as folder:
        other = FakeQemu(Path(folder) / "q", greeting)
        with pytest.raises(UnavailableError) as caught:
            Qmp(other.path)
        other.close()
    assert caught.value.code == "qmp-protocol"


def test_hold_written_in_between_is_broken_though_it_stands_again(qemu: FakeQemu) -> None:
    hold = QmpHold(str(qemu.path))
    hold.freeze()
    assert hold.intact()
    qemu.written += 512  # somebody let it run and stopped it again
    assert not hold.intact()
    assert not hold.thaw()
    assert qemu.running


def test_hold_of_a_stopped_machine_never_continues_it(qemu: FakeQemu) -> None:
    qemu.running = False
    hold = QmpHold(str(qemu.path))
    hold.freeze()
    assert not hold.ours
    assert hold.thaw()
    assert "cont" not in qemu.asked


def test_hold_that_fails_after_its_stop_continues_at_once(qemu: FakeQemu) -> None:
    real = qemu._answer

    def failing(command: str) -> dict[str, Any]:
        if command == "query-blockstats" and "cont" not in qemu.asked and not failed:
            failed.append(command)
            return {"error": {"class": "GenericError", "desc": "broken"}}
        return real(command)

    failed: list[str] = []
    qemu._answer = failing  # type: ignore[method-assign]
    with pytest.raises(QmpError):
        QmpHold(str(qemu.path)).freeze()
    assert qemu.running
