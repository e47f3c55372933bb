"""Writable views that are unmounted and mounted again with what was written."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import run
from offload.errors import BusyError, UsageError
from offload.journal import CRASH_ENV
from offload.model import View, ViewState
from offload.services import mount, recover, status
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions

MIB = 1 << 20
MARK = b"written " * 512

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
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofk-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def ctx(folder: Path) -> Iterator[Context]:
    (folder / "db.raw").write_bytes(os.urandom(8 * MIB))
    config = folder / "offload.toml"
    config.write_text(CONFIG.format(folder=folder))
    with open_context(config) as made:
        yield made
        mount.unmount(made, [], all_views=True, force=True)


@pytest.fixture
def view(ctx: Context) -> View:
    """One with something written to it, and nobody connected."""
    (made,) = mount.mount(ctx, ["shop"], MountOptions(writable=True, name="v"))
    client = connected(made)
    client.pwrite(MARK, 4096)
    client.shutdown()
    return made


def connected(view: View) -> Any:
    client: Any = nbd.NBD()
    client.connect_uri(view.uri)
    return client


def shown(view: View) -> bytes:
    client = connected(view)
    found = bytes(client.pread(8 * MIB, 0))
    client.shutdown()
    return found


def test_kept_view_mounted_again_has_what_was_written_at_its_address(
    ctx: Context, view: View, folder: Path
) -> None:
    before = shown(view)
    assert before[4096:8192] == MARK
    mount.keep(ctx, ["v"])
    assert not list((folder / "run").rglob("*.sock"))
    (again,) = mount.mount_again(ctx, ["v"])
    assert again.uri == view.uri
    assert shown(again) == before


def test_kept_view_is_not_served_by_a_recovery_and_is_no_alarm(ctx: Context, view: View) -> None:
    mount.keep(ctx, ["v"])
    assert recover.recover(ctx).remounted == ()
    assert recover.recover(ctx, dry_run=True).remounted == ()
    (seen,) = mount.views(ctx)
    assert (seen.view.state, seen.alive) == (ViewState.KEPT, False)
    assert seen.overlay is not None
    report = status.collect(ctx)
    assert [row.kept for row in report.views] == [True]
    assert not [alarm for alarm in report.alarms if "not served" in alarm]


def test_kept_view_unmounted_is_discarded_with_its_timemark(
    ctx: Context, view: View, folder: Path
) -> None:
    mount.keep(ctx, ["v"])
    assert len(ctx.catalog.timemarks()) == 1  # its origin
    mount.unmount(ctx, ["v"])
    assert list((folder / "state/overlays").iterdir()) == []
    assert ctx.catalog.timemarks() == []


def test_keep_of_a_view_with_a_client_or_without_writes_is_refused(
    ctx: Context, view: View
) -> None:
    client = connected(view)
    with pytest.raises(BusyError) as busy:
        mount.keep(ctx, ["v"])
    client.shutdown()
    assert busy.value.code == "view-busy"
    mount.mount(ctx, ["shop"], MountOptions(name="ro"))
    with pytest.raises(UsageError) as caught:
        mount.keep(ctx, ["ro"])
    assert caught.value.code == "view-read-only"
    with pytest.raises(BusyError) as mounted:
        mount.mount_again(ctx, ["v"])
    assert mounted.value.code == "view-mounted"


@pytest.mark.parametrize(
    "step", ["keep.begin", "keep.server.intended", "keep.row.done", "keep.server.done",
             "keep.commit.before", "keep.commit.after"],
)  # fmt: skip
def test_keep_killed_at_a_step_loses_no_write(
    ctx: Context, view: View, folder: Path, step: str
) -> None:
    before = shown(view)
    program = [sys.executable, "-m", "offload.cli", "--config", str(folder / "offload.toml")]
    done = run.run([*program, "unmount", "v", "--keep"], env={CRASH_ENV: step}, check=False)
    assert done.status == -9, done.stderr
    recover.recover(ctx)
    (seen,) = mount.views(ctx)
    kept = step not in {"keep.begin", "keep.server.intended"}
    assert (seen.view.state is ViewState.KEPT, seen.alive) == (kept, not kept)
    if kept:
        mount.mount_again(ctx, ["v"])
    assert shown(ctx.catalog.view("v")) == before
