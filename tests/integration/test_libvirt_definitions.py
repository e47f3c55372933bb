"""Definitions of domains of another host, as a real libvirt daemon takes them here."""

from __future__ import annotations

import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest

from offload.errors import ConfigError, IntegrityError
from offload.hypervisors.libvirt import domain_xml, translate
from offload.hypervisors.libvirt.abilities import Abilities, abilities
from offload.hypervisors.libvirt.domain_xml import Mark
from offload.hypervisors.libvirt.new_domain import NewDisk, NewDomain
from offload.libvirtd import Libvirt
from offload.testing.libvirt_host import LibvirtHost

pytestmark = [pytest.mark.needs_root]

# As of a host with another QEMU: a newer machine type, hardware and folders of its own.
RICH = """
<domain type='xenner' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>rich</name>
  <uuid>11111111-2222-4333-8444-555555555503</uuid>
  <genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>
  <title>rich</title>
  <metadata>
    <info:libosinfo xmlns:info='http://libosinfo.org/xmlns/libvirt/domain/1.0'>
      <info:os id='http://redhat.com/rhel/9.4'/>
    </info:libosinfo>
    <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>
      <nova:name>rich</nova:name>
    </nova:instance>
  </metadata>
  <memory unit='KiB'>131072</memory>
  <memoryBacking><hugepages/></memoryBacking>
  <vcpu placement='static' cpuset='0-1'>2</vcpu>
  <iothreads>1</iothreads><iothreadids><iothread id='5'/></iothreadids>
  <cputune><vcpupin vcpu='0' cpuset='7'/></cputune>
  <numatune><memory mode='strict' nodeset='1'/></numatune>
  <resource><partition>/machine</partition></resource>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-rhel9.4.0'>hvm</type>
    <firmware><feature enabled='yes' name='secure-boot'/></firmware>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/edk2/ovmf/CODE.fd</loader>
    <nvram template='/usr/share/edk2/ovmf/VARS.fd'>/var/lib/libvirt/qemu/nvram/rich.fd</nvram>
  </os>
  <features><acpi/><smm state='on'/><hyperv><relaxed state='on'/></hyperv></features>
  <cpu mode='host-passthrough' check='none' migratable='on'>
    <topology sockets='1' cores='2' threads='1'/><feature policy='require' name='vmx'/>
  </cpu>
  <clock offset='utc'><timer name='hypervclock' present='yes'/></clock>
  <devices>
    <emulator>/usr/libexec/qemu-kvm</emulator>
    <disk type='block' device='lun'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
      <source dev='/dev/disk/by-id/old'/><target dev='sda' bus='scsi'/>
      <shareable/><iotune><total_iops_sec>9</total_iops_sec></iotune>
      <boot order='1'/><serial>S9</serial>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/>
    </disk>
    <disk type='file' device='disk'>
      <source file='/old/other.raw'/><target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='network' device='cdrom'>
      <source protocol='http' name='a.iso'><host name='h' port='80'/></source>
      <target dev='sdb' bus='sata'/><readonly/>
    </disk>
    <controller type='scsi' index='0' model='virtio-scsi'><driver iothread='5'/></controller>
    <controller type='usb' index='0' model='qemu-xhci'/>
    <filesystem type='mount'><source dir='/srv'/><target dir='srv'/></filesystem>
    <interface type='bridge'>
      <mac address='52:54:00:00:00:21'/><source bridge='br9'/><target dev='vnet9'/>
      <model type='virtio'/><filterref filter='clean-traffic'/>
      <bandwidth><inbound average='1000'/></bandwidth>
    </interface>
    <interface type='hostdev'>
      <mac address='52:54:00:00:00:22'/>
      <source><address type='pci' domain='0' bus='9' slot='0' function='1'/></source>
    </interface>
    <serial type='unix'><source mode='bind' path='/tmp/s'/><target port='0'/></serial>
    <console type='unix'>
      <source mode='bind' path='/tmp/s'/><target type='serial' port='0'/>
    </console>
    <parallel type='dev'><source path='/dev/parport0'/><target port='0'/></parallel>
    <channel type='unix'>
      <source mode='bind' path='/old/agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
    </channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <channel type='unix'>
      <source mode='bind' path='/old/own'/><target type='virtio' name='own.0'/>
    </channel>
    <channel type='tcp'>
      <source mode='connect' host='192.0.2.1' service='9'/><target type='virtio' name='far.0'/>
    </channel>
    <input type='tablet' bus='usb'/>
    <input type='passthrough' bus='virtio'><source evdev='/dev/input/event1'/></input>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='vnc' port='5901' listen='10.0.0.1'>
      <listen type='address' address='10.0.0.1'/>
    </graphics>
    <graphics type='rdp' port='3389'/>
    <sound model='ich9'/>
    <audio id='1' type='pulseaudio' serverName='/old'/>
    <video><model type='none-such' vram='9'/></video>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source><address domain='0' bus='9' slot='0' function='0'/></source>
    </hostdev>
    <redirdev bus='usb' type='spicevmc'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <rng model='virtio'>
      <backend model='egd' type='udp'><source host='h' service='9'/></backend>
    </rng>
    <vsock model='virtio'><cid auto='no' address='9'/></vsock>
    <shmem name='s'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>
    <memballoon model='virtio'/>
  </devices>
  <seclabel type='dynamic' model='selinux'/>
  <qemu:commandline><qemu:arg value='-old'/></qemu:commandline>
</domain>
"""
UUID = "11111111-2222-4333-8444-5555555555aa"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ol-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def link(folder: Path) -> Iterator[Libvirt]:
    with LibvirtHost(folder).running() as daemon, Libvirt(daemon.uri) as made:
        yield made


def abilities_of(link: Libvirt) -> Abilities:
    """Of this host, where it has KVM or where it has not: without."""
    found = abilities(link, domain_xml.parse(RICH))
    assert found.kind == "qemu"
    assert found.machine == "q35"
    return found


def translated(link: Libvirt, kind: str) -> tuple[ET.Element, list[str]]:
    """What the daemon has made of it, and the notes."""
    new = NewDomain(
        name="new",
        uuid=UUID,
        mark=Mark(kind=kind, fields={"instance": "i1"}),
        disks={"sda": NewDisk(kind="file", form="qcow2", source={"file": "/new/sda.qcow2"})},
        mac=lambda old: old.replace("52:54:00", "52:54:01"),
        nvram="/new/nvram",
    )
    text, notes = translate.translate(domain_xml.parse(RICH), new, abilities_of(link))
    defined: Any = link.connection.defineXML(text)
    try:
        return domain_xml.parse(defined.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)), notes
    finally:
        defined.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)


def models(root: ET.Element, device: str) -> list[str | None]:
    return [element.get("type") for element in root.findall(f"devices/{device}")]


def test_placeholder_of_a_foreign_domain_is_taken(link: Libvirt) -> None:
    root, notes = translated(link, domain_xml.PLACEHOLDER)
    assert (root.findtext("name"), root.findtext("uuid")) == ("new", UUID)
    assert root.find("genid") is None
    assert [e.tag.rpartition("}")[2] for e in root.findall("metadata/*")] == [
        "libosinfo",
        "placeholder",
    ]
    (disk,) = domain_xml.disk_elements(root)
    assert (disk.get("device"), domain_xml.disk_path(disk)) == ("disk", "/new/sda.qcow2")
    assert disk.findtext("serial") == "S9"
    assert disk.find("shareable") is None
    assert disk.find("iotune") is None
    assert [driver.attrib for driver in disk.iterfind("driver")] == [
        {"name": "qemu", "type": "qcow2", "discard": "unmap"}
    ]
    assert domain_xml.nvram_of(root) == "/new/nvram"
    assert [(cpu.get("mode"), [e.tag for e in cpu]) for cpu in root.findall("cpu")] == [
        ("maximum", ["topology"])
    ]
    assert root.find("features/hyperv") is None
    assert domain_xml.firmware_of(root) == "uefi"
    (card,) = root.findall("devices/interface")
    assert domain_xml.networks_of(root) == [
        {"name": "br9", "mac": "52:54:01:00:00:21", "model": "virtio"}
    ]
    assert [element.attrib for element in card.findall("link")] == [{"state": "down"}]
    assert card.find("filterref") is None
    assert domain_xml.tools_of(root) == "not-running"
    assert models(root, "channel") == ["unix"]
    assert models(root, "serial") == ["pty"]
    for gone in ("graphics", "video", "tpm", "hostdev", "filesystem", "vsock", "shmem", "sound"):
        assert root.findall(f"devices/{gone}") == []
    said = "\n".join(notes)
    for what in (
        "emulated", "pc-q35-rhel9.4.0", "a device of its host", "a folder of its host",
        "pinning to CPUs", "backs its memory", "past libvirt", "TPM", "52:54:00:00:00:22",
        "channel own.0", "channel far.0", "parallel port", "SCSI commands", "sdb: the drive",
        "randomness", "an input device",
    ):  # fmt: skip
        assert what in said


def test_restored_vm_of_a_foreign_domain_is_taken(link: Libvirt) -> None:
    root, notes = translated(link, domain_xml.RESTORED)
    assert root.find("genid") is not None
    assert root.findtext("genid") != "43dc0cf8-809b-4adb-9bea-a9abb5f3d90e"
    assert "instance" in {e.tag.rpartition("}")[2] for e in root.findall("metadata/*")}
    (screen,) = root.findall("devices/graphics")
    assert (screen.get("type"), screen.get("listen")) == ("vnc", "127.0.0.1")
    assert [m.get("type") for m in root.findall("devices/video/model")] == ["vga"]
    assert sorted(str(kind) for kind in models(root, "channel")) == ["unix", "unix"]
    assert root.findall("devices/channel/source[@path]") == []
    assert [element.get("auto") for element in root.findall("devices/vsock/cid")] == ["yes"]
    (card,) = root.findall("devices/interface")
    assert card.find("link") is None
    assert card.find("filterref") is not None
    said = "\n".join(notes)
    for what in ("screen by rdp", "none-such graphics", "TPM", "channel far.0"):
        assert what in said


def test_domain_that_this_host_can_run_as_it_is_stays_as_it_is(link: Libvirt) -> None:
    plain = """
    <domain type='qemu'><name>a</name><memory>32768</memory>
      <os><type arch='x86_64' machine='pc'>hvm</type></os>
      <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
      <devices>
        <disk type='file' device='disk'><source file='/a'/><target dev='vda'/></disk>
      </devices>
    </domain>
    """
    root = domain_xml.parse(plain)
    new = NewDomain(
        name="a",
        uuid=UUID,
        mark=Mark(kind=domain_xml.RESTORED, fields={"instance": "i1"}),
        disks={"vda": NewDisk(kind="block", form="raw", source={"dev": "/dev/a"})},
        mac=str,
    )
    text, notes = translate.translate(root, new, abilities(link, root))
    assert notes == []
    made = domain_xml.parse(text)
    assert made.findtext("cpu/model") == "qemu64"
    (disk,) = domain_xml.disk_elements(made)
    assert (disk.get("type"), domain_xml.disk_path(disk)) == ("block", "/dev/a")


CHOSEN = """
<domain type='qemu'><name>a</name><memory>32768</memory>
  <os firmware='efi'>
    <type arch='x86_64' machine='q35'>hvm</type>{loader}<nvram>/old</nvram>
  </os>
  <features><acpi/></features><devices/>
</domain>
"""


@pytest.mark.parametrize("kind", [domain_xml.PLACEHOLDER, domain_xml.RESTORED])
@pytest.mark.parametrize("loader", ["", "<loader type='pflash'>/old.fd</loader>"])
@pytest.mark.parametrize("has", [True, False])
def test_firmware_that_libvirt_chooses_is_one_that_this_host_has(
    link: Libvirt, kind: str, loader: str, has: bool
) -> None:
    root = domain_xml.parse(CHOSEN.format(loader=loader))
    host = abilities(link, root)
    assert host.has("firmware", "efi")
    if not has:
        host = replace(host, models={**host.models, "firmware": frozenset({"bios"})})
    new = NewDomain(
        name="a",
        uuid=UUID,
        mark=Mark(kind=kind, fields={"instance": "i1"}),
        disks={},
        mac=str,
        nvram="/new/nvram",
    )
    text, notes = translate.translate(root, new, host)
    domain = link.connection.defineXML(text)
    made = domain_xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    nameless = kind == domain_xml.PLACEHOLDER and not has and not loader
    assert domain_xml.firmware_of(made) == ("bios" if nameless else "uefi")
    assert domain_xml.nvram_of(made) == ("" if nameless else "/new/nvram")
    missing = [note for note in notes if "no firmware 'efi'" in note]
    assert bool(missing) == (not has and not (kind == domain_xml.PLACEHOLDER and loader))


def test_architecture_that_this_host_has_not_is_refused(link: Libvirt) -> None:
    other = domain_xml.parse(RICH.replace("arch='x86_64'", "arch='s390x'"))
    with pytest.raises(ConfigError) as refused:
        abilities(link, other)
    assert refused.value.code == "wrong-architecture"


@pytest.mark.parametrize("text", ["", "<domain>", "<network/>", "no XML"])
def test_definition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(IntegrityError) as refused:
        domain_xml.parse(text)
    assert refused.value.code == "bad-definition"
