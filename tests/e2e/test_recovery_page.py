"""docs/design/recovery.md names every step that the operations go through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from e2e_site import ROOT, Site

from offload.journal import TRACE_ENV

PAGE = (ROOT / "docs" / "design" / "recovery.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.needs_root


def general(step: str) -> str:
    """A step's name as the page has it: numbers and names of volumes and providers made general."""
    step = re.sub(r"-\d+(?=\.)", "-N", step)
    step = re.sub(r"(snapshot-|backup\.image\.)(db|web)\b", r"\1VOLUME", step)
    return re.sub(r"timemark\.snapshot\.\w+", "timemark.snapshot.PROVIDER", step)


def test_page_names_each_step_of_each_operation(site: Site) -> None:
    trace: Path = site.folder / "trace"
    env = {TRACE_ENV: str(trace)}

    def traced(*words: str) -> None:
        site.ok(*words, **env)

    traced("timemark", "create", "shop")
    traced("mount", "shop", "--writable")
    traced("unmount", "--all")
    traced("mount", "solo", "--writable", "--name", "w")
    traced("unmount", "w", "--keep")
    site.ok("mount", "--again", "w")
    traced("migrate", "w", "--to", str(site.folder / "home.raw"))
    site.ok("unmount", "w")
    traced("backup", "solo")
    (site.mounts["web"] / "random").write_bytes(b"new" * 1_000_000)
    traced("backup", "solo")
    first = site.ask("backup", "list")[0]["id"]
    traced("restore", f"{first}/web", "--to", str(site.folder / "web.raw"))
    traced("backup", "hold", first, "--reason", "case 7")
    traced("backup", "release", first, "--yes")
    traced("backup", "delete", first, "--yes")
    traced("backup", "solo")
    traced("prune", "--store", "main", "--keep-last", "1", "--yes")
    (mark,) = (m["id"] for m in site.ask("timemark", "list", "--group", "shop"))
    traced("timemark", "delete", mark, "--yes")

    steps = {general(step) for step in trace.read_text().split()}
    unnamed = sorted(s for s in steps if not s.startswith("undo.") and f"`{s}`" not in PAGE)
    assert {s.partition(".")[0] for s in steps} >= {
        "timemark", "mount", "unmount", "keep", "migrate", "backup", "restore", "backup-delete",
        "backup-hold", "backup-release", "prune",
    }  # fmt: skip
    assert unnamed == []
