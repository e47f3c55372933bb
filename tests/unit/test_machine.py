"""Settings of VMs: as JSON, as packed files, and on which volume a disk lies."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from offload.config import Config
from offload.errors import NotFoundError
from offload.machine import FILE_MAX, DiskKind, Machine, MachineDisk, pack_file, unpack_file
from offload.services.disk_volumes import volume_of
from offload.services.machines import chosen, placed

DISK = MachineDisk(name="vda", kind=DiskKind.FILE, path="/srv/a.raw", size_bytes=1 << 20)
MACHINE = Machine(
    name="web", kind="libvirt", hypervisor="kvm", id="i1", uuid="AB-CD", definition="<domain/>",
    files={"nvram": pack_file(b"vars")}, disks=(DISK,), summary={"cpus": 1, "networks": []},
)  # fmt: skip


def test_machine_goes_through_json_and_back() -> None:
    there = json.loads(json.dumps(MACHINE.to_dict()))
    assert Machine.from_dict(there) == MACHINE
    newer = {**there, "colour": "red", "disks": [{**there["disks"][0], "rpm": 1}]}
    assert Machine.from_dict(newer) == MACHINE


def test_packed_file_comes_back_and_an_empty_one_is_small() -> None:
    content = b"\xff" * 540672
    packed = pack_file(content)
    assert unpack_file(packed) == content
    assert len(packed) < 4096


def _bomb() -> str:
    return base64.b64encode(zlib.compress(bytes(FILE_MAX + 1), 9)).decode()


@pytest.mark.parametrize(
    "packed",
    ["%", base64.b64encode(b"no zlib").decode(), pack_file(b"x" * 100)[:-8], _bomb()],
    ids=["alphabet", "no-zlib", "cut-off", "bomb"],
)
def test_packed_file_that_is_damaged_is_an_error(packed: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of any kind
        unpack_file(packed)


def test_pack_file_refuses_what_is_no_setting() -> None:
    with pytest.raises(ValueError, match="no setting"):
        pack_file(bytes(FILE_MAX + 1))


def _config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "volumes": {
                "ds1": {"provider": "device", "path": "/dev/x", "lun": "naa.6001405aaaaaaaaa"},
                "a": {"provider": "reflink", "path": str(tmp_path / "a.raw")},
                "rbd": {"provider": "rbd", "image": "pool/img"},
            }
        }
    )


def test_disk_lies_on_the_volume_of_its_lun_its_file_or_its_image(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (tmp_path / "a.raw").touch()
    (tmp_path / "link").symlink_to("a.raw")
    on = {
        "ds1": replace(DISK, luns=("naa.6001405AAAAAAAAA", "naa.6001405bbbbbbbbb"), path="[ds] x"),
        "a": replace(DISK, path=str(tmp_path / "link")),
        "rbd": replace(DISK, kind=DiskKind.NETWORK, path="rbd:pool/img"),
        "": replace(DISK, luns=("naa.6001405bbbbbbbbb",), path=str(tmp_path / "a.raw")),
    }
    assert {name: volume_of(config, disk) for name, disk in on.items()} == {n: n for n in on}
    machine = placed(config, replace(MACHINE, disks=(on["a"], DISK)))
    assert [disk.volume for disk in machine.disks] == ["a", ""]


def test_chosen_machines_by_name_or_uuid() -> None:
    other = replace(MACHINE, name="db", id="i2", uuid="ef-01")
    twin = replace(MACHINE, id="i3", uuid="ef-02")
    assert chosen([MACHINE, other], []) == (MACHINE, other)
    assert chosen([MACHINE, other], ["db", "ab-cd", "i2"]) == (other, MACHINE)
    with pytest.raises(NotFoundError, match="no VM 'mail'") as error:
        chosen([MACHINE, other], ["mail"])
    assert error.value.hint == "it has: db, web"
    with pytest.raises(NotFoundError) as error:
        chosen([MACHINE, twin], ["web"])
    assert error.value.code == "ambiguous-vm"
    assert "ef-02" in (error.value.hint or "")
