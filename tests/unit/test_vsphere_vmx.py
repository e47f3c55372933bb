"""Settings of VMs become those of placeholders, as text."""

from __future__ import annotations

from uuid import UUID

import pytest

from offload.hypervisors.vsphere.register import NAME_MAX, escaped, placeholder_names
from offload.hypervisors.vsphere.vmx import Vmx, make_placeholder, make_restored
from offload.machine import Machine

TEXT = """#!/usr/bin/vmware
.encoding = "UTF-8"
displayName = "web"
uuid.bios = "56 4d 00 00 00 00 40 00-80 00 00 00 00 00 00 01"
vc.uuid = "50 23"
annotation = "said |22so|22|0Atwice"
SCSI0:0.fileName = "web-000001.vmdk"
scsi0:0.present = "TRUE"
scsi0:1.fileName = "/vmfs/volumes/old-uuid/web/data.vmdk"
scsi0:2.fileName = "/vmfs/volumes/elsewhere/web/other.vmdk"
scsi0:2.present = "TRUE"
scsi0:3.fileName = "../../db/db.vmdk"
sata0:0.fileName = "/vmfs/volumes/isos/debian.iso"
sata0:0.deviceType = "cdrom-image"
floppy0.fileName = "/vmfs/volumes/isos/floppy.flp"
ethernet0.present = "TRUE"
ethernet0.startConnected = "TRUE"
ethernet1.present = "TRUE"
ethernet1.address = "00:50:56:00:00:01"
workingDir = "/vmfs/volumes/old-label/web"
sched.swap.derivedName = "/vmfs/volumes/elsewhere/web/web.vswp"
checkpoint.vmState = "web-1.vmss"
"""
VOLUMES = {"old-uuid": "new-uuid", "old-label": "new-uuid"}


@pytest.fixture
def vmx() -> Vmx:
    return Vmx(TEXT)


def _placeholder(vmx: Vmx) -> list[str]:
    return make_placeholder(
        vmx, mark="i/1", mark_key="offload.island", annotation='a "note"\nof two', volumes=VOLUMES
    )


def test_vmx_that_nothing_changes_stays_as_it_is(vmx: Vmx) -> None:
    assert vmx.text() == TEXT
    assert vmx.get("ANNOTATION") == 'said "so"\ntwice'


def test_placeholder_has_no_file_of_production(vmx: Vmx) -> None:
    notes = _placeholder(vmx)
    assert dict(vmx.disks()) == {
        "scsi0:0": "web-000001.vmdk",
        "scsi0:1": "/vmfs/volumes/new-uuid/web/data.vmdk",
    }
    assert vmx.get("workingDir") == "/vmfs/volumes/new-uuid/web"
    for gone in ("elsewhere", "isos", "db.vmdk", "vmss", "old-"):
        assert gone not in vmx.text()
    assert [note.split()[2] for note in notes[:2]] == ["scsi0:2", "scsi0:3"]
    assert "suspended" in notes[2]


def test_placeholder_connects_to_no_network_and_says_what_it_is(vmx: Vmx) -> None:
    _placeholder(vmx)
    found = Vmx(vmx.text())
    assert found.get("ethernet0.startConnected") == "FALSE"
    assert found.get("ethernet1.startConnected") == "FALSE"
    assert found.get("annotation") == 'a "note"\nof two'
    assert found.get("offload.island") == "i/1"
    assert found.get("uuid.action") == "create"


def test_placeholder_made_twice_is_the_same(vmx: Vmx) -> None:
    _placeholder(vmx)
    once = vmx.text()
    again = Vmx(once)
    make_placeholder(
        again,
        mark="i/1",
        mark_key="offload.island",
        annotation='a "note"\nof two',
        volumes={**VOLUMES, "new-uuid": "new-uuid"},
    )
    assert again.text() == once


def test_restored_vm_has_identities_of_its_own(vmx: Vmx) -> None:
    make_restored(
        vmx,
        name="web2",
        uuid=UUID("00112233-4455-6677-8899-aabbccddeeff"),
        mark=("offload.restored", "i/vm-1"),
        volumes=VOLUMES,
    )
    assert vmx.get("uuid.bios") == "00 11 22 33 44 55 66 77-88 99 aa bb cc dd ee ff"
    assert vmx.get("displayName") == "web2"
    assert vmx.get("ethernet1.addressType") == "generated"
    assert "00:50:56" not in vmx.text()
    assert "vc.uuid" not in vmx.text()
    assert vmx.get("ethernet0.startConnected") == "TRUE"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b", "a%2fb"), ("a\\b", "a%5cb"), ("5%", "5%25"), ("a%2Fb", "a%2Fb"), ("%zz", "%25zz")],
)
def test_name_is_escaped_once(name: str, expected: str) -> None:
    assert escaped(name) == expected
    assert escaped(expected) == expected


def test_names_of_placeholders_are_short_and_differ() -> None:
    names = ["x" * 79 + end for end in "abc"] + ["same", "same", "y" * 69 + "/z"]
    machines = [
        Machine(name=name, kind="vsphere", hypervisor="vc", id=f"vm-{n}", uuid="", definition="")
        for n, name in enumerate(names)
    ]
    made = placeholder_names("backup-", machines)
    assert len(set(made.values())) == len(names)
    assert all(len(name) <= NAME_MAX for name in made.values())
    assert all(escaped(name) == name for name in made.values())
    assert made == placeholder_names("backup-", reversed(machines))
