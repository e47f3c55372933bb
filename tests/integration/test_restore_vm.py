"""`restore --as-vm` on a real libvirt daemon: from a backup to a VM, in files or on views."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import pytest

from offload import run as programs
from offload.cli.main import run
from offload.hypervisors.libvirt import domain_xml
from offload.journal import CRASH_ENV
from offload.services import mount, recover
from offload.services.context import Context, open_context
from offload.testing.libvirt_host import LibvirtHost

pytestmark = [pytest.mark.needs_root]

MIB = 1 << 20
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "1MiB"
[overlays]
limit = "8MiB"
min_free = "1MiB"
[volumes.system]
provider = "copy"
path = "{folder}/system.raw"
[volumes.data]
provider = "copy"
path = "{folder}/data.raw"
[groups.shop]
hypervisor = "kvm"
tags = ["gold"]
atomic = "record"
[groups.plain]
volumes = ["data"]
atomic = "record"
[hypervisors.kvm]
kind = "libvirt"
uri = "{uri}"
[backup_hosts.here]
hypervisor = "kvm"
[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "1MiB"
"""
DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/><source file='{folder}/{name}.raw'/>
  <target dev='{dev}' bus='virtio'/>
</disk>
"""
DOMAIN = """
<domain type='qemu'>
  <name>shop vm</name><memory unit='MiB'>64</memory><vcpu>2</vcpu>
  <description>the shop</description>
  <metadata><o:tags xmlns:o='{tags}'><o:tag>gold</o:tag></o:tags></metadata>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>{disks}<memballoon model='none'/></devices>
</domain>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A VM with two disks, offload beside its daemon, and a backup."""

    folder: Path
    connection: Any
    ctx: Context
    backup: str

    def domains(self) -> set[str]:
        return {domain.name() for domain in self.connection.listAllDomains(0)}

    def disks(self, name: str) -> dict[str, ET.Element]:
        root = domain_xml.parse(self.connection.lookupByName(name).XMLDesc(0))
        found = {}
        for disk in root.iterfind("devices/disk"):
            target = disk.find("target")
            assert target is not None
            found[target.attrib["dev"]] = disk
        return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="orv-"))
    for name in ("system", "data"):
        (folder / f"{name}.raw").write_bytes((name.encode() * 100).ljust(2 * MIB, b"\0"))
    (folder / "d").mkdir()
    with LibvirtHost(folder / "d").running() as daemon:
        config = folder / "o.toml"
        config.write_text(CONFIG.format(folder=folder, uri=daemon.uri))
        connection = libvirt.open(daemon.uri)
        disks = DISK.format(folder=folder, name="system", dev="vda")
        disks += DISK.format(folder=folder, name="data", dev="vdb")
        connection.defineXML(DOMAIN.format(tags=domain_xml.TAGS, disks=disks))
        for words in (["store", "init", "main"], ["backup", "create", "shop"]):
            assert run(["--config", str(config), "--quiet", *words]) == 0
        with open_context(config) as ctx:
            (made,) = ctx.catalog.backups()
            assert made.vms == ("shop vm",)
            yield World(folder=folder, connection=connection, ctx=ctx, backup=made.id)
        connection.close()
    shutil.rmtree(folder)


@pytest.fixture
def place(world: World) -> Iterator[Path]:
    """An empty folder; domains that were made, and views, go at the end."""
    folder = world.folder / "to"
    folder.mkdir()
    yield folder
    for name in world.domains() - {"shop vm"}:
        world.connection.lookupByName(name).undefine()
    mount.unmount(world.ctx, [], all_views=True, force=True)
    shutil.rmtree(folder)


@pytest.fixture
def ask(world: World, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with --json; its value, or with `code` its error."""

    def command(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert run(["--config", str(world.folder / "o.toml"), "--json", *words]) == code
        said = capsys.readouterr()
        return json.loads(said.err if code else said.out)

    return command


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_vm_is_made_again_with_its_disks_in_a_folder(
    world: World, place: Path, ask: Callable[..., Any], form: str
) -> None:
    made = ask(
        "restore", world.backup, "--as-vm", "shop vm", "--host", "here",
        "--to", str(place), "--name", "shop again", "--format", form,
    )  # fmt: skip
    domain = world.connection.lookupByName("shop again")
    assert made["id"] == domain.UUIDString()
    assert not domain.isActive()
    assert not domain.autostart()
    assert domain.UUIDString() != world.connection.lookupByName("shop vm").UUIDString()
    assert domain_xml.parse(domain.XMLDesc(0)).findtext("vcpu") == "2"
    disks = world.disks("shop again")
    assert list(disks) == ["vda", "vdb"]
    for dev, name in (("vda", "system"), ("vdb", "data")):
        source = disks[dev].find("source")
        assert source is not None
        path = source.attrib["file"]
        assert path == made["disks"][dev] == f"{place}/shop-again-{dev}.{form}"
        raw = place / "raw"
        programs.run(["qemu-img", "convert", "-f", form, "-O", "raw", path, str(raw)])
        assert raw.read_bytes() == (world.folder / f"{name}.raw").read_bytes()


def test_vm_is_there_at_once_on_writable_views(
    world: World, place: Path, ask: Callable[..., Any]
) -> None:
    made = ask(
        "restore", world.backup, "--as-vm", "shop vm", "--host", "here",
        "--instant", "--name", "shop now",
    )  # fmt: skip
    views = {view["name"]: view for view in ask("views")}
    assert sorted(views) == sorted(made["views"])
    assert all(view["writable"] and view["alive"] for view in views.values())
    assert len(world.disks("shop now")) == 2
    for dev, name in (("vda", "system"), ("vdb", "data")):
        raw = place / "raw"
        programs.run(
            ["qemu-img", "convert", "-f", "raw", "-O", "raw", made["disks"][dev], str(raw)]
        )
        assert raw.read_bytes() == (world.folder / f"{name}.raw").read_bytes()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["{backup}", "--as-vm", "mail", "--to", "{to}"], "unknown-vm"),
        (["{backup}", "--as-vm", "shop vm", "--to", "{to}"], "name-taken"),
        (["{backup}", "--as-vm", "shop vm", "--to", "{to}", "--name", "a/b"], "bad-name"),
        (["{backup}/data", "--as-vm", "shop vm", "--to", "{to}"], "bad-origin"),
        (["{backup}", "--as-vm", "shop vm", "--host", "x", "--instant"], "unknown-backup-host"),
        (["{plain}", "--as-vm", "shop vm", "--to", "{to}"], "no-vm-settings"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is(
    world: World, place: Path, ask: Callable[..., Any], words: list[str], code: str
) -> None:
    plain = "timemark:none"
    if "{plain}" in words:
        plain = "timemark:" + ask("timemark", "create", "plain")["id"]
    given = [w.format(backup=world.backup, to=place, plain=plain) for w in words]
    if "--host" not in given:
        given += ["--host", "here"]
    codes = {"unknown-vm": 4, "unknown-backup-host": 4, "no-vm-settings": 4, "name-taken": 5}
    assert ask("restore", *given, code=codes.get(code, 2))["code"] == code
    assert world.domains() == {"shop vm"}
    assert list(place.iterdir()) == []
    assert ask("views") == []


@pytest.mark.parametrize("how", ["--instant", "--to"])
@pytest.mark.parametrize("kill_at", ["restore-vm.vm.intended", "restore-vm.vm.done"])
def test_restore_killed_leaves_no_vm(world: World, place: Path, how: str, kill_at: str) -> None:
    config = str(world.folder / "o.toml")
    argv = [sys.executable, "-m", "offload.cli", "--config", config, "restore", world.backup]
    argv += ["--as-vm", "shop vm", "--host", "here", "--name", "gone", how]
    argv += [str(place)] if how == "--to" else []
    killed = subprocess.run(argv, check=False, timeout=300, env={**os.environ, CRASH_ENV: kill_at})
    assert killed.returncode == -signal.SIGKILL
    recover.recover(world.ctx)
    assert world.domains() == {"shop vm"}
    assert world.ctx.catalog.views() == []
    assert list(world.ctx.instance.journal_dir.glob("*")) == []
    assert bool(list(place.iterdir())) == (how == "--to")  # whole files stay
