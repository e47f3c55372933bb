"""kill -9 at every named step of every operation; the next command brings all to clean.

The steps are not listed here: a traced run says which there are, so that a new step is walked as
soon as it exists.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from e2e_site import Site

from offload import run
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.services import mount

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(900)]

KILLED = -9


def steps_of(site: Site, *words: str) -> list[str]:
    """The names of the steps that a command goes through, each once, in order."""
    trace = site.folder / "trace"
    trace.unlink(missing_ok=True)
    site.ok(*words, **{TRACE_ENV: str(trace)})
    return list(dict.fromkeys(trace.read_text().split()))


def kill_at(site: Site, step: str, *words: str) -> None:
    """Run a command that dies at a step."""
    done = site.run(*words, **{CRASH_ENV: step})
    assert done.status == KILLED, f"{words} did not reach {step}: {done.stdout}{done.stderr}"


def assert_clean(site: Site, *, timemarks: set[str], views: set[str], backups: set[str]) -> None:
    """Exactly what the catalog is expected to hold is there, inside and outside."""
    with site.context() as ctx:
        assert {t.id for t in ctx.catalog.timemarks()} == timemarks
        assert {b.id for b in ctx.catalog.backups()} == backups
        shown = mount.views(ctx)
    assert {status.view.name for status in shown} == views
    assert all(status.alive for status in shown)
    assert site.journal_files() == []
    assert {p.parent.name for p in site.snapshots()} == timemarks
    writable = [status for status in shown if status.view.writable]
    assert len(site.overlays()) == len(writable)
    assert len(site.servers()) == len(views) + len(writable)  # a daemon behind each overlay
    assert len(site.run_files()) == len(views)
    assert site.store_files("tmp") == []
    writers = {n.rpartition("/")[2].rpartition("-")[0] for n in site.store_files("packs")}
    assert writers <= backups | set(known_writers(site))
    assert {n.rpartition("/")[2] for n in site.store_files("manifests")} == backups
    assert site.guardians() == []
    assert site.writable()


def timemarks_of(site: Site) -> set[str]:
    with site.context() as ctx:
        return {t.id for t in ctx.catalog.timemarks()}


def backups_of(site: Site) -> set[str]:
    with site.context() as ctx:
        return {b.id for b in ctx.catalog.backups()}


def known_writers(site: Site) -> list[str]:
    """Writers whose index object is there: backups that are deleted but not pruned, prunes."""
    return [n.rpartition("/")[2] for n in site.store_files("index")]


def test_timemark_killed_at_each_step_leaves_nothing(site: Site) -> None:
    words = ("timemark", "create", "shop")
    steps = steps_of(site, *words)
    assert "timemark.frozen" in steps
    assert "timemark.commit.before" in steps
    first = timemarks_of(site)
    for step in steps:
        kill_at(site, step, *words)
        assert site.writable(), f"frozen for good after a kill at {step}"
        site.ok("recover")
        now = timemarks_of(site)
        if step == "timemark.commit.after":  # complete, though nobody was told of it
            assert len(now - first) == 1
            first = now
        assert_clean(site, timemarks=first, views=set(), backups=set())


def test_timemark_delete_killed_at_each_step_is_finished(site: Site) -> None:
    def make() -> str:
        return str(site.ask("timemark", "create", "shop")["id"])

    trace_id = make()
    steps = steps_of(site, "timemark", "delete", trace_id, "--yes")
    assert any("snapshot" in step for step in steps)
    for step in steps:
        kill_at(site, step, "timemark", "delete", made := make(), "--yes")
        site.ok("recover")
        left = timemarks_of(site)
        if left:  # killed before it had begun: nothing was to be deleted yet
            assert left == {made}
            assert "intended" not in step or step.endswith("catalog.intended")
            site.ok("timemark", "delete", made, "--yes")
        assert_clean(site, timemarks=set(), views=set(), backups=set())


@pytest.mark.parametrize("words", [("mount", "shop"), ("mount", "solo", "--writable")])
def test_mount_killed_at_each_step_leaves_nothing(site: Site, words: tuple[str, ...]) -> None:
    steps = steps_of(site, *words)
    assert ("mount.overlay-1.intended" in steps) == ("--writable" in words)
    site.ok("unmount", "--all")
    assert_clean(site, timemarks=set(), views=set(), backups=set())
    for step in steps:
        kill_at(site, step, *words)
        site.ok("recover")
        if step == "mount.commit.after":
            site.ok("unmount", "--all")
        assert_clean(site, timemarks=set(), views=set(), backups=set())


def test_unmount_killed_at_each_step_is_finished(site: Site) -> None:
    site.ok("mount", "shop")
    steps = steps_of(site, "unmount", "--all")
    for step in steps:
        site.ok("mount", "shop")
        kill_at(site, step, "unmount", "--all")
        site.ok("recover")
        if site.ask("views"):  # killed before all its intents were durable: some stay, served
            assert "intended" in step or step == "unmount.begin", step
            assert len(site.servers()) == len(site.ask("views"))
            site.ok("unmount", "--all")
        marks = timemarks_of(site)
        assert marks == set(), f"a fresh TimeMark outlived its views after a kill at {step}"
        assert_clean(site, timemarks=set(), views=set(), backups=set())


def test_unmount_of_a_writable_view_killed_at_each_step_keeps_it_whole_or_not_at_all(
    site: Site,
) -> None:
    mark = site.ask("timemark", "create", "solo")["id"]
    words = ("mount", f"timemark:{mark}", "--writable", "--name", "scratch")
    site.ok(*words)
    steps = steps_of(site, "unmount", "scratch")
    assert {"unmount.overlay-1.intended", "unmount.overlay-1.done"} <= set(steps)
    for step in steps:
        if not site.overlays():
            site.ok(*words)
        kill_at(site, step, "unmount", "scratch")
        site.ok("recover")
        stays = "scratch" if site.overlays() else ""
        assert not stays or step in {"unmount.begin", "unmount.overlay-1.intended"}, step
        assert_clean(site, timemarks={mark}, views={stays} - {""}, backups=set())


def test_backup_killed_at_each_step_is_gone_or_whole(site: Site) -> None:
    first = site.ask("backup", "shop")["id"]
    site.write("db", "traced")
    steps = steps_of(site, "backup", "shop")
    assert "backup.manifest.written" in steps
    backups = backups_of(site)
    assert first in backups
    finished_at = steps.index("backup.manifest.written")
    for number, step in enumerate(steps):
        site.write("db", f"before {step}")
        kill_at(site, step, "backup", "shop")
        site.ok("recover")
        now = backups_of(site)
        new = now - backups
        assert backups <= now, f"a finished backup was lost by a kill at {step}"
        if number >= finished_at:
            assert len(new) == 1, f"a finished backup is not known after a kill at {step}"
        else:
            assert not new, f"an unfinished backup is listed after a kill at {step}"
        backups = now
        parents = timemarks_of(site)
        assert len(parents) == 1, f"{len(parents)} TimeMarks are kept after a kill at {step}"
        assert_clean(site, timemarks=parents, views=set(), backups=backups)
    report = json.loads(site.ok("--json", "verify", "--all"))
    assert report["problems"] == []
    last = site.ask("backup", "shop")
    assert {i["mode"] for i in last["images"]} == {"incremental"}


@pytest.mark.parametrize("name", ["db.raw", "db.qcow2"])
def test_restore_killed_at_each_step_goes_on_or_leaves_no_part(
    site: Site, tmp_path: Path, name: str
) -> None:
    made = site.ask("backup", "shop")["id"]
    target = tmp_path / name
    words = ("restore", f"{made}/db", "--to", str(target), "--overwrite")
    steps = steps_of(site, *words)
    assert {"restore.checkpoint", "restore.finished"} <= set(steps)
    whole = raw_content(target)
    for step in steps:
        target.write_bytes(b"old")
        kill_at(site, step, *words)
        site.ok("recover")
        left = site.ask("recover", "--dry-run")["unfinished_restores"]
        assert len(list(tmp_path.iterdir())) == 1 + len(left), step
        assert len(left) == (step in {"restore.checkpoint", "restore.copied"}), step
        if target.read_bytes() != b"old":
            assert raw_content(target) == whole
        marks = timemarks_of(site)
        assert_clean(site, timemarks=marks, views=set(), backups={made})
        report = site.ask(*words)
        assert bool(report["volumes"][0]["resumed_bytes"]) == bool(left), step
        assert raw_content(target) == whole
        assert [p.name for p in tmp_path.iterdir()] == [name]
        assert list((site.state / "restores").iterdir()) == []


def raw_content(image: Path) -> bytes:
    """What a guest would read from an image, raw or qcow2."""
    if image.suffix == ".raw":
        return image.read_bytes()
    raw = image.parent.parent / "raw"
    run.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)])
    return raw.read_bytes()


@pytest.mark.parametrize("deleted", ["first", "last"])
def test_prune_killed_at_each_step_keeps_all_that_is_kept(site: Site, deleted: str) -> None:
    def make() -> dict[str, str]:
        made = {}
        for name in ("first", "last"):
            (site.mounts["web"] / "random").write_bytes(os.urandom(1 << 20))
            made[name] = site.ask("backup", "solo")["id"]
        return made

    def delete_one(made: dict[str, str]) -> None:
        site.ok("backup", "delete", made.pop(deleted), "--yes")

    made = make()
    delete_one(made)
    steps = steps_of(site, "prune", "--store", "main", "--yes")
    kept = set(made.values())
    assert any(step.startswith("prune.") for step in steps)
    for step in steps:
        more = make()
        delete_one(more)
        kill_at(site, step, "prune", "--store", "main", "--yes")
        kept |= set(more.values())
        site.ok("recover")
        assert backups_of(site) == kept
        report = site.ask("verify", "--all")
        assert report["problems"] == [], f"after a kill at {step}"
    site.ok("prune", "--store", "main", "--yes")
    assert site.ask("verify", "--all")["problems"] == []
    assert site.ask("store", "check", "main")["orphan_packs"] == []
