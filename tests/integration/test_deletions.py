"""Several hosts at one store: what one has deleted is no loss to another, and a loss is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import compose
from offload.errors import IntegrityError
from offload.retention import KeepRules
from offload.services.backups import delete
from offload.services.context import Context, open_context
from offload.services.prune import prune
from offload.services.stores import check
from offload.services.verify import verify
from offload.testing.backup_site import PROVIDER, BackupSite, backup_site

LAST = KeepRules(last=1)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackupSite]:
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    with backup_site(tmp_path) as made:
        for _ in range(3):
            made.scribble("db")
            made.back_up()
        yield made


@pytest.fixture
def other(site: BackupSite) -> Iterator[Context]:
    """Another host, whose catalog knows all three."""
    config = site.folder / "other.toml"
    text = site.config.read_text().replace(f"{site.folder}/state", f"{site.folder}/state2")
    config.write_text(text.replace(f"{site.folder}/run", f"{site.folder}/run2"))
    with open_context(config) as ctx:
        check(ctx, "main", rebuild_catalog=True)
        assert len(ctx.catalog.backups(store="main")) == 3
        yield ctx


def test_prune_after_that_of_another_host_forgets_what_it_deleted(
    site: BackupSite, other: Context
) -> None:
    first, second, last = site.taken
    assert {v.backup.id for v in prune(other, "main", rules=LAST).verdicts if not v.kept} == {
        first,
        second,
    }
    assert check(site.ctx, "main").problems == ()
    assert verify(site.ctx, all_backups=True, store="main").problems == ()
    prune(site.ctx, "main", rules=LAST, dry_run=True)
    assert len(site.ctx.catalog.backups(store="main")) == 3  # it only looked
    prune(site.ctx, "main", rules=LAST)
    assert [b.id for b in site.ctx.catalog.backups(store="main")] == [last]
    site.check_all()


def test_prune_where_a_manifest_was_lost_beside_a_deletion_stops(
    site: BackupSite, other: Context
) -> None:
    first, second, _ = site.taken
    delete(other, [first])
    (site.folder / "main" / "manifests" / second).unlink()
    with pytest.raises(IntegrityError, match=second) as caught:
        prune(site.ctx, "main", rules=LAST)
    assert first not in caught.value.message
    (problem,) = check(site.ctx, "main").problems
    assert second in problem


def test_note_of_a_deletion_under_another_name_hides_no_loss(
    site: BackupSite, other: Context
) -> None:
    first, second, _ = site.taken
    delete(other, [first])
    notes = site.folder / "main" / "deleted"
    (notes / first).rename(notes / second)
    (site.folder / "main" / "manifests" / second).unlink()
    with pytest.raises(IntegrityError, match=second):
        prune(site.ctx, "main", rules=LAST)
