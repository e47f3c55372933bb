"""Two encrypted stores that share ids, on disk and on a real S3 server: copied, damaged, mended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload import instance
from offload.cli.main import run as offload
from offload.testing.rgw import RunningRgw

MIB = 1 << 20
SIZE = 8 * MIB

pytestmark = pytest.mark.needs_root

Ask = Callable[..., Any]

CONFIG = """
state_dir = "{folder}/state"
pool.min_free = "1MiB"
[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
[groups.shop]
volumes = ["db"]
atomic = "record"
store = "main"
[stores.main]
kind = "disk"
path = "{folder}/main"
min_free = "0%"
[stores.main.key]
file = "{folder}/main.key"
[stores.away]
kind = "s3"
bucket = "{bucket}"
prefix = "copies"
endpoint = "{endpoint}"
region = "default"
path_style = true
credentials_file = "{credentials}"
[stores.away.key]
file = "{folder}/away.key"
"""


@pytest.fixture
def ask(
    rgw: RunningRgw,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Ask:
    """Run a command with --json: its value, or with `code` its error."""
    monkeypatch.setattr(instance, "_runtime_base", lambda _: tmp_path / "run")
    (tmp_path / "db.raw").write_bytes(os.urandom(SIZE // 2) + bytes(SIZE // 4) + b"o" * (SIZE // 4))
    config = tmp_path / "o.toml"
    config.write_text(
        CONFIG.format(
            folder=tmp_path, bucket=rgw.new_bucket(), endpoint=rgw.endpoint,
            credentials=rgw.credentials_file,
        )
    )  # fmt: skip

    def command(*words: str, code: int = 0, out: bool = False) -> Any:
        capsys.readouterr()
        got = offload(["--config", str(config), "--json", *words])
        said = capsys.readouterr()
        assert got == code, said.err
        return json.loads(said.out if out or not code else said.err)

    command("store", "init", "main", "--no-recovery-key")
    command("store", "init", "away", "--like", "main", "--no-recovery-key")
    return command


def test_copy_to_s3_shares_chunks_verifies_and_mends_the_first_store(
    ask: Ask, tmp_path: Path
) -> None:
    first = ask("backup", "shop")["id"]
    before = (tmp_path / "db.raw").read_bytes()
    with (tmp_path / "db.raw").open("r+b") as volume:
        volume.write(b"\xff" * 4096)
    ask("backup", "shop")
    done = ask("copy", "--all", "--from", "main", "--to", "away", "--verify")["copies"]
    assert [entry["how"] for entry in done] == ["same-key", "same-key"]
    assert done[1]["stored_bytes"] < MIB
    assert {e["how"] for e in ask("copy", "--all", "--from", "main", "--to", "away")["copies"]} == {
        "already-there"
    }
    assert ask("verify", "--all")["problems"] == []
    packs = [p for p in (tmp_path / "main" / "packs").rglob("*") if p.is_file()]
    for pack in packs[:1]:
        pack.unlink()
    found = ask("verify", "--all", "--quick", "--store", "main", code=7, out=True)
    assert found["quarantined"]
    assert ask("repair", "main", "--dry-run")["dry_run"] is True
    report = ask("repair", "main")
    assert set(report["found_in"]) == {"store away"}
    for ident in (first, done[0]["copy"]):
        out = tmp_path / f"{ident}.raw"
        ask("restore", f"{ident}/db", "--to", str(out))
        assert out.read_bytes() == before
    assert ask("verify", "--all", "--store", "away")["problems"] == []


def test_copy_from_s3_that_lost_a_pack_fails_for_that_backup_alone(
    ask: Ask, rgw: RunningRgw, tmp_path: Path
) -> None:
    ask("backup", "shop")
    ask("copy", "--all", "--from", "main", "--to", "away")
    client = rgw.client()
    bucket = (tmp_path / "o.toml").read_text().partition('bucket = "')[2].partition('"')[0]
    listed = client.list_objects_v2(Bucket=bucket, Prefix="copies/packs/")["Contents"]
    client.delete_object(Bucket=bucket, Key=listed[0]["Key"])
    (ident,) = [b["id"] for b in ask("backup", "list", "--store", "main")]
    ask("backup", "delete", ident, "--yes")
    report = ask("copy", "--all", "--from", "away", "--to", "main", code=7, out=True)
    assert [entry["how"] for entry in report["copies"]] == ["failed"]
    assert ask("backup", "list", "--store", "main") == []
