"""Broken iSCSI initiators: a view comes back at its address, and others keep reading from it.

tgtd 1.0.85 does not survive everything that an initiator may send once it has logged in (its heap
is damaged by data that nobody asked for, and by writes that announce more than they send). What
nobody may do without a login, it survives. So the promise is: nothing but the truth is read, a
server that ended is noticed, and served again it is the same disk to whoever comes back.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from offload.instance import Instance
from offload.model import Exposure, RawSource
from offload.target import Endpoint, ExportRequest
from offload.testing import malformed_iscsi
from offload.testing.instances import make_instance
from offload.testing.libiscsi import Initiator, ScsiError
from targets.tgt import TgtTarget

SIZE = 4 << 20
ROUNDS = 360  # sessions; each seed is one


class Reader(threading.Thread):
    """Another initiator, which reads all the time, compares, and logs in again where it must."""

    def __init__(self, uri: str, content: bytes) -> None:
        super().__init__(daemon=True)
        self._uri = uri
        self._content = content
        self._enough = threading.Event()
        self.reads = 0
        self.logins = 0
        self.wrong: str | None = None

    def run(self) -> None:
        while not self._enough.is_set():
            try:
                session = Initiator(self._uri, timeout_s=10)
            except ScsiError:
                time.sleep(0.01)
                continue
            self.logins += 1
            self._read(session)
            session.close()

    def _read(self, session: Initiator) -> None:
        at = 0
        while not self._enough.is_set():
            try:
                got = session.pread(65536, at)
            except ScsiError:
                return
            if got != self._content[at : at + 65536]:
                self.wrong = f"other bytes at {at}"
            self.reads += 1
            at = (at + 65536) % SIZE

    def finish(self) -> None:
        self._enough.set()
        self.join(60)
        assert not self.is_alive(), "the other initiator hangs"
        assert self.wrong is None


class Served:
    """A view that is served again, as `recover` and `watch` do, when its server has ended."""

    def __init__(self, instance: Instance, image: Path, initiators: tuple[str, ...] = ()) -> None:
        self.target = TgtTarget(instance)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.request = ExportRequest(
            view_id="v1",
            name="one",
            source=RawSource(path=image, size_bytes=SIZE),
            run_dir=instance.views_dir / "v1",
            exposure=self.target.check(Exposure(port=port, initiators=initiators)),
        )
        self.endpoint: Endpoint = self.target.export(self.request)
        self.restarts = 0

    @property
    def peer(self) -> malformed_iscsi.Peer:
        parts = urlsplit(self.endpoint.uri)
        iqn, _, lun = parts.path.strip("/").rpartition("/")
        where = (parts.hostname, parts.port)
        return malformed_iscsi.Peer(
            connect=lambda: socket.create_connection(where, timeout=5), iqn=iqn, lun=int(lun)
        )

    def look_after(self) -> bool:
        """Whether it was still served."""
        if self.target.alive(self.request.run_dir, self.endpoint.server):
            return True
        self.restarts += 1
        before = self.endpoint.uri
        self.target.withdraw(self.request.run_dir, self.endpoint.server)
        self.endpoint = self.target.export(self.request)
        assert self.endpoint.uri == before
        return False

    def close(self) -> None:
        self.target.withdraw(self.request.run_dir, self.endpoint.server)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="off-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def image(folder: Path) -> Path:
    path = folder / "image.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def served(folder: Path, image: Path) -> Iterator[Served]:
    made = Served(make_instance(folder), image)
    yield made
    made.close()


def test_tgt_view_broken_initiators_are_survived_or_it_is_served_again(
    served: Served, image: Path
) -> None:
    content = image.read_bytes()
    reader = Reader(served.endpoint.uri, content)
    reader.start()
    sent = set()
    for seed in range(ROUNDS):
        sent.add(malformed_iscsi.send(served.peer, seed))
        served.look_after()
    before = reader.reads
    until = time.monotonic() + 60
    while reader.reads < before + 10 and time.monotonic() < until:
        time.sleep(0.01)
    assert reader.reads >= before + 10  # it reads on after the last of them
    reader.finish()
    assert sent == {session.__name__ for session in malformed_iscsi.SESSIONS}
    assert image.read_bytes() == content


@pytest.mark.parametrize("how", ["acl", "chap"])
def test_tgt_view_is_not_ended_by_who_cannot_log_in(how: str, folder: Path, image: Path) -> None:
    """An ACL or CHAP is all that it takes: what needs no login ends nothing."""
    secret = folder / "secret"
    secret.write_text("a secret of some length\n")
    secret.chmod(0o600)
    chap = {"user": "backup", "secret_file": str(secret)}
    served = Served(
        make_instance(folder, {"iscsi": {"chap": chap}} if how == "chap" else None),
        image,
        initiators=("iqn.2026-11.example.test:known",) if how == "acl" else (),
    )
    try:
        for seed in range(ROUNDS):
            malformed_iscsi.send(served.peer, seed)
            assert served.look_after(), f"seed {seed}"
    finally:
        served.close()
