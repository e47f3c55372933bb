"""Object lock on a real S3 server: what is locked, until when, and what commands make of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from offload.engine import retention_lock
from offload.errors import PolicyError
from offload.format import layout
from offload.objectlock import LockRules
from offload.retention import KeepRules
from offload.services import backups
from offload.services.backup import backup
from offload.services.prune import prune
from offload.stores.s3_lock import LockedStore
from offload.testing.backup_site import PROVIDER
from offload.testing.locked_site import LockedSite, Place, locked_site
from offload.testing.rgw import RunningRgw

LOCK = """
[stores.main.lock]
mode = "compliance"
retain = "1h"
generation = "1h"
"""


@pytest.fixture
def site(rgw: RunningRgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LockedSite]:
    monkeypatch.setitem(__import__("offload.compose").compose.PROVIDERS, "copy", PROVIDER)
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
