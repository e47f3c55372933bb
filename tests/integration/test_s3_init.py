"""`store init` in a bucket: what the server honours is noted, what is taken is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload.errors import BusyError, OffloadError, PolicyError
from offload.format import layout
from offload.services import store_init, stores
from offload.services.context import Context, open_context
from offload.services.doctor import Status, examine
from offload.testing.rgw import RunningRgw

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[stores.main]
kind = "s3"
bucket = "{bucket}"
prefix = "a/b"
endpoint = "{endpoint}"
path_style = true
credentials_file = "{keys}"
{more}
"""


@contextmanager
def context(rgw: RunningRgw, folder: Path, bucket: str, more: str = "") -> Iterator[Context]:
    config = folder / "offload.toml"
    config.write_text(
        CONFIG.format(
            folder=folder,
            bucket=bucket,
            endpoint=rgw.endpoint,
            keys=rgw.credentials_file,
            more=more,
        )
    )
    with open_context(config) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", {"conditional put": "honoured", "versions": "none", "object lock": "none"}),
        ("versioned", {"conditional put": "ignored", "versions": "kept", "object lock": "none"}),
        (
            "locked",
            {
                "conditional put": "ignored",
                "versions": "kept",
                "object lock": "possible, no default",
            },
        ),
    ],
)
def test_init_notes_what_the_server_honours_and_leaves_no_trace_of_trying(
    rgw: RunningRgw, tmp_path: Path, kind: str, expected: dict[str, str]
) -> None:
    bucket = rgw.new_bucket(versioned=kind == "versioned", locked=kind == "locked")
    with context(rgw, tmp_path, bucket) as ctx:
        made = store_init.init(ctx, "main")
        assert expected.items() <= made.honours.items()
        assert made.honours["checksum"] == "compared"
        assert made.honours["multipart"] == "works"
        assert made.honours["list after write"] == "at once"
        assert stores.show(ctx, "main").honours == made.honours
        client = rgw.client()
        left = client.list_object_versions(Bucket=bucket)
        names = sorted(v["Key"].removeprefix("a/b/") for v in left.get("Versions", ()))
        assert names[1:] == [layout.STORE_OBJECT]
        assert names[0].startswith(layout.PROBES)
        assert not left.get("DeleteMarkers")
        assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_init_where_a_store_is_already_is_refused(rgw: RunningRgw, tmp_path: Path) -> None:
    with context(rgw, tmp_path, rgw.new_bucket()) as ctx:
        store_init.init(ctx, "main")
        with pytest.raises(BusyError) as caught:
            store_init.init(ctx, "main")
        assert caught.value.code == "store-exists"


def test_init_makes_no_bucket(rgw: RunningRgw, tmp_path: Path) -> None:
    with context(rgw, tmp_path, "never-made") as ctx:
        with pytest.raises(OffloadError) as caught:
            store_init.init(ctx, "main")
        assert caught.value.code == "no-bucket"
    names = [b["Name"] for b in rgw.client().list_buckets()["Buckets"]]
    assert "never-made" not in names


def test_init_with_an_encryption_that_the_server_does_not_do_is_refused(
    rgw: RunningRgw, tmp_path: Path
) -> None:
    bucket = rgw.new_bucket()
    with context(rgw, tmp_path, bucket, 'server_side_encryption = "AES256"') as ctx:
        with pytest.raises(PolicyError) as caught:
            store_init.init(ctx, "main")
        assert caught.value.code == "store-option"
    assert not rgw.client().list_objects_v2(Bucket=bucket).get("Contents")


def test_doctor_looks_at_a_store_in_a_bucket(rgw: RunningRgw, tmp_path: Path) -> None:
    with context(rgw, tmp_path, rgw.new_bucket()) as ctx:
        assert _doctor(ctx) is Status.LIMITED
        store_init.init(ctx, "main")
        assert _doctor(ctx) is Status.OK


def _doctor(ctx: Context) -> Status:
    (found,) = (c for c in examine(ctx.instance.config) if c.name == "store main")
    return found.status
