"""Broken iSCSI initiators against LIO: the kernel stays up, and others keep reading the truth."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit

import pytest

from offload.run import run
from offload.testing import malformed_iscsi
from offload.testing.libiscsi import Initiator, ScsiError
from offload.testing.lio import MIB, site, wait_until

ROUNDS = 90  # sessions; each seed is one
SIZE = 4 * MIB

pytestmark = [pytest.mark.in_guest(timeout_s=900), pytest.mark.timeout(600)]


class Reader(threading.Thread):
    """Another initiator, which reads all the time and compares."""

    def __init__(self, uri: str, content: bytes) -> None:
        super().__init__(daemon=True)
        self._session = Initiator(uri, timeout_s=60)
        self._content = content
        self._enough = threading.Event()
        self.reads = 0
        self.wrong = ""

    def run(self) -> None:
        while not self._enough.is_set() and not self.wrong:
            at = self.reads * 65536 % SIZE
            try:
                if self._session.pread(65536, at) != self._content[at : at + 65536]:
                    self.wrong = f"other bytes at {at}"
            except ScsiError as error:
                self.wrong = str(error)
            self.reads += 1

    def finish(self) -> None:
        self._enough.set()
        self.join(90)
        assert not self.is_alive(), "the other initiator hangs"
        self._session.close()
        assert self.wrong == ""


def peer_of(uri: str) -> malformed_iscsi.Peer:
    parts = urlsplit(uri)
    iqn, _, lun = parts.path.strip("/").rpartition("/")
    where = (parts.hostname, parts.port)
    return malformed_iscsi.Peer(
        connect=lambda: socket.create_connection(where, timeout=30), iqn=iqn, lun=int(lun)
    )


def test_lio_survives_broken_initiators_and_others_read_on() -> None:
    with site() as lio:
        image = lio.image(SIZE)
        content = image.read_bytes()
        request = lio.request(image)
        endpoint = lio.export(request)
        reader = Reader(endpoint.uri, content)
        reader.start()
        sent = {malformed_iscsi.send(peer_of(endpoint.uri), seed) for seed in range(ROUNDS)}
        before = reader.reads
        wait_until(lambda: reader.reads >= before + 10 or reader.wrong)
        reader.finish()
        assert sent == {session.__name__ for session in malformed_iscsi.SESSIONS}
        assert lio.target.alive(request.run_dir, endpoint.server)
        assert image.read_bytes() == content
        lio.withdraw(request)
    said = run(["dmesg"]).stdout
    assert not [line for line in said.splitlines() if "BUG:" in line or "Oops" in line], said
