"""Object lock on a real S3 server: what is locked, until when, and what commands make of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from offload import compose
from offload.engine import retention_lock
from offload.engine.lockledger import LockLedger
from offload.engine.manifests import read_manifest
from offload.engine.repository import Repository
from offload.engine.tree import walk_pages
from offload.errors import PolicyError, UnavailableError
from offload.format import layout
from offload.journal import CRASH_ENV
from offload.model import BackupSource
from offload.objectlock import LockRules
from offload.retention import KeepRules
from offload.services import backups
from offload.services.backup import backup
from offload.services.context import open_context
from offload.services.prune import prune
from offload.services.store_init import InitOptions, init
from offload.stores.s3_lock import LockedStore
from offload.testing.backup_site import PROVIDER
from offload.testing.fault_proxy import fault_proxy
from offload.testing.locked_site import CHUNK, SIZES, Attacker, LockedSite, Place, locked_site
from offload.testing.rgw import RunningRgw, S3User
from offload.testing.warm import warm_python

LOCK = """
[stores.main.lock]
mode = "compliance"
retain = "1h"
generation = "1h"
"""


@pytest.fixture
def site(rgw: RunningRgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LockedSite]:
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    place = Place(rgw=rgw, bucket=rgw.new_bucket(locked=True), more=LOCK)
    with locked_site(tmp_path, place) as made:
        yield made


def _locks(site: LockedSite) -> dict[str, datetime | None]:
    """Until when the original of each object is locked, as the server says."""
    with site.repository() as repository:
        store = repository.store
        assert isinstance(store, LockedStore)
        names = {v.name for v in store.versions("")}
        return {v.name: store.retained_until(v) for v in store.originals(names).values()}


def test_backup_all_that_it_needs_is_locked_at_least_as_long_as_its_manifest(
    site: LockedSite,
) -> None:
    before = datetime.now(UTC)
    for _ in range(3):
        done = site.back_up().backup
        site.scribble()
    locks = _locks(site)
    manifest = locks[layout.manifest_name(done.id)]
    assert manifest is not None
    assert manifest >= before + timedelta(hours=1) - timedelta(seconds=1)
    needed = [n for n in locks if n.startswith(("packs/", "index/", "keys/", "store.json"))]
    assert len(needed) > 4
    for name in needed:
        until = locks[name]
        assert until is not None, name
        assert until >= manifest, name
    site.check_all()


def test_backup_without_changes_asks_little_and_extends_nothing(site: LockedSite) -> None:
    """The next night: only the manifest and the index object's dates are new."""
    site.back_up()
    before = _locks(site)
    site.back_up()
    after = _locks(site)
    assert {n: after[n] for n in before} == before


def test_extension_moves_early_dates_once_a_generation_and_only_what_is_needed(
    site: LockedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later by a whole generation: what the new backup inherits gets dates ahead of its own."""
    first = site.back_up().backup
    site.scribble()
    before = _locks(site)
    later = timedelta(hours=2)
    real = LockedStore.clock
    monkeypatch.setattr(LockedStore, "clock", lambda store: real(store) + later)
    second = site.back_up().backup
    after = _locks(site)
    manifest = after[layout.manifest_name(second.id)]
    assert manifest is not None
    with site.repository() as repository:
        needed = _needed_packs(repository, second.id)
        assert any(first.id in pack for pack in needed)
        for name in (*needed, layout.STORE_OBJECT, layout.index_name(first.id)):
            until = after[name]
            assert until is not None, name
            assert until >= manifest, name
    for name, until in before.items():
        if name not in (*needed, layout.STORE_OBJECT, layout.index_name(first.id)):
            assert after[name] == until, name
    assert before[layout.manifest_name(first.id)] == after[layout.manifest_name(first.id)]
    again = site.back_up().backup
    assert {n: u for n, u in _locks(site).items() if n in after} == after
    assert again.id != second.id


def _needed_packs(repository: Repository, ident: str) -> set[str]:
    """By a walk of its own over the trees of a backup."""
    found = set()
    for image in read_manifest(repository, ident, "main").backup.images:
        shape = repository.shape(image.size_bytes)
        for _, _, page, leaves in walk_pages(repository, bytes.fromhex(image.root), shape, set()):
            ids = {page} | {i for leaf in leaves if leaf for i in (leaf.base, *leaf.deltas)}
            found |= {repository.locate(i).pack for i in ids}
    return found


def test_backup_whose_extension_fails_has_no_manifest(
    site: LockedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.back_up()
    site.scribble()
    real = LockedStore.clock
    monkeypatch.setattr(LockedStore, "clock", lambda store: real(store) + timedelta(hours=2))

    def refuse(_store: LockedStore, _version: object, _until: datetime) -> None:
        raise UnavailableError("no")

    with monkeypatch.context() as patch:
        patch.setattr(LockedStore, "extend", refuse)
        with pytest.raises(UnavailableError):
            backup(site.ctx, "shop", "main")
    with site.repository() as repository:
        names = list(repository.store.list(layout.MANIFESTS))
    assert names == [layout.manifest_name(next(iter(site.taken)))]
    site.back_up()
    site.check_all()


def test_ledger_that_is_lost_or_wrong_is_made_again_from_the_store(
    site: LockedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: it says that packs are locked for years, and the store says otherwise."""
    site.back_up()
    with site.repository() as repository:
        path = retention_lock.ledger_path(repository)
    path.unlink()
    site.scribble()
    site.back_up()
    with closing(LockLedger(path)) as ledger, site.repository() as repository:
        names = list(repository.store.list(layout.PACKS))
        assert ledger.locks(names).keys() == set(names)
        far = datetime.now(UTC) + timedelta(days=3000)
        ledger.note(dict.fromkeys(names, far))
    real = LockedStore.clock
    monkeypatch.setattr(LockedStore, "clock", lambda store: real(store) + timedelta(hours=2))
    last = site.back_up().backup
    locks = _locks(site)
    manifest = locks[layout.manifest_name(last.id)]
    assert manifest is not None
    with site.repository() as repository:
        for pack in _needed_packs(repository, last.id):
            until = locks[pack]
            assert until is not None
            assert manifest <= until < far


def test_date_beyond_the_cap_is_refused() -> None:
    rules = LockRules(mode="compliance", retain_s=3600, generation_s=3600, max_s=7200)
    now = datetime(2026, 11, 21, 12, 30, tzinfo=UTC)
    assert rules.backup_until(now) == datetime(2026, 11, 21, 13, 30, tzinfo=UTC)
    with pytest.raises(PolicyError) as caught:
        rules.object_until(now)
    assert caught.value.code == "lock-too-long"


def test_clock_that_differs_from_the_stores_locks_nothing(
    site: LockedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    years = timedelta(days=3650)
    with site.repository() as repository:
        store = repository.store
        assert isinstance(store, LockedStore)
        there = store.now()
        monkeypatch.setattr(store.inner, "now", lambda: there + years)
        with pytest.raises(PolicyError) as caught:
            store.put("packs/ab/abcdefghjk-000001", [b"x"])
        assert caught.value.code == "clock-differs"
        assert not store.exists("packs/ab/abcdefghjk-000001")


def test_deleting_a_locked_backup_says_until_when(site: LockedSite) -> None:
    done = site.back_up().backup
    with pytest.raises(PolicyError) as caught:
        backups.delete(site.ctx, [done.id])
    assert caught.value.code == "backup-locked"
    assert "until" in caught.value.message
    with site.repository() as repository, pytest.raises(PolicyError) as direct:
        repository.store.delete(layout.manifest_name(done.id))
    assert direct.value.code == "object-locked"
    site.check_all()


def test_prune_keeps_what_is_locked_and_says_why(site: LockedSite) -> None:
    for _ in range(3):
        site.back_up()
        site.scribble(20)
    before = _locks(site)
    report = prune(site.ctx, "main", rules=KeepRules(last=1, min_age_s=0))
    reasons = [v.reasons[0] for v in report.verdicts if v.reasons[0].startswith("locked until")]
    assert len(reasons) == 2
    assert report.packs_deleted == report.packs_rewritten == report.freed_bytes == 0
    packs = {n for n in before if n.startswith("packs/")}
    with site.repository() as repository:
        assert packs <= set(repository.store.list(layout.PACKS))
    site.check_all()


def test_prune_frees_what_is_locked_no_longer(
    site: LockedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the store's clock: a day later all but the newest goes, by delete markers."""
    for _ in range(3):
        site.back_up()
        site.scribble(20)
    real, real_now = LockedStore.clock, LockedStore.now
    day = timedelta(days=1)
    monkeypatch.setattr(LockedStore, "clock", lambda store: real(store) + day)
    monkeypatch.setattr(LockedStore, "now", lambda store: real_now(store) + day)
    report = prune(site.ctx, "main", rules=KeepRules(last=1, min_age_s=0))
    assert [v.kept for v in report.verdicts] == [False, False, True]
    kept = report.verdicts[-1].backup.id
    site.taken = {kept: site.taken[kept]}
    with site.repository() as repository:
        assert list(repository.store.list(layout.MANIFESTS)) == [layout.manifest_name(kept)]
    site.check_all()


def test_store_init_on_a_bucket_without_object_lock_is_refused(
    rgw: RunningRgw, tmp_path: Path
) -> None:
    place = Place(rgw=rgw, bucket=rgw.new_bucket(versioned=True), more=LOCK)
    with pytest.raises(PolicyError) as caught, locked_site(tmp_path, place):
        pass
    assert caught.value.code == "no-object-lock"
    client = rgw.client()
    assert client.list_objects_v2(Bucket=place.bucket)["KeyCount"] == 0


@pytest.mark.needs_root
def test_no_change_of_a_sparse_tebibyte_is_few_requests_and_no_walk(
    rgw: RunningRgw, tmp_path: Path, xfs_pool: Path
) -> None:
    """Locks are known here; what is asked does not grow with the image."""
    volume = xfs_pool / "big.raw"
    with volume.open("wb") as out:
        out.truncate(1 << 40)
        for piece in range(100):
            out.seek(piece * (10 << 30))
            out.write(bytes((piece + 1,)) * 4096)
    with fault_proxy(rgw.endpoint) as proxy:
        place = Place(rgw=rgw, bucket=rgw.new_bucket(locked=True), more=LOCK)
        text = place.text(tmp_path, tmp_path).replace(rgw.endpoint, proxy.endpoint)
        text = text.replace('"copy"', '"reflink"').replace(f"{tmp_path}/db.raw", str(volume))
        (tmp_path / "offload.toml").write_text(text.replace('["db", "web"]', '["db"]'))
        with open_context(tmp_path / "offload.toml") as ctx:
            init(ctx, "main", InitOptions())
            for _ in range(2):
                backup(ctx, "shop", "main")
            proxy.forget()
            report = backup(ctx, "shop", "main")
            assert report.images[0].mode == "incremental"
            assert report.stored_bytes == 0
            assert proxy.count(part="retention") <= 8
            assert proxy.count("PUT", "retention") == 0
            assert proxy.count() < 150


def test_backup_works_with_credentials_that_can_only_add(
    site: LockedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs/howto/s3.md: dates are extended with them, and nothing is destroyed."""
    rgw, bucket = site.place.rgw, site.place.bucket
    site.back_up()
    user = rgw.new_user()
    page = Path(__file__).parents[2] / "docs/howto/s3.md"
    policy = page.read_text().partition("```json\n")[2].partition("```")[0]
    policy = policy.replace("example-backups", bucket).replace("site-a/", "vault/")
    policy = policy.replace(
        "arn:aws:iam::111122223333:user/backup", f"arn:aws:iam:::user/{user.name}"
    )
    rgw.client().put_bucket_policy(Bucket=bucket, Policy=policy)
    keys = user.write_credentials(site.folder / "append-only")
    config = site.folder / "offload.toml"
    config.write_text(config.read_text().replace(str(rgw.credentials_file), str(keys)))
    site.scribble()
    real = LockedStore.clock
    monkeypatch.setattr(LockedStore, "clock", lambda store: real(store) + timedelta(hours=2))
    with open_context(config) as ctx:
        done = backup(ctx, "shop", "main").backup
        site = replace(site, ctx=ctx)  # what he has put is his: the owner may not ask for its dates
        site.taken[done.id] = {n: site.volume(n).read_bytes() for n in SIZES}
        _attack_by_adding(site, user, done.id)


def _attack_by_adding(site: LockedSite, user: S3User, newest: str) -> None:
    rgw, bucket = site.place.rgw, site.place.bucket
    locks = _locks(site)
    manifest = locks[layout.manifest_name(newest)]
    first = locks[layout.index_name(min(site.taken, key=lambda ident: ident == newest))]
    assert manifest is not None
    assert first is not None
    assert first >= manifest
    client = rgw.client(user)
    for version in client.list_object_versions(Bucket=bucket)["Versions"]:
        with pytest.raises(ClientError, match="AccessDenied"):
            client.delete_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
    for key in {v["Key"] for v in client.list_object_versions(Bucket=bucket)["Versions"]}:
        client.put_object(Bucket=bucket, Key=key, Body=b"all yours are belong to us")
    site.check_all()


def test_view_shows_what_was_stored_though_packs_are_replaced_while_it_reads(
    site: LockedSite,
) -> None:
    """Through its cache on disk, too."""
    done = site.back_up().backup
    attacker = Attacker(site.place)
    source = BackupSource(
        store=site.ctx.instance.config.store("main").spec().text(),
        backup=done.id,
        volume="db",
        size_bytes=SIZES["db"],
        cache_dir=site.ctx.instance.cache_dir,
        cache_bytes=64 << 20,
    )
    wanted = site.taken[done.id]["db"]
    for _ in range(2):  # the second time with what the first has cached
        image = compose.open_image(source)
        assert image.pread(0, 8 * CHUNK) == wanted[: 8 * CHUNK]
        for key in attacker.names():
            if "/packs/" in key:
                attacker.put(key, os.urandom(40_000))
        assert image.pread(0, SIZES["db"]) == wanted
        image.close()


SCRIPT = f"""
import sys
from pathlib import Path
from offload import compose
from offload.services.backup import backup
from offload.services.context import open_context
compose.PROVIDERS["copy"] = {PROVIDER!r}
with open_context(Path(sys.argv[1])) as ctx:
    backup(ctx, "shop", "main")
"""


@pytest.mark.parametrize(
    ("killed_at", "there"),
    [
        ("store.packs.written", False),
        ("store.index.written", False),
        ("backup.locked", False),
        ("backup.manifest.written", True),
    ],
)
def test_backup_killed_is_taken_back_or_whole_and_the_next_one_is_locked(
    site: LockedSite, killed_at: str, there: bool
) -> None:
    """What it has locked cannot be taken away; it is hidden, or left for a prune."""
    site.back_up()
    site.scribble()
    taken = {n: site.volume(n).read_bytes() for n in SIZES}
    argv = ("-c", SCRIPT, str(site.folder / "offload.toml"))
    done = warm_python().run(*argv, env={CRASH_ENV: killed_at})
    assert done.status == -signal.SIGKILL, done.stderr
    site.ctx.journal.recover()
    assert site.ctx.journal.leftovers() == []
    with site.repository() as repository:
        idents = {n.removeprefix("manifests/") for n in repository.store.list(layout.MANIFESTS)}
        assert list(repository.store.list(layout.PINS)) == []
    new = idents - site.taken.keys()
    assert len(new) == there
    site.taken |= dict.fromkeys(new, taken)
    site.scribble()
    last = site.back_up().backup
    locks = _locks(site)
    manifest = locks[layout.manifest_name(last.id)]
    assert manifest is not None
    with site.repository() as repository:
        for pack in _needed_packs(repository, last.id):
            until = locks[pack]
            assert until is not None
            assert until >= manifest
    site.check_all()
