"""The simulator's site, and the program that starts one for a person."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from offload import run
from tests.vsphere_sim.site import BACKUP, Plan, running_site

pytestmark = pytest.mark.timeout(300)

_ROOT = Path(__file__).resolve().parents[2]
_OFFLOAD = str(Path(sys.executable).with_name("offload"))


def test_sim_site_is_what_its_configuration_says(tmp_path: Path) -> None:
    (tmp_path / "luns").mkdir()
    plan = Plan(luns_in=tmp_path / "luns", provider="copy", luns=2, vms=3)
    with running_site(tmp_path, plan) as site:
        argv = [_OFFLOAD, "--config", str(site.config), "--json"]
        run.run([*argv, "inventory", "refresh", "vc"], timeout_s=120)
        shown = json.loads(run.run([*argv, "inventory", "list", "vc"], timeout_s=120).stdout)
        assert {vm["name"] for vm in shown} == {"vm01", "vm02", "vm03"}
        luns = {lun for vm in shown for disk in vm["disks"] for lun in disk["luns"]}
        assert luns == {naa for _, naa in site.luns.values()}
        site.write("vm02", b"of the guest", 4096)
        assert site.read(site.vms["vm02"], 12, 4096) == b"of the guest"
        assert site.left_on(BACKUP[0]) == []
        assert site.model.sessions == 0


def test_sim_program_prints_what_to_do_and_ends_when_told(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    argv = [sys.executable, "-m", "tests.vsphere_sim", "--folder", str(folder), "--more", "5"]
    process = run.spawn(argv, stderr=None, cwd=_ROOT)
    try:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line.decode()
        assert f"export OFFLOAD_CONFIG={folder}/offload.toml" in said
        assert (folder / "offload.toml").is_file()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        run.terminate(process)


def test_sim_program_takes_no_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    argv = [sys.executable, "-m", "tests.vsphere_sim", "--folder", str(tmp_path)]
    done = run.run(argv, check=False, cwd=_ROOT, timeout_s=120)
    assert done.status == 2
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
