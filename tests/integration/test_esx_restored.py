"""VMs that are made again on vSphere, with the services, against the simulator."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.errors import BusyError, CleanupError
from offload.services import director, mount, restore_vm
from offload.services.context import open_context
from offload.services.restore_vm import VmRequest
from tests.vsphere_sim.site import BACKUP, GROUP, Plan, running_site

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(300)]

OVERLAYS = '[overlays]\nlimit = "64MiB"\nmin_free = "1MiB"\n'


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, as unix sockets have."""
    made = Path(tempfile.mkdtemp(prefix="oe-"))
    yield made
    shutil.rmtree(made)


def test_restored_vm_goes_before_its_views_and_never_under_it(folder: Path) -> None:
    (folder / "luns").mkdir()
    plan = Plan(luns_in=folder / "luns", provider="copy")
    with running_site(folder, plan) as site:
        site.write_config(OVERLAYS)
        site.write("vm01", b"content of vm01")
        with open_context(site.config) as ctx:
            mark = director.create(ctx, GROUP)
            request = VmRequest(
                what=f"timemark:{mark.id}", vm="vm01", host=BACKUP[0], name="vm01 again"
            )
            made = restore_vm.restore_vm(ctx, request)
            vm = site.placeholders()["vm01 again"]
            assert site.read(vm, 15) == b"content of vm01"
            with pytest.raises(BusyError) as busy:
                mount.unmount(ctx, made.views)
            assert busy.value.code == "view-busy"
            site.model.set_power(vm, "poweredOn")
            with pytest.raises(CleanupError) as runs:
                mount.unmount(ctx, made.views, force=True)
            assert runs.value.code == "placeholder-runs"
            assert [view.name for view in ctx.catalog.views()] == list(made.views)
            site.model.set_power(vm, "poweredOff")
            mount.unmount(ctx, made.views, force=True)
            assert ctx.catalog.views() == []
        assert site.left_on() == []
        assert site.model.storage.all_paths_down() == []
        assert not list((folder / "state" / "restored").iterdir())
