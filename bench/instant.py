"""Instant recovery: mount of a backup to its first byte, read-ahead, the boot of a guest from S3.

The S3 server is Ceph's gateway on loopback; a proxy counts what moves, and delays each reply as a
network would. The guest is emulated.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nbd

from bench.report import Table
from offload.services import mount
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.services.store_init import init
from offload.testing.fault_proxy import FaultProxy, Trouble, fault_proxy
from offload.testing.lab.diskguest import DiskGuest, make_disk
from offload.testing.rgw import RunningRgw, running_rgw

MIB = 1 << 20
_SIZE = 512 * MIB
_FILLER = 320 * MIB
_DELAY_S = 0.02
_PACKS = "packs/"

_CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "0%"
[volumes.vm]
provider = "copy"
path = "{folder}/vm.raw"
[groups.vm]
volumes = ["vm"]
atomic = "record"
[stores.near]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
[stores.far]
kind = "s3"
bucket = "{bucket}"
endpoint = "{endpoint}"
path_style = true
credentials_file = "{credentials}"
[cache]
read_ahead = "{read_ahead}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    folder: Path
    rgw: RunningRgw
    proxy: FaultProxy
    bucket: str

    @contextmanager
    def context(self, read_ahead: str = "8MiB") -> Iterator[Context]:
        config = self.folder / "offload.toml"
        config.write_text(
            _CONFIG.format(
                folder=self.folder,
                bucket=self.bucket,
                endpoint=self.proxy.endpoint,
                credentials=self.rgw.credentials_file,
                read_ahead=read_ahead,
            )
        )
        with open_context(config) as ctx:
            yield ctx

    def forget_cache(self) -> None:
        """As on a machine that has never read this backup."""
        shutil.rmtree(self.folder / "state/cache/blocks", ignore_errors=True)

    def delay(self, seconds: float) -> None:
        """Each reply so much later from now on."""
        self.proxy.forget()
        if seconds:
            self.proxy.inject(Trouble.LATE, times=1 << 30, seconds=seconds)

    def moved(self) -> tuple[int, int]:
        """Bytes and requests of packs since `delay`."""
        packs = [seen for seen in self.proxy.seen if _PACKS in seen.path]
        return sum(seen.got_bytes for seen in packs), len(packs)


def measure(rounds: int) -> list[Table]:
    """All of it, in a folder and with a server of its own."""
    folder = Path(tempfile.mkdtemp(prefix="ofb-", dir="/tmp"))  # short: unix sockets
    try:
        make_disk(folder / "vm.raw", folder, _SIZE, _FILLER)
        with running_rgw(folder / "rgw") as rgw, fault_proxy(rgw.endpoint) as proxy:
            site = _Site(folder=folder, rgw=rgw, proxy=proxy, bucket=rgw.new_bucket())
            with site.context() as ctx:
                for store in ("near", "far"):
                    init(ctx, store)
                near = backup(ctx, "vm", "near").backup.id
                far = backup(ctx, "vm", "far").backup.id
            return [_first(site, near, far, rounds), _reading(site, far), _boot(site, far)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _first(site: _Site, near: str, far: str, rounds: int) -> Table:
    table = Table("Mount of a backup to its first byte", ("store", "seconds"))
    with site.context() as ctx:
        for what, ident, delay in (
            ("disk", near, 0.0),
            ("S3 on loopback", far, 0.0),
            (f"S3, each reply {_DELAY_S * 1000:.0f} ms later", far, _DELAY_S),
        ):
            site.delay(delay)
            times = [_first_byte(site, ctx, ident) for _ in range(rounds)]
            table.add(what, f"{statistics.median(times):.3f}")
    return table


def _first_byte(site: _Site, ctx: Context, ident: str) -> float:
    site.forget_cache()
    began = time.perf_counter()
    (view,) = mount.mount(ctx, [f"backup:{ident}/vm"])
    handle = nbd.NBD()
    handle.connect_uri(view.uri)
    handle.pread(4096, 0)
    seconds = time.perf_counter() - began
    handle.shutdown()
    mount.unmount(ctx, [view.name], force=True)
    return seconds


def _reading(site: _Site, ident: str) -> Table:
    title = "A view on S3, each reply 20 ms later, read in order, 256 KiB at once"
    table = Table(title, ("read-ahead", "MB/s", "requests a GiB"))
    for how, read_ahead, fresh in (
        ("none", "0", True),
        ("8 MiB", "8MiB", True),
        ("8 MiB, read before", "8MiB", False),
    ):
        if fresh:
            site.forget_cache()
        with site.context(read_ahead) as ctx:
            site.delay(0.0)
            (view,) = mount.mount(ctx, [f"backup:{ident}/vm"])
            site.delay(_DELAY_S)
            seconds = _read(view.uri)
            _, requests = site.moved()
            table.add(how, f"{_SIZE / seconds / 1e6:.0f}", f"{requests * (1 << 30) / _SIZE:.0f}")
            mount.unmount(ctx, [view.name], force=True)
    table.notes.append(f"{_SIZE // MIB} MiB, {_FILLER // MIB} of them files; the rest is holes.")
    return table


def _read(uri: str) -> float:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    began = time.perf_counter()
    for offset in range(0, _SIZE, 256 << 10):
        handle.pread(256 << 10, offset)
    seconds = time.perf_counter() - began
    handle.shutdown()
    return seconds


def _boot(site: _Site, ident: str) -> Table:
    """Emulated: its seconds say what a view costs beside a file, and nothing of a real boot."""
    table = Table(
        "Boot of an emulated guest from a writable view, its root a disk of 512 MiB",
        ("disk", "power-on to up", "moved from S3", "requests"),
    )
    with site.context() as ctx:
        mark = [f"backup:{ident}/vm"]
        for what, fresh in (("S3, 20 ms", True), ("S3, 20 ms, read before", False)):
            if fresh:
                site.forget_cache()
            (view,) = mount.mount(ctx, mark, MountOptions(writable=True))
            site.delay(_DELAY_S)
            socket = Path(parse_qs(urlsplit(view.uri).query)["socket"][0])
            began = time.perf_counter()
            with DiskGuest(socket, site.folder) as guest:
                guest.wait_for("guest up")
                seconds = time.perf_counter() - began
                count, requests = site.moved()
            table.add(what, f"{seconds:.1f} s", f"{count / MIB:.1f} MiB", str(requests))
            mount.unmount(ctx, [view.name], force=True)
    return table
