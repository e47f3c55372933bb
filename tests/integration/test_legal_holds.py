"""Legal holds: what is held stays, whatever rules and commands say; the store is what counts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.catalog.store import Catalog
from offload.engine.repository import Repository
from offload.errors import BusyError, IntegrityError, NotFoundError
from offload.format import layout
from offload.format.layout import encode_parameters, new_parameters
from offload.format.legalhold import decode_hold, encode_hold
from offload.journal import CRASH_ENV
from offload.model import BackupId, LegalHold
from offload.retention import KeepRules
from offload.services import backups, legalholds, stores
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.prune import prune
from offload.stores.disk import DiskStore
from offload.storespec import StoreSpec

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
[pool]
min_free = "0%"
[volumes.db]
provider = "copy"
path = "{folder}/db.raw"
[groups.shop]
volumes = ["db"]
atomic = "record"
[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"
"""

# A process of its own, to be killed at a step.
SCRIPT = """
import sys
from pathlib import Path
from offload.services import legalholds
from offload.services.context import open_context
with open_context(Path(sys.argv[1])) as ctx:
    if sys.argv[2] == "hold":
        legalholds.hold(ctx, [sys.argv[3]], "case 7")
    else:
        legalholds.release(ctx, [sys.argv[3]])
"""


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[Context]:
    config = tmp_path / "offload.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "db.raw").write_bytes(os.urandom(16384))
    (tmp_path / "store").mkdir()
    store = DiskStore(StoreSpec(url=str(tmp_path / "store")))
    store.put(layout.STORE_OBJECT, [encode_parameters(new_parameters(chunk_bytes=4096))])
    store.close()
    with open_context(config) as made:
        yield made


def _backups(ctx: Context, count: int, *tags: str) -> list[str]:
    return [backup(ctx, "shop", tags=tags).backup.id for _ in range(count)]


def _objects(ctx: Context) -> DiskStore:
    return DiskStore(ctx.instance.config.store("main").spec())


def _killed(ctx: Context, tmp_path: Path, verb: str, ident: str, at: str) -> None:
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path / "offload.toml"), verb, ident]
    done = subprocess.run(argv, env={**os.environ, CRASH_ENV: at}, check=False, timeout=60)
    assert done.returncode == -9


def test_hold_keeps_a_backup_from_rules_and_from_deletion_until_its_release(ctx: Context) -> None:
    old, middle, new = _backups(ctx, 3)
    (placed,) = legalholds.hold(ctx, [old], "case 7")
    assert (placed.backup, placed.reason) == (old, "case 7")
    with pytest.raises(BusyError) as caught:
        backups.delete(ctx, [middle, old])
    assert caught.value.code == "backup-held"
    assert {b.id for b in ctx.catalog.backups()} == {old, middle, new}

    report = prune(ctx, "main", rules=KeepRules(last=1))
    assert {v.backup.id: v.reasons for v in report.verdicts} == {
        old: ("held",),
        middle: (),
        new: ("newest", "last 1"),
    }
    assert {b.id for b in ctx.catalog.backups()} == {old, new}

    assert [b.id for b in legalholds.release(ctx, [old])] == [old]
    assert ctx.catalog.holds() == {}
    prune(ctx, "main", rules=KeepRules(last=1))
    assert {b.id for b in ctx.catalog.backups()} == {new}


def test_hold_of_what_is_held_keeps_the_first_reason(ctx: Context) -> None:
    (ident,) = _backups(ctx, 1)
    legalholds.hold(ctx, [ident], "first")
    (again,) = legalholds.hold(ctx, [ident], "second")
    assert again.reason == "first"


def test_release_of_what_is_not_held_says_so(ctx: Context) -> None:
    (ident,) = _backups(ctx, 1)
    with pytest.raises(NotFoundError) as caught:
        legalholds.release(ctx, [ident])
    assert caught.value.code == "not-held"


def test_hold_of_a_backup_that_went_meanwhile_holds_nothing(ctx: Context) -> None:
    (ident,) = _backups(ctx, 1)
    _objects(ctx).delete(layout.manifest_name(ident))
    with pytest.raises(NotFoundError) as caught:
        legalholds.hold(ctx, [ident])
    assert caught.value.code == "unknown-backup"
    assert list(_objects(ctx).list(layout.HOLDS)) == []
    assert ctx.catalog.holds() == {}


def test_hold_placed_while_the_manifest_was_being_deleted_brings_it_back(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ident,) = _backups(ctx, 1)
    name = layout.manifest_name(ident)
    delete = DiskStore.delete

    def placed_in_between(store: DiskStore, gone: str) -> None:
        delete(store, gone)
        if gone == name:
            store.put(layout.hold_name(ident), [b"of another host"])

    monkeypatch.setattr(DiskStore, "delete", placed_in_between)
    raw = _objects(ctx).get(name)
    backups.delete(ctx, [ident])
    assert _objects(ctx).get(name) == raw
    assert [b.id for b in ctx.catalog.backups()] == [ident]


def test_hold_that_cannot_be_read_holds(ctx: Context) -> None:
    old, _ = _backups(ctx, 2)
    _objects(ctx).put(layout.hold_name(old), [b"damaged"])
    report = prune(ctx, "main", rules=KeepRules(last=1))
    assert all(v.kept for v in report.verdicts)


@pytest.mark.parametrize(
    ("verb", "at", "stays"),
    [
        ("hold", "backup-hold.hold-1.intended", False),
        ("hold", "hold.placed", True),
        ("hold", "backup-hold.commit.after", True),
        ("release", "backup-release.begin", True),
        ("release", "backup-release.release-1.intended", True),
        ("release", "hold.released", False),
    ],
)
def test_hold_and_release_killed_leave_what_the_page_says(
    ctx: Context, tmp_path: Path, verb: str, at: str, stays: bool
) -> None:
    (ident,) = _backups(ctx, 1)
    if verb == "release":
        legalholds.hold(ctx, [ident], "case 7")
    _killed(ctx, tmp_path, verb, ident, at)
    ctx.journal.recover()
    names = [layout.hold_name(ident)] if stays else []
    assert list(_objects(ctx).list(layout.HOLDS)) == names
    assert set(ctx.catalog.holds()) == ({ident} if stays else set())


def test_hold_found_by_another_command_outlives_the_recovery_of_who_placed_it(
    ctx: Context, tmp_path: Path
) -> None:
    (ident,) = _backups(ctx, 1)
    _killed(ctx, tmp_path, "hold", ident, "hold.placed")
    legalholds.hold(ctx, [ident])  # says that the backup is held
    ctx.journal.recover()
    with pytest.raises(BusyError, match="legal hold"):
        backups.delete(ctx, [ident])


def test_catalog_made_anew_knows_holds_and_tags(ctx: Context) -> None:
    old, _ = _backups(ctx, 2, "release")
    legalholds.hold(ctx, [old], "case 7")
    ctx.catalog.drop_hold(old)
    stores.check(ctx, "main", rebuild_catalog=True)
    assert ctx.catalog.holds()[old].reason == "case 7"  # type: ignore[index]
    assert {b.tags for b in ctx.catalog.backups()} == {("release",)}


def test_tags_keep_a_backup_from_the_counts(ctx: Context) -> None:
    (tagged,) = _backups(ctx, 1, "release", "release", "a")
    _, new = _backups(ctx, 2)
    prune(ctx, "main", rules=KeepRules(last=1, tags=("release",)))
    assert {b.id: b.tags for b in ctx.catalog.backups()} == {tagged: ("a", "release"), new: ()}


def test_decode_hold_of_another_object_is_refused(ctx: Context) -> None:
    with stores.opened(ctx, "main", exclusive=False) as repository:
        name = layout.hold_name("babcdefghj")
        raw = _raw_hold(repository, name)
        assert decode_hold(name, raw, repository.keys).reason == "why"
        with pytest.raises(IntegrityError) as caught:
            decode_hold(layout.hold_name("bother0000"), raw, repository.keys)
        assert caught.value.code == "bad-seal"


def _raw_hold(repository: Repository, name: str) -> bytes:
    made = LegalHold(
        backup=BackupId("babcdefghj"),
        placed_at=repository.store.now(),
        host="h",
        reason="why",
    )
    return encode_hold(name, made, repository.keys)


def test_set_holds_leaves_out_backups_that_the_catalog_lacks(tmp_path: Path) -> None:
    catalog = Catalog.open(tmp_path / "catalog.db")
    unknown = LegalHold(
        backup=BackupId("babcdefghj"),
        placed_at=DiskStore(StoreSpec(url=str(tmp_path))).now(),
        host="h",
    )
    catalog.set_holds("main", [unknown])
    assert catalog.holds() == {}
    catalog.close()
