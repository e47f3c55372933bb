"""A view that looks like this machine's own disk, and the real udevd, LVM, md and multipath.

The machine's disk is a loop device with partitions; the view is a copy of it, taken when it also
had an md array and a second volume group. So every name and UUID of the machine exists twice.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from offload import attachment, device_use, host_rules, procs, run
from offload.errors import PolicyError
from offload.host_rules import RuleState
from offload.model import Connection, ConnectionKind
from offload.services import connect
from offload.services.connect import ConnectOptions
from offload.services.doctor import Status, examine
from offload.testing.connections import MIB, Site, connection_site, wait_for

pytestmark = pytest.mark.timeout(400)

TABLE = """\
label: gpt
start=1MiB, size=8MiB
start=9MiB, size=8MiB
start=17MiB, size=2MiB
start=19MiB, size=4MiB
start=23MiB, size=8MiB
"""
OURS, FILES, SWAP, ARRAY, THEIRS = range(1, 6)  # partitions
CONFIGURED = (
    Path("/etc/udev/rules.d/60-offload.rules"),
    Path("/etc/multipath/conf.d/offload.conf"),
    Path("/etc/lvm/lvmlocal.conf"),
    Path("/etc/multipath.conf"),
)


@dataclass(frozen=True)
class Machine:
    """This machine's disk, and the image of the view."""

    disk: str
    image: Path
    point: Path

    def part(self, number: int) -> str:
        return f"{self.disk}p{number}"


def sh(*argv: str, check: bool = True, stdin: bytes | None = None) -> str:
    return run.run(argv, check=check, stdin=stdin, timeout_s=120).stdout.strip()


def settle() -> None:
    sh("udevadm", "settle", "--timeout=60")


@pytest.fixture(scope="module")
def udevd() -> Iterator[None]:
    sh("modprobe", "--all", "loop", "dm-mod", "raid1", "dm-multipath", "iscsi_tcp", "sd_mod")
    sh("/lib/systemd/systemd-udevd", "--daemon")
    sh("udevadm", "trigger", "--subsystem-match=block")
    settle()
    yield
    sh("udevadm", "control", "--exit")
    wait_for(lambda: not host_rules.udev_runs())


@pytest.fixture(scope="module")
def machine(udevd: None) -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="ofh-", dir="/tmp"))
    image = folder / "disk.raw"
    with image.open("xb") as out:
        out.truncate(32 * MIB)
    sh("sfdisk", "--quiet", str(image), stdin=TABLE.encode())
    disk = sh("losetup", "--find", "--show", "--partscan", str(image))
    made = Machine(disk, folder / "view.raw", folder / "mnt")
    wait_for(Path(made.part(THEIRS)).exists)
    settle()
    fill(made)
    yield made
    sh("umount", str(made.point))
    sh("vgchange", "--quiet", "--activate=n", "ours")
    sh("losetup", "--detach", disk)
    shutil.rmtree(folder)


def fill(machine: Machine) -> None:
    for number, group in ((OURS, "ours"), (THEIRS, "theirs")):
        sh("vgcreate", "--quiet", "--physicalextentsize=1m", group, machine.part(number))
        sh("lvcreate", "--quiet", "--yes", "--size=2m", "--name=data", group)
    sh("mkfs.ext4", "-q", "-L", "data", machine.part(FILES))
    sh("mkswap", machine.part(SWAP))
    array = ["mdadm", "--create", "/dev/md/theirs", "--level=1", "--raid-devices=1", "--force"]
    sh(*array, "--run", machine.part(ARRAY))
    sh("mdadm", "--stop", "/dev/md/theirs")
    sh("vgchange", "--quiet", "--activate=n", "theirs")
    settle()
    sh("sync")
    sh("blockdev", "--flushbufs", machine.disk)
    machine.image.write_bytes((machine.image.parent / "disk.raw").read_bytes())
    # what only the view has from now on
    sh("vgremove", "--quiet", "--force", "theirs")
    sh("pvremove", "--quiet", machine.part(THEIRS))
    sh("mdadm", "--zero-superblock", machine.part(ARRAY))
    machine.point.mkdir()
    sh("mount", machine.part(FILES), str(machine.point))
    settle()


@pytest.fixture(params=["nbd", "tgt"])
def site(request: pytest.FixtureRequest, machine: Machine) -> Iterator[Site]:
    """The view is mounted, over NBD or iSCSI."""
    if request.param != "nbd":
        sh("iscsid")
    for state in ("pvs_online", "vgs_online", "pvs_lookup"):  # what pvscan has seen since boot
        shutil.rmtree(Path("/run/lvm", state), ignore_errors=True)
    with connection_site({"iscsi": {"port": 3278}}) as made, configuration():
        made.volume.write_bytes(machine.image.read_bytes())
        made.mount(target=str(request.param))
        yield made
        connect.disconnect(made.ctx, [], all_connections=True, force=True)
    for ref in procs.find_running("iscsid", "iscsid"):
        ref.end()
    settle()


@contextmanager
def configuration() -> Iterator[None]:
    """What tests write into /etc, they find as it was."""
    before = {path: path.read_bytes() if path.exists() else None for path in CONFIGURED}
    yield
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)
    sh("udevadm", "control", "--reload")


def uuid_of(device: str) -> str:
    return sh("blkid", "--probe", "--match-tag=UUID", "--output=value", device)


def link(*names: str) -> str:
    return str(Path("/dev/disk", *names).resolve())


def arrays() -> str:
    return Path("/proc/mdstat").read_text()


def properties(device: str) -> dict[str, str]:
    lines = sh("udevadm", "info", "--query=property", device).splitlines()
    return dict(line.split("=", 1) for line in lines)


def said_by(*argv: str) -> subprocess.CompletedProcess[str]:
    """What it says, and what it warns of."""
    done = run.run(argv, check=False, timeout_s=120)
    return subprocess.CompletedProcess(argv, done.status, done.stdout, done.stderr)


def parts_of(made: Connection) -> list[str]:
    name = Path(made.device).name
    return sorted(
        f"/dev/{path.parent.name}" for path in Path("/sys/block", name).glob("*/partition")
    )


def test_without_the_rules_the_machine_acts_on_the_view(site: Site, machine: Machine) -> None:
    """The control: the view is as dangerous as it is meant to be."""
    options = ConnectOptions(host_rules=False)
    made = connect.connect(site.ctx, "v", options).connection
    settle()
    assert len(parts_of(made)) == 5
    name = Path(made.device).name
    if made.kind is ConnectionKind.NBD:  # a read-only SCSI disk lets no writer in, and so not md
        wait_for(lambda: name in arrays())
    wait_for(lambda: Path("/dev/theirs/data").exists())
    assert (
        "duplicate" in said_by("vgs", "ours").stderr or "Not using device" in said_by("vgs").stderr
    )
    taken = [
        link("by-uuid", uuid_of(machine.part(FILES))),
        link("by-uuid", uuid_of(machine.part(SWAP))),
        link("by-label", "data"),
    ]
    assert any(path.startswith(made.device) for path in taken), taken
    sh("mdadm", "--stop", "--scan")
    sh("vgchange", "--quiet", "--activate=n", "theirs")


@pytest.mark.parametrize("site", ["nbd", "tgt", "lio"], indirect=True)
def test_with_the_rules_the_machine_passes_the_view_over(site: Site, machine: Machine) -> None:
    host_rules.install()
    made = site.connect()
    settle()
    assert len(parts_of(made)) == 5
    assert link("by-uuid", uuid_of(machine.part(FILES))) == machine.part(FILES)
    assert link("by-uuid", uuid_of(machine.part(SWAP))) == machine.part(SWAP)
    assert link("by-label", "data") == machine.part(FILES)
    assert link("by-id", f"lvm-pv-uuid-{uuid_of(machine.part(OURS))}") == machine.part(OURS)
    assert Path(made.device).name not in arrays()
    assert not Path("/dev/theirs").exists()
    for device in (made.device, *parts_of(made)):
        found = properties(device)
        assert found["SYSTEMD_READY"] == "0"
        assert found["UDISKS_IGNORE"] == "1"
        assert found["DM_MULTIPATH_DEVICE_PATH"] == "0"
        assert "ID_FS_UUID" not in found
        name = Path(device).name
        assert f"/dev/offload/device/{name}" in found["DEVLINKS"].split()
        assert Path(f"/dev/offload/device/{name}").resolve() == Path(device)
    assert device_use.users(made.device) == []
    assert attachment.answers(made.device)
    connect.disconnect(site.ctx, ["v"])


def test_with_the_filter_lvm_sees_only_the_machines_own(site: Site, machine: Machine) -> None:
    host_rules.install()
    made = site.connect()
    settle()
    done = said_by("vgs", "--noheadings", "--options=vg_name,pv_name")
    assert done.stdout.split() == ["ours", machine.part(OURS)]
    assert done.stderr.strip() == ""
    sh("lvcreate", "--quiet", "--yes", "--size=1m", "--name=more", "ours")
    assert sh("lvs", "--noheadings", "--options=devices", "ours/more").startswith(
        machine.part(OURS)
    )
    sh("lvremove", "--quiet", "--yes", "ours/more")
    connect.disconnect(site.ctx, [made.device])


@pytest.mark.parametrize("site", ["tgt"], indirect=True)
def test_with_the_blacklist_multipath_leaves_the_disk_alone(site: Site) -> None:
    """Where an administrator has it take every disk, that it would otherwise take."""
    Path("/etc/multipath.conf").write_text("defaults {\n\tfind_multipaths no\n}\n")
    host_rules.install()
    site.connect()
    assert said_by("multipath", "-d", "-v2").stdout == ""
    Path("/etc/multipath/conf.d/offload.conf").unlink()
    assert "OFFLOAD,TimeView" in said_by("multipath", "-d", "-v2").stdout


@pytest.mark.parametrize("site", ["nbd"], indirect=True)
def test_loop_device_over_a_snapshot_is_passed_over_too(site: Site, machine: Machine) -> None:
    host_rules.install()
    (snapshot,) = site.folder.glob(".offload/*/*/db.copy")
    with looped(snapshot) as device:
        wait_for(Path(f"{device}p5").exists)
        settle()
        assert properties(f"{device}p2")["OFFLOAD_VIEW"] == "1"
        assert link("by-uuid", uuid_of(machine.part(FILES))) == machine.part(FILES)
        assert not Path("/dev/theirs").exists()


@contextmanager
def looped(path: Path) -> Iterator[str]:
    device = sh("losetup", "--find", "--show", "--read-only", "--partscan", str(path))
    try:
        yield device
    finally:
        sh("losetup", "--detach", device)


@pytest.mark.parametrize("site", ["nbd"], indirect=True)
def test_connect_without_the_rules_is_refused(site: Site) -> None:
    with pytest.raises(PolicyError) as error:
        site.connect()
    assert error.value.code == "host-rules-missing"
    site.assert_clean()


@pytest.mark.parametrize("site", ["nbd"], indirect=True)
def test_look_sees_the_real_configuration(site: Site) -> None:
    def states() -> dict[str, RuleState]:
        return {rule.name: rule.state for rule in host_rules.look()}

    def in_doctor() -> set[Status]:
        return {check.status for check in examine(None) if check.name.startswith("host rule")}

    before = Path("/etc/lvm/lvmlocal.conf").read_text()
    assert set(states().values()) == {RuleState.MISSING}
    assert in_doctor() == {Status.LIMITED}
    host_rules.install()
    assert in_doctor() == {Status.OK}
    assert set(states().values()) == {RuleState.INSTALLED}
    assert connect.connect(site.ctx, "v").warnings == ()
    local = Path("/etc/lvm/lvmlocal.conf")
    assert local.read_text().startswith(before)
    host_rules.install()
    assert local.read_text().count("global_filter = [") == 1
    local.write_text('devices { global_filter = [ "r|^/dev/sr|" ] }\n')
    (lvm,) = (rule for rule in host_rules.install() if rule.name == "lvm")
    assert (lvm.state, lvm.by_hand) == (RuleState.MISSING, True)
    (warning,) = host_rules.require()
    assert "lvm" in warning


def test_disconnect_leaves_nothing_in_the_database_of_udev(udevd: None) -> None:
    settle()
    known = sh("udevadm", "info", "--export-db")
    assert "OFFLOAD_VIEW" not in known
