"""`offload doctor` asks each VM."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from offload.config import load_config
from offload.services.doctor import Status, lacking
from offload.services.doctor_vms import look_at_vms

CONFIG = """
state_dir = "{folder}/state"
[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
[groups.shop]
volumes = ["db"]
consistency = "{consistency}"
[vms.one]
volumes = ["db"]
[[vms.one.applications]]
kind = "script"
name = "true"
command = ["/bin/true"]
[[vms.one.applications]]
kind = "script"
name = "gone"
command = ["{folder}/nowhere"]
[vms.two]
volumes = ["db"]
freeze = {{ kind = "qemu-ga", socket = "{folder}/agent" }}
"""


@pytest.mark.parametrize(("consistency", "needed"), [("crash", 0), ("application", 2)])
def test_vms_that_cannot_be_held_are_named_and_needed_where_more_than_a_crash_is_asked_for(
    tmp_path: Path, consistency: str, needed: int
) -> None:
    path = tmp_path / "offload.toml"
    path.write_text(CONFIG.format(folder=tmp_path, consistency=consistency))
    path.chmod(0o600)
    (tmp_path / "db.raw").write_bytes(b"\0" * 4096)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "agent"))  # and nobody listens
        checks = look_at_vms(load_config(path), path)
    assert [(check.name, check.status) for check in checks] == [
        ("vm one: script", Status.OK),
        ("vm one: script", Status.MISSING),
        ("vm two: qemu-ga", Status.MISSING),
    ]
    assert str(tmp_path / "nowhere") in checks[1].detail
    assert len(lacking(checks)) == needed
    assert not (tmp_path / "state").exists(), "nothing is made"
