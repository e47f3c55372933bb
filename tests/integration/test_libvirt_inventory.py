"""The inventory of a real libvirt daemon, and how changes reach it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from offload import compose, run
from offload.errors import NotFoundError, UnavailableError
from offload.hypervisor import Hypervisor
from offload.hypervisors.libvirt import domain_xml
from offload.inventory import Inventory, InventoryVm
from offload.machine import DiskKind, unpack_file
from offload.testing.instances import free_port, make_instance
from offload.testing.libvirt_host import LibvirtHost

pytestmark = [pytest.mark.needs_root]

MIB = 1 << 20
WAIT_S = 60.0
TAGS = (
    f"<offload:tags xmlns:offload='{domain_xml.TAGS}'>"
    "<offload:tag>gold</offload:tag></offload:tags>"
)
SECRET = "<secret type='passphrase' uuid='11111111-2222-4333-8444-5555555555ff'/>"

WEB = """
<domain type='qemu'>
  <name>web</name>
  <uuid>11111111-2222-4333-8444-555555555501</uuid>
  <description>the shop's front</description>
  <metadata>{tags}</metadata>
  <memory unit='MiB'>32</memory><vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/none/CODE.fd</loader>
    <nvram>{folder}/web.nvram</nvram>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{folder}/pool/web.raw'/>
      <target dev='vda' bus='virtio'/><shareable/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='{folder}/pool/top.qcow2'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='raw'/><source pool='store' volume='web.raw'/>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='vms/web'><host name='127.0.0.1'/></source>
      <target dev='vdd' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{folder}/pool/secret.qcow2'>
        <encryption format='luks'>{secret}</encryption>
      </source>
      <target dev='vde' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='hda' bus='ide'/><readonly/></disk>
    <interface type='bridge'>
      <mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='virtio'/>
    </interface>
    <channel type='unix'>
      <source mode='bind'/><target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <memballoon model='none'/>
  </devices>
</domain>
"""
# no operating system: it sits in its firmware
BARE = """
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices><memballoon model='none'/></devices>
</domain>
"""
DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/><source file='{path}'/><target dev='vdz' bus='virtio'/>
</disk>
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ol-"))
    (made / "pool").mkdir()
    pool = made / "pool"
    run.run(["truncate", "-s", "3M", str(pool / "web.raw")])
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    run.run([*create, str(pool / "base.qcow2"), "5M"])
    run.run([*create, "-b", "base.qcow2", "-F", "qcow2", str(pool / "top.qcow2"), "6M"])
    run.run([*create, str(pool / "secret.qcow2"), "1M"])
    (made / "web.nvram").write_bytes(b"variables" * 1000)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[LibvirtHost]:
    (folder / "d").mkdir()
    with LibvirtHost(folder / "d", tcp_port=free_port()).running() as started:
        yield started


@pytest.fixture(scope="module")
def connection(host: LibvirtHost, folder: Path) -> Iterator[Any]:
    """With VM `web` and a storage pool."""
    made = libvirt.open(host.uri)
    for name, place in (("store", folder / "pool"), ("firmware", folder)):
        pool = made.storagePoolDefineXML(
            f"<pool type='dir'><name>{name}</name><target><path>{place}</path></target></pool>"
        )
        pool.create()
    made.defineXML(WEB.format(folder=folder, tags=TAGS, secret=SECRET))
    yield made
    made.close()


Open = Callable[[str], Hypervisor]


@pytest.fixture
def enter(tmp_path: Path, connection: Any) -> Iterator[Open]:
    entered: list[Hypervisor] = []

    def enter(uri: str) -> Hypervisor:
        tables = {"hypervisors": {"kvm": {"kind": "libvirt", "uri": uri}}}
        made = compose.hypervisor("kvm", make_instance(tmp_path, tables))
        entered.append(made.__enter__())
        return made

    yield enter
    for each in entered:
        each.__exit__(None, None, None)


@pytest.fixture
def kvm(enter: Open, host: LibvirtHost) -> Hypervisor:
    return enter(host.uri)


@pytest.fixture
def bare(connection: Any) -> Iterator[Any]:
    domain = connection.defineXML(BARE.format(name="bare"))
    yield domain
    if domain.isActive():
        domain.destroy()
    if domain.isPersistent():
        domain.undefine()


def vm_of(inventory: Inventory, name: str) -> InventoryVm:
    (found,) = [vm for vm in inventory.vms if vm.name == name]
    return found


def test_inventory_shows_a_vm_with_its_disks(kvm: Hypervisor, folder: Path) -> None:
    inventory = kvm.inventory()
    web = vm_of(inventory, "web")
    assert (web.power, web.tools, web.firmware, web.tags) == (
        "off",
        "not-running",
        "uefi",
        ("gold",),
    )
    assert web.encrypted
    assert web.placeholder == ""
    assert [host.name for host in inventory.hosts] == [web.host]
    raw, top, volume, rbd, secret = web.disks
    assert [d.name for d in web.disks] == ["vda", "vdb", "vdc", "vdd", "vde"]
    assert (raw.kind, raw.path, raw.size_bytes) == (
        DiskKind.FILE,
        f"{folder}/pool/web.raw",
        3 * MIB,
    )
    assert (raw.datastore, raw.shared) == ("store", True)
    assert (top.format, top.size_bytes, top.shared) == ("qcow2", 6 * MIB, False)
    assert top.chain == (f"{folder}/pool/base.qcow2",)
    assert (volume.kind, volume.path) == (DiskKind.FILE, f"{folder}/pool/web.raw")
    assert (rbd.kind, rbd.path) == (DiskKind.NETWORK, "rbd:vms/web")
    assert secret.encrypted
    assert "encrypts" in secret.problem


def test_inventory_shows_storage_pools_as_datastores(kvm: Hypervisor) -> None:
    store = next(d for d in kvm.inventory().datastores if d.name == "store")
    assert (store.kind, store.accessible, store.luns) == ("dir", True, ())
    assert 0 < store.free_bytes <= store.capacity_bytes


def test_machine_has_definition_and_firmware_variables(kvm: Hypervisor) -> None:
    machine = kvm.machine(kvm.find("web"))
    assert machine.definition.lstrip().startswith("<domain type='qemu'")
    assert unpack_file(machine.files["nvram"]) == b"variables" * 1000
    assert machine.summary["cpus"] == 2
    assert machine.summary["memory_bytes"] == 32 * MIB
    assert machine.summary["notes"] == "the shop's front"
    assert machine.summary["tags"] == ["gold"]
    assert machine.summary["networks"] == [
        {"name": "br0", "mac": "52:54:00:00:00:01", "model": "virtio"}
    ]
    assert machine.summary["left_out"] == []
    assert machine.uuid == machine.id == "11111111-2222-4333-8444-555555555501"


def test_machine_of_a_remote_daemon_has_its_firmware_variables(
    enter: Open, host: LibvirtHost
) -> None:
    remote = enter(host.tcp_uri)
    machine = remote.machine(remote.find("web"))
    assert unpack_file(machine.files["nvram"]) == b"variables" * 1000


@pytest.mark.parametrize("runs", [True, False])
def test_machine_whose_firmware_libvirt_chose_has_its_variables(
    enter: Open, host: LibvirtHost, connection: Any, runs: bool
) -> None:
    """Its definition does not say where they are."""
    text = BARE.format(name="chosen").replace("<os>", "<os firmware='efi'>")
    text = text.replace("'pc'", "'q35'").replace(
        "<devices>", "<features><acpi/></features><devices>"
    )
    domain = connection.defineXML(text)
    domain.create()
    pool = connection.storagePoolCreateXML(
        "<pool type='dir'><name>variables</name>"
        "<target><path>/var/lib/libvirt/qemu/nvram</path></target></pool>"
    )
    try:
        if not runs:
            domain.destroy()
        remote = enter(host.tcp_uri)  # what lies in there is seen by the daemon only
        machine = remote.machine(remote.find("chosen"))
    finally:
        pool.destroy()
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    assert machine.summary["firmware"] == "uefi"
    assert len(unpack_file(machine.files["nvram"])) > 100_000


def test_machine_whose_variables_are_gone_says_so(kvm: Hypervisor, folder: Path) -> None:
    (folder / "web.nvram").rename(folder / "aside")
    try:
        machine = kvm.machine(kvm.find("web"))
    finally:
        (folder / "aside").rename(folder / "web.nvram")
    assert "nvram" not in machine.files
    assert machine.summary["left_out"] == [f"nvram: there is no {folder}/web.nvram"]


def test_inventory_of_a_running_vm_has_its_images_parents(
    kvm: Hypervisor, bare: Any, tmp_path: Path
) -> None:
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    run.run([*create, str(tmp_path / "base.qcow2"), "1M"])
    run.run([*create, "-b", "base.qcow2", "-F", "qcow2", str(tmp_path / "middle.qcow2")])
    run.run([*create, "-b", "middle.qcow2", "-F", "qcow2", str(tmp_path / "top.qcow2")])
    disk = DISK.format(path=tmp_path / "top.qcow2").replace("'raw'", "'qcow2'")
    bare.attachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    assert vm_of(kvm.inventory(), "bare").disks[0].chain == ()  # off, and in no pool
    bare.create()
    running = vm_of(kvm.inventory(), "bare")
    assert (running.power, running.tools) == ("on", "not-installed")
    assert running.disks[0].chain == (f"{tmp_path}/middle.qcow2", f"{tmp_path}/base.qcow2")
    bare.suspend()
    assert vm_of(kvm.inventory(), "bare").power == "suspended"


def test_unknown_vm_is_refused(kvm: Hypervisor) -> None:
    with pytest.raises(NotFoundError) as refused:
        kvm.find("nobody")
    assert refused.value.code == "unknown-vm"
    with pytest.raises(NotFoundError) as refused:
        kvm.machine("11111111-2222-4333-8444-5555555555aa")
    assert refused.value.code == "unknown-vm"


def test_daemon_that_is_not_there_is_unavailable(enter: Open, folder: Path) -> None:
    nobody = f"qemu:///system?socket={folder}/nobody"
    for uri in (nobody, f"qemu+tcp://127.0.0.1:{free_port()}/system"):
        with pytest.raises(UnavailableError) as refused:
            enter(uri)
        assert refused.value.code == "libvirt-unavailable"


def test_daemon_without_storage_pools_has_an_inventory(enter: Open, folder: Path) -> None:
    place = folder / "q"
    place.mkdir()
    with LibvirtHost(place, drivers=["qemu"]).running() as poor:
        kvm = enter(poor.uri)
        assert kvm.inventory().datastores == ()
        made = libvirt.open(poor.uri)
        made.defineXML(BARE.format(name="lonely"))
        made.close()
        assert [vm.name for vm in kvm.changes(WAIT_S).vms] == ["lonely"]


def test_changes_before_the_inventory_are_refused(kvm: Hypervisor) -> None:
    with pytest.raises(UnavailableError) as refused:
        kvm.changes(0)
    assert refused.value.code == "not-followed"


def test_changes_follow_the_life_of_a_vm(kvm: Hypervisor, connection: Any) -> None:
    kvm.inventory()
    assert kvm.changes(0).vms == ()
    domain = connection.defineXML(BARE.format(name="young"))
    (there,) = kvm.changes(WAIT_S).vms
    assert (there.name, there.power) == ("young", "off")
    domain.create()
    (started,) = kvm.changes(WAIT_S).vms
    assert started.power == "on"
    domain.destroy()
    (stopped,) = kvm.changes(WAIT_S).vms
    assert stopped.power == "off"
    domain.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT,
        "<tags><tag>b</tag><tag>a</tag></tags>",
        "offload",
        domain_xml.TAGS,
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    (tagged,) = kvm.changes(WAIT_S).vms
    assert tagged.tags == ("a", "b")
    domain.undefine()
    assert kvm.changes(WAIT_S).gone == (there.id,)


def test_changes_find_disks_that_no_event_tells(kvm: Hypervisor, bare: Any, tmp_path: Path) -> None:
    disk = tmp_path / "new.raw"
    run.run(["truncate", "-s", "1M", str(disk)])
    kvm.inventory()
    bare.attachDeviceFlags(DISK.format(path=disk), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    (added,) = kvm.changes(0).vms
    assert [(d.name, d.size_bytes) for d in added.disks] == [("vdz", MIB)]
    run.run(["truncate", "-s", "2M", str(disk)])
    (grown,) = kvm.changes(0).vms
    assert [d.size_bytes for d in grown.disks] == [2 * MIB]
    bare.detachDeviceFlags(DISK.format(path=disk), libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    assert kvm.changes(0).vms[0].disks == ()


def test_changes_over_a_restart_of_the_daemon_come_as_differences(
    kvm: Hypervisor, host: LibvirtHost
) -> None:
    web = vm_of(kvm.inventory(), "web")
    host.restart()
    again = libvirt.open(host.uri)
    domain = again.defineXML(BARE.format(name="late"))
    seen: list[str] = []
    while "late" not in seen:  # it may be there before it is looked, or be told
        seen += [vm.name for vm in kvm.changes(WAIT_S).vms]
    domain.undefine()
    again.close()
    assert seen == ["late"]
    assert vm_of(kvm.inventory(), "web") == web
