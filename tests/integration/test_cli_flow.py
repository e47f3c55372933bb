"""The verbs on real data, as their output shows it: a copied volume, nbdkit, a disk store."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.cli.app import Settings
from offload.cli.main import run
from offload.cli.session import only_context
from offload.procs import ProcessRef

MIB = 1 << 20

Ask = Callable[..., Any]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short folder (unix sockets have short names) with a volume, a store and a configuration."""
    folder = Path(tempfile.mkdtemp(prefix="ofc-", dir="/tmp"))
    (folder / "db.raw").write_bytes(os.urandom(2 * MIB) + bytes(2 * MIB))
    (folder / "o.toml").write_text(
        f'state_dir = "{folder}/state"\nruntime_dir = "{folder}/run"\n'
        f'[volumes.db]\nprovider = "copy"\npath = "{folder}/db.raw"\n'
        '[groups.shop]\nvolumes = ["db"]\natomic = "record"\n'
        f'[stores.main]\nkind = "disk"\npath = "{folder}/store"\n'
        '[pool]\nmin_free = "1MiB"\n'
    )
    try:
        assert run(["--config", str(folder / "o.toml"), "--quiet", "store", "init", "main"]) == 0
        yield folder
    finally:
        run(["--config", str(folder / "o.toml"), "unmount", "--all", "--force"])
        shutil.rmtree(folder)


@pytest.fixture
def ask(place: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command with --json; its value from stdout, or with `code` its error from stderr."""

    def command(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert run(["--config", str(place / "o.toml"), "--json", *words]) == code
        said = capsys.readouterr()
        if code == 0:
            assert said.err == ""
            return json.loads(said.out)
        return json.loads(said.err)

    return command


@pytest.fixture
def say(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command for people; what it prints on stdout."""

    def command(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert run(["--config", str(place / "o.toml"), *words]) == code
        return capsys.readouterr().out

    return command


def test_timemark_verbs(ask: Ask, say: Callable[..., str]) -> None:
    made = ask("timemark", "create", "shop", "--keep")
    assert (made["group"], made["keep"], made["purpose"]) == ("shop", True, "user")
    assert made["snapshots"][0]["size_bytes"] == 4 * MIB
    assert [mark["id"] for mark in ask("timemark", "list", "--group", "shop")] == [made["id"]]
    assert ask("timemark", "show", made["id"][:6]) == made
    assert made["id"] in say("timemark", "show", made["id"])
    plan = ask("timemark", "delete", made["id"], "--dry-run")
    assert (plan["dry_run"], plan["deleted"], len(plan["would_delete"])) == (True, [], 1)
    assert ask("timemark", "delete", made["id"], code=2)["code"] == "not-confirmed"
    assert len(ask("timemark", "list")) == 1
    assert f"deleted {made['id']}" in say("timemark", "delete", made["id"][:6], "--yes")
    assert ask("timemark", "list") == []


def test_timemark_delete_of_several_with_one_in_use_deletes_none(ask: Ask) -> None:
    free, used = (ask("timemark", "create", "shop")["id"] for _ in range(2))
    ask("mount", f"timemark:{used}/db", "--name", "look")
    error = ask("timemark", "delete", free, used, "--yes", code=5)
    assert error["code"] == "timemark-in-use"
    assert "unmount look" in error["hint"]
    assert len(ask("timemark", "list")) == 2


def test_mount_verbs_and_group_unmount_spares_what_others_mounted(
    ask: Ask, say: Callable[..., str]
) -> None:
    mark = ask("timemark", "create", "shop")["id"]
    (named,) = ask("mount", f"timemark:{mark}/db", "--name", "look", "--writable")
    assert named["uri"].startswith("nbd+unix://")
    assert (named["name"], named["writable"], named["size_bytes"]) == ("look", True, 4 * MIB)
    (fresh,) = ask("mount", "shop", "--tcp")
    assert fresh["uri"].startswith("nbd://127.0.0.1:")
    assert [view["alive"] for view in ask("views")] == [True, True]
    assert "writable" in say("views")
    assert ask("mount", f"timemark:{mark}/db", "--name", "look", code=5)["code"] == "name-taken"
    assert "unmounted" in say("unmount", "--group", "shop")
    assert [view["name"] for view in ask("views")] == ["look"]
    assert [entry["id"] for entry in ask("timemark", "list")] == [mark]
    assert [view["name"] for view in ask("unmount", "look")] == ["look"]
    assert ask("views") == []


def test_backup_verbs(place: Path, ask: Ask, say: Callable[..., str]) -> None:
    first = ask("backup", "shop")
    assert first["images"][0]["mode"] == "full"
    with (place / "db.raw").open("r+b") as volume:
        volume.seek(MIB)
        volume.write(b"\xff" * 4096)
    second = ask("backup", "create", "shop", "--store", "main")
    ids = [entry["id"] for entry in ask("backup", "list")]
    assert ids == [first["id"], second["id"]]
    assert [entry["id"] for entry in ask("backup", "list", "--group", "shop")] == ids
    (found,) = ask("backup", "diff", *ids)
    assert (found["name"], found["changed_bytes"]) == ("db", 4096)
    assert found["ranges"] == [{"offset_bytes": MIB, "length_bytes": 4096}]
    assert "4.0 KiB" in say("backup", "diff", *ids)
    shown = ask("backup", "show", second["id"][:7])
    assert (shown["id"], shown["verified"]) == (second["id"], None)
    assert second["id"] in say("backup", "show", second["id"])
    assert ask("backup", "delete", ids[0], "--dry-run")["deleted"] == []
    assert len(ask("backup", "list")) == 2
    assert len(ask("backup", "delete", ids[0], "--yes")["deleted"]) == 1
    assert [entry["id"] for entry in ask("backup", "list")] == ids[1:]


def test_restore_writes_what_the_volume_was(place: Path, ask: Ask, say: Callable[..., str]) -> None:
    before = (place / "db.raw").read_bytes()
    backup = ask("backup", "shop")["id"]
    (place / "db.raw").write_bytes(bytes(4 * MIB))
    out = place / "out.raw"
    report = ask("restore", f"{backup}/db", "--to", str(out))
    assert report["volumes"][0]["written_bytes"] >= 2 * MIB
    assert out.read_bytes() == before
    assert ask("restore", backup, "--to", str(out), code=5)["code"] == "target-exists"
    assert "restored" in say("restore", backup, "--to", str(out), "--overwrite")


def test_verify_names_the_hit_range_and_ends_with_7(
    place: Path, ask: Ask, say: Callable[..., str]
) -> None:
    backup = ask("backup", "shop")["id"]
    assert ask("verify", "--all")["problems"] == []
    assert "0 problems" in say("verify", backup, "--sample", "50%")
    pack = max((place / "store").rglob("packs/**/*"), key=lambda p: p.stat().st_size)
    raw = bytearray(pack.read_bytes())
    raw[len(raw) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(raw)
    assert ask("verify", backup, code=7)["code"] == "backup-damaged"
    out = say("verify", "--all", code=7)
    assert f"backup {backup}, volume db, bytes " in out
    assert any("problems when it was verified" in alarm for alarm in ask("status")["alarms"])


def test_prune_plan_says_why_and_changes_nothing(ask: Ask, say: Callable[..., str]) -> None:
    ids = [ask("backup", "shop")["id"] for _ in range(3)]
    plan = ask("prune", "--keep-last", "1", "--dry-run")
    assert {entry["id"]: entry["kept"] for entry in plan["backups"]} == {
        ids[0]: False, ids[1]: False, ids[2]: True,
    }  # fmt: skip
    assert plan["backups"][2]["reasons"]
    assert "would go" in say("prune", "--keep-last", "1", "--dry-run")
    assert ask("prune", "--keep-last", "1", code=2)["code"] == "not-confirmed"
    assert len(ask("backup", "list")) == 3
    done = ask("prune", "--keep-last", "1", "--yes")
    assert done["dry_run"] is False
    assert [entry["id"] for entry in ask("backup", "list")] == ids[2:]
    assert all(entry["kept"] for entry in ask("prune", "--dry-run")["backups"])


def test_store_verbs_and_rebuild_of_a_lost_catalog(
    place: Path, ask: Ask, say: Callable[..., str]
) -> None:
    backup = ask("backup", "shop")["id"]
    (listed,) = ask("store", "list")
    assert (listed["name"], listed["state"], listed["backups"]) == ("main", "ok", 1)
    assert ask("store", "show", "main")["id"] == listed["id"]
    assert "main" in say("store", "show", "main")
    assert ask("store", "init", "main", code=5)["code"] == "store-exists"
    for file in (place / "state").glob("catalog.db*"):
        file.unlink()
    assert ask("backup", "list") == []
    assert ask("store", "check", "main", "--rebuild-catalog")["rebuilt"] == 1
    assert [entry["id"] for entry in ask("backup", "list")] == [backup]
    next((place / "store").rglob("packs/**/*-*")).unlink()
    assert ask("store", "check", "main", code=7)["code"] == "store-damaged"
    assert "PROBLEM" in say("store", "check", "main", code=7)


def test_catalog_that_is_damaged_says_how_to_rebuild(place: Path, ask: Ask) -> None:
    ask("backup", "shop")
    for file in (place / "state").glob("catalog.db-*"):
        file.unlink()
    (place / "state" / "catalog.db").write_bytes(b"not a database at all" * 300)
    error = ask("backup", "list", code=7)
    assert error["code"] == "catalog-corrupt"
    assert "--rebuild-catalog" in error["hint"]


def test_recover_serves_a_view_again_whose_server_died(
    place: Path, ask: Ask, say: Callable[..., str]
) -> None:
    (view,) = ask("mount", "shop")
    with only_context(Settings(config_path=place / "o.toml")) as context:
        server = ProcessRef.from_strings(dict(context.catalog.view(view["id"]).server))
    assert server is not None
    server.end()
    assert [entry["alive"] for entry in ask("views")] == [False]
    assert "dead" in say("views")
    report = ask("recover")
    assert [entry["id"] for entry in report["remounted"]] == [view["id"]]
    assert [entry["alive"] for entry in ask("views")] == [True]
    assert ask("views")[0]["uri"] == view["uri"]


def test_hold_and_tag_verbs(ask: Ask, say: Callable[..., str]) -> None:
    first = ask("backup", "shop", "--tag", "release", "--tag", "v2")["backup"]
    assert first["tags"] == ["release", "v2"]
    second, third = (ask("backup", "shop")["id"] for _ in range(2))
    (held,) = ask("backup", "hold", second[:6], "--reason", "case 7")["held"]
    assert (held["backup"], held["reason"]) == (second, "case 7")
    assert [entry["held"] for entry in ask("backup", "list")] == [None, held, None]
    assert ask("backup", "show", second)["held"] == held
    assert "case 7" in say("backup", "show", second)
    assert "release, v2" in say("backup", "show", first["id"])
    assert "held" in say("backup", "list")
    assert ask("backup", "delete", second, "--yes", code=5)["code"] == "backup-held"

    plan = ask("prune", "--keep-last", "1", "--keep-tag", "release", "--dry-run")
    assert [entry["reasons"] for entry in plan["backups"]] == [
        ["tag release"],
        ["held"],
        ["newest", "last 1"],
    ]
    assert "tag release" in say("prune", "--keep-last", "1", "--keep-tag", "release", "--dry-run")
    assert ask("backup", "release", second, code=2)["code"] == "not-confirmed"
    (released,) = ask("backup", "release", second, "--yes")["released"]
    assert released["id"] == second
    plan = ask("prune", "--keep-last", "1", "--dry-run")
    missed = ["1 newer than it, last keeps 1"]
    assert [entry["missed"] for entry in plan["backups"]][1:] == [missed, []]
    plan = ask("prune", "--keep-last", "1", "--keep-min-age", "1h", "--dry-run")
    assert all("younger than min_age" in entry["reasons"] for entry in plan["backups"])
    assert ask("backup", "shop", "--tag", "no tag", code=2)["code"] == "usage"
    assert third == ask("backup", "list")[-1]["id"]
