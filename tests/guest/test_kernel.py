"""The kernel that tests in the guest find."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offload.run import run


def test_guest_is_where_this_runs() -> None:
    assert os.uname().nodename == "lab"
    assert os.geteuid() == 0


@pytest.mark.parametrize(
    "module",
    [
        "target_core_mod", "target_core_iblock", "target_core_file", "target_core_user",
        "iscsi_target_mod", "tcm_loop", "iscsi_tcp", "nbd", "loop", "dm-thin-pool", "dm-snapshot",
        "dm-flakey", "dm-log-writes", "st", "ch", "sg",
    ],
)  # fmt: skip
def test_kernel_module_loads(module: str) -> None:
    run(["modprobe", module])
    assert Path("/sys/module", module.replace("-", "_")).is_dir()


def test_lio_makes_a_target_and_takes_it_away() -> None:
    run(["modprobe", "iscsi_target_mod"])
    folder = Path("/sys/kernel/config/target/iscsi/iqn.2003-01.org.example:lab")
    folder.mkdir(parents=True)
    (folder / "tpgt_1").mkdir()
    (folder / "tpgt_1").rmdir()
    folder.rmdir()  # the folder above stays: other tests may have targets in it
