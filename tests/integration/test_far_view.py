"""Views of backups on S3: few requests, one cache for all views, nothing in clear in it."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import compose
from offload.model import View
from offload.retention import KeepRules
from offload.services import mount as mounts
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.prune import prune
from offload.services.store_init import init
from offload.services.stores import spec_of
from offload.testing.fault_proxy import FaultProxy, Trouble, fault_proxy
from offload.testing.rgw import RunningRgw

MIB = 1 << 20
SIZE = 20 * MIB
DATA = 16 * MIB
CHUNK = 256 << 10
PACKS = "packs/"

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "0%"
[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
[groups.shop]
volumes = ["db"]
atomic = "record"
[stores.far]
kind = "s3"
bucket = "{bucket}"
endpoint = "{endpoint}"
path_style = true
credentials_file = "{credentials}"
retry_for = "5s"
{more}
"""


class Site:
    """An instance whose only store is a bucket, by way of a proxy that counts."""

    def __init__(self, ctx: Context, folder: Path, proxy: FaultProxy) -> None:
        self.ctx, self.folder, self.proxy = ctx, folder, proxy
        self.blocks = folder / "state/cache/blocks"

    def backup(self) -> str:
        return backup(self.ctx, "shop", "far").backup.id

    def mount(self, ident: str, **options: Any) -> View:
        (view,) = mounts.mount(self.ctx, [f"backup:{ident}/db"], mounts.MountOptions(**options))
        return view

    def content(self) -> bytes:
        return (self.folder / "db.raw").read_bytes()

    def pack_requests(self) -> int:
        return self.proxy.count("GET", PACKS)

    def cached(self) -> list[Path]:
        return [path for path in self.blocks.rglob("*") if path.is_file()]


def read(view: View, offset: int = 0, length: int = SIZE, step: int = 64 << 10) -> bytes:
    client: Any = nbd.NBD()
    client.connect_uri(view.uri)
    found = b"".join(client.pread(step, at) for at in range(offset, offset + length, step))
    client.shutdown()
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="off-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@contextmanager
def site_of(folder: Path, rgw: RunningRgw, more: str) -> Iterator[Site]:
    with (folder / "db.raw").open("xb") as out:
        out.write(os.urandom(DATA))
        out.truncate(SIZE)
    with fault_proxy(rgw.endpoint) as proxy:
        config = folder / "offload.toml"
        config.write_text(
            CONFIG.format(
                folder=folder,
                bucket=rgw.new_bucket(),
                endpoint=proxy.endpoint,
                credentials=rgw.credentials_file,
                more=more,
            )
        )
        with open_context(config) as ctx:
            init(ctx, "far")
            yield Site(ctx, folder, proxy)
            mounts.unmount(ctx, [], all_views=True, force=True)


@pytest.fixture
def site(folder: Path, rgw: RunningRgw) -> Iterator[Site]:
    with site_of(folder, rgw, "") as made:
        yield made


def test_far_view_read_in_order_needs_a_request_for_many_chunks(site: Site) -> None:
    """How many depends on how far the reader gets while one is under way."""
    view = site.mount(site.backup())
    site.proxy.forget()
    assert read(view) == site.content()
    assert site.pack_requests() <= DATA // CHUNK * 3 // 4


def test_far_view_read_at_random_reads_nothing_ahead(site: Site) -> None:
    view = site.mount(site.backup())
    site.proxy.forget()
    places = random.Random(3).sample(range(0, DATA // CHUNK, 3), 12)
    content = site.content()
    for place in places:
        at = place * CHUNK + 8192
        assert read(view, at, 4096, 4096) == content[at : at + 4096]
    assert site.pack_requests() <= len(places) + 2  # pages of the tree


def test_far_view_reads_from_the_cache_what_another_view_has_read(site: Site) -> None:
    ident = site.backup()
    assert read(site.mount(ident, name="one")) == site.content()
    other = site.mount(ident, name="two")
    site.proxy.forget()
    assert read(other) == site.content()
    assert site.pack_requests() == 0


def test_far_view_with_a_damaged_cache_shows_the_backup(site: Site) -> None:
    ident = site.backup()
    read(site.mount(ident, name="one"))
    spoiled = site.cached()
    for path in spoiled:
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"spoiled")
    assert read(site.mount(ident, name="two")) == site.content()
    assert len(spoiled) > DATA // CHUNK // 2


def test_far_view_of_an_incremental_fetches_the_parts_of_a_chunk_together(site: Site) -> None:
    site.backup()
    choose = random.Random(5)
    for _ in range(3):
        with (site.folder / "db.raw").open("r+b") as disk:
            for place in range(0, DATA, CHUNK):
                disk.seek(place + choose.randrange(60) * 4096)
                disk.write(choose.randbytes(4096))
        ident = site.backup()
    view = site.mount(ident)
    site.proxy.forget()
    assert read(view) == site.content()
    # a request a night for eight chunks, and not four a chunk
    assert site.pack_requests() <= DATA // CHUNK


def test_far_view_whose_server_cuts_and_fails_shows_the_backup(site: Site) -> None:
    view = site.mount(site.backup())
    site.proxy.inject(Trouble.CUT_REPLY, part=PACKS, times=3)
    assert read(view) == site.content()


def test_far_view_of_an_encrypted_store_leaves_nothing_in_clear(
    folder: Path, rgw: RunningRgw
) -> None:
    key = folder / "secret"
    key.write_text("a passphrase that is long enough\n")
    key.chmod(0o600)
    with site_of(folder, rgw, f'key = {{ passphrase_file = "{key}" }}') as site:
        view = site.mount(site.backup())
        assert read(view) == site.content()
        content = site.content()
        marks = [content[at + 1000 : at + 1016] for at in range(0, DATA, CHUNK)]
        kept = b"".join(path.read_bytes() for path in site.cached())
        assert len(kept) > DATA // 2
        assert not [mark for mark in marks if mark in kept]
        assert {path.stat().st_mode & 0o777 for path in site.cached()} == {0o600}


def test_far_view_whose_chunks_a_prune_has_moved_shows_the_backup(
    folder: Path, rgw: RunningRgw
) -> None:
    """What the view reads shares packs with what goes: it is copied, and the old packs are gone."""
    with site_of(folder, rgw, 'grace = "0s"') as site:
        site.backup()
        with (folder / "db.raw").open("r+b") as disk:
            for at in range(0, DATA, 2 * CHUNK):  # every second chunk is new
                disk.seek(at)
                disk.write(os.urandom(CHUNK))
        ident = site.backup()
        view = site.mount(ident)
        before = set(packs(site))
        for _ in range(2):  # one says what goes, the next one deletes it
            prune(site.ctx, "far", rules=KeepRules(last=1))
        gone = before - set(packs(site))
        assert gone
        site.proxy.forget()
        assert read(view) == site.content()


def packs(site: Site) -> list[str]:
    store = compose.open_store(spec_of(site.ctx, "far"))
    try:
        return list(store.list(PACKS))
    finally:
        store.close()


def test_far_view_renews_its_pin_while_it_is_mounted(folder: Path, rgw: RunningRgw) -> None:
    """From inside the server, which no process of ours looks after."""
    with site_of(folder, rgw, 'pin_lifetime = "2s"') as site:
        site.mount(site.backup())
        site.proxy.forget()
        until = time.monotonic() + 30
        while site.proxy.count("PUT", "pins/") < 3:
            assert time.monotonic() < until, "the pin is not renewed"
            time.sleep(0.05)
