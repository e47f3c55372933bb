"""docs/reference.md says what the program does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from offload import config, errors, run

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
MODELS = sorted(config.all_models(), key=lambda model: model.__name__)


def test_commands_chapter_is_what_the_help_says() -> None:
    done = run.run(
        [sys.executable, str(ROOT / "scripts" / "make-reference"), "--check"], check=False
    )
    assert done.status == 0, done.stderr


@pytest.mark.parametrize("model", MODELS)
def test_config_table_has_every_key(model: type[BaseModel]) -> None:
    chapter = REFERENCE.partition("## Configuration")[2].partition("\n## ")[0]
    words = set(re.findall(r"[a-z_]+", chapter))
    assert set(model.model_fields) - words == set()


def test_exit_code_table_has_every_family() -> None:
    chapter = REFERENCE.partition("## Exit codes")[2].partition("\n## ")[0]
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", chapter, re.MULTILINE)}
    families = {f for f in errors.OffloadError.__subclasses__() if f.__module__ == errors.__name__}
    assert {family.exit_code for family in families} <= shown


def test_relative_links_of_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert broken == []
