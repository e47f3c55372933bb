"""Placeholders on a real libvirt daemon, over real views of production's disks."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import libvirt
import pytest

from offload import compose, run
from offload.configs.hypervisors import BackupHostConfig
from offload.errors import (
    BusyError,
    CleanupError,
    ConfigError,
    OffloadError,
    PolicyError,
    PrivilegeError,
)
from offload.hypervisor import BackupHost, IslandRequest, IslandView
from offload.hypervisors.libvirt import domain_xml
from offload.hypervisors.libvirt.backup_host import LibvirtBackupHost
from offload.island import Placeholder, Shown
from offload.machine import Machine
from offload.model import TimeMark, View
from offload.services import director, machines
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.testing.instances import free_port, make_instance
from offload.testing.libvirt_host import LibvirtHost

pytestmark = [pytest.mark.needs_root]

MIB = 1 << 20
WEB = "11111111-2222-4333-8444-555555555501"
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.system]
provider = "copy"
path = "{folder}/system.raw"

[volumes.data]
provider = "qcow2"
path = "{folder}/data.qcow2"

[volumes.log]
provider = "copy"
path = "{folder}/log.qcow2"

[groups.shop]
volumes = ["system", "data", "log"]
atomic = "record"

[groups.log]
volumes = ["log"]
atomic = "record"

[hypervisors.kvm]
kind = "libvirt"
uri = "{uri}"

[backup_hosts.island]
hypervisor = "kvm"
disk_dir = "{folder}/placeholders"
"""
DOMAIN = """
<domain type='qemu'>
  <name>web</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <loader readonly='yes' type='pflash'>{folder}/CODE.fd</loader>
    <nvram>{folder}/web.nvram</nvram>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' discard='unmap'/>
      <source file='{folder}/system.raw'/>
      <target dev='vda' bus='virtio'/><serial>S1</serial><boot order='1'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{folder}/data.qcow2'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{folder}/log.qcow2'/>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{folder}/elsewhere.raw'/>
      <target dev='vdd' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='{folder}/install.iso'/><target dev='hda' bus='ide'/><readonly/>
    </disk>
    <interface type='network'>
      <mac address='52:54:00:00:00:01'/><source network='gone'/><model type='virtio'/>
    </interface>
    <interface type='bridge'>
      <mac address='52:54:00:00:00:02'/><source bridge='br0'/><model type='virtio'/>
    </interface>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def write(path: Path, size: int, *, form: str) -> bytes:
    """A disk with data here and there; its guest's bytes."""
    content = bytearray(size)
    for at in range(0, size, MIB):
        content[at : at + 4096] = path.name.encode()[:4].ljust(4, b"-") * 1024
    raw = path.with_suffix(".bytes")
    raw.write_bytes(content)
    run.run(["qemu-img", "convert", "-f", "raw", "-O", form, str(raw), str(path)])
    raw.unlink()
    return bytes(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Production, a TimeMark of it, and its views. `content`: of its disks as its guest sees it."""

    folder: Path
    libvirt: LibvirtHost
    connection: Any
    ctx: Context
    mark: TimeMark
    machine: Machine
    content: Mapping[str, bytes]
    views: tuple[View, ...]

    def host(self, **entry: Any) -> BackupHost:
        """As configured, but for `entry`."""
        if not entry:
            return compose.backup_host("island", self.ctx.instance)
        table = {"hypervisor": "kvm", "disk_dir": f"{self.folder}/placeholders", **entry}
        config = BackupHostConfig.model_validate({k: v for k, v in table.items() if v is not None})
        return LibvirtBackupHost("island", config, self.ctx.instance)

    def request(self, ident: str, *found: Machine, **other: Any) -> IslandRequest:
        """An island of these VMs, or of `web`."""
        views = [
            IslandView(view=view, volume=view.origin.rpartition("/")[2], identity="")
            for view in self.views
        ]
        fields: dict[str, Any] = {
            "id": ident,
            "name": f"shop-{ident}",
            "group": "shop",
            "origin": f"timemark:{self.mark.id}",
            "at": self.mark.created_at,
            "consistency": {"web": "filesystem"},
            "shown": Shown.GROUP,
            "views": views,
            "machines": found or (self.machine,),
        }
        return IslandRequest(**{**fields, **other})


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="ol-"))
    content = {
        "vda": write(folder / "system.raw", 4 * MIB, form="raw"),
        "vdb": write(folder / "data.qcow2", 3 * MIB, form="qcow2"),
        "vdc": write(folder / "log.qcow2", 2 * MIB, form="qcow2"),
    }
    for name in ("elsewhere.raw", "install.iso"):
        (folder / name).write_bytes(bytes(MIB))
    (folder / "web.nvram").write_bytes(b"variables" * 1000)
    (folder / "CODE.fd").write_bytes(b"firmware")
    for name in ("placeholders", "d"):
        (folder / name).mkdir()
    with LibvirtHost(folder / "d").running() as daemon:
        (folder / "offload.toml").write_text(CONFIG.format(folder=folder, uri=daemon.uri))
        connection = libvirt.open(daemon.uri)
        connection.defineXML(DOMAIN.format(folder=folder, uuid=WEB))
        with open_context(folder / "offload.toml") as ctx:
            mark = director.create(ctx, "shop")
            with compose.hypervisor("kvm", ctx.instance) as kvm:
                machine = machines.placed(ctx.instance.config, kvm.machine(WEB))
            views = mounts.mount(ctx, [f"timemark:{mark.id}"])
            try:
                yield World(
                    folder=folder,
                    libvirt=daemon,
                    connection=connection,
                    ctx=ctx,
                    mark=mark,
                    machine=machine,
                    content=content,
                    views=tuple(views),
                )
            finally:
                mounts.unmount(ctx, [], all_views=True, force=True)
                connection.close()
    shutil.rmtree(folder)


def no_step(_name: str) -> None:
    """Nobody dies."""


@contextmanager
def island(
    world: World, request: IslandRequest, host: BackupHost | None = None
) -> Iterator[tuple[Placeholder, ...]]:
    """Built; gone with the block."""
    host = host or world.host()
    record = host.plan(request)
    try:
        yield host.build(request, record, no_step)
    finally:
        host.take_down(record, no_step)
        assert nothing_is_left(world)


def nothing_is_left(world: World) -> bool:
    names = {domain.name() for domain in world.connection.listAllDomains(0)}
    return names == {"web"} and list((world.folder / "placeholders").iterdir()) == []


def definition(world: World, name: str) -> Any:
    return domain_xml.parse(world.connection.lookupByName(name).XMLDesc(0))


def guest_bytes(overlay: Path) -> bytes:
    """What a guest, or a backup, would read of a disk."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        run.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(overlay), str(raw)])
        return raw.read_bytes()


# -- what stands -----------------------------------------------------------------------------------


def test_placeholder_is_off_and_shows_the_disks_of_the_point_in_time(world: World) -> None:
    with island(world, world.request("k1")) as (found,):
        assert (found.name, found.vm, found.production) == ("backup-web", "web", WEB)
        assert found.consistency == "filesystem"
        domain = world.connection.lookupByName("backup-web")
        assert (domain.UUIDString(), domain.isActive(), domain.autostart()) == (found.id, 0, 0)
        root = definition(world, "backup-web")
        disks = {domain_xml.disk_name(d): d for d in domain_xml.disk_elements(root)}
        assert set(disks) == {"vda", "vdb", "vdc"}
        for name, disk in disks.items():
            path = Path(domain_xml.disk_path(disk))
            assert path.parent == world.folder / "placeholders"
            assert path.stat().st_mode & 0o777 == 0o600
            assert guest_bytes(path)[: len(world.content[name])] == world.content[name]
        assert disks["vda"].findtext("serial") == "S1"
        assert [driver.attrib for driver in disks["vda"].iterfind("driver")] == [
            {"name": "qemu", "type": "qcow2", "discard": "unmap"}
        ]


def test_placeholder_names_what_it_is_and_what_it_lacks(world: World) -> None:
    with island(world, world.request("k2")) as (found,):
        root = definition(world, "backup-web")
        mark = domain_xml.mark_of(root)
        assert mark is not None
        assert (mark.instance, mark.island) == (world.ctx.instance.id, "k2")
        assert mark.fields["production"] == WEB
        said = root.findtext("description")
        assert "Do not start it" in said
        assert f"timemark:{world.mark.id}" in said
        notes = "\n".join(found.notes)
        assert "vdd is left out" in notes
        assert "hda: the drive is empty" in notes
        assert "no network 'gone'" in notes


def test_placeholder_has_its_own_identity_network_and_firmware(world: World) -> None:
    with island(world, world.request("k3")) as (found,):
        root = definition(world, "backup-web")
        assert root.findtext("uuid") == found.id != WEB
        (card,) = root.findall("devices/interface")
        assert card.find("mac").get("address") != "52:54:00:00:00:02"
        assert card.find("link").get("state") == "down"
        nvram = Path(domain_xml.nvram_of(root))
        assert nvram.parent == world.folder / "placeholders"
        assert nvram.read_bytes() == b"variables" * 1000
    assert (world.folder / "web.nvram").exists()


def test_placeholder_is_none_of_the_vms_that_a_group_may_choose(world: World) -> None:
    with (
        island(world, world.request("k4")),
        compose.hypervisor("kvm", world.ctx.instance) as kvm,
    ):
        shown = {vm.name: vm.placeholder for vm in kvm.inventory().vms}
        assert shown == {"web": "", "backup-web": "k4"}
        with pytest.raises(OffloadError) as refused:
            kvm.find("backup-web")
        assert refused.value.code == "unknown-vm"


def test_placeholder_over_tcp_shows_the_same(world: World) -> None:
    host = world.host(address="127.0.0.1")
    target, exposure, writable = host.export()
    assert (target, writable) == ("nbd", False)
    origin = f"timemark:{world.mark.id}/system"
    (view,) = mounts.mount(world.ctx, [origin], MountOptions(target=target, exposure=exposure))
    try:
        shown = IslandView(view=view, volume="system", identity="")
        with island(world, world.request("k5", views=[shown]), host) as (found,):
            (path,) = (world.folder / "placeholders").glob("*.qcow2")
            assert guest_bytes(path) == world.content["vda"]
            assert any("volume data is not part of this" in note for note in found.notes)
    finally:
        mounts.unmount(world.ctx, [view.name])


def test_placeholder_over_iscsi_shows_the_same(world: World) -> None:
    host = world.host(target="tgt")
    target, exposure, _ = host.export()
    origin = f"timemark:{world.mark.id}/system"
    port = MountOptions(target=target, exposure=replace(exposure, port=free_port()))
    (view,) = mounts.mount(world.ctx, [origin], port)
    try:
        shown = IslandView(view=view, volume="system", identity="")
        with island(world, world.request("k6", views=[shown]), host) as (found,):
            (path,) = (world.folder / "placeholders").glob("*.qcow2")
            assert guest_bytes(path) == world.content["vda"]
            (standing,) = host.look({"uri": world.libvirt.uri}, [found])
            assert standing.problem == ""
    finally:
        mounts.unmount(world.ctx, [view.name], force=True)


# -- it is backed up, unchanged --------------------------------------------------------------------


def test_virtnbdbackup_backs_a_placeholder_up_and_gives_the_bytes_back(
    world: World, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.folder.glob("*.qcow2")}
    out, back = tmp_path / "out", tmp_path / "back"
    with island(world, world.request("k7")):
        argv = ["virtnbdbackup", "-U", world.libvirt.uri, "-d", "backup-web", "-l", "copy"]
        run.run([*argv, "-o", str(out)], timeout_s=300, env={"HOME": str(tmp_path)})
        assert not world.connection.lookupByName("backup-web").isActive()
    back.mkdir()
    restore = ["virtnbdrestore", "-U", world.libvirt.uri, "-i", str(out), "-o", str(back)]
    run.run(restore, timeout_s=300, env={"HOME": str(tmp_path)})
    (nvram,) = (world.folder / "placeholders").iterdir()  # it goes back to where it was
    assert nvram.read_bytes() == b"variables" * 1000
    nvram.unlink()
    restored = {path: guest_bytes(path) for path in back.iterdir() if path.suffix == ".qcow2"}
    assert sorted(restored.values()) == sorted(world.content.values())
    assert {path: path.stat().st_mtime_ns for path in before} == before


# -- how it goes -----------------------------------------------------------------------------------


def test_take_down_refuses_while_a_placeholder_runs(world: World) -> None:
    request, host = world.request("k8"), world.host()
    with island(world, request) as (found,):
        domain = world.connection.lookupByName(found.name)
        root = definition(world, found.name)
        for element in [*root.findall("os/loader"), *root.findall("os/nvram")]:
            root.find("os").remove(element)
        for card in root.findall("devices/interface"):
            root.find("devices").remove(card)
        world.connection.defineXML(ET.tostring(root, encoding="unicode"))
        domain.create()
        (standing,) = host.look(host.plan(request), [found])
        assert (standing.there, standing.power) == (True, "on")
        assert "started" in standing.problem
        with pytest.raises(CleanupError) as refused:
            host.take_down(host.plan(request), no_step)
        assert refused.value.code == "placeholder-runs"
        assert len(list((world.folder / "placeholders").glob("*.qcow2"))) == 3
        domain.destroy()


def test_take_down_is_idempotent_and_leaves_other_islands(world: World) -> None:
    other = world.host(prefix="other-")
    request = world.request("k9")
    with island(world, world.request("k10")):
        record = other.plan(request)
        other.build(request, record, no_step)
        other.take_down(record, no_step)
        other.take_down(record, no_step)
        assert len(list((world.folder / "placeholders").glob("*.qcow2"))) == 3
        world.connection.lookupByName("backup-web")


def test_look_says_what_is_wrong_with_what_stands(world: World) -> None:
    request, host = world.request("k11"), world.host()
    record = host.plan(request)
    with island(world, request) as (found,):
        (standing,) = host.look(record, [found])
        assert (standing.there, standing.power, standing.problem) == (True, "off", "")
        (path, *_) = sorted((world.folder / "placeholders").glob("*.qcow2"))
        path.rename(path.with_suffix(".aside"))
        (standing,) = host.look(record, [found])
        path.with_suffix(".aside").rename(path)
        assert path.name in standing.problem
        world.connection.lookupByName(found.name).undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
        (standing,) = host.look(record, [found])
        assert (standing.there, standing.problem) == (False, "somebody has removed it")


def test_look_finds_a_view_that_is_gone(world: World) -> None:
    host, origin = world.host(), f"timemark:{world.mark.id}/system"
    (view,) = mounts.mount(world.ctx, [origin])
    shown = IslandView(view=view, volume="system", identity="")
    request = world.request("k12", views=[shown])
    with island(world, request) as (found,):
        mounts.unmount(world.ctx, [view.name])
        (standing,) = host.look(host.plan(request), [found])
        assert standing.there
        assert standing.problem
        assert "recover" in standing.do


# What is killed at a step: a process of its own, told by a file what to build.
SCRIPT = """
import os, pickle, signal, sys
from pathlib import Path
from offload import compose
from offload.services.context import open_context
def step(name):
    with open(sys.argv[3], "a") as out:
        out.write(name + "\\n")
    if name == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
request = pickle.loads(Path(sys.argv[2]).read_bytes())
with open_context(Path(sys.argv[1])) as ctx:
    host = compose.backup_host("island", ctx.instance)
    host.build(request, host.plan(request), step)
"""


def in_a_process(world: World, request: IslandRequest, tmp_path: Path, kill_at: str) -> list[str]:
    """Build in a process that dies at this step ("" for none); the steps that it came to."""
    trace, order = tmp_path / "trace", tmp_path / "order"
    trace.write_text("")
    order.write_bytes(pickle.dumps(request))
    argv = [sys.executable, "-c", SCRIPT, str(world.folder / "offload.toml"), str(order)]
    done = subprocess.run([*argv, str(trace), kill_at], check=False, timeout=300)
    assert done.returncode == (-signal.SIGKILL if kill_at else 0)
    return trace.read_text().split()


def test_build_killed_at_any_step_is_taken_down_by_its_record(world: World, tmp_path: Path) -> None:
    request, host = world.request("k13"), world.host()
    steps = in_a_process(world, request, tmp_path, "")
    host.take_down(host.plan(request), no_step)
    assert nothing_is_left(world)
    assert steps == ["overlay-1-vda", "overlay-1-vdb", "overlay-1-vdc", "nvram-1", "define-1"]
    for number, step in enumerate(steps, start=1):
        assert in_a_process(world, request, tmp_path, step) == steps[:number]
        assert not nothing_is_left(world)
        host.take_down(host.plan(request), no_step)
        assert nothing_is_left(world)


# -- what is refused -------------------------------------------------------------------------------


def refused_by(world: World, request: IslandRequest, code: str, **entry: Any) -> OffloadError:
    with pytest.raises(OffloadError) as refused:
        world.host(**entry).refuse(request)
    assert refused.value.code == code
    assert nothing_is_left(world)
    return refused.value


def changed(machine: Machine, **fields: Any) -> Machine:
    """With these fields in all of its disks."""
    return replace(machine, disks=tuple(replace(d, **fields) for d in machine.disks))


def test_request_with_a_lost_disk_is_warned_of(world: World) -> None:
    (warning,) = world.host().refuse(world.request("k20"))
    assert warning.startswith(
        f"VM web: disk vdd is left out: {world.folder}/elsewhere.raw is on no"
    )


def test_name_that_is_taken_is_refused(world: World) -> None:
    with island(world, world.request("k21")):
        with pytest.raises(BusyError) as refused:
            world.host().refuse(world.request("k22"))
        assert refused.value.code == "name-taken"
        request, host = world.request("k22"), world.host()
        record = host.plan(request)
        with pytest.raises(BusyError):
            host.build(request, record, no_step)


def test_vms_that_cannot_stand_are_refused(world: World) -> None:
    machine = world.machine
    cases: list[tuple[Machine, str]] = [
        (replace(machine, kind="vsphere"), "wrong-hypervisor"),
        (replace(machine, name="a/b"), "bad-name"),
        (changed(machine, problem="QEMU encrypts it"), "no-disk-to-show"),
        (changed(machine, format="vmdk"), "no-disk-to-show"),
        (changed(machine, volume=""), "no-disk-to-show"),
        (replace(machine, disks=()), "no-disk-to-show"),
        (
            replace(machine, definition=machine.definition.replace("x86_64", "s390x")),
            "wrong-architecture",
        ),
    ]
    for case, code in cases:
        refused_by(world, world.request("k23", case), code)
    refused_by(world, world.request("k24", machine, machine), "name-taken")
    refused_by(world, world.request("k25", shown=Shown.VM), "no-vm-instant")


def test_disks_that_vms_share_are_shown_to_each_and_named(world: World) -> None:
    shared = changed(world.machine, shared=True)
    with island(world, world.request("k27", shared)) as (found,):
        assert any("vda is shared" in note for note in found.notes)
        assert definition(world, found.name).findall("devices/disk/shareable") == []


def test_disk_that_is_plugged_in_for_now_is_left_out_and_named(world: World) -> None:
    """What a VM has now and will have at its next start need not be the same."""
    *first, last = world.machine.disks
    plugged = replace(first[0], name="vdx")
    machine = replace(world.machine, disks=(*first, plugged))
    with island(world, world.request("k28", machine)) as (found,):
        notes = "\n".join(found.notes)
        assert "vdx is left out: it is plugged in until" in notes
        assert f"{last.name} is left out: the VM gets it at its next start" in notes


def test_image_whose_parent_is_not_in_the_view_is_refused(world: World) -> None:
    """Its overlay would show production's parent as it is now."""
    child = world.folder / "child.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    run.run([*create, str(world.folder / "data.qcow2"), str(child)])
    aside = world.folder / "log.aside"
    (world.folder / "log.qcow2").rename(aside)
    child.rename(world.folder / "log.qcow2")
    try:
        (view,) = mounts.mount(world.ctx, ["log"])
    finally:
        aside.rename(world.folder / "log.qcow2")
    shown = IslandView(view=view, volume="log", identity="")
    request, host = world.request("k26", views=[shown]), world.host()
    with pytest.raises(PolicyError) as refused:
        host.build(request, host.plan(request), no_step)
    host.take_down(host.plan(request), no_step)
    mounts.unmount(world.ctx, [view.name])
    assert refused.value.code == "image-has-parents"


def test_backup_host_that_cannot_be_used_is_refused(world: World) -> None:
    with pytest.raises(ConfigError) as refused:
        world.host(disk_dir=f"{world.folder}/nothing").check()
    assert refused.value.code == "no-disk-dir"
    with pytest.raises(ConfigError) as refused:
        world.host(address="192.0.2.1").export()
    assert refused.value.code == "not-loopback"
    assert world.host().check() == []


def test_folder_that_this_user_may_not_write_to_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root may everything
    with pytest.raises(PrivilegeError):
        world.host().check()


def test_backup_host_on_another_machine_is_refused(world: World) -> None:
    elsewhere = {"kind": "libvirt", "uri": "qemu+ssh://192.0.2.1/system"}
    tables = {"hypervisors": {"far": elsewhere}, "backup_hosts": {"far": {"hypervisor": "far"}}}
    instance = make_instance(world.folder / "far", tables)
    with pytest.raises(ConfigError) as refused:
        compose.backup_host("far", instance).check()
    assert refused.value.code == "remote-backup-host"
