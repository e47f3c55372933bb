"""mount, unmount, remount and recovery of views over iSCSI: on real tgtds, catalog and journal."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from offload import procs
from offload.errors import BusyError, UnavailableError
from offload.journal import CRASH_ENV, TRACE_ENV
from offload.model import TimeMark, View
from offload.services import director
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.testing.instances import free_port
from offload.testing.libiscsi import Initiator
from offload.testing.warm import warm_python
from targets import tgt_mgmt
from targets.tgt_server import PortalServer

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
TGT = MountOptions(target="tgt")

CONFIG = """
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"

[pool]
min_free = "0%"

[iscsi]
port = {port}

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

# What the crash tests run in a process of their own. The third argument names where inside the
# target it kills itself: `MODULE:CLASS.METHOD` before the method, with a `+` after it.
SCRIPT = """
import importlib, os, signal, sys
from pathlib import Path
from offload.services import mount
from offload.services.context import open_context
from offload.services.mount import MountOptions

def fatal(place):
    module, _, name = place.rstrip("+").partition(":")
    owner, method = name.split(".")
    owner = getattr(importlib.import_module(module), owner)
    real = getattr(owner, method)
    def dies(*args, **kwargs):
        if place.endswith("+"):
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, method, dies)

config, command, place = sys.argv[1:]
if place:
    fatal(place)
with open_context(Path(config)) as ctx:
    match command:
        case "mount":
            mount.mount(ctx, ["shop"], MountOptions(target="tgt", writable=True))
        case "unmount":
            mount.unmount(ctx, [], all_views=True)
        case "remount":
            mount.remount(ctx)
        case "recover":
            ctx.journal.recover()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofj-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def config(folder: Path) -> Path:
    for name in ("db", "web"):
        with (folder / f"{name}.raw").open("xb") as out:
            out.truncate(2 * MIB)
            out.write(name.encode() * 100)
    path = folder / "offload.toml"
    path.write_text(CONFIG.format(folder=folder, port=free_port()))
    return path


@pytest.fixture
def ctx(config: Path) -> Iterator[Context]:
    with open_context(config) as made:
        yield made
        mounts.unmount(made, [], all_views=True, force=True)
        left = _server(made).find()
        for ref in left:
            ref.end(0)
        assert left == []


@pytest.fixture
def mark(ctx: Context) -> TimeMark:
    return director.create(ctx, "shop")


def _server(ctx: Context) -> PortalServer:
    return PortalServer.of(ctx.instance.servers_dir, "127.0.0.1", ctx.instance.config.iscsi.port)


def _read(view: View, count: int = 4096) -> bytes:
    with Initiator(view.uri) as disk:
        assert disk.block_size == view.sector_size
        return disk.pread(count, 0)


def _kill_server(ctx: Context) -> None:
    refs = _server(ctx).find()
    for ref in refs:
        os.kill(ref.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while any(ref.alive() for ref in refs):
        assert time.monotonic() < until
        time.sleep(0.005)


def _assert_nothing_is_left(ctx: Context) -> None:
    assert _server(ctx).find() == []
    assert not _server(ctx).folder.exists()
    assert list(ctx.instance.views_dir.glob("*")) == []
    assert list(ctx.instance.overlays_dir.glob("*")) == []
    assert ctx.catalog.views() == []
    assert ctx.catalog.timemarks() == []
    assert list(ctx.instance.journal_dir.glob("*")) == []
    own = os.fsencode(ctx.instance.runtime_dir)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                assert own not in (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue


def test_mount_group_serves_all_its_volumes_from_one_portal(ctx: Context) -> None:
    db, web = mounts.mount(ctx, ["shop"], TGT)
    assert _read(db)[:200] == b"db" * 100
    assert _read(web)[:300] == b"web" * 100
    assert db.server["pid"] == web.server["pid"]
    assert [s.alive for s in mounts.views(ctx)] == [True, True]
    mounts.unmount(ctx, [db.name])
    assert _read(web)[:300] == b"web" * 100
    mounts.unmount(ctx, [web.name])
    _assert_nothing_is_left(ctx)


def test_unmount_with_an_initiator_logged_in_is_refused_unless_forced(
    ctx: Context, mark: TimeMark
) -> None:
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"], TGT)
    disk = Initiator(view.uri)
    (status,) = mounts.views(ctx)
    assert [client.name for client in status.clients] != [""]
    with pytest.raises(BusyError) as busy:
        mounts.unmount(ctx, [view.name])
    assert busy.value.code == "view-busy"
    assert "127.0.0.1" in busy.value.message
    mounts.unmount(ctx, [view.name], force=True)
    disk.vanish()
    assert mounts.views(ctx) == []


def test_remount_after_kill_brings_all_views_back_to_one_new_server(
    ctx: Context, mark: TimeMark
) -> None:
    before = mounts.mount(ctx, [f"timemark:{mark.id}"], replace(TGT, writable=True))
    with Initiator(before[0].uri) as disk:
        disk.pwrite(b"w" * 512, 0)
        serial = disk.inquiry(0x83)
    _kill_server(ctx)
    assert [s.alive for s in mounts.views(ctx)] == [False, False]
    done = mounts.remount(ctx)
    assert [view.uri for view in done.views] == [view.uri for view in before]
    assert len({view.server["pid"] for view in done.views}) == 1
    assert [s.alive for s in mounts.views(ctx)] == [True, True]
    with Initiator(before[0].uri) as disk:
        assert disk.pread(512, 0) == b"w" * 512
        assert disk.inquiry(0x83) == serial
    assert _read(done.views[1])[:300] == b"web" * 100
    assert mounts.remount(ctx) == mounts.Remounted()


def test_remount_after_reboot_brings_the_views_back(ctx: Context, mark: TimeMark) -> None:
    before = mounts.mount(ctx, [f"timemark:{mark.id}"], TGT)
    _kill_server(ctx)
    shutil.rmtree(ctx.instance.views_dir)
    shutil.rmtree(ctx.instance.servers_dir)
    for view in before:
        ctx.catalog.update_view(replace(view, server={**view.server, "boot": "another"}))
    assert [view.uri for view in mounts.remount(ctx).views] == [view.uri for view in before]
    assert [s.alive for s in mounts.views(ctx)] == [True, True]


def test_server_that_hangs_is_ended_by_a_forced_unmount_and_remount_serves_the_rest(
    ctx: Context, mark: TimeMark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tgt_mgmt, "_ANSWER_S", 0.5)
    db, web = mounts.mount(ctx, [f"timemark:{mark.id}"], TGT)
    os.kill(int(db.server["pid"]), signal.SIGSTOP)
    assert [s.alive for s in mounts.views(ctx)] == [False, False]
    with pytest.raises(UnavailableError) as silent:
        mounts.unmount(ctx, [db.name])
    assert silent.value.code == "server-silent"
    mounts.unmount(ctx, [db.name], force=True)
    assert [view.id for view in mounts.remount(ctx).views] == [web.id]
    assert _read(ctx.catalog.view(web.id))[:300] == b"web" * 100


# -- kill -9 ----------------------------------------------------------------------------------


def _run(config: Path, command: str, place: str = "", **env: str) -> int:
    return warm_python().run("-c", SCRIPT, str(config), command, place, env=env).status


def _steps(config: Path, folder: Path, command: str) -> list[str]:
    trace = folder / "trace"
    trace.unlink(missing_ok=True)
    assert _run(config, command, **{TRACE_ENV: str(trace)}) == 0
    return list(dict.fromkeys(trace.read_text().split()))


@pytest.mark.slow
def test_mount_and_unmount_killed_at_each_step_recover_to_nothing(
    ctx: Context, config: Path, folder: Path
) -> None:
    for command in ("mount", "unmount"):  # what the first leaves mounted, the second takes away
        steps = [step for step in _steps(config, folder, command) if f"{command}.server" in step]
        assert f"{command}.server-2.intended" in steps
        mounts.unmount(ctx, [], all_views=True)
        for name in steps:
            if command == "unmount":
                mounts.mount(ctx, ["shop"], replace(TGT, writable=True))
            assert _run(config, command, **{CRASH_ENV: name}) == -signal.SIGKILL, name
            ctx.journal.recover()
            if ctx.catalog.views():  # it died before it had promised anything
                assert name == "unmount.server-1.intended"
                assert all(s.alive for s in mounts.views(ctx))
                mounts.unmount(ctx, [], all_views=True)
            _assert_nothing_is_left(ctx)
        mounts.mount(ctx, ["shop"], replace(TGT, writable=True))


@pytest.mark.parametrize(
    "place",
    [
        "targets.tgt_server:PortalServer.start",
        "targets.tgt_server:PortalServer._wait_ready",
        "targets.tgt_server:PortalServer.start+",
        "targets.tgt_mgmt:Management.new_target+",
        "targets.tgt_mgmt:Management.new_unit+",
        "targets.tgt_mgmt:Management.allow_everybody+",
    ],
)
def test_mount_killed_inside_the_target_recovers_to_nothing(
    ctx: Context, config: Path, place: str
) -> None:
    assert _run(config, "mount", place) == -signal.SIGKILL
    ctx.journal.recover()
    _assert_nothing_is_left(ctx)


@pytest.mark.parametrize(
    "place",
    [
        "targets.tgt_mgmt:Management.close_target+",
        "targets.tgt_mgmt:Management.delete_target+",
        "targets.tgt_mgmt:Management.shut_down",
        "targets.tgt_mgmt:Management.shut_down+",
    ],
)
def test_unmount_killed_inside_the_target_is_finished_by_recovery(
    ctx: Context, config: Path, place: str
) -> None:
    mounts.mount(ctx, ["shop"], TGT)
    assert _run(config, "unmount", place) == -signal.SIGKILL
    ctx.journal.recover()
    mounts.unmount(ctx, [], all_views=True)
    _assert_nothing_is_left(ctx)


def test_remount_killed_inside_the_target_is_finished_by_the_next(
    ctx: Context, config: Path, mark: TimeMark
) -> None:
    before = mounts.mount(ctx, [f"timemark:{mark.id}"], TGT)
    for place in ("PortalServer.start+", "PortalServer.start"):
        _kill_server(ctx)
        assert _run(config, "remount", f"targets.tgt_server:{place}") == -signal.SIGKILL
        ctx.journal.recover()
        mounts.remount(ctx)
        assert [s.alive for s in mounts.views(ctx)] == [True, True]
        assert [_read(view)[:2] for view in before] == [b"db", b"we"]
        assert len(_server(ctx).find()) == 1


def test_views_mounted_by_threads_at_once_share_the_server(config: Path, ctx: Context) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with open_context(config) as mine:
                for _ in range(3):
                    found = mounts.mount(mine, ["shop"], TGT)
                    assert all(_read(view)[:2] in {b"db", b"we"} for view in found)
                    mounts.unmount(mine, [view.id for view in found])
        except BaseException as error:  # noqa: BLE001 - the thread's end is the test's
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []
    assert procs.find_running("tgtd", str(_server(ctx).folder / "tgtd.pid")) == []
