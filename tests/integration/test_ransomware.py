"""An attacker with the backup host's own credentials, for as long as he likes; then every backup is
restored bit for bit, by `offload` on a bare machine with the recovery key."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from offload import compose, instance
from offload.cli.main import run as offload
from offload.engine.manifests import read_manifest
from offload.engine.repository import Repository
from offload.engine.tombstones import put_tombstone
from offload.format import layout
from offload.format.fold import Fold, encode_fold
from offload.format.manifest import encode_manifest
from offload.format.pack import Entry, Kind
from offload.storespec import StoreSpec
from offload.testing.backup_site import PROVIDER
from offload.testing.locked_site import SIZES, Attacker, LockedSite, Place, locked_site
from offload.testing.rgw import RunningRgw

LOCK = """
[stores.main.lock]
mode = "{mode}"
retain = "1h"
generation = "1h"
"""
KEY = """
[stores.main.key]
file = "{folder}/store.key"
"""
RECOVERY = """
[stores.main.key]
recovery_file = "{folder}/recovery"
"""
FLOOD = 1100  # more than a page of a listing


@dataclass
class Scene:
    """Backups that were taken, the moment after that, and the one who comes then."""

    site: LockedSite
    attacker: Attacker
    moment: datetime
    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def locked(self) -> list[str]:
        return sorted(self.site.taken)

    def bare(self, name: str, more: str) -> Callable[..., Any]:
        """`offload` on a machine that has nothing but the configuration and the recovery key."""
        folder = self.folder / name
        folder.mkdir()
        place = replace(self.site.place, more=more)
        config = folder / "offload.toml"
        config.write_text(place.text(folder, folder))

        def ask(*words: str, codes: tuple[int, ...] = (0,)) -> Any:
            self.capsys.readouterr()
            code = offload(["--config", str(config), "--json", *words])
            said = self.capsys.readouterr()
            assert code in codes, said.err
            assert said.out, said.err
            return json.loads(said.out)

        return ask

    def restore_all(self, ask: Callable[..., Any], folder: Path) -> None:
        """List from the store alone, restore everything, compare."""
        ask("store", "check", "main", "--rebuild-catalog", codes=(0, 7))  # 7: it found rubbish
        listed = {entry["id"] for entry in ask("backup", "list")}
        assert set(self.locked) <= listed
        for ident in self.locked:
            for volume in SIZES:
                out = folder / f"{ident}-{volume}"
                ask("restore", f"backup:{ident}/{volume}", "--to", str(out))
                assert out.read_bytes() == self.site.taken[ident][volume], (ident, volume)


def _scene(
    rgw: RunningRgw, folder: Path, mode: str, key: str, capsys: pytest.CaptureFixture[str]
) -> Iterator[Scene]:
    lock = LOCK.format(mode=mode) + key.format(folder=folder)
    place = Place(rgw=rgw, bucket=rgw.new_bucket(locked=True), more=lock)
    with locked_site(folder, place) as site:
        for _ in range(3):
            site.back_up()
            site.scribble()
        with site.repository() as repository:
            moment = repository.store.now() + timedelta(seconds=1)  # a server says whole seconds
            while repository.store.now() <= moment:
                time.sleep(0.1)
        yield Scene(site, Attacker(place), moment, folder, capsys)


@pytest.fixture
def scene(
    rgw: RunningRgw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Scene]:
    """An encrypted store under compliance."""
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    yield from _scene(rgw, tmp_path, "compliance", KEY, capsys)


def _rampage(scene: Scene, flood: int = 3) -> None:
    """All that can be done without the store's keys."""
    attacker, chooser = scene.attacker, random.Random(3)
    _, refused = attacker.destroy(bypass=True)
    assert refused > 10
    for key in attacker.names():
        attacker.put(key, chooser.randbytes(chooser.randrange(1, 40_000)))
        attacker.hide(key)
        if chooser.random() < 0.5:
            attacker.put(key, b"")
    newest = f"{attacker.prefix}{layout.manifest_name(scene.locked[0])}"
    for number in range(flood):
        attacker.put(newest, b"%d" % number)
        attacker.hide(f"{attacker.prefix}{layout.STORE_OBJECT}")
    for backup in scene.locked:
        for name in (layout.void_name(backup), layout.fold_name(backup), layout.hold_name(backup),
                     layout.tombstone_name(backup), layout.fence_name(backup, backup),
                     layout.pin_name(backup, 1), f"{layout.QUARANTINE}{backup}-000001.x",
                     layout.key_name(backup), layout.index_name(backup[::-1]),
                     layout.manifest_name(backup[::-1])):  # fmt: skip
            attacker.put(f"{attacker.prefix}{name}", os.urandom(100))
    _meddle_with_the_bucket(attacker)


def _meddle_with_the_bucket(attacker: Attacker) -> None:
    """Its settings: what protects what was stored is not one of them."""
    client, bucket = attacker.client, attacker.bucket
    with pytest.raises(ClientError):
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    with pytest.raises(ClientError):
        client.delete_bucket(Bucket=bucket)
    client.put_object_lock_configuration(
        Bucket=bucket,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}},
        },
    )


def test_ransomware_every_locked_backup_is_restored_on_a_bare_machine(scene: Scene) -> None:
    _rampage(scene, FLOOD)
    more = LOCK.format(mode="compliance") + RECOVERY.format(folder=scene.folder)
    ask = scene.bare("bare", more)
    scene.restore_all(ask, scene.folder / "bare")


def test_ransomware_as_of_the_moment_before_all_is_as_it_was(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing that was put later is even listed. The machine begins with an address, a key and
    a time."""
    _rampage(scene)
    monkeypatch.setattr(instance, "_runtime_base", lambda _: scene.folder / "run-of-past")
    ask = scene.bare("past", "")
    rgw, past = scene.site.place.rgw, scene.folder / "past"
    ask(
        "init", "--force", "--state-dir", str(past / "state"),
        "--from-store", f"s3://{scene.site.place.bucket}/vault",
        "--endpoint", rgw.endpoint, "--path-style",
        "--credentials-file", str(rgw.credentials_file),
        "--recovery-key-file", str(scene.folder / "recovery"),
        "--as-of", scene.moment.isoformat(),
    )  # fmt: skip
    scene.restore_all(ask, past)
    assert {entry["id"] for entry in ask("backup", "list")} == set(scene.locked)
    report = ask("store", "check", "main")
    assert report["problems"] == []


def _forge(scene: Scene) -> None:
    """What somebody can put who has the keys too: everything is sealed as it should be."""
    with scene.site.repository() as found:
        inner = compose.open_store(_unlocked(found.store.spec))
        repository = Repository(inner, found.parameters, found.keys, scene.folder / "his")
        wrong = found.keys.page[:32].hex()
        roots = {}
        for backup in scene.locked:
            manifest = read_manifest(found, backup)
            roots[backup] = {image.volume: wrong for image in manifest.backup.images}
            value = {"format": "offload-void", "version": 1, "writer": backup}
            repository.put_sealed(layout.void_name(backup), value)
            images = tuple(replace(image, root=wrong) for image in manifest.backup.images)
            forged = replace(manifest, backup=replace(manifest.backup, images=images))
            name = layout.manifest_name(backup)
            inner.put(name, [encode_manifest(forged, found.keys)])
        name = layout.fold_name("zzzzzzzzzz")
        inner.put(name, [encode_fold(name, Fold(10**9, roots), found.keys)])
        put_tombstone(repository, "zzzzzzzzzz", found.store.list(layout.PACKS))
        inner.close()


def _unlocked(spec: StoreSpec) -> StoreSpec:
    options = {k: v for k, v in spec.options.items() if not k.startswith("lock_")}
    return replace(spec, options=options)


def test_ransomware_with_the_keys_too_locked_backups_are_read_as_they_were(scene: Scene) -> None:
    """Voids, folds and second manifests count for nothing against a locked manifest."""
    _forge(scene)
    more = LOCK.format(mode="compliance") + RECOVERY.format(folder=scene.folder)
    ask = scene.bare("bare", more)
    scene.restore_all(ask, scene.folder / "bare")


def test_ransomware_with_the_keys_a_forged_index_ends_at_the_moment_before(scene: Scene) -> None:
    """An index object may say that chunks are what they are not; as of before, it is not there."""
    with scene.site.repository() as found:
        idents = [e.id for pack in found.index.packs() for e in found.index.entries(pack)]
        lies = [Entry(ident, Kind.DELTA, 1, 7, 7, 40 + n) for n, ident in enumerate(idents)]
        pack = layout.pack_name("aaaaaaaaaa", 1)
        inner = compose.open_store(_unlocked(found.store.spec))
        repository = Repository(inner, found.parameters, found.keys, scene.folder / "his")
        repository.put_index(layout.index_name("aaaaaaaaaa"), {pack: lies})
        inner.close()
    _forge(scene)
    _rampage(scene)
    more = f'as_of = "{scene.moment.isoformat()}"\n' + RECOVERY.format(folder=scene.folder)
    scene.restore_all(scene.bare("past", more), scene.folder / "past")


def test_ransomware_plain_store_every_locked_backup_is_restored(
    rgw: RunningRgw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without encryption everybody has the keys."""
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    for scene in _scene(rgw, tmp_path, "compliance", "", capsys):
        _forge(scene)
        _rampage(scene)
        ask = scene.bare("bare", LOCK.format(mode="compliance"))
        scene.restore_all(ask, scene.folder / "bare")


def test_governance_whoever_may_bypass_it_destroys_everything(
    rgw: RunningRgw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without the right to bypass it holds as compliance does."""
    monkeypatch.setitem(compose.PROVIDERS, "copy", PROVIDER)
    for scene in _scene(rgw, tmp_path, "governance", KEY, capsys):
        _, refused = scene.attacker.destroy()
        assert refused > 10
        more = LOCK.format(mode="governance") + RECOVERY.format(folder=scene.folder)
        scene.restore_all(scene.bare("bare", more), scene.folder / "bare")
        _, refused = scene.attacker.destroy(bypass=True)
        assert refused == 0
        assert scene.attacker.versions() == []
