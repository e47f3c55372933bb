"""Legal holds: what is held stays, whatever rules and commands say; the store is what counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.catalog.store import Catalog
from offload.engine.repository import Repository
from offload.engine.writing import settle_dead
from offload.errors import BusyError, IntegrityError, NotFoundError, PrivilegeError
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
from offload.testing.warm import warm_python

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
from offload.services import backups, legalholds
from offload.services.context import open_context
with open_context(Path(sys.argv[1])) as ctx:
    if sys.argv[2] == "hold":
        legalholds.hold(ctx, [sys.argv[3]], "case 7")
    elif sys.argv[2] == "delete":
        backups.delete(ctx, [sys.argv[3]])
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
    argv = ("-c", SCRIPT, str(tmp_path / "offload.toml"), verb, ident)
    assert warm_python().run(*argv, env={CRASH_ENV: at}).status == -9


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


def test_deletion_that_finds_a_hold_after_its_note_leaves_all_as_it_was(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ident,) = _backups(ctx, 1)
    put = DiskStore.put

    def placed_in_between(store: DiskStore, name: str, parts: list[bytes]) -> int:
        done = put(store, name, parts)
        if name.startswith(layout.DELETED):
            put(store, layout.hold_name(ident), [b"of another host"])
        return done

    monkeypatch.setattr(DiskStore, "put", placed_in_between)
    with pytest.raises(BusyError) as caught:
        backups.delete(ctx, [ident])
    assert caught.value.code == "backup-held"
    assert _objects(ctx).exists(layout.manifest_name(ident))
    assert list(_objects(ctx).list(layout.DELETED)) == []
    assert [b.id for b in ctx.catalog.backups()] == [ident]


def test_prune_that_finds_a_hold_after_its_note_says_that_the_backup_is_kept(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = _backups(ctx, 2)
    put = DiskStore.put

    def placed_in_between(store: DiskStore, name: str, parts: list[bytes]) -> int:
        done = put(store, name, parts)
        if name.startswith(layout.DELETED):
            put(store, layout.hold_name(old), [b"of another host"])
        return done

    monkeypatch.setattr(DiskStore, "put", placed_in_between)
    report = prune(ctx, "main", rules=KeepRules(last=1))
    assert {v.backup.id: (v.kept, v.reasons) for v in report.verdicts} == {
        old: (True, ("held",)),
        new: (True, ("newest", "last 1")),
    }
    assert {b.id for b in ctx.catalog.backups()} == {old, new}


def _noted(ctx: Context, ident: str) -> str:
    """A deletion by another host has begun; the name of its note."""
    with stores.opened(ctx, "main", exclusive=False) as repository:
        name = layout.deletion_name(ident, "dother0000")
        note = {"backup": ident, "host": "elsewhere", "at": "2026-01-02T03:04:05+00:00"}
        repository.put_sealed(name, {"format": "offload-deletion", "version": 1, **note})
    return name


@pytest.mark.parametrize("ends_by", [layout.MANIFESTS, layout.DELETED])
def test_hold_beside_a_deletion_that_has_begun_waits_for_its_end(
    ctx: Context, monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    (ident,) = _backups(ctx, 1)
    goes = layout.manifest_name(ident)
    note = _noted(ctx, ident)

    def the_other_ends() -> Iterator[None]:
        yield
        _objects(ctx).delete(goes if ends_by == layout.MANIFESTS else note)
        yield
        raise AssertionError("it waits though it need not")

    monkeypatch.setattr(legalholds, "_attempts", the_other_ends)
    if ends_by == layout.DELETED:
        assert [h.backup for h in legalholds.hold(ctx, [ident])] == [ident]
        return
    with pytest.raises(NotFoundError, match="nothing is held"):
        legalholds.hold(ctx, [ident])
    assert list(_objects(ctx).list(layout.HOLDS)) == []


def test_hold_beside_a_deletion_that_does_not_end_stays_and_says_so(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = _backups(ctx, 2)
    note = _noted(ctx, old)
    monkeypatch.setattr(legalholds, "WAIT_S", 0.0)
    for _ in range(2):  # also where the hold is there already
        with pytest.raises(BusyError, match="deleted by elsewhere, since 2026-01-02T03:04Z") as it:
            legalholds.hold(ctx, [old])
        assert it.value.code == "hold-unsure"
    prune(ctx, "main", rules=KeepRules(last=1))
    assert _objects(ctx).exists(layout.manifest_name(old))
    _objects(ctx).delete(note)
    assert [h.backup for h in legalholds.hold(ctx, [old])] == [old]


@pytest.mark.parametrize("held", [False, True])
def test_deletion_killed_after_its_note_is_finished_or_withdrawn_by_the_next_command(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    (ident,) = _backups(ctx, 1)
    _killed(ctx, tmp_path, "delete", ident, "deletion.noted")
    assert _objects(ctx).exists(layout.manifest_name(ident))
    if held:
        monkeypatch.setattr(legalholds, "WAIT_S", 0.0)
        with pytest.raises(BusyError, match="may be too late"):
            legalholds.hold(ctx, [ident])  # this host's other command, before any recovery
    ctx.journal.recover()  # as `prune`, and each command that changes something, begins
    assert _objects(ctx).exists(layout.manifest_name(ident)) == held
    assert (list(_objects(ctx).list(layout.deletions_folder(ident))) == []) == held
    assert [b.id for b in ctx.catalog.backups()] == [ident] * held
    if held:
        assert [h.backup for h in legalholds.hold(ctx, [ident])] == [ident]


def test_deletion_that_the_store_refuses_leaves_no_note(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ident,) = _backups(ctx, 1)
    delete = DiskStore.delete

    def refused(store: DiskStore, name: str) -> None:
        if name == layout.manifest_name(ident):
            raise PrivilegeError("denied", code="store-denied")
        delete(store, name)

    monkeypatch.setattr(DiskStore, "delete", refused)
    with pytest.raises(PrivilegeError):
        backups.delete(ctx, [ident])
    assert list(_objects(ctx).list(layout.DELETED)) == []


def test_writer_that_takes_its_backup_back_leaves_it_where_there_is_a_hold(ctx: Context) -> None:
    (ident,) = _backups(ctx, 1)
    _objects(ctx).put(layout.fence_name(ident, "pother0000"), [b"of a prune"])
    with stores.opened(ctx, "main", exclusive=False) as repository:
        _objects(ctx).put(layout.hold_name(ident), [b"of another host"])
        assert settle_dead(repository, ident)
        assert repository.store.exists(layout.manifest_name(ident))
        _objects(ctx).delete(layout.hold_name(ident))
        assert not settle_dead(repository, ident)
        assert not repository.store.exists(layout.manifest_name(ident))


def test_hold_of_a_backup_that_a_prune_has_given_up_holds_nothing(ctx: Context) -> None:
    (ident,) = _backups(ctx, 1)
    _objects(ctx).put(layout.void_name(ident), [b"of a prune"])
    with pytest.raises(NotFoundError, match="nothing is held"):
        legalholds.hold(ctx, [ident])
    assert list(_objects(ctx).list(layout.HOLDS)) == []


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
