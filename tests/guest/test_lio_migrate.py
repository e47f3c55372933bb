"""A view over LIO comes home under an iSCSI session."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.services import migrate, mount
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.testing.libiscsi import Initiator

pytestmark = pytest.mark.in_guest(timeout_s=600)

MIB = 1 << 20
SIZE = 16 * MIB
BLOCK = 4096
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "0%"
[overlays]
min_free = "1MiB"
limit = "64MiB"
[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
[groups.shop]
volumes = ["db"]
atomic = "record"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofl-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def ctx(folder: Path) -> Iterator[Context]:
    (folder / "db.raw").write_bytes(os.urandom(SIZE))
    config = folder / "offload.toml"
    config.write_text(CONFIG.format(folder=folder))
    with open_context(config) as made:
        yield made
        mount.unmount(made, [], all_views=True, force=True)


def test_lio_view_migrated_under_a_session_holds_every_write(ctx: Context, folder: Path) -> None:
    (view,) = mount.mount(ctx, ["shop"], MountOptions(writable=True, name="v", target="lio"))
    image = bytearray((folder / "db.raw").read_bytes())
    stop = threading.Event()
    written: list[int] = []
    with Initiator(view.uri, timeout_s=120) as session:

        def write() -> None:
            while not stop.is_set():
                number = len(written)
                offset = number * 7919 * BLOCK % SIZE
                data = number.to_bytes(8, "big") * (BLOCK // 8)
                session.pwrite(data, offset)
                image[offset : offset + BLOCK] = data
                written.append(number)

        client = threading.Thread(target=write)
        client.start()
        try:
            migrate.migrate(ctx, "v", str(folder / "home.raw"))
        finally:
            stop.set()
            client.join()
        assert written
        session.pwrite(b"at home " * 512, 0)
        image[:4096] = b"at home " * 512
        shown = b"".join(session.pread(MIB, at) for at in range(0, SIZE, MIB))
    assert shown == image
    assert (folder / "home.raw").read_bytes() == image
    (status,) = mount.views(ctx)
    assert status.alive
    mount.keep(ctx, ["v"])
    (again,) = mount.mount_again(ctx, ["v"])
    assert again.uri == view.uri
    with Initiator(again.uri, timeout_s=120) as session:
        assert session.pread(4096, 0) == image[:4096]
