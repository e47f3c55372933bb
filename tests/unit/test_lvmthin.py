"""The lvmthin provider without LVM: names, what thin_delta and the kernel say, errors."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from offload import devicemapper, run
from offload.devicemapper import Target
from offload.errors import (
    BusyError,
    ConfigError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    PolicyError,
    UnavailableError,
)
from offload.extents import Ranges, normalize
from offload.model import Volume
from offload.run import ProgramError
from offload.snapshots import lvmthin_lvm, lvmthin_names, lvmthin_pool
from offload.snapshots.lvmthin import LvmThinProvider
from offload.snapshots.lvmthin_delta import parse

MIB = 1 << 20
SIZE = 8 * MIB


def volume(path: str, name: str = "db") -> Volume:
    return Volume(name=name, provider="lvmthin", path=Path(path))


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/dev/vg0/db", ("vg0", "db")),
        ("/dev/mapper/vg0-db", ("vg0", "db")),
        ("/dev/mapper/my--vg-shop--db", ("my-vg", "shop-db")),
        ("/dev/mapper/vg----0-db", ("vg--0", "db")),
    ],
)
def test_place_of_an_inactive_volume_is_read_from_its_path(
    path: str, place: tuple[str, str]
) -> None:
    assert lvmthin_names.place_of(volume(path)) == place
    assert lvmthin_names.mapper_name(*place) in {path.rpartition("/")[2], "vg0-db"}


@pytest.mark.parametrize(
    "path", ["/srv/db.raw", "/dev/sda", "/dev/mapper/vg0-pool-tpool", "/dev/mapper/plain"]
)
def test_place_of_what_can_be_no_volume_is_refused(path: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        lvmthin_names.place_of(volume(path))
    assert caught.value.code == "not-a-thin-volume"


def test_ref_of_has_a_name_of_our_scheme() -> None:
    ref = lvmthin_names.ref_of(volume("/dev/vg0/db"), "iabc", "t1")
    assert ref == {"vg": "vg0", "lv": "offload.iabc.t1.db"}
    assert lvmthin_names.own(ref, "iabc") == ("vg0", "offload.iabc.t1.db")


@pytest.mark.parametrize("name", ["x_tmeta", "a" * 63, "a" + "-" * 61 + "z"])
def test_ref_of_a_name_that_lvm_would_refuse_is_hashed(name: str) -> None:
    """Reserved, or too long: with its hyphens doubled."""
    vg = "v" * 70
    ref = lvmthin_names.ref_of(volume(f"/dev/{vg}/db", name), "iabcdefghi", "t123456789")
    other = lvmthin_names.ref_of(volume(f"/dev/{vg}/db", name + "x"), "iabcdefghi", "t123456789")
    assert ref != other
    assert "_" not in ref["lv"]
    assert len(lvmthin_names.mapper_name(vg, ref["lv"])) <= 127
    assert lvmthin_names.own(ref, "iabcdefghi") == (vg, ref["lv"])


def test_ref_of_in_a_group_whose_name_leaves_no_room_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        lvmthin_names.ref_of(volume(f"/dev/{'v' * 100}/db"), "iabcdefghi", "t123456789")
    assert caught.value.code == "name-too-long"


@pytest.mark.parametrize(
    "ref",
    [
        {},
        {"vg": "vg0"},
        {"vg": "", "lv": "offload.iabc.t1.db"},
        {"vg": "-f", "lv": "offload.iabc.t1.db"},
        {"vg": "vg0/x", "lv": "offload.iabc.t1.db"},
        {"vg": "vg0", "lv": "db"},
        {"vg": "vg0", "lv": "offload.other.t1.db"},
        {"vg": "vg0", "lv": "offload.iabc.t1"},
        {"vg": "vg0", "lv": "offload.iabc.t1.db pool"},
    ],
)
def test_own_damaged_ref_is_refused(ref: dict[str, str]) -> None:
    with pytest.raises(PolicyError) as caught:
        lvmthin_names.own(ref, "iabc")
    assert caught.value.code == "foreign-snapshot"


# -- thin_delta -------------------------------------------------------------------------------

OUTPUT = """\
<superblock uuid="" time="18" transaction="36" data_block_size="128" nr_data_blocks="0">
  <diff left="3" right="4">
    <same begin="0" length="16"/>
    <left_only begin="16" length="32"/>
    <same begin="48" length="52"/>
    <different begin="100" length="3"/>
    <right_only begin="127" length="1"/>
  </diff>
</superblock>
"""
BLOCK = 64 << 10


def test_parse_names_what_differs_and_what_was_discarded() -> None:
    assert parse(OUTPUT, SIZE) == [
        (16 * BLOCK, 48 * BLOCK), (100 * BLOCK, 103 * BLOCK), (127 * BLOCK, 128 * BLOCK)
    ]  # fmt: skip


def test_parse_clips_the_last_block_to_the_volume() -> None:
    assert parse(OUTPUT, SIZE - BLOCK // 2)[-1] == (127 * BLOCK, SIZE - BLOCK // 2)


@pytest.mark.parametrize("end", [0, 20, 200, len(OUTPUT) - 5])
def test_parse_output_that_is_cut_off_is_an_error(end: int) -> None:
    """Too little would be a backup without what changed."""
    with pytest.raises(IntegrityError):
        parse(OUTPUT[:end], SIZE)


@pytest.mark.parametrize("seed", range(20))
def test_parse_gives_back_any_map(seed: int) -> None:
    dice = random.Random(seed)
    kinds = [dice.choice(["same", "different", "left_only", "right_only"]) for _ in range(128)]
    lines = [f'    <{kind} begin="{at}" length="1"/>' for at, kind in enumerate(kinds)]
    text = "\n".join([*OUTPUT.splitlines()[:2], *lines, *OUTPUT.splitlines()[-2:]])
    wanted: Ranges = normalize(
        (at * BLOCK, (at + 1) * BLOCK) for at, kind in enumerate(kinds) if kind != "same"
    )
    assert parse(text, SIZE) == wanted


# -- the pool in the kernel -------------------------------------------------------------------

TABLE = "253:0 253:1 128 0 0 "
HEALTHY = "42 215/2048 160/9600 - rw discard_passdown queue_if_no_space - 512 "


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """What the kernel says of the pool."""

    def says(kind: str, text: str) -> None:
        def lines(line: str) -> Callable[[str], list[Target]]:
            return lambda _: [Target(kind=kind, start=0, length=1228800, text=line)]

        monkeypatch.setattr(devicemapper, "status", lines(text))
        monkeypatch.setattr(devicemapper, "table", lines(TABLE))

    return says


def test_look_at_pool_tells_space_in_bytes(kernel: Callable[[str, str], None]) -> None:
    kernel("thin-pool", HEALTHY)
    pool = lvmthin_pool.look_at("vg0/pool", "LVM-x-tpool")
    assert (pool.transaction_id, pool.held_root, pool.mode) == (42, None, "rw")
    assert (pool.size_bytes, pool.free_bytes) == (9600 * BLOCK, 9440 * BLOCK)
    assert (pool.metadata_size_bytes, pool.metadata_free_bytes) == (8 * MIB, 1833 * 4096)
    lvmthin_pool.check_writable(pool)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (HEALTHY.replace("rw", "ro"), "pool-read-only"),
        (HEALTHY.replace("- 512", "needs_check 512"), "pool-needs-check"),
        (HEALTHY.replace("rw", "out_of_data_space"), "pool-out-of-data"),
        ("Fail", "pool-failed"),
        ("Error", "pool-failed"),
    ],
)
def test_pool_in_trouble_is_told_apart(
    kernel: Callable[[str, str], None], text: str, code: str
) -> None:
    kernel("thin-pool", text)
    with pytest.raises(UnavailableError) as caught:
        lvmthin_pool.check_writable(lvmthin_pool.look_at("vg0/pool", "LVM-x-tpool"))
    assert caught.value.code == code
    assert "vg0/pool" in caught.value.message + caught.value.hint


def test_look_at_pool_with_a_metadata_snapshot_names_its_root(
    kernel: Callable[[str, str], None],
) -> None:
    kernel("thin-pool", HEALTHY.replace(" - rw", " 460 rw"))
    assert lvmthin_pool.look_at("vg0/pool", "LVM-x-tpool").held_root == 460


# -- errors -----------------------------------------------------------------------------------

OUT_OF_STEP = """\
  WARNING: Thin pool vg0/p has unexpected transaction id 13, expecting 15 or lower by 1.
  Cannot create new thin volume, free space in thin pool vg0/p reached threshold.
"""


@pytest.mark.parametrize(
    ("said", "kind", "code"),
    [
        ("  Logical volume vg0/s1 in use.", BusyError, "snapshot-in-use"),
        ("  Failed to suspend thin snapshot origin vg0/db.", BusyError, "volume-frozen"),
        ('  Logical Volume "s" already exists in volume group "vg0"', BusyError, "snapshot-exists"),
        ('  Volume group "vgx" not found', NotFoundError, "volume-missing"),
        ("  Cannot create new thin volume, free space in thin pool vg0/p reached threshold.",
         UnavailableError, "no-space"),
        (OUT_OF_STEP, UnavailableError, "pool-out-of-step"),
        ("  Something else.\n  WARNING: not the cause", UnavailableError, "lvm-failed"),
    ],
)  # fmt: skip
def test_command_that_fails_is_explained(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[OffloadError], code: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ProgramError(["lvcreate"], 5, 0.1, said)

    monkeypatch.setattr(run, "run", fail)
    monkeypatch.setattr(run, "require_program", lambda name, _: name)
    with pytest.raises(kind) as caught:
        lvmthin_lvm.command(["lvcreate"], about="vg0/s1")
    assert caught.value.code == code
    assert "WARNING" not in caught.value.message


def test_inspect_on_a_kernel_without_device_mapper_says_how_to_load_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(devicemapper, "available", lambda: False)
    with pytest.raises(UnavailableError) as caught:
        LvmThinProvider("i").inspect(volume("/dev/vg0/db"))
    assert caught.value.code == "no-device-mapper"
    assert "modprobe dm-thin-pool" in caught.value.hint
