"""Sources survive the way through strings."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from offload.errors import UsageError
from offload.model import (
    BackupSource,
    HomeSource,
    NbdSource,
    Qcow2Source,
    RawSource,
    RbdSource,
    Source,
)
from offload.sources import on_lun, source_from_dict, source_to_dict

EXAMPLES: tuple[Source, ...] = (
    RawSource(path=Path("/a b/ü.raw"), size_bytes=1 << 40, sector_size=4096),
    Qcow2Source(path=Path("/q"), size_bytes=5, snapshot="s1"),
    Qcow2Source(path=Path("/q"), size_bytes=5),
    NbdSource(uri="nbd+unix:///x?socket=/s", size_bytes=9),
    RbdSource(
        cluster="c0", pool=3, namespace="n", image="1a", name="vms/n/db", snapshot="s",
        conf=Path("/c.conf"), user="client.a", size_bytes=7,
    ),
    RbdSource(
        cluster="c0", pool=3, image="1a", name="vms/db", group="g", conf=Path("/c"),
        user="client.a", size_bytes=7, sector_size=4096,
    ),
    BackupSource(store="/store", backup="b1", volume="v", size_bytes=7, cache_dir=Path("/c")),
    BackupSource(
        store="s3://b", backup="b1", volume="v", size_bytes=7, cache_dir=Path("/c"),
        block_dir=Path("/d"), cache_bytes=1, memory_bytes=2, ahead_bytes=3,
    ),
    HomeSource(place="nbd://h:1/x y", size_bytes=7, sector_size=4096),
    on_lun(RawSource(path=Path("/dev/x"), size_bytes=9), "web/web.vmdk", 7),
)  # fmt: skip


@pytest.mark.parametrize("source", EXAMPLES)
def test_source_through_strings_is_the_same(source: Source) -> None:
    record = source_to_dict(source)
    assert all(isinstance(value, str) for value in record.values())
    assert source_from_dict(record) == source


def test_source_kinds_are_all_tested() -> None:
    assert {type(source) for source in EXAMPLES} == set(get_args(Source))


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"kind": "tape"},
        {"kind": "raw", "path": "/x"},
        {"kind": "raw", "path": "/x", "size_bytes": "many"},
    ],
)
def test_source_from_damaged_record_is_refused(record: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        source_from_dict(record)
    assert caught.value.code == "bad-source"
