"""The main job through the command line, as a user does it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import nbd
import pytest
from e2e_site import MIB, Site

from offload import run

pytestmark = pytest.mark.needs_root


def uri_of(site: Site, name: str) -> str:
    return next(str(v["uri"]) for v in site.ask("views") if v["name"] == name)


def read_view(uri: str) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = b"".join(
        bytes(handle.pread(min(4 * MIB, handle.get_size() - at), at))
        for at in range(0, handle.get_size(), 4 * MIB)
    )
    handle.shutdown()
    return data


def digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def test_timemark_of_frozen_volumes_reaches_filesystem_consistency(site: Site) -> None:
    made = site.ask("timemark", "create", "shop")
    assert made["consistency"] == "filesystem"
    assert made["instant"] == "held"
    assert 0 < made["freeze_ms"] < 5000
    assert site.writable()
    mark = f"timemark:{made['id']}/db"
    site.ok("mount", mark, "--name", "db")
    image = site.folder / "db.img"
    image.write_bytes(read_view(uri_of(site, "db")))
    done = run.run(["e2fsck", "-fn", str(image)], check=False)
    assert done.status == 0, done.stdout


def test_view_of_a_timemark_never_changes(site: Site) -> None:
    made = site.ask("timemark", "create", "shop")
    site.ok("mount", f"timemark:{made['id']}/db", "--name", "db")
    before = read_view(uri_of(site, "db"))
    site.write("db", "later " * 1000)
    os.sync()
    assert read_view(uri_of(site, "db")) == before


def test_backups_restore_and_mount_byte_for_byte(site: Site) -> None:
    contents: dict[str, dict[str, str]] = {}
    for night in range(4):
        site.write("db", f"night {night} " * (1000 * night + 1))
        (site.mounts["web"] / f"new{night}").write_bytes(os.urandom(300_000))
        made = site.ask("backup", "shop")
        assert {i["mode"] for i in made["images"]} == {"incremental" if night else "full"}
        with site.context() as ctx:
            mark = ctx.catalog.timemarks()[-1]
        assert mark.id == made["timemark"]
        contents[made["id"]] = {s.volume: digest(Path(s.ref["path"])) for s in mark.snapshots}
    for backup, volumes in contents.items():
        target = site.folder / f"restored-{backup}"
        target.mkdir()
        site.ok("restore", backup, "--to", str(target))
        for volume, content in volumes.items():
            assert digest(target / f"{volume}.raw") == content
        shutil.rmtree(target)
    last, volumes = list(contents.items())[-1]
    site.ok("mount", f"backup:{last}/web", "--name", "kept")
    assert hashlib.sha256(read_view(uri_of(site, "kept"))).hexdigest() == volumes["web"]
    assert site.ask("verify", "--all")["problems"] == []


def test_incremental_reads_what_changed(site: Site) -> None:
    site.ok("backup", "solo")
    (site.mounts["web"] / "random").write_bytes(os.urandom(2 * MIB))
    made = site.ask("backup", "solo")
    image = made["images"][0]
    assert image["mode"] == "incremental"
    assert 2 * MIB <= image["read_bytes"] < 4 * MIB


def test_resized_volume_is_backed_up_in_full_and_says_why(site: Site) -> None:
    site.ok("backup", "solo")
    os.truncate(site.volume("web"), 336 * MIB)
    image = site.ask("backup", "solo")["images"][0]
    assert image["mode"] == "full"
    assert "size" in image["reason"]
    assert site.ask("verify", "--all")["problems"] == []


def test_remade_volume_is_backed_up_in_full_and_says_why(site: Site) -> None:
    first = site.ask("backup", "solo")["id"]
    run.run(["umount", str(site.mounts.pop("web"))])
    path = site.volume("web")
    shutil.copyfile(path, site.pool / "copy")
    path.unlink()
    (site.pool / "copy").rename(path)
    image = site.ask("backup", "solo")["images"][0]
    assert image["mode"] == "full"
    assert "anew" in image["reason"]
    run.run(["mount", "-o", "loop", str(path), str(site.folder / "web")])
    assert site.ask("verify", first)["problems"] == []


def test_bare_machine_goes_on_from_the_store_alone(site: Site) -> None:
    first = site.ask("backup", "shop")["id"]
    content = site.volume("db").read_bytes()
    for mark in site.ask("timemark", "list"):
        site.ok("timemark", "delete", mark["id"], "--yes")
    shutil.rmtree(site.state)
    site.config.unlink()
    made = site.ask("init", "--state-dir", str(site.state), "--from-store", str(site.store))
    assert made["problems"] == []
    assert [b["id"] for b in site.ask("backup", "list")] == [first]
    target = site.folder / "again.raw"
    site.ok("restore", f"{first}/db", "--to", str(target))
    assert len(target.read_bytes()) == len(content)
    shown = site.ask("backup", "show", first)
    assert shown["consistency"] == "filesystem"
    again = site.ask("backup", "shop")
    assert again["id"] != first
    assert sum(i["stored_bytes"] for i in again["images"]) < 8 * MIB  # known chunks stay known


def test_lost_catalog_is_rebuilt_and_incrementals_go_on(site: Site) -> None:
    first = site.ask("backup", "shop")["id"]
    for path in site.state.glob("catalog.db*"):
        path.unlink()
    assert site.ask("backup", "list") == []
    assert site.ask("store", "check", "main", "--rebuild-catalog")["problems"] == []
    assert [b["id"] for b in site.ask("backup", "list")] == [first]
    again = site.ask("backup", "shop")
    assert sum(i["stored_bytes"] for i in again["images"]) < 8 * MIB


def test_two_instances_share_a_pool_without_touching_each_other(site: Site) -> None:
    other = site.folder / "other.toml"
    other.write_text(
        site.config.read_text()
        .replace(f"{site.folder}/state", f"{site.folder}/state2")
        .replace(f"{site.folder}/store", f"{site.folder}/store2")
    )
    second = Site(folder=site.folder, pool=site.pool, config=other, mounts=site.mounts)
    mine = site.ask("timemark", "create", "shop")["id"]
    theirs = second.ask("timemark", "create", "shop")["id"]
    assert [t["id"] for t in site.ask("timemark", "list")] == [mine]
    site.ok("recover", "--orphans", "--yes")
    site.ok("timemark", "delete", mine, "--yes")
    assert {p.parent.name for p in site.snapshots()} == {theirs}
    second.ok("mount", f"timemark:{theirs}", "--tcp")
    assert len(second.ask("views")) == 2
    assert site.ask("views") == []
    second.ok("unmount", "--all")


def test_views_survive_kill_of_their_servers_through_recover(site: Site) -> None:
    made = site.ask("backup", "shop")["id"]
    site.ok("mount", f"backup:{made}/db", "--name", "kept")
    before = read_view(uri_of(site, "kept"))
    with site.context() as ctx:
        pid = int(ctx.catalog.view("kept").server["pid"])
    os.kill(pid, 9)
    time.sleep(0.2)
    assert site.ask("views")[0]["state"] == "dead"
    site.ok("recover")
    assert site.ask("views")[0]["state"] == "mounted"
    assert read_view(uri_of(site, "kept")) == before


def test_low_pool_deletes_the_oldest_unneeded_timemark_first(site: Site) -> None:
    parent = site.ask("backup", "solo")["timemark"]
    oldest = site.ask("timemark", "create", "solo")["id"]
    kept = site.ask("timemark", "create", "solo", "--keep")["id"]
    shown = site.ask("timemark", "create", "solo")["id"]
    newest = site.ask("timemark", "create", "solo")["id"]
    site.ok("mount", f"timemark:{shown}/web", "--name", "shown")
    filler = site.pool / "filler"
    space = os.statvfs(site.pool)
    with filler.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, space.f_bavail * space.f_frsize - 4 * MIB)
    error = site.refused("timemark", "create", "solo")
    assert error["code"] == "pool-full"
    left = [t["id"] for t in site.ask("timemark", "list")]
    assert kept in left
    assert shown in left
    assert oldest not in left
    assert newest not in left
    assert parent not in left  # last of all, and the next backup reads everything
    filler.unlink()
    site.ok("timemark", "create", "solo")


def test_volume_with_4096_byte_sectors_shows_them(site: Site) -> None:
    text = site.config.read_text().replace("[volumes.db]", "[volumes.db]\nsector_size = 4096")
    site.config.write_text(text)
    made = site.ask("backup", "shop")
    for name, origin in (
        ("snap", f"timemark:{made['timemark']}/db"),
        ("back", f"backup:{made['id']}/db"),
    ):
        site.ok("mount", origin, "--name", name)
        info = run.run(["nbdinfo", uri_of(site, name)]).stdout
        assert "block_size_minimum: 4096" in info
