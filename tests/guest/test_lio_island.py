"""An island on the vSphere simulator whose host logs in to views of the kernel's own target."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from offload import iscsi
from offload.services import island, island_away
from offload.services.context import open_context
from offload.services.island_record import IslandOptions
from tests.vsphere_sim.site import BACKUP, GROUP, Plan, running_site

pytestmark = pytest.mark.in_guest(timeout_s=900)


def test_island_over_lio_shows_what_was_written_and_goes_without_a_trace() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = Plan(luns_in=folder, provider="copy", target="lio")
        with running_site(folder, plan) as site:
            site.write_config('[overlays]\nlimit = "64MiB"\nmin_free = "1MiB"\n')
            site.write("vm01", b"content of vm01")
            with open_context(site.config) as ctx:
                made = island.mount(ctx, GROUP, IslandOptions(host=BACKUP[0]))
                (view,) = made.views
                assert view.target == "lio"
                (naa,) = iscsi.canonical_names("lio", view.id)
                assert set(site.model.hosts.all[BACKUP[0]].disks) == {naa}
                standing = site.placeholders()
                assert set(standing) == {"backup-vm01", "backup-vm02"}
                assert site.read(standing["backup-vm01"], 15) == b"content of vm01"
                island_away.unmount(ctx, made.island)
            assert site.left_on() == []
            assert site.model.storage.all_paths_down() == []
