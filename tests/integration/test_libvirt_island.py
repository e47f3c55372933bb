"""Islands of placeholders from end to end: VMs of a real libvirt daemon, chosen by their tag."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import pytest

from offload import run
from offload.errors import BusyError, CleanupError
from offload.hypervisors.libvirt import domain_xml
from offload.journal import CRASH_ENV
from offload.services import island, island_away, placeholders, recover
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.island_record import IslandOptions
from offload.testing.daemon import Daemon, running
from offload.testing.instances import free_port
from offload.testing.libvirt_host import LibvirtHost
from targets import processes

pytestmark = [pytest.mark.needs_root]

MIB = 1 << 20
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[volumes.web]
provider = "copy"
path = "{folder}/web.raw"

[groups.shop]
hypervisor = "kvm"
tags = ["gold"]
atomic = "record"

[hypervisors.kvm]
kind = "libvirt"
uri = "{uri}"

[backup_hosts.island]
hypervisor = "kvm"

[backup_hosts.iscsi]
hypervisor = "kvm"
target = "tgt"
prefix = "iscsi-"

[iscsi]
port = {port}
"""
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>64</memory>
  <metadata>
    <o:tags xmlns:o='{tags}'><o:tag>gold</o:tag></o:tags>
  </metadata>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{folder}/{name}.raw'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <memballoon model='none'/>
  </devices>
</domain>
"""
DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/><source file='{path}'/><target dev='vdb' bus='virtio'/>
</disk>
"""
SCRIPT = """
import sys
from pathlib import Path
from offload.services import island
from offload.services.context import open_context
from offload.services.island_record import IslandOptions
with open_context(Path(sys.argv[1])) as ctx:
    island.mount(ctx, "shop", IslandOptions(host="island"))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Production's two VMs, `db` and `web`, each with one disk, and offload beside them."""

    folder: Path
    connection: Any
    ctx: Context

    def domains(self) -> set[str]:
        return {domain.name() for domain in self.connection.listAllDomains(0)}

    def overlays(self) -> list[Path]:
        return sorted(self.ctx.instance.state_dir.glob("placeholders/*"))

    def is_clean(self) -> bool:
        """Nothing is left of any island: domain, overlay, view, server, TimeMark, intent."""
        ctx = self.ctx
        return (
            self.domains() == {"db", "web"}
            and self.overlays() == []
            and ctx.catalog.islands() == []
            and ctx.catalog.views() == []
            and ctx.catalog.timemarks() == []
            and list(ctx.instance.views_dir.glob("*")) == []
            and list(ctx.instance.journal_dir.glob("*")) == []
        )


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="ol-"))
    for name in ("db", "web"):
        with (folder / f"{name}.raw").open("xb") as out:
            out.truncate(2 * MIB)
            out.write(name.encode() * 100)
    (folder / "d").mkdir()
    with LibvirtHost(folder / "d").running() as daemon:
        (folder / "offload.toml").write_text(
            CONFIG.format(folder=folder, uri=daemon.uri, port=free_port())
        )
        connection = libvirt.open(daemon.uri)
        for name in ("db", "web"):
            text = DOMAIN.format(name=name, folder=folder, tags=domain_xml.TAGS)
            connection.defineXML(text)
        with open_context(folder / "offload.toml") as ctx:
            yield World(folder=folder, connection=connection, ctx=ctx)
        connection.close()
    shutil.rmtree(folder)


@pytest.fixture
def stage(world: World) -> Iterator[World]:
    """With nothing mounted, before and after."""
    assert world.is_clean()
    yield world
    for name in world.domains() - {"db", "web"}:
        domain = world.connection.lookupByName(name)
        if domain.isActive():
            domain.destroy()
    island_away.unmount_all(world.ctx, all_views=True, force=True)
    assert world.is_clean()


def stand(stage: World) -> island.IslandReport:
    return island.mount(stage.ctx, "shop", IslandOptions(host="island"))


def read(path: Path) -> bytes:
    """What a backup reads of an overlay."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        run.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)])
        return raw.read_bytes()


def test_group_chosen_by_a_tag_stands_as_placeholders(stage: World) -> None:
    report = stand(stage)
    assert stage.domains() == {"db", "web", "backup-db", "backup-web"}
    assert [read(path)[:4] for path in stage.overlays()] == [b"dbdb", b"webw"]
    assert {p.vm for p in report.island.placeholders} == {"db", "web"}
    found = placeholders.check(stage.ctx)
    assert (found.placeholders, found.findings) == (2, ())
    (status,) = placeholders.look(stage.ctx)
    assert [(s.there, s.power, s.problem) for s in status.standing] == [(True, "off", "")] * 2


@pytest.mark.parametrize("host", ["island", "iscsi"])
def test_island_whose_disks_are_being_read_stays(stage: World, host: str) -> None:
    report = island.mount(stage.ctx, "shop", IslandOptions(host=host))
    socket = stage.folder / "reader"
    argv = ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", str(socket), str(stage.overlays()[0])]
    with running(Daemon(argv=argv, log=stage.folder / "log"), socket.exists):
        with pytest.raises(BusyError) as refused:
            island_away.unmount_all(stage.ctx, [report.island.name])
        assert refused.value.code == "view-busy"
        assert placeholders.check(stage.ctx).findings == ()
    until = time.monotonic() + 60
    while any(status.clients for status in mounts.views(stage.ctx)):  # it notices a moment later
        assert time.monotonic() < until
        time.sleep(0.05)
    island_away.unmount_all(stage.ctx, [report.island.name])


def test_islands_views_go_with_it_only(stage: World) -> None:
    report = stand(stage)
    with pytest.raises(BusyError) as refused:
        mounts.unmount(stage.ctx, [report.views[0].name])
    assert refused.value.code == "view-in-island"


def test_check_tells_how_production_has_moved_on(stage: World) -> None:
    stand(stage)
    disk = stage.folder / "new.raw"
    disk.write_bytes(bytes(MIB))
    web = stage.connection.lookupByName("web")
    web.attachDeviceFlags(DISK.format(path=disk), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    os.truncate(stage.folder / "db.raw", 3 * MIB)
    try:
        findings = placeholders.check(stage.ctx).findings
    finally:
        web.detachDeviceFlags(DISK.format(path=disk), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        os.truncate(stage.folder / "db.raw", 2 * MIB)
    said = {finding.vm: finding.what for finding in findings if finding.vm}
    assert set(said) == {"db", "web"}
    assert "vdb" in said["web"]
    assert placeholders.check(stage.ctx).findings == ()


def test_views_that_are_served_again_are_under_the_same_placeholders(stage: World) -> None:
    """As after a reboot: the placeholders stood on, the servers did not."""
    report = stand(stage)
    for view in report.views:
        for server in processes.find_servers(stage.ctx.instance.views_dir / view.id):
            server.end()
    assert placeholders.check(stage.ctx).findings
    recover.recover(stage.ctx)
    assert placeholders.check(stage.ctx).findings == ()
    assert [read(path)[:4] for path in stage.overlays()] == [b"dbdb", b"webw"]


def test_refresh_shows_what_production_has_now(stage: World) -> None:
    before = stand(stage).island
    content = (stage.folder / "web.raw").read_bytes()
    with (stage.folder / "web.raw").open("r+b") as out:
        out.write(b"later")
    try:
        (_report,) = placeholders.refresh(stage.ctx, [before.name])
    finally:
        (stage.folder / "web.raw").write_bytes(content)
    (after,) = stage.ctx.catalog.islands()
    assert after.name == before.name
    assert [p.name for p in after.placeholders] == [p.name for p in before.placeholders]
    assert read(stage.overlays()[1])[:5] == b"later"


def test_unmount_waits_for_a_placeholder_that_was_started(stage: World) -> None:
    report = stand(stage)
    domain = stage.connection.lookupByName("backup-web")
    domain.create()
    with pytest.raises(CleanupError):
        island_away.unmount_all(stage.ctx, [report.island.name], force=True)
    assert stage.overlays()
    assert all(status.alive for status in mounts.views(stage.ctx))
    domain.destroy()


@pytest.mark.parametrize(
    "kill_at",
    ["island.build.overlay-1-vda", "island.build.define-1", "island.build.define-2"],
)
def test_mount_killed_while_placeholders_are_made_leaves_nothing(
    stage: World, kill_at: str
) -> None:
    argv = [sys.executable, "-c", SCRIPT, str(stage.folder / "offload.toml")]
    killed = subprocess.run(argv, check=False, timeout=300, env={**os.environ, CRASH_ENV: kill_at})
    assert killed.returncode == -signal.SIGKILL
    assert not stage.is_clean()
    recover.recover(stage.ctx)
    assert stage.is_clean()
