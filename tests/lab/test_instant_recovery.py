"""A guest boots from a backup on S3, and its disk comes home while it writes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from offload import run
from offload.services import migrate
from offload.services import mount as mounts
from offload.services.backup import backup
from offload.services.context import open_context
from offload.services.store_init import init
from offload.testing.fault_proxy import FaultProxy, fault_proxy
from offload.testing.lab.diskguest import DiskGuest, make_disk
from offload.testing.rgw import RunningRgw

MIB = 1 << 20
SIZE = 64 * MIB
FILLER = 32 * MIB

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "0%"
[volumes.vm]
provider = "copy"
path = "{folder}/vm.raw"
[groups.shop]
volumes = ["vm"]
atomic = "record"
[stores.far]
kind = "s3"
bucket = "{bucket}"
endpoint = "{endpoint}"
path_style = true
credentials_file = "{credentials}"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofi-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def proxy(rgw: RunningRgw) -> Iterator[FaultProxy]:
    with fault_proxy(rgw.endpoint) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_guest_boots_from_a_backup_on_s3_and_comes_home_while_it_writes(
    rgw: RunningRgw, proxy: FaultProxy, folder: Path
) -> None:
    make_disk(folder / "vm.raw", folder, SIZE, FILLER)
    config = folder / "offload.toml"
    config.write_text(
        CONFIG.format(
            folder=folder,
            bucket=rgw.new_bucket(),
            endpoint=proxy.endpoint,
            credentials=rgw.credentials_file,
        )
    )
    with open_context(config) as ctx:
        init(ctx, "far")
        ident = backup(ctx, "shop", "far").backup.id
        (folder / "vm.raw").unlink()  # production is gone
        proxy.forget()
        options = mounts.MountOptions(writable=True, name="vm")
        (view,) = mounts.mount(ctx, [f"backup:{ident}/vm"], options)
        socket = Path(parse_qs(urlsplit(view.uri).query)["socket"][0])
        with DiskGuest(socket, folder) as guest:
            guest.wait_for("guest up")
            moved = sum(seen.got_bytes for seen in proxy.seen if "packs/" in seen.path)
            guest.wait_rounds(2)
            before = guest.rounds
            home = folder / "home.raw"
            report = migrate.migrate(ctx, "vm", str(home))
            assert guest.rounds >= before
            guest.wait_rounds(2)
            proxy.forget()
            guest.wait_rounds(2)
            assert proxy.count("GET", "packs/") == 0  # the backup is needed no more
            shown = guest.end()
        assert not [line for line in guest.lines if "damaged" in line]
        mounts.unmount(ctx, ["vm"])
    assert moved < FILLER // 2  # what a boot reads, and not the disk
    assert hashlib.md5(home.read_bytes(), usedforsecurity=False).hexdigest() == shown
    assert report.view.uri == view.uri
    check = run.run(["e2fsck", "-fn", str(home)], check=False)
    assert check.status == 0, check.stdout
