"""mount, unmount, views, remount: on real servers, with a real catalog and journal."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import procs
from offload.errors import (
    BusyError,
    NotFoundError,
    OffloadError,
    UnavailableError,
    UsageError,
)
from offload.holds import claim_timemark
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.model import Exposure, TimeMark, View, ViewState
from offload.services import director, timemark
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.testing.warm import warm_python
from targets import processes

MIB = 1 << 20

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[volumes.db]
provider = "copy"
path = "{folder}/db.raw"

[volumes.web]
provider = "copy"
path = "{folder}/web.raw"
sector_size = 4096

[groups.shop]
volumes = ["db", "web"]
atomic = "record"
"""

# What the crash tests run in a process of their own, which is killed at a step.
SCRIPT = """
import sys
from pathlib import Path
from offload.services import mount
from offload.services.context import open_context
with open_context(Path(sys.argv[1])) as ctx:
    match sys.argv[2:]:
        case ["mount", *origins]:
            mount.mount(ctx, origins)
        case ["unmount"]:
            mount.unmount(ctx, [], all_views=True)
        case ["remount"]:
            mount.remount(ctx)
        case ["recover"]:
            ctx.journal.recover()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofm-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def config(folder: Path) -> Path:
    for name in ("db", "web"):
        with (folder / f"{name}.raw").open("xb") as out:
            out.truncate(2 * MIB)
            out.write(name.encode() * 100)
    path = folder / "offload.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


@pytest.fixture
def ctx(config: Path) -> Iterator[Context]:
    with open_context(config) as made:
        yield made
        servers = [r for d in _run_dirs(made) for r in processes.find_servers(d)]
        for ref in servers:
            ref.end()


@pytest.fixture
def mark(ctx: Context) -> TimeMark:
    return director.create(ctx, "shop")


def _run_dirs(ctx: Context) -> list[Path]:
    return sorted(ctx.instance.views_dir.glob("*"))


def assert_nothing_is_left(ctx: Context, marks: int = 0) -> None:
    """No process, socket, folder, row, journal entry or fresh TimeMark."""
    assert _nbdkits(ctx) == []
    assert _run_dirs(ctx) == []
    assert ctx.catalog.views() == []
    assert len(ctx.catalog.timemarks()) == marks
    assert len(_snapshot_files(ctx)) == 2 * marks
    assert list(ctx.instance.journal_dir.glob("*")) == []


def _nbdkits(ctx: Context) -> list[int]:
    """Live servers of this instance, whatever their folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"nbdkit\0" in argv and bytes(ctx.instance.runtime_dir) in argv:
                found.append(int(entry.name))
    return found


def _snapshot_files(ctx: Context) -> list[Path]:
    base = ctx.instance.config.volumes["db"].place.parent / ".offload"
    return [path for path in base.rglob("*") if path.is_file()]


def read(view: View, count: int, offset: int = 0) -> bytes:
    handle: Any = nbd.NBD()
    handle.connect_uri(view.uri)
    try:
        return bytes(handle.pread(4096, offset))[:count]
    finally:
        handle.shutdown()


# -- mount ------------------------------------------------------------------------------------


def test_mount_one_volume_of_a_timemark_shows_it_as_it_was(ctx: Context, mark: TimeMark) -> None:
    ctx.instance.config.volumes["db"].place.write_bytes(b"changed since")
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id[:6]}/db"])
    assert read(view, 200) == b"db" * 100
    assert view.origin == f"timemark:{mark.id}/db"
    assert view.name == f"shop-db-{mark.id[:4]}"
    assert ctx.catalog.view(view.name) == view
    mounts.unmount(ctx, [view.name])
    assert_nothing_is_left(ctx, marks=1)


def test_mount_timemark_without_volume_shows_all_with_their_sector_sizes(
    ctx: Context, mark: TimeMark
) -> None:
    found = mounts.mount(ctx, [f"timemark:{mark.id}"])
    assert [(v.origin, v.sector_size) for v in found] == [
        (f"timemark:{mark.id}/db", 512),
        (f"timemark:{mark.id}/web", 4096),
    ]
    assert read(found[1], 4096)[:6] == b"webweb"


def test_mount_same_origin_twice_gives_two_names(ctx: Context, mark: TimeMark) -> None:
    origin = f"timemark:{mark.id}/db"
    names = [v.name for v in mounts.mount(ctx, [origin, origin])]
    names += [v.name for v in mounts.mount(ctx, [origin])]
    base = f"shop-db-{mark.id[:4]}"
    assert names == [base, f"{base}-2", f"{base}-3"]


def test_mount_group_takes_a_timemark_that_goes_with_its_last_view(ctx: Context) -> None:
    db, web = mounts.mount(ctx, ["shop"])
    (made,) = ctx.catalog.timemarks()
    assert made.purpose == "mount"
    mounts.unmount(ctx, [db.name])
    assert ctx.catalog.timemarks() == [made]
    mounts.unmount(ctx, [web.id[:6]])
    assert_nothing_is_left(ctx)


def test_mount_writable_is_disposable(ctx: Context, mark: TimeMark) -> None:
    origin = f"timemark:{mark.id}/db"
    (view,) = mounts.mount(ctx, [origin], MountOptions(name="scratch", writable=True))
    handle: Any = nbd.NBD()
    handle.connect_uri(view.uri)
    handle.pwrite(b"w" * 512, 0)
    handle.shutdown()
    assert read(view, 512) == b"w" * 512
    mounts.unmount(ctx, ["scratch"])
    (again,) = mounts.mount(ctx, [origin])
    assert read(again, 200) == b"db" * 100


def test_mount_tcp_port_is_kept_in_the_uri(ctx: Context, mark: TimeMark) -> None:
    (view,) = mounts.mount(
        ctx, [f"timemark:{mark.id}/db"], MountOptions(exposure=Exposure(transport="tcp"))
    )
    assert view.uri.startswith("nbd://127.0.0.1:")
    assert read(view, 2) == b"db"


@pytest.mark.parametrize(
    ("origins", "options", "error"),
    [
        ([], MountOptions(), (UsageError, "bad-origin")),
        (["tape:x"], MountOptions(), (UsageError, "bad-origin")),
        (["nobody"], MountOptions(), (NotFoundError, "unknown-group")),
        (["timemark:zzz"], MountOptions(), (NotFoundError, "unknown-timemark")),
        (["backup:zzz"], MountOptions(), (NotFoundError, "unknown-backup")),
        (["timemark:{id}/nope"], MountOptions(), (NotFoundError, "unknown-volume")),
        (["timemark:{id}"], MountOptions(name="x"), (UsageError, "name-for-several")),
        (["shop"], MountOptions(name="x"), (UsageError, "name-for-several")),
        (
            ["shop"],
            MountOptions(exposure=Exposure(transport="tcp", port=20000)),
            (UsageError, "port-for-several"),
        ),
        (["timemark:{id}/db"], MountOptions(name="No"), (UsageError, "bad-name")),
        (["timemark:{id}/db"], MountOptions(name="taken"), (BusyError, "name-taken")),
        (["shop"], MountOptions(exposure=Exposure(transport="fax")), (UsageError, "bad-transport")),
        (
            ["timemark:{id}/db"],
            MountOptions(exposure=Exposure(port=20000)),
            (UsageError, "bad-port"),
        ),
        (
            ["shop"],
            MountOptions(exposure=Exposure(transport="tcp", address="192.0.2.1")),
            (UsageError, "not-loopback"),
        ),
    ],
)
def test_mount_bad_request_is_refused_and_changes_nothing(
    ctx: Context,
    mark: TimeMark,
    origins: list[str],
    options: MountOptions,
    error: tuple[type[OffloadError], str],
) -> None:
    family, code = error
    mounts.mount(ctx, [f"timemark:{mark.id}/web"], MountOptions(name="taken"))
    with pytest.raises(family) as caught:
        mounts.mount(ctx, [text.format(id=mark.id) for text in origins], options)
    assert caught.value.code == code
    assert caught.value.hint
    assert [view.name for view in ctx.catalog.views()] == ["taken"]
    assert len(_nbdkits(ctx)) == 1
    assert ctx.catalog.timemarks() == [mark]


def test_mount_second_view_fails_first_goes_too(ctx: Context, mark: TimeMark) -> None:
    (wanted,) = [p for p in _snapshot_files(ctx) if p.name.startswith("web")]
    with wanted.open("ab") as out:
        out.write(b"grown")
    with pytest.raises(OffloadError) as caught:
        mounts.mount(ctx, [f"timemark:{mark.id}"])
    assert caught.value.code == "size-mismatch"
    assert_nothing_is_left(ctx, marks=1)


def test_mount_fails_fresh_timemark_goes_too(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UnavailableError("no server today", code="server-failed")

    monkeypatch.setattr("targets.nbd._start", broken)
    with pytest.raises(UnavailableError, match="no server today"):
        mounts.mount(ctx, ["shop"])
    assert_nothing_is_left(ctx)


def test_mount_timemark_whose_snapshot_is_gone_says_so(ctx: Context, mark: TimeMark) -> None:
    for path in _snapshot_files(ctx):
        path.unlink()
    with pytest.raises(NotFoundError) as caught:
        mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    assert caught.value.code == "snapshot-missing"


def test_mount_timemark_being_deleted_is_refused(ctx: Context, mark: TimeMark) -> None:
    with claim_timemark(ctx.instance, mark.id), pytest.raises(BusyError) as caught:
        mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    assert caught.value.code == "timemark-going"
    assert_nothing_is_left(ctx, marks=1)


def test_timemark_with_a_view_cannot_be_deleted(ctx: Context, mark: TimeMark) -> None:
    mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    with pytest.raises(BusyError):
        timemark.delete(ctx, mark.id)


# -- unmount ----------------------------------------------------------------------------------


def test_unmount_with_a_client_is_refused_for_all_unless_forced(
    ctx: Context, mark: TimeMark
) -> None:
    db, web = mounts.mount(ctx, [f"timemark:{mark.id}"])
    handle: Any = nbd.NBD()
    handle.connect_uri(web.uri)
    with pytest.raises(BusyError) as caught:
        mounts.unmount(ctx, [db.name, web.name])
    assert caught.value.code == "view-busy"
    assert web.name in caught.value.message
    assert "1 client" in caught.value.message
    assert [s.alive for s in mounts.views(ctx)] == [True, True]
    assert {v.id for v in mounts.unmount(ctx, [db.name, web.name], force=True)} == {db.id, web.id}
    assert_nothing_is_left(ctx, marks=1)


def test_unmount_all_takes_every_view(ctx: Context, mark: TimeMark) -> None:
    mounts.mount(ctx, [f"timemark:{mark.id}", "shop"])
    assert len(mounts.unmount(ctx, [], all_views=True)) == 4
    assert_nothing_is_left(ctx, marks=1)
    assert mounts.unmount(ctx, [], all_views=True) == []


def test_unmount_unknown_name_among_known_changes_nothing(ctx: Context, mark: TimeMark) -> None:
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    with pytest.raises(NotFoundError):
        mounts.unmount(ctx, [view.name, "nobody"])
    assert mounts.views(ctx)[0].alive


@pytest.mark.parametrize(("names", "all_views"), [([], False), (["x"], True)])
def test_unmount_names_and_all_exclude_each_other(
    ctx: Context, names: list[str], all_views: bool
) -> None:
    with pytest.raises(UsageError):
        mounts.unmount(ctx, names, all_views=all_views)


def test_unmount_of_a_killed_server_cleans_up(ctx: Context, mark: TimeMark) -> None:
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    _kill(view)
    assert [s.alive for s in mounts.views(ctx)] == [False]
    mounts.unmount(ctx, [view.name])
    assert_nothing_is_left(ctx, marks=1)


# -- views and remount ------------------------------------------------------------------------


def test_views_show_who_is_connected(ctx: Context, mark: TimeMark) -> None:
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    (status,) = mounts.views(ctx)
    assert (status.view, status.alive, status.clients) == (view, True, ())
    handle: Any = nbd.NBD()
    handle.connect_uri(view.uri)
    (status,) = mounts.views(ctx)
    assert len(status.clients) == 1


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("reboot", [False, True])
def test_remount_serves_killed_views_again_at_their_address(
    ctx: Context, mark: TimeMark, transport: str, reboot: bool
) -> None:
    options = MountOptions(exposure=Exposure(transport=transport), writable=True)
    lost, kept = mounts.mount(ctx, [f"timemark:{mark.id}"], options)
    _kill(lost)
    if reboot:
        shutil.rmtree(ctx.instance.views_dir / lost.id)
        ctx.catalog.update_view(replace(lost, server={**lost.server, "boot": "another"}))
    done = mounts.remount(ctx)
    (again,) = done.views
    assert (again.id, again.uri) == (lost.id, lost.uri)
    assert read(again, 200) == b"db" * 100
    assert [s.alive for s in mounts.views(ctx)] == [True, True]
    assert ctx.catalog.view(kept.id) == kept
    assert mounts.remount(ctx) == mounts.Remounted()
    mounts.unmount(ctx, [], all_views=True)
    assert_nothing_is_left(ctx, marks=1)


def test_remount_one_that_cannot_be_served_keeps_its_row_and_is_told(
    ctx: Context, mark: TimeMark
) -> None:
    bad, good = mounts.mount(ctx, [f"timemark:{mark.id}"])
    _kill(bad)
    _kill(good)
    for path in _snapshot_files(ctx):
        if path.name.startswith("db"):
            path.unlink()
    done = mounts.remount(ctx)
    assert [v.id for v in done.views] == [good.id]
    assert bad.name in done.warnings[0]
    assert [s.alive for s in mounts.views(ctx)] == [False, True]
    assert list(ctx.instance.journal_dir.glob("*")) == []


def test_remount_leaves_a_closing_view_alone(ctx: Context, mark: TimeMark) -> None:
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    _kill(view)
    ctx.catalog.update_view(replace(view, state=ViewState.CLOSING))
    assert mounts.remount(ctx) == mounts.Remounted()
    assert _nbdkits(ctx) == []


# -- kill -9 at every step --------------------------------------------------------------------


def _run(config: Path, *words: str, **env: str) -> int:
    return warm_python().run("-c", SCRIPT, str(config), *words, env=env).status


def _steps(config: Path, folder: Path, *words: str) -> list[str]:
    trace = folder / "trace"
    trace.unlink(missing_ok=True)
    assert _run(config, *words, **{TRACE_ENV: str(trace)}) == 0
    return list(dict.fromkeys(trace.read_text().split()))


def test_mount_killed_at_each_step_recovers_to_nothing(
    ctx: Context, config: Path, folder: Path
) -> None:
    steps = _steps(config, folder, "mount", "shop")
    assert {"mount.timemark.intended", "mount.server-2.intended", "mount.row-2.done"} <= set(steps)
    mounts.unmount(ctx, [], all_views=True)
    for name in steps:
        assert _run(config, "mount", "shop", **{CRASH_ENV: name}) == -signal.SIGKILL, name
        ctx.journal.recover()
        if name == "mount.commit.after":
            assert all(s.alive for s in mounts.views(ctx))
            mounts.unmount(ctx, [], all_views=True)
        elif name == "timemark.commit.after":
            assert ctx.catalog.views() == [], name
        assert_nothing_is_left(ctx)


def test_unmount_killed_at_each_step_recovers_to_nothing(
    ctx: Context, config: Path, folder: Path
) -> None:
    mounts.mount(ctx, ["shop"])
    steps = _steps(config, folder, "unmount")
    assert {"unmount.server-2.intended", "unmount.closing-2.done", "unmount.row-2.done"} <= set(
        steps
    )
    early = {"unmount.begin", "unmount.timemark-1.intended", "unmount.server-1.intended"}
    for name in steps:
        mounts.mount(ctx, ["shop"])
        assert _run(config, "unmount", **{CRASH_ENV: name}) == -signal.SIGKILL, name
        ctx.journal.recover()
        if ctx.catalog.views():  # it died before it had promised anything
            assert name in early, name
            assert all(s.alive for s in mounts.views(ctx))
            mounts.unmount(ctx, [], all_views=True)
        assert_nothing_is_left(ctx)


def test_remount_killed_at_each_step_is_served_by_the_next(
    ctx: Context, mark: TimeMark, config: Path, folder: Path
) -> None:
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    _kill(view)
    steps = _steps(config, folder, "remount")
    assert {"remount.server.intended", "remount.server.done", "remount.row.done"} <= set(steps)
    for name in steps:
        _kill(ctx.catalog.view(view.id))
        assert _run(config, "remount", **{CRASH_ENV: name}) == -signal.SIGKILL, name
        ctx.journal.recover()
        mounts.remount(ctx)
        assert read(ctx.catalog.view(view.id), 2) == b"db"
        assert len(_nbdkits(ctx)) == 1, name


def test_recovery_killed_at_each_step_is_finished_by_the_next(
    ctx: Context, config: Path, folder: Path
) -> None:
    crash = {CRASH_ENV: "mount.commit.before"}
    assert _run(config, "mount", "shop", **crash) == -signal.SIGKILL
    steps = _steps(config, folder, "recover")
    assert {"undo.withdraw-view", "undo.delete-unused"} <= set(steps)
    for name in steps:
        assert _run(config, "mount", "shop", **crash) == -signal.SIGKILL
        assert _run(config, "recover", **{CRASH_ENV: name}) == -signal.SIGKILL
        ctx.journal.recover()
        assert_nothing_is_left(ctx)


def test_recovery_leaves_a_running_mount_alone(ctx: Context, mark: TimeMark) -> None:
    with ctx.journal.operation("mount", "slow") as op:
        (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"])
        op.intend(
            "server",
            "withdraw-view",
            {"id": view.id, "target": "nbd", "run_dir": str(ctx.instance.views_dir / view.id)},
        )
        ctx.journal.recover()
        assert mounts.views(ctx)[0].alive


def _kill(view: View) -> None:
    ref = procs.ProcessRef.from_strings(dict(view.server))
    assert ref is not None
    os.kill(ref.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while ref.alive():
        assert time.monotonic() < until
        time.sleep(0.005)
