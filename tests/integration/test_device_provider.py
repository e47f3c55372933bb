"""Block devices as volumes: sizes, sector sizes, identities."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from offload import blockdev, compose
from offload.errors import ConfigError, UnavailableError
from offload.model import Instant, Volume
from offload.run import run
from offload.snapshots.device import DeviceProvider
from offload.testing.pools import loop_device, partitions
from offload.testing.snapshot_provider import taken

_SIZE = 8 << 20


@pytest.fixture
def provider() -> DeviceProvider:
    return DeviceProvider("idevice000")


def _file(path: Path, size: int = _SIZE) -> Path:
    path.write_bytes(b"device")
    os.truncate(path, size)
    return path


def _volume(path: Path) -> Volume:
    return Volume(name="lun", provider="device", path=path)


def _number(folder: Path) -> list[str]:
    return (folder / "dev").read_text().strip().split(":")


@pytest.mark.needs_root
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_snapshot_shows_the_device_with_its_own_sector_size(
    provider: DeviceProvider, tmp_path: Path, sector_size: int
) -> None:
    file = _file(tmp_path / "lun.img")
    with loop_device(file, sector_size=sector_size, read_only=True) as device:
        assert provider.plan("t1", [_volume(device)]).instant_alone is Instant.NONE
        with taken(provider, "t1", _volume(device)) as (snapshot,):
            assert snapshot.ref == {"path": str(device)}
            assert (snapshot.size_bytes, snapshot.sector_size) == (_SIZE, sector_size)
            image = compose.open_image(provider.source(snapshot))
            assert (image.pread(0, 6), image.block_size) == (b"device", sector_size)
            image.close()
        assert device.exists()


@pytest.mark.needs_root
def test_prepare_pages_cached_before_another_host_wrote_are_forgotten(
    provider: DeviceProvider, tmp_path: Path
) -> None:
    """The file behind a loop device stands for the array, who writes to it for the other host."""
    file = _file(tmp_path / "lun.img")
    with loop_device(file, read_only=True) as device, device.open("rb") as holder:
        assert os.pread(holder.fileno(), 6, 0) == b"device"
        with file.open("r+b") as other:
            other.write(b"newer!")
        assert os.pread(holder.fileno(), 6, 0) == b"device"  # from the cache
        with taken(provider, "t1", _volume(device)) as (snapshot,):
            image = compose.open_image(provider.source(snapshot))
            assert image.pread(0, 6) == b"newer!"
            image.close()


@pytest.mark.needs_root
def test_inspect_device_uses_no_pool(provider: DeviceProvider, tmp_path: Path) -> None:
    with loop_device(_file(tmp_path / "lun.img")) as device:
        state = provider.inspect(_volume(device))
    assert (state.pool, state.needed_bytes, state.estimate_s) == ("", 0, 0.0)


@pytest.mark.needs_root
def test_inspect_configured_sector_size_that_the_device_has_not_is_refused(
    provider: DeviceProvider, tmp_path: Path
) -> None:
    with loop_device(_file(tmp_path / "lun.img")) as device:
        assert provider.inspect(replace(_volume(device), sector_size=512)).sector_size == 512
        with pytest.raises(ConfigError) as refused:
            provider.inspect(replace(_volume(device), sector_size=4096))
    assert refused.value.code == "sector-size"


@pytest.mark.needs_root
def test_identity_of_a_loop_device_is_of_the_file_behind_it(
    provider: DeviceProvider, tmp_path: Path
) -> None:
    """Whichever loop device it gets; another file, or the same from another place, is another."""
    one, two = _file(tmp_path / "one.img"), _file(tmp_path / "two.img")
    with loop_device(one) as first:
        identity = provider.inspect(_volume(first)).identity
        with loop_device(one) as second:
            assert second != first
            assert provider.inspect(_volume(second)).identity == identity
    with loop_device(two) as other:
        assert provider.inspect(_volume(other)).identity != identity


@pytest.mark.needs_root
def test_identity_of_partitions_differs_from_the_disk_and_each_other(
    provider: DeviceProvider, tmp_path: Path
) -> None:
    file = _file(tmp_path / "disk.img")
    run(["sfdisk", "--quiet", str(file)], stdin=b"label: gpt\nsize=2MiB\nsize=2MiB\n")
    with loop_device(file) as disk:
        folder = Path("/sys/block") / disk.name
        with partitions(disk):
            parts = sorted(p.name for p in folder.glob(f"{disk.name}p*"))
            assert len(parts) == 2
            found = {provider.inspect(_volume(disk)).identity}
            for name in parts:
                node = tmp_path / name  # made by hand: a container has no udev
                run(["mknod", str(node), "b", *_number(folder / name)])
                found.add(provider.inspect(_volume(node)).identity)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"dm/uuid": "LVM-abc\n", "wwid": "naa.1"}, "uuid:LVM-abc"),
        ({"wwid": "eui.0025385b\n", "device/serial": "S1"}, "wwid:eui.0025385b"),
        ({"device/wwid": "t10.ATA     Disk  7 \n"}, "wwid:t10.ATA Disk 7"),
        ({"serial": "vol-1\n"}, "serial:vol-1"),
        ({"serial": "\n"}, "number:254:0:100"),
        ({"loop/backing_file": "/no/such/file (deleted)"}, "number:254:0:100"),
        ({}, "number:254:0:100"),
    ],
)
def test_identity_of_a_disk_is_the_best_that_sysfs_knows(
    tmp_path: Path, attributes: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockdev, "_BY_ID", tmp_path / "none")
    for name, text in attributes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert blockdev._disk_identity(tmp_path, "254:0", 100) == expected


@pytest.mark.needs_root
def test_identity_without_attributes_is_udevs_lasting_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loop_device(_file(tmp_path / "lun.img")) as device:
        by_id = tmp_path / "by-id"
        by_id.mkdir()
        (by_id / "scsi-dead").symlink_to(tmp_path / "gone")
        (by_id / "scsi-lun").symlink_to(device)
        monkeypatch.setattr(blockdev, "_BY_ID", by_id)
        status = device.stat()
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        assert blockdev._disk_identity(tmp_path, number, _SIZE) == "by-id:scsi-lun"


def test_inspect_file_is_allowed_and_its_partition_table_tells_the_sector_size(
    provider: DeviceProvider, tmp_path: Path
) -> None:
    file = _file(tmp_path / "template.img")
    with file.open("r+b") as out:
        out.seek(4096)
        out.write(b"EFI PART")
    state = provider.inspect(_volume(file))
    assert (state.size_bytes, state.sector_size) == (_SIZE, 4096)


@pytest.mark.parametrize(("make", "code"), [("mkdir", "not-a-device"), ("touch", "volume-empty")])
def test_inspect_folder_or_empty_file_is_refused(
    provider: DeviceProvider, tmp_path: Path, make: str, code: str
) -> None:
    run([make, str(tmp_path / "lun")])
    with pytest.raises(UnavailableError) as refused:
        provider.inspect(_volume(tmp_path / "lun"))
    assert refused.value.code == code
