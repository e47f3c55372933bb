"""Reading mountinfo."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload import mountinfo

TEXT = r"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 7:1 / /srv/with\040blank rw shared:5 master:2 - xfs /dev/loop1 rw,noquota
41 27 7:1 /sub /srv/bound ro,relatime - xfs /dev/loop1 rw,noquota
42 27 0:50 / /srv/still rw - btrfs /dev/loop2 ro,space_cache
43 27 0:51 / /srv/with\040blank rw - tmpfs none rw
"""


def test_parse_reads_escapes_optional_fields_and_the_file_systems_own_mode() -> None:
    table = mountinfo._parse(TEXT)
    assert [str(m.point) for m in table[:3]] == ["/", "/srv/with blank", "/srv/bound"]
    assert table[1].device == table[2].device == (7, 1)
    assert [m.read_only for m in table] == [False, False, False, True, False]


def test_find_mount_gives_the_topmost() -> None:
    found = mountinfo.find_mount(Path("/srv/with blank"), mountinfo._parse(TEXT))
    assert found is not None
    assert found.kind == "tmpfs"


@pytest.mark.parametrize(
    ("path", "point"),
    [("/srv/bound/deep/not/there", "/srv/bound"), ("/srv/boundary", "/"), ("/", "/")],
)
def test_mount_holding_a_path_is_its_nearest_mount(path: str, point: str) -> None:
    assert mountinfo.mount_holding(Path(path), mountinfo._parse(TEXT)).point == Path(point)


def test_mounts_of_this_machine_hold_the_root() -> None:
    assert Path("/") in {mount.point for mount in mountinfo.mounts()}
    assert Path("/") in {mount.point for mount in mountinfo.mounts_everywhere()}
