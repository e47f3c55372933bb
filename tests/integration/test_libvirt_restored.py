"""Real domains made again from their settings, on a real libvirt daemon: UEFI, and one boots from a
view."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from offload import compose, run
from offload.errors import BusyError, CleanupError, ConfigError, OffloadError
from offload.hypervisor import BackupHost
from offload.hypervisors.libvirt import abilities, domain_xml
from offload.machine import Machine
from offload.services import director, island, island_away, machines
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.island_record import IslandOptions
from offload.services.mount import MountOptions
from offload.testing import agent_disk
from offload.testing.instances import free_port
from offload.testing.libvirt_host import LibvirtHost
from offload.testing.production_images import ext4_faults

pytestmark = [pytest.mark.needs_root]

UUID = "11111111-2222-4333-8444-555555555502"
MAC = "52:54:00:00:00:07"
BOOT_S = 300.0
VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")  # of UEFI, as they are at the first start
CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.system]
provider = "copy"
path = "{folder}/system.raw"

[groups.shop]
volumes = ["system"]
atomic = "record"

[groups.gold]
hypervisor = "kvm"
tags = ["gold"]
consistency = "filesystem"
deadline_s = 120

[hypervisors.kvm]
kind = "libvirt"
uri = "{uri}"

[backup_hosts.island]
hypervisor = "kvm"

[hypervisors.far]
kind = "libvirt"
uri = "{far}"

[backup_hosts.far]
hypervisor = "far"
"""
DOMAIN = """
<domain type='qemu'>
  <name>shop</name>
  <uuid>{uuid}</uuid>
  <metadata><o:tags xmlns:o='{tags}'><o:tag>gold</o:tag></o:tags></metadata>
  <memory unit='MiB'>256</memory><vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram>{folder}/shop.nvram</nvram>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{folder}/system.raw'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><mac address='{mac}'/><model type='virtio'/></interface>
    <channel type='unix'>
      <source mode='bind'/><target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <serial type='file'><source path='{folder}/console.log'/></serial>
    <graphics type='vnc' port='5999'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Production: a domain with one disk, its settings, and where it is made again."""

    folder: Path
    connection: Any
    ctx: Context
    machine: Machine
    host: BackupHost
    far: BackupHost  # the same, as one of another machine

    @property
    def disk(self) -> Path:
        return self.folder / "system.raw"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="ol-"))
    agent_disk.make_disk(folder / "system.raw", folder, "a shop")
    boot = agent_disk.make_boot(folder)
    shutil.copyfile(VARIABLES, folder / "shop.nvram")
    (folder / "d").mkdir()
    with LibvirtHost(folder / "d", tcp_port=free_port()).running() as daemon:
        (folder / "offload.toml").write_text(
            CONFIG.format(folder=folder, uri=daemon.uri, far=daemon.tcp_uri)
        )
        connection = libvirt.open(daemon.uri)
        connection.defineXML(
            DOMAIN.format(
                folder=folder,
                uuid=UUID,
                tags=domain_xml.TAGS,
                mac=MAC,
                kernel=boot.kernel,
                initrd=boot.initramfs,
                cmdline=agent_disk.COMMAND_LINE,
            )
        )
        with open_context(folder / "offload.toml") as ctx:
            with compose.hypervisor("kvm", ctx.instance) as kvm:
                machine = machines.placed(ctx.instance.config, kvm.machine(UUID))
            yield World(
                folder=folder,
                connection=connection,
                ctx=ctx,
                machine=machine,
                host=compose.backup_host("island", ctx.instance),
                far=compose.backup_host("far", ctx.instance),
            )
        connection.close()
    shutil.rmtree(folder)


@pytest.fixture
def made(world: World) -> Iterator[World]:
    """What a test makes with the mark `m1` is gone after it."""
    yield world
    world.host.destroy("m1")
    assert [domain.name() for domain in world.connection.listAllDomains(0)] == ["shop"]


def no_step(_name: str) -> None:
    """Nobody dies."""


def definition(world: World, name: str) -> Any:
    return domain_xml.parse(world.connection.lookupByName(name).XMLDesc(0))


def agent(domain: Any, command: str) -> Any:
    """Its answer, as soon as it gives one."""
    until = time.monotonic() + BOOT_S
    while True:
        try:
            said = libvirt_qemu.qemuAgentCommand(domain, json.dumps({"execute": command}), 5, 0)
        except libvirt.libvirtError:
            assert time.monotonic() < until
            assert domain.isActive()
            time.sleep(0.2)
        else:
            return json.loads(said)["return"]


def needs_recovery(disk: Path) -> bool:
    """Whether its journal has to be replayed: not where it was frozen."""
    said = run.run(["dumpe2fs", "-h", str(disk)]).stdout
    return "needs_recovery" in said


# -- what is made ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_clone_boots_from_a_writable_view_and_its_agent_answers(made: World) -> None:
    before = hashlib.sha256(made.disk.read_bytes()).hexdigest()
    mark = director.create(made.ctx, "shop")
    target, exposure, _ = made.host.export()
    options = MountOptions(target=target, exposure=exposure, writable=True)
    (view,) = mounts.mount(made.ctx, [f"timemark:{mark.id}"], options)
    try:
        number = made.host.create(made.machine, {"vda": view.uri}, "clone", "m1", no_step)
        domain = made.connection.lookupByUUIDString(number)
        assert not domain.isActive()
        assert domain_xml.firmware_of(definition(made, "clone")) == "uefi"
        domain.create()
        assert agent(domain, "guest-get-osinfo")["pretty-name"] == "a shop"
        with compose.hypervisor("kvm", made.ctx.instance) as kvm:
            (clone,) = [vm for vm in kvm.inventory().vms if vm.name == "clone"]
        assert (clone.power, clone.tools, clone.placeholder) == ("on", "running", "")
        with pytest.raises(CleanupError) as refused:
            made.host.destroy("m1")
        assert refused.value.code == "vm-runs"
        domain.destroy()
        made.host.destroy("m1")
    finally:
        mounts.unmount(made.ctx, [view.name], force=True)
    assert hashlib.sha256(made.disk.read_bytes()).hexdigest() == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_running_vm_is_frozen_for_its_placeholder(world: World, tmp_path: Path) -> None:
    """Chosen by its tag, it has no entry in the configuration: its hypervisor asks its agent."""
    shop = world.connection.lookupByName("shop")
    shop.create()
    try:
        assert agent(shop, "guest-get-osinfo")["pretty-name"] == "a shop"
        made = island.mount(world.ctx, "gold", IslandOptions(host="island")).island
        try:
            (placeholder,) = made.placeholders
            assert (placeholder.name, placeholder.consistency) == ("backup-shop", "filesystem")
            (overlay,) = (world.ctx.instance.state_dir / "placeholders").glob("*.qcow2")
            raw = tmp_path / "raw"
            run.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(overlay), str(raw)])
        finally:
            island_away.unmount_all(world.ctx, [made.name])
        assert agent(shop, "guest-fsfreeze-status") == "thawed"
    finally:
        shop.destroy()
    assert ext4_faults(raw) == []
    assert not needs_recovery(raw)
    assert needs_recovery(world.disk)  # as a power cut leaves it


def test_vm_beside_the_original_gets_another_identity(made: World) -> None:
    number = made.host.create(made.machine, {"vda": str(made.disk)}, "again", "m1", no_step)
    root = definition(made, "again")
    assert root.findtext("uuid") == number != UUID
    (card,) = root.findall("devices/interface")
    assert card.find("mac").get("address") != MAC
    (disk,) = domain_xml.disk_elements(root)
    assert (domain_xml.disk_path(disk), domain_xml.disk_format(disk)) == (str(made.disk), "raw")


def test_vm_whose_original_is_gone_is_the_original(made: World) -> None:
    shop = made.connection.lookupByName("shop")
    text = shop.XMLDesc(0)
    shop.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
    try:
        number = made.host.create(made.machine, {"vda": str(made.disk)}, "shop", "m1", no_step)
        root = definition(made, "shop")
        made.host.destroy("m1")
    finally:
        made.connection.defineXML(text)
    assert number == UUID
    assert domain_xml.networks_of(root)[0]["mac"] == MAC


def test_vm_keeps_its_screen_and_agent_but_not_its_hosts_files(made: World) -> None:
    warnings = made.host.check_create(made.machine, {"vda": str(made.disk)}, "again")
    assert warnings == ["its serial port is a terminal, no file any more"]
    made.host.create(made.machine, {"vda": str(made.disk)}, "again", "m1", no_step)
    root = definition(made, "again")
    (screen,) = root.findall("devices/graphics")
    assert (screen.get("type"), screen.get("autoport"), screen.get("listen")) == (
        "vnc",
        "yes",
        "127.0.0.1",
    )
    assert root.find("devices/serial").get("type") == "pty"
    assert domain_xml.tools_of(root) == "not-running"


def test_vm_has_its_firmware_variables_beside_its_disk(made: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    steps: list[str] = []
    machine = made.machine
    made.host.create(machine, {"vda": str(disk)}, "uefi", "m1", steps.append)
    root = definition(made, "uefi")
    nvram = Path(domain_xml.nvram_of(root))
    assert (nvram.parent, nvram.read_bytes()) == (tmp_path, VARIABLES.read_bytes())
    (found,) = domain_xml.disk_elements(root)
    assert domain_xml.disk_format(found) == "qcow2"
    assert steps == ["define", "nvram"]
    made.host.destroy("m1")
    assert list(tmp_path.iterdir()) == []


def test_vm_on_another_machine_has_its_firmware_variables_by_a_storage_pool(
    made: World, tmp_path: Path
) -> None:
    disk = {"vda": str(tmp_path / "disk.raw")}
    machine = made.machine
    with pytest.raises(ConfigError) as refused:
        made.far.check_create(machine, disk, "uefi")
    assert refused.value.code == "no-pool"
    pool = made.connection.storagePoolCreateXML(
        f"<pool type='dir'><name>disks</name><target><path>{tmp_path}</path></target></pool>"
    )
    try:
        made.far.create(machine, disk, "uefi", "m1", no_step)
        nvram = Path(domain_xml.nvram_of(definition(made, "uefi")))
        assert (nvram.parent, nvram.read_bytes()) == (tmp_path, VARIABLES.read_bytes())
        assert nvram.stat().st_mode & 0o777 == 0o600
        made.far.destroy("m1")
    finally:
        pool.destroy()
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, pickle, signal, sys
from pathlib import Path
from offload import compose, run
from offload.services.context import open_context
def step(name):
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
machine, disk = pickle.loads(Path(sys.argv[2]).read_bytes())
with open_context(Path(sys.argv[1])) as ctx:
    compose.backup_host("island", ctx.instance).create(machine, {"vda": disk}, "uefi", "m1", step)
"""


@pytest.mark.parametrize("kill_at", ["define", "nvram"])
def test_vm_killed_in_the_making_is_taken_back_by_its_mark(
    made: World, tmp_path: Path, kill_at: str
) -> None:
    (tmp_path / "disks").mkdir()
    disk, order = tmp_path / "disks/disk.raw", tmp_path / "order"
    order.write_bytes(pickle.dumps((made.machine, str(disk))))
    argv = [sys.executable, "-c", SCRIPT, str(made.folder / "offload.toml"), str(order), kill_at]
    assert subprocess.run(argv, check=False, timeout=300).returncode == -signal.SIGKILL
    assert made.connection.lookupByName("uefi")
    made.host.destroy("other")
    assert made.connection.lookupByName("uefi")
    made.host.destroy("m1")
    made.host.destroy("m1")
    assert list((tmp_path / "disks").iterdir()) == []


def test_disk_that_was_plugged_in_for_then_is_left_out_and_named(made: World) -> None:
    (disk,) = made.machine.disks
    machine = replace(made.machine, disks=(disk, replace(disk, name="vdx")))
    disks = {"vda": str(made.disk), "vdx": "/other.raw"}
    warnings = made.host.check_create(machine, disks, "again")
    assert "left out: disk vdx, which was plugged in until the VM's next stop only" in warnings
    made.host.create(machine, disks, "again", "m1", no_step)
    (found,) = domain_xml.disk_elements(definition(made, "again"))
    assert domain_xml.disk_name(found) == "vda"


def test_timemark_of_a_vm_whose_firmware_variables_cannot_be_had_warns(world: World) -> None:
    nvram = world.folder / "shop.nvram"
    nvram.rename(world.folder / "aside")
    try:
        (machine,), warnings = machines.capture(world.ctx, {"kvm": [UUID]}, "shop")
    finally:
        (world.folder / "aside").rename(nvram)
    assert machine.files == {}
    assert warnings == (f"of VM shop is not kept: nvram: there is no {nvram}",)


def test_vm_whose_firmware_variables_were_not_kept_is_warned_of(world: World) -> None:
    bare = replace(world.machine, files={})
    warnings = world.host.check_create(bare, {"vda": str(world.disk)}, "new")
    assert "the variables of its firmware were not kept: they are the defaults" in warnings


# -- what is refused -------------------------------------------------------------------------------


def test_vm_that_cannot_be_made_is_refused(world: World) -> None:
    machine, disk = world.machine, {"vda": str(world.disk)}
    cases: list[tuple[Machine, dict[str, str], str, str]] = [
        (machine, disk, "shop", "name-taken"),
        (machine, disk, "a/b", "bad-name"),
        (machine, {"vdz": "/x"}, "new", "unknown-disk"),
        (machine, {}, "new", "no-disk"),
        (machine, {"vda": "iscsi://127.0.0.1/iqn.2004-10.com.example:a/1"}, "new", "bad-disk"),
        (replace(machine, kind="vsphere"), disk, "new", "wrong-hypervisor"),
        (replace(machine, definition="<domain"), disk, "new", "bad-definition"),
    ]
    for found, disks, name, code in cases:
        with pytest.raises(OffloadError) as refused:
            world.host.check_create(found, disks, name)
        assert refused.value.code == code
        with pytest.raises(OffloadError):
            world.host.create(found, disks, name, "m1", no_step)
    with pytest.raises(BusyError):
        world.host.create(machine, disk, "shop", "m1", no_step)
    assert [domain.name() for domain in world.connection.listAllDomains(0)] == ["shop"]


def test_view_on_a_socket_that_qemu_may_not_open_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = abilities.abilities
    monkeypatch.setattr(
        abilities, "abilities", lambda link, root: replace(real(link, root), user=64055)
    )
    with pytest.raises(ConfigError) as refused:
        world.host.create(
            world.machine, {"vda": "nbd+unix:///?socket=/run/x"}, "new", "m1", no_step
        )
    assert refused.value.code == "socket-out-of-reach"
