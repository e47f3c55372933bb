"""A backup as a TimeView: nbdkit's Python plugin over the real engine and store."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload.errors import BusyError, NotFoundError
from offload.model import View
from offload.services import mount as mounts
from offload.services import store_init
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions

MIB = 1 << 20
SIZE = 8 * MIB

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
sector_size = 4096

[groups.shop]
volumes = ["db"]
atomic = "record"

[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofb-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def content(folder: Path) -> bytes:
    """Text that compresses, random data that does not, and a hole between them."""
    path = folder / "db.raw"
    with path.open("xb") as out:
        out.write(b"all work and no play " * 50_000)
        out.seek(4 * MIB)
        out.write(os.urandom(MIB + 4096))
        out.truncate(SIZE)
    return path.read_bytes()


@pytest.fixture
def ctx(folder: Path, content: bytes) -> Iterator[Context]:
    config = folder / "offload.toml"
    config.write_text(CONFIG.format(folder=folder))
    with open_context(config) as made:
        store_init.init(made, "main")
        yield made
        mounts.unmount(made, [], all_views=True, force=True)


@pytest.fixture
def backup_id(ctx: Context) -> str:
    return backup(ctx, "shop", "main").backup.id


def connect(view: View) -> Any:
    handle: Any = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(view.uri)
    return handle


def test_mounted_backup_read_by_several_clients_at_once_is_the_volume(
    ctx: Context, backup_id: str, content: bytes
) -> None:
    (view,) = mounts.mount(ctx, [f"backup:{backup_id}"])
    assert (view.size_bytes, view.sector_size) == (SIZE, 4096)
    pieces = [(offset, 64 << 10) for offset in range(0, SIZE, 64 << 10)]
    random.Random(1).shuffle(pieces)
    handles = [connect(view) for _ in range(4)]
    sent = []
    for number, (offset, length) in enumerate(pieces):
        handle, buffer = handles[number % 4], nbd.Buffer(length)
        sent.append((handle, handle.aio_pread(buffer, offset), buffer, offset))
    for handle, cookie, buffer, offset in sent:
        while not handle.aio_command_completed(cookie):
            handle.poll(1000)
        assert bytes(buffer.to_bytearray()) == content[offset : offset + len(buffer)]
    for handle in handles:
        handle.shutdown()


def test_mounted_backup_tells_its_holes_and_sectors(ctx: Context, backup_id: str) -> None:
    (view,) = mounts.mount(ctx, [f"backup:{backup_id}/db"])
    handle = connect(view)
    assert handle.get_block_size(nbd.SIZE_MINIMUM) == 4096
    flat: list[int] = []

    def collect(_name: str, _offset: int, entries: list[int], _error: object) -> int:
        flat.extend(entries)
        return 0

    handle.block_status(SIZE, 0, collect)
    handle.shutdown()
    data = sum(length for length, flags in zip(flat[::2], flat[1::2], strict=True) if not flags)
    assert sum(flat[::2]) == SIZE
    assert data <= 3 * MIB


def test_mounted_backup_writable_takes_writes_and_stays_as_it_is(
    ctx: Context, backup_id: str, content: bytes
) -> None:
    (view,) = mounts.mount(ctx, [f"backup:{backup_id}/db"], MountOptions(writable=True))
    handle = connect(view)
    handle.pwrite(b"w" * 4096, 4096)
    assert bytes(handle.pread(12288, 0)) == content[:4096] + b"w" * 4096 + content[8192:12288]
    handle.shutdown()
    (other,) = mounts.mount(ctx, [f"backup:{backup_id}/db"])
    handle = connect(other)
    assert bytes(handle.pread(12288, 0)) == content[:12288]
    handle.shutdown()


def test_mounted_backup_holds_the_store_until_it_is_unmounted(
    ctx: Context, backup_id: str, folder: Path
) -> None:
    from offload.compose import open_store
    from offload.store import Exclusive

    (view,) = mounts.mount(ctx, [f"backup:{backup_id}/db"])
    store = open_store(str(folder / "store"))
    assert isinstance(store, Exclusive)
    with pytest.raises(BusyError), store.lock(exclusive=True):
        pass
    mounts.unmount(ctx, [view.name])
    with store.lock(exclusive=True):
        pass
    store.close()


def test_mounted_backup_damaged_pack_is_an_error_not_other_data(
    ctx: Context, backup_id: str, content: bytes, folder: Path
) -> None:
    packs = sorted((folder / "store").rglob("*"), key=lambda path: path.stat().st_size)
    with packs[-1].open("r+b") as pack:
        pack.seek(packs[-1].stat().st_size // 2)
        old = pack.read(1)
        pack.seek(-1, os.SEEK_CUR)
        pack.write(bytes([old[0] ^ 1]))
    (view,) = mounts.mount(ctx, [f"backup:{backup_id}/db"])
    handle = connect(view)
    failed = 0
    for offset in range(0, SIZE, 256 << 10):
        try:
            read = bytes(handle.pread(256 << 10, offset))
        except nbd.Error as error:
            assert error.errno == "EIO"  # noqa: PT017 - reads that succeed are looked at too
            failed += 1
        else:
            assert read == content[offset : offset + (256 << 10)]
    handle.shutdown()
    assert failed >= 1


def test_mounting_a_backup_loads_no_heavy_library(ctx: Context, backup_id: str) -> None:
    (view,) = mounts.mount(ctx, [f"backup:{backup_id}/db"])
    handle = connect(view)
    handle.pread(4096, 0)
    mapped = Path(f"/proc/{view.server['pid']}/maps").read_text()
    handle.shutdown()
    for heavy in ("pydantic", "sqlalchemy", "libnbd", "numpy"):
        assert heavy not in mapped


def test_mount_of_a_backup_whose_store_has_lost_it_says_so_and_leaves_nothing(
    ctx: Context, backup_id: str, folder: Path
) -> None:
    for path in (folder / "store").rglob(f"*{backup_id}*"):
        path.unlink()
    with pytest.raises(NotFoundError) as caught:
        mounts.mount(ctx, [f"backup:{backup_id}"])
    assert "Traceback" not in caught.value.message
    assert backup_id in caught.value.message
    assert list(ctx.instance.views_dir.glob("*")) == []
    assert ctx.catalog.views() == []
