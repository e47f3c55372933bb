"""The shipped units: systemd accepts them, their commands exist, and they are hardened.

What they do under a live systemd: tests/lab/test_systemd_units.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offload.cli import failures
from offload.cli.app import Settings
from offload.cli.main import cli

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
TIMERS = sorted(UNITS.glob("*.timer"))

# Units that start, look at or end servers of views. They need the host's own mount namespace, and
# with it every option that hides a part of the file system is out; mounts, modules, configfs.
_SERVE = {
    "offload-mount@.service",
    "offload-unmount@.service",
    "offload-recover.service",
    "offload-watch.service",
}
# of 10; what is left is root, the freeze, block devices and the network
_WORST_EXPOSURE = 3.5
_WORST_EXPOSURE_SERVING = 5.6
# systemd.exec(5), PrivateMounts=: what gives a unit a mount namespace
_OWN_NAMESPACE = (
    r"^(Protect(System|Home|ControlGroups|Kernel\w+|Proc)|ProcSubset|PrivateTmp|PrivateDevices|"
    r"PrivateMounts|PrivateIPC|MountFlags|Root\w+|TemporaryFileSystem|Bind\w*Paths|"
    r"(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths)="
)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units in a folder of their own, with the command of this environment in ExecStart."""
    command = Path(sys.executable).parent / "offload"
    folder = tmp_path / "units"
    folder.mkdir()
    for unit in (*SERVICES, *TIMERS):
        text = unit.read_text()
        (folder / unit.name).write_text(text.replace("ExecStart=offload", f"ExecStart={command}"))
    return folder


def _analyze(*args: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program is not None, "systemd-analyze is missing: packages.txt lists systemd"
    return subprocess.run([program, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [unit.name for unit in (*SERVICES, *TIMERS)])
def test_unit_is_accepted_by_systemd(installed: Path, name: str) -> None:
    instance = installed / name.replace("@.", "@shop.")
    if instance.name != name:
        instance.symlink_to(installed / name)
    done = _analyze("verify", "--man=no", str(instance))
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_that_is_wrong_is_refused(installed: Path) -> None:
    """That the test above can fail."""
    unit = installed / "offload-recover.service"
    unit.write_text(unit.read_text().replace("[Service]", "[Service]\nNoSuchSetting=1"))
    assert "NoSuchSetting" in _analyze("verify", "--man=no", str(unit)).stderr


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.name)
def test_service_exposure_stays_low(installed: Path, service: Path) -> None:
    if "--offline" not in _analyze("--help").stdout:
        pytest.skip("this systemd has no offline security check")
    done = _analyze("security", "--offline=true", "--no-pager", str(installed / service.name))
    found = re.search(r"Overall exposure level for .*: (\d+\.\d)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    worst = _WORST_EXPOSURE_SERVING if service.name in _SERVE else _WORST_EXPOSURE
    assert float(found.group(1)) <= worst


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.name)
def test_service_starts_a_command_that_exists(service: Path) -> None:
    """Parsed by the real command line, up to the configuration, which is not there."""
    (line,) = re.findall(r"^ExecStart=offload (.*)$", service.read_text(), re.MULTILINE)
    args = ["--config", "/nonexistent/offload.toml", *line.replace("%i", "shop").split()]
    with (
        pytest.raises(Exception, match="no configuration file") as caught,
        cli.make_context("offload", args, obj=Settings()) as ctx,
    ):
        cli.invoke(ctx)
    assert failures.report(caught.value, Settings()) == 3


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.name)
def test_service_keeps_the_sockets_of_views(service: Path) -> None:
    text = service.read_text()
    assert "RuntimeDirectory=offload\n" in text
    assert "RuntimeDirectoryPreserve=yes\n" in text


@pytest.mark.parametrize("name", sorted(_SERVE))
def test_service_with_view_servers_has_the_host_s_mounts(name: str) -> None:
    assert re.findall(_OWN_NAMESPACE, (UNITS / name).read_text(), re.MULTILINE) == []


def test_service_that_only_copies_has_mounts_of_its_own() -> None:
    """That the test above can fail."""
    text = (UNITS / "offload-backup@.service").read_text()
    assert len(re.findall(_OWN_NAMESPACE, text, re.MULTILINE)) > 5


@pytest.mark.parametrize("name", ["offload-mount@.service", "offload-recover.service"])
def test_service_that_starts_view_servers_lets_them_live(name: str) -> None:
    text = (UNITS / name).read_text()
    assert "KillMode=process\n" in text
    assert "RemainAfterExit=yes\n" in text
    assert "ExecStop=" not in text


def test_watch_goes_on_and_lets_the_servers_live_that_it_starts_again() -> None:
    text = (UNITS / "offload-watch.service").read_text()
    for line in ("Type=exec", "Restart=on-failure", "KillMode=process"):
        assert f"{line}\n" in text
    assert "ExecStop=" not in text


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.name)
def test_service_can_reach_block_devices(service: Path) -> None:
    """Either setting makes systemd filter devices, and volumes are block devices."""
    text = service.read_text()
    filtering = r"^(PrivateDevices|ProtectClock|DevicePolicy|DeviceAllow)="
    assert not re.search(filtering, text, re.MULTILINE)


@pytest.mark.parametrize("timer", TIMERS, ids=lambda path: path.name)
def test_timer_has_its_service(timer: Path) -> None:
    assert timer.with_suffix(".service") in SERVICES
    times = re.findall(r"^OnCalendar=(.*)$", timer.read_text(), re.MULTILINE)
    done = _analyze("calendar", *times)
    assert done.returncode == 0
