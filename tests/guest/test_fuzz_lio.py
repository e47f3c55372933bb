"""Broken iSCSI initiators against the kernel's target: it stays, and others keep reading."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit

from offload.run import run
from offload.testing import malformed_iscsi
from offload.testing.libiscsi import Initiator, ScsiError
from offload.testing.lio import MIB, site, wait_until

ROUNDS = 5 * len(malformed_iscsi.SESSIONS)  # each seed is one; the guest is slow


def _peer(uri: str) -> malformed_iscsi.Peer:
    parts = urlsplit(uri)
    iqn, _, lun = parts.path.strip("/").rpartition("/")
    where = (parts.hostname, parts.port)
    return malformed_iscsi.Peer(
        connect=lambda: socket.create_connection(where, timeout=30), iqn=iqn, lun=int(lun)
    )


class Reader(threading.Thread):
    """Another initiator: one session from beginning to end."""

    def __init__(self, uri: str, content: bytes) -> None:
        super().__init__(daemon=True)
        self._session = Initiator(uri, timeout_s=60)
        self._content = content
        self._enough = threading.Event()
        self.reads = 0
        self.failure: str | None = None

    def run(self) -> None:
        at = 0
        while not self._enough.wait(0.005):
            try:
                got = self._session.pread(65536, at)
            except ScsiError as error:
                self.failure = str(error)
                return
            if got != self._content[at : at + 65536]:
                self.failure = f"other bytes at {at}"
                return
            self.reads += 1
            at = (at + 65536) % MIB

    def finish(self) -> None:
        self._enough.set()
        self.join(60)
        assert not self.is_alive(), "the other initiator hangs"
        assert self.failure is None
        self._session.close()


def test_view_broken_initiators_neither_end_it_nor_disturb_others() -> None:
    with site() as lio:
        image = lio.image()
        content = image.read_bytes()
        request = lio.request(image)
        endpoint = lio.export(request)
        reader = Reader(endpoint.uri, content)
        reader.start()
        sent = {malformed_iscsi.send(_peer(endpoint.uri), seed) for seed in range(ROUNDS)}
        assert sent == {session.__name__ for session in malformed_iscsi.SESSIONS}
        before = reader.reads
        wait_until(lambda: reader.reads > before + 5)
        reader.finish()
        with Initiator(endpoint.uri, timeout_s=60) as client:  # a new login works as well
            assert client.pread(4096, 0) == content[:4096]
        lio.withdraw(request)
        assert image.read_bytes() == content
    said = run(["dmesg"]).stdout
    assert "Oops" not in said
    assert "BUG:" not in said
