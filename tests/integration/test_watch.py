"""`offload watch`: on a real pool, with real servers, beside other processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from offload.holds import claim_view, hold_timemark
from offload.journal import CRASH_ENV
from offload.model import Backup, BackupId, TimeMark, View, ViewState
from offload.services import director, pools
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.director import CreateOptions
from offload.services.mount import MountOptions
from offload.services.undo import dump
from offload.services.watch import Event, EventKind, Watch
from targets import processes

pytestmark = pytest.mark.needs_root

MIB = 1 << 20
OFFLOAD = [sys.executable, "-m", "offload.cli"]

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "{min_free}"

[volumes.db]
provider = "copy"
path = "{pool}/db.raw"

[groups.shop]
volumes = ["db"]
atomic = "record"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofw-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def config(folder: Path, ext4_pool: Path) -> Path:
    (ext4_pool / "db.raw").write_bytes(os.urandom(4 * MIB))
    path = folder / "offload.toml"
    path.write_text(CONFIG.format(folder=folder, pool=ext4_pool, min_free="0%"))
    path.chmod(0o600)
    return path


@pytest.fixture
def ctx(config: Path) -> Iterator[Context]:
    with open_context(config) as made:
        yield made
        if made.catalog.views():
            mounts.unmount(made, [], all_views=True, force=True)


@pytest.fixture
def watch(config: Path, ctx: Context) -> Watch:
    return Watch(lambda: open_context(config))


def want_free(config: Path, size_bytes: int) -> None:
    """From now on so much is to stay free."""
    text = config.read_text()
    start, end = text.index("min_free"), text.index("\n", text.index("min_free"))
    config.write_text(f'{text[:start]}min_free = "{size_bytes // 1024}KiB"{text[end:]}')


def free(ctx: Context) -> int:
    states, _ = pools.inspect_all(ctx)
    return states["db"].pool_free_bytes


def kinds(events: list[Event]) -> list[EventKind]:
    return [event.event for event in events]


def kill_server(ctx: Context, view: View) -> None:
    (ref,) = processes.find_servers(ctx.instance.views_dir / view.id)
    os.kill(ref.pid, signal.SIGKILL)
    while ref.alive():
        pass


def marks(ctx: Context) -> set[str]:
    return {mark.id for mark in ctx.catalog.timemarks()}


def backup_of(mark: TimeMark) -> Backup:
    return Backup(
        id=BackupId("b1"), store="main", group="shop", created_at=mark.created_at,
        finished_at=mark.created_at, timemark=mark.id, consistency=mark.consistency,
        instant=mark.instant, images=(),
    )  # fmt: skip


# -- pools ------------------------------------------------------------------------------------


def test_round_where_all_is_well_says_nothing(watch: Watch, ctx: Context) -> None:
    director.create(ctx, "shop")
    assert watch.round() == []
    assert watch.alarms == []


def test_round_low_pool_loses_the_least_needed_timemarks_until_there_is_room(
    watch: Watch, ctx: Context, config: Path
) -> None:
    """In the documented order; no more than it takes."""
    user = director.create(ctx, "shop")
    parent = director.create(ctx, "shop", CreateOptions(purpose="backup"))
    ctx.catalog.add_backup(backup_of(parent))
    ctx.catalog.set_parent("main", "db", parent.id, BackupId("b1"))
    unneeded = director.create(ctx, "shop", CreateOptions(purpose="backup"))
    want_free(config, free(ctx) + 2 * MIB)
    events = watch.round()
    assert kinds(events) == [EventKind.RECLAIMED]
    assert unneeded.id in events[0].message
    assert marks(ctx) == {user.id, parent.id}
    assert watch.round() == []
    want_free(config, free(ctx) + 6 * MIB)
    assert kinds(watch.round()) == [EventKind.RECLAIMED] * 2
    assert marks(ctx) == set()


@contextmanager
def held(ctx: Context, mark: TimeMark) -> Iterator[None]:
    with hold_timemark(ctx.instance, mark.id):
        yield


@contextmanager
def shown(ctx: Context, mark: TimeMark) -> Iterator[None]:
    mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    yield
    mounts.unmount(ctx, [], all_views=True)


@contextmanager
def being_mounted(ctx: Context, mark: TimeMark) -> Iterator[None]:
    """A mount has made it, and has no view of it yet."""
    with ctx.journal.operation("mount", "shop") as op:
        op.intend("timemark", "delete-unused", {"ids": dump([mark.id])})
        yield


@pytest.mark.parametrize("used", [held, shown, being_mounted])
def test_round_low_pool_keeps_a_timemark_that_is_used(
    watch: Watch, ctx: Context, config: Path, used: Callable[..., AbstractContextManager[None]]
) -> None:
    mark = director.create(ctx, "shop", CreateOptions(purpose="user"))
    want_free(config, free(ctx) + 2 * MIB)
    with used(ctx, mark):
        assert kinds(watch.round()) == [EventKind.ALARM]
        assert watch.round() == []
        assert marks(ctx) == {mark.id}
    assert kinds(watch.round()) == [EventKind.RECLAIMED, EventKind.CLEARED]
    assert marks(ctx) == set()


def test_round_low_pool_keeps_a_protected_timemark(
    watch: Watch, ctx: Context, config: Path
) -> None:
    mark = director.create(ctx, "shop", CreateOptions(keep=True))
    want_free(config, free(ctx) + 2 * MIB)
    assert kinds(watch.round()) == [EventKind.ALARM]
    assert marks(ctx) == {mark.id}


def test_round_low_pool_without_reclaim_is_an_alarm_only(
    watch: Watch, ctx: Context, config: Path
) -> None:
    mark = director.create(ctx, "shop")
    want_free(config, free(ctx) + 2 * MIB)
    config.write_text(config.read_text().replace("[pool]", "[pool]\nreclaim = false"))
    assert kinds(watch.round()) == [EventKind.ALARM]
    assert marks(ctx) == {mark.id}


def test_round_alarm_is_told_once_and_again_when_it_is_over(
    watch: Watch, ctx: Context, config: Path, ext4_pool: Path
) -> None:
    want_free(config, free(ctx) - MIB)
    assert watch.round() == []
    (ext4_pool / "other").write_bytes(bytes(2 * MIB))
    (alarm,) = watch.round()
    assert alarm.event is EventKind.ALARM
    assert "under its watermark" in alarm.message
    (ext4_pool / "more").write_bytes(bytes(MIB))  # other numbers, the same state
    assert watch.round() == []
    for name in ("other", "more"):
        (ext4_pool / name).unlink()
    (cleared,) = watch.round()
    assert cleared.event is EventKind.CLEARED
    assert cleared.message.startswith(f"pool {ext4_pool} has ")
    assert watch.alarms == []


# -- what fails -------------------------------------------------------------------------------


def test_round_storage_that_is_away_is_an_alarm_and_not_the_end(
    watch: Watch, ctx: Context, ext4_pool: Path
) -> None:
    (view,) = mounts.mount(ctx, ["shop"])
    volume = ext4_pool / "db.raw"
    volume.rename(ext4_pool / "elsewhere")
    kill_server(ctx, view)
    events = watch.round()
    assert kinds(events) == [EventKind.ALARM, EventKind.REMOUNTED]
    assert events[0].message.startswith("volume db: ")
    (ext4_pool / "elsewhere").rename(volume)
    assert kinds(watch.round()) == [EventKind.CLEARED]


def test_round_configuration_that_breaks_is_an_alarm_and_clears_no_other(
    watch: Watch, ctx: Context, config: Path
) -> None:
    want_free(config, free(ctx) + 2 * MIB)
    assert kinds(watch.round()) == [EventKind.ALARM]
    good = config.read_text()
    config.write_text("volumes = 3")
    (event,) = watch.round()
    assert event.event is EventKind.ALARM
    assert "offload.toml" in event.message
    assert len(watch.alarms) == 2
    config.write_text(good)
    assert kinds(watch.round()) == [EventKind.CLEARED]
    assert len(watch.alarms) == 1


# -- views ------------------------------------------------------------------------------------


def test_round_dead_view_is_served_again_at_its_address(watch: Watch, ctx: Context) -> None:
    (view,) = mounts.mount(ctx, ["shop"])
    kill_server(ctx, view)
    (event,) = watch.round()
    assert (event.event, event.message) == (
        EventKind.REMOUNTED, f"view {view.name} is served again at {view.uri}"
    )  # fmt: skip
    assert [status.alive for status in mounts.views(ctx)] == [True]
    assert watch.round() == []


def test_round_view_that_cannot_be_served_is_an_alarm(
    watch: Watch, ctx: Context, ext4_pool: Path
) -> None:
    (view,) = mounts.mount(ctx, ["shop"])
    kill_server(ctx, view)
    shutil.rmtree(ext4_pool / ".offload")
    (event,) = watch.round()
    assert event.event is EventKind.ALARM
    assert event.message.startswith(f"view {view.name} cannot be served again: the snapshot")
    assert watch.round() == []


@pytest.mark.parametrize("how", ["claimed", "closing", "journalled"])
def test_round_dead_view_that_another_process_works_on_is_left_to_it(
    watch: Watch, ctx: Context, how: str
) -> None:
    (view,) = mounts.mount(ctx, ["shop"])
    if how == "closing":
        ctx.catalog.update_view(replace(view, state=ViewState.CLOSING))
    kill_server(ctx, view)
    if how == "closing":
        assert watch.round() == []
    elif how == "claimed":
        with claim_view(ctx.instance, view.id, wait=True):
            assert watch.round() == []
    else:
        with ctx.journal.operation("unmount", view.name) as op:
            op.intend("server-1", "stop-server", {"id": view.id, "target": "nbd", "run_dir": "/x"})
            assert watch.round() == []
    assert mounts.views(ctx)[0].alive is False


def test_unmount_waits_while_a_view_is_served_again(ctx: Context, config: Path) -> None:
    """And then takes away the server that there is now."""
    (view,) = mounts.mount(ctx, ["shop"])
    with claim_view(ctx.instance, view.id, wait=True):
        process = subprocess.Popen([*OFFLOAD, "--config", str(config), "unmount", view.name])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        kill_server(ctx, view)
        again = mounts._serve_if_dead(ctx, view.id)
        assert again is not None
    assert process.wait(timeout=60) == 0
    assert ctx.catalog.views() == []
    assert processes.find_servers(ctx.instance.views_dir / view.id) == []


def test_round_overlay_that_is_gone_is_an_alarm(watch: Watch, ctx: Context) -> None:
    mounts.mount(ctx, ["shop"], MountOptions(writable=True))
    assert watch.round() == []
    for path in ctx.instance.overlays_dir.iterdir():
        path.unlink()
    (event,) = watch.round()
    assert (event.event, "overlay" in event.message) == (EventKind.ALARM, True)


def test_round_takes_back_what_a_dead_process_left(
    watch: Watch, ctx: Context, config: Path
) -> None:
    command = [*OFFLOAD, "--config", str(config), "timemark", "create", "shop"]
    env = {**os.environ, CRASH_ENV: "timemark.snapshot.copy"}
    assert subprocess.run(command, env=env, check=False).returncode == -signal.SIGKILL
    (event,) = watch.round()
    assert event.event is EventKind.RECOVERED
    assert "timemark shop" in event.message
    assert ctx.journal.leftovers() == []


# -- the command ------------------------------------------------------------------------------


def run_watch(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*OFFLOAD, "--config", str(config), "watch", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_once_where_all_is_well_is_silent_and_ends_with_0(config: Path, ctx: Context) -> None:
    done = run_watch(config, "--once")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_once_with_an_alarm_ends_with_9(config: Path, ctx: Context) -> None:
    want_free(config, free(ctx) + 2 * MIB)
    done = run_watch(config, "--once")
    assert done.returncode == 9
    assert done.stdout.startswith("alarm: pool ")
    assert done.stderr.startswith("offload: error: there is 1 alarm\n")
    done = run_watch(config, "--once", "--json")
    event = json.loads(done.stdout)
    assert (event["event"], set(event)) == ("alarm", {"at", "event", "message"})
    assert json.loads(done.stderr)["code"] == "alarms"


def test_watch_without_a_configuration_ends_at_once(folder: Path) -> None:
    assert run_watch(folder / "none.toml").returncode == 3


def test_watch_interval_of_nothing_is_refused(config: Path) -> None:
    done = run_watch(config, "--interval", "0.5s")
    assert done.returncode == 2
    assert "at least 1.00 s" in done.stderr


def test_watch_tells_changes_as_they_come_and_ends_with_0_at_sigterm(
    config: Path, ctx: Context
) -> None:
    """Each one once, however many rounds there are."""
    (view,) = mounts.mount(ctx, ["shop"])
    command = [*OFFLOAD, "--config", str(config), "watch", "--interval", "1s", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        want_free(config, free(ctx) + 2 * MIB)
        alarm = json.loads(process.stdout.readline())
        assert (alarm["event"], alarm["message"].split()[0]) == ("alarm", "pool")
        kill_server(ctx, view)
        assert json.loads(process.stdout.readline())["event"] == "remounted"
        want_free(config, 0)
        assert json.loads(process.stdout.readline())["event"] == "cleared"
        process.terminate()
        rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert [status.alive for status in mounts.views(ctx)] == [True]
