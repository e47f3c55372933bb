"""What is written to views: what survives, what the limit does, and when it goes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import overlay, procs, run
from offload.cli.main import run as cli
from offload.errors import BusyError, OffloadError, PolicyError, UnavailableError, UsageError
from offload.model import TimeMark, View, ViewState
from offload.services import director, overlays, recover, status, store_init
from offload.services import mount as mounts
from offload.services.backup import backup
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.services.undo import run_undo
from offload.target import Overlay

MIB = 1 << 20
SIZE = 8 * MIB
WRITABLE = MountOptions(writable=True)

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

[stores.main]
kind = "disk"
path = "{folder}/store"
min_free = "0%"

[overlays]
{overlays}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofo-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def config(folder: Path) -> Path:
    for name in ("db", "web"):
        with (folder / f"{name}.raw").open("xb") as out:
            out.truncate(SIZE)
            out.write(os.urandom(MIB))
    path = folder / "offload.toml"
    path.write_text(CONFIG.format(folder=folder, overlays=""))
    return path


@pytest.fixture
def ctx(config: Path, folder: Path) -> Iterator[Context]:
    with open_context(config) as made:
        yield made
        mounts.unmount(made, [], all_views=True, force=True)
        left = _processes(folder)
    for ref in left:
        ref.end()
    assert left == []


@pytest.fixture
def mark(ctx: Context) -> TimeMark:
    return director.create(ctx, "shop")


@pytest.fixture
def view(ctx: Context, mark: TimeMark) -> View:
    """A writable view of 512-byte sectors."""
    return mounts.mount(ctx, [f"timemark:{mark.id}/db"], WRITABLE)[0]


class Client:
    """One connection to a view."""

    def __init__(self, view: View) -> None:
        self.nbd: Any = nbd.NBD()
        self.nbd.connect_uri(view.uri)

    def read(self, count: int, offset: int = 0) -> bytes:
        return bytes(self.nbd.pread(count, offset))

    def write(self, data: bytes, offset: int) -> None:
        self.nbd.pwrite(data, offset)

    def close(self) -> None:
        self.nbd.shutdown()


def _processes(folder: Path) -> list[procs.ProcessRef]:
    """Live servers that name this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            argv = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        ref = procs.ref_of(int(entry.name))
        if bytes(folder) in argv and b"--pidfile" in argv and ref is not None:
            found.append(ref)
    return found


def _kill_all(folder: Path) -> None:
    """`kill -9` of every server at once."""
    refs = _processes(folder)
    assert refs
    for ref in refs:
        os.kill(ref.pid, signal.SIGKILL)
    _wait(lambda: not any(ref.alive() for ref in refs))


def _wait(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def _file(ctx: Context, view: View) -> Path:
    return overlays.overlay_of(ctx.instance, view).path


def _digests(folder: Path) -> dict[str, str]:
    """Of everything that views show: snapshots and the store."""
    roots = (folder / ".offload", folder / "store")
    found = [path for root in roots for path in root.rglob("*") if path.is_file()]
    assert found
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def _assert_sound(path: Path) -> None:
    """No error in the tables of a qcow2 file, and no leak either."""
    done = run.run(["qemu-img", "check", str(path)], check=False)
    assert done.status == 0, done.stdout + done.stderr


# -- what survives ----------------------------------------------------------------------------


def test_written_and_never_flushed_survives_kill_of_every_server(
    ctx: Context, view: View, folder: Path
) -> None:
    """In new clusters, in clusters that were there, and in parts of them."""
    written = {0: b"a" * 512, 3 * MIB: b"b" * 70_144 + b"c" * 1024, 5 * MIB + 512: b"d" * 512}
    with closing(Client(view)) as client:
        before = client.read(SIZE)
        for offset, data in written.items():
            client.write(data, offset)
        client.write(b"e" * 512, 512)
        client.nbd.zero(MIB // 2, MIB // 2)  # of the origin's data
    _kill_all(folder)
    assert [s.alive for s in mounts.views(ctx)] == [False]
    (again,) = mounts.remount(ctx).views
    wanted = bytearray(before)
    for offset, data in {**written, 512: b"e" * 512, MIB // 2: bytes(MIB // 2)}.items():
        wanted[offset : offset + len(data)] = data
    with closing(Client(again)) as client:
        assert client.read(SIZE) == bytes(wanted)
    mounts.unmount(ctx, [view.name])


def test_acknowledged_writes_of_a_busy_client_survive_kill_of_every_server(
    ctx: Context, view: View, folder: Path
) -> None:
    """The servers die while writes are in flight; nothing is flushed or closed before."""
    acknowledged: dict[int, bytes] = {}
    enough = threading.Event()

    def write(seed: int) -> None:
        chance, client = random.Random(seed), Client(view)
        places = [n * 4096 for n in range(SIZE // 4096) if n % 4 == seed]
        chance.shuffle(places)
        for offset in places:
            data = chance.randbytes(4096)
            try:
                client.write(data, offset)
            except nbd.Error:
                return
            acknowledged[offset] = data
            if len(acknowledged) > 200:
                enough.set()

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for writer in writers:
        writer.start()
    assert enough.wait(30)
    _kill_all(folder)
    for writer in writers:
        writer.join()
    _assert_sound_or_leaking(_file(ctx, view))
    (again,) = mounts.remount(ctx).views
    with closing(Client(again)) as client:
        lost = [n for n, data in acknowledged.items() if client.read(4096, n) != data]
    assert lost == []


def _assert_sound_or_leaking(path: Path) -> None:
    """After `kill -9` in the middle of a write a cluster may be taken that nothing names."""
    assert run.run(["qemu-img", "check", str(path)], check=False).status in {0, 3}


def test_written_survives_a_reboot_also_in_the_catalogs_eyes(
    ctx: Context, view: View, folder: Path
) -> None:
    with closing(Client(view)) as client:
        client.write(b"w" * 512, 0)
    _kill_all(folder)
    shutil.rmtree(ctx.instance.views_dir / view.id)  # a reboot empties /run
    ctx.catalog.update_view(replace(view, server={**view.server, "boot": "another"}))
    (again,) = mounts.remount(ctx).views
    assert (again.id, again.uri) == (view.id, view.uri)
    with closing(Client(again)) as client:
        assert client.read(512) == b"w" * 512


def test_written_survives_one_server_killed_after_the_other(
    ctx: Context, view: View, folder: Path
) -> None:
    """First the one that clients see, then the one behind it."""
    for number, prefix in enumerate(("", "backing_")):
        current = ctx.catalog.view(view.id)
        with closing(Client(current)) as client:
            client.write(bytes([number + 1]) * 512, number * MIB)
        os.kill(int(current.server[f"{prefix}pid"]), signal.SIGKILL)
        _wait(lambda: not mounts.views(ctx)[0].alive)
        assert len(mounts.remount(ctx).views) == 1
    with closing(Client(ctx.catalog.view(view.id))) as client:
        assert [client.read(512, n * MIB) for n in range(2)] == [b"\1" * 512, b"\2" * 512]


def test_flush_and_fua_reach_the_disk_before_they_are_acknowledged(
    ctx: Context, view: View, tmp_path: Path
) -> None:
    """Counted where they are made: in the server that has the overlay open."""
    daemon, trace = view.server["backing_pid"], tmp_path / "trace"
    argv = ["strace", "-f", "-qq", "-e", "trace=fdatasync", "-o", str(trace), "-p", daemon]
    tracer = run.spawn(argv)
    try:
        with closing(Client(view)) as client:
            _wait(lambda: client.read(512) and _is_traced(daemon))
            client.write(b"a" * 512, 0)
            plain = _finished(trace)
            assert plain >= 1
            client.nbd.pwrite(b"b" * 512, 0, nbd.CMD_FLAG_FUA)
            forced = _finished(trace)
            assert forced > plain
            client.write(b"c" * 512, 0)
            written = _finished(trace)
            client.nbd.flush()
            assert _finished(trace) >= written > forced
    finally:
        run.terminate(tracer)


def _is_traced(pid: str) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)


def _finished(trace: Path) -> int:
    return trace.read_text().count(" = 0")


def test_origin_of_every_kind_stays_as_it_is(ctx: Context, mark: TimeMark, folder: Path) -> None:
    store_init.init(ctx, "main")
    made = backup(ctx, "shop", "main").backup.id
    timemarks = {t.id for t in ctx.catalog.timemarks()}
    before = _digests(folder)
    origins = [f"timemark:{mark.id}/db", f"backup:{made}/db", f"backup:{made}/web"]
    for shown in mounts.mount(ctx, origins, WRITABLE):
        with closing(Client(shown)) as client:
            assert client.nbd.get_block_size(nbd.SIZE_MINIMUM) == shown.sector_size
            client.write(b"w" * SIZE, 0)
            client.nbd.flush()
            assert client.read(SIZE) == b"w" * SIZE
    _kill_all(folder)
    mounts.remount(ctx)
    mounts.unmount(ctx, [], all_views=True)
    assert {t.id for t in ctx.catalog.timemarks()} == timemarks
    after = _digests(folder)
    assert {name: after[name] for name in before} == before


def test_views_of_one_origin_are_independent(ctx: Context, mark: TimeMark) -> None:
    origin = f"timemark:{mark.id}/db"
    (plain,) = mounts.mount(ctx, [origin])
    one, two = mounts.mount(ctx, [origin, origin], WRITABLE)
    with closing(Client(plain)) as reader, closing(Client(one)) as first:
        content = reader.read(SIZE)
        first.write(b"1" * MIB, MIB)
        with closing(Client(two)) as second:
            second.write(b"2" * MIB, 2 * MIB)
            assert second.read(MIB, MIB) == content[MIB : 2 * MIB]
        assert first.read(MIB, 2 * MIB) == content[2 * MIB : 3 * MIB]
        assert reader.read(SIZE) == content
    mounts.unmount(ctx, [two.name])
    with closing(Client(one)) as first:
        assert first.read(MIB, MIB) == b"1" * MIB


# -- the limit --------------------------------------------------------------------------------


def test_limit_reached_write_fails_with_enospc_and_all_else_goes_on(
    ctx: Context, mark: TimeMark, folder: Path
) -> None:
    options = MountOptions(writable=True, overlay_limit_bytes=4 * MIB)
    (full,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"], options)
    written: dict[int, bytes] = {}
    refused = 0
    with closing(Client(full)) as client:
        origin = client.read(SIZE)
        chance = random.Random(1)
        for offset in chance.sample(range(0, SIZE, 4096), 400):
            data = chance.randbytes(4096)
            try:
                client.write(data, offset)
                written[offset] = data
            except nbd.Error as error:
                assert error.errno == "ENOSPC"  # noqa: PT017 - some of the writes succeed
                refused += 1
        assert refused > 0
        assert len(written) > 40  # 64 KiB of the limit each
        for offset in list(written):  # what has its cluster takes more
            data = chance.randbytes(4096)
            client.write(data, offset)
            written[offset] = data
        client.nbd.flush()
        _assert_shows(client, origin, written)
    path = _file(ctx, full)
    assert path.stat().st_size <= 4 * MIB
    assert path.stat().st_blocks * 512 <= 4 * MIB
    _kill_all(folder)
    _assert_sound(path)
    (again,) = mounts.remount(ctx).views
    with closing(Client(again)) as client:
        _assert_shows(client, origin, written)
        with pytest.raises(nbd.Error) as caught:
            client.write(b"x" * MIB, SIZE - MIB)
        assert caught.value.errno == "ENOSPC"


def _assert_shows(client: Client, origin: bytes, written: dict[int, bytes]) -> None:
    wanted = bytearray(origin)
    for offset, data in written.items():
        wanted[offset : offset + len(data)] = data
    assert client.read(len(origin)) == bytes(wanted)


def test_limit_writes_of_whole_clusters_fill_it_to_the_end(ctx: Context, mark: TimeMark) -> None:
    options = MountOptions(writable=True, overlay_limit_bytes=4 * MIB)
    (full,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"], options)
    with closing(Client(full)) as client:
        done = _write_until_refused(client, overlay.CLUSTER_BYTES)
    assert done > 3 * MIB
    (shown,) = mounts.views(ctx)
    assert shown.overlay is not None
    assert shown.overlay.share == 1.0


def _write_until_refused(client: Client, size: int) -> int:
    """How many bytes went in, from the start on, `size` at a time."""
    for offset in range(0, SIZE, size):
        try:
            client.write(b"w" * size, offset)
        except nbd.Error as error:
            assert error.errno == "ENOSPC"  # noqa: PT017 - most of the writes succeed
            return offset
    raise AssertionError("nothing was refused")


@pytest.mark.needs_root
def test_file_system_full_write_fails_and_nothing_is_damaged(
    folder: Path, config: Path, ext4_pool: Path
) -> None:
    """The limit is larger than the space there is."""
    settings = f'folder = "{ext4_pool}/overlays"\nmin_free = "1MiB"'
    config.write_text(CONFIG.format(folder=folder, overlays=settings))
    filler = ext4_pool / "filler"
    with open_context(config) as ctx:
        mark = director.create(ctx, "shop")
        (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"], WRITABLE)
        try:
            free = os.statvfs(ext4_pool).f_bavail * os.statvfs(ext4_pool).f_frsize
            filler.write_bytes(b"f" * (free - MIB))
            assert any(str(ext4_pool) in alarm for alarm in overlays.alarms(ctx))
            with pytest.raises(PolicyError) as caught:
                mounts.mount(ctx, [f"timemark:{mark.id}/db"], WRITABLE)
            assert caught.value.code == "overlays-full"
            with closing(Client(view)) as client:
                origin = client.read(SIZE)
                written = {0: b"w" * _write_until_refused(client, 16384)}
                _assert_shows(client, origin, written)
                filler.unlink()
                client.write(b"x" * MIB, SIZE - MIB)
                written[SIZE - MIB] = b"x" * MIB
            _kill_all(folder)
            _assert_sound_or_leaking(_file(ctx, view))
            (again,) = mounts.remount(ctx).views
            with closing(Client(again)) as client:
                _assert_shows(client, origin, written)
        finally:
            mounts.unmount(ctx, [], all_views=True, force=True)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (0, (UsageError, "overlay-limit-small")),
        (MIB - 1, (UsageError, "overlay-limit-small")),
        (MIB, (UsageError, "overlay-limit-small")),
        (1 << 62, (UnavailableError, "overlay-unusable")),
    ],
)
def test_limit_that_cannot_be_is_refused_and_leaves_nothing(
    ctx: Context, asked: int, error: tuple[type[OffloadError], str]
) -> None:
    family, code = error
    options = MountOptions(writable=True, overlay_limit_bytes=asked)
    with pytest.raises(family) as caught:
        mounts.mount(ctx, ["shop"], options)
    assert caught.value.code == code
    assert caught.value.hint
    assert ctx.catalog.views() == []
    assert ctx.catalog.timemarks() == []
    assert list(ctx.instance.overlays_dir.glob("*")) == []


class Heard:
    """A progress that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, task: str, total_bytes: int | None) -> None: ...

    def advance(self, task: str, count_bytes: int) -> None: ...

    def status(self, task: str, text: str) -> None: ...

    def finish(self, task: str) -> None: ...

    def message(self, text: str) -> None:
        self.said.append(text)


def test_limit_larger_than_the_free_space_is_told(ctx: Context, mark: TimeMark) -> None:
    free = shutil.disk_usage(ctx.instance.state_dir).free
    heard = Heard()
    options = MountOptions(writable=True, overlay_limit_bytes=free * 2 // 3)
    mounts.mount(ctx, [f"timemark:{mark.id}/db"], options, heard)
    assert heard.said == []
    mounts.mount(ctx, [f"timemark:{mark.id}"], options, heard)  # two of them
    assert any("free" in line and str(ctx.instance.overlays_dir) in line for line in heard.said)


# -- what is told -----------------------------------------------------------------------------


def test_usage_grows_with_what_is_written_and_alarms_near_the_limit(
    ctx: Context, mark: TimeMark, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = MountOptions(name="scratch", writable=True, overlay_limit_bytes=4 * MIB)
    (view,) = mounts.mount(ctx, [f"timemark:{mark.id}/db"], options)
    fresh = overlays.usage_of(ctx.instance, view)
    assert fresh is not None
    assert 0 < fresh.used_bytes < MIB
    assert overlays.alarms(ctx) == []
    with closing(Client(view)) as client:
        client.write(b"x" * (2 * MIB), 0)
    half = overlays.usage_of(ctx.instance, view)
    assert half is not None
    assert fresh.used_bytes + 2 * MIB <= half.used_bytes < 3 * MIB
    assert overlays.alarms(ctx) == []
    with closing(Client(view)) as client:
        client.write(b"x" * MIB, 2 * MIB)
    (alarm,) = overlays.alarms(ctx)
    assert "scratch" in alarm
    assert "of 4.0 MiB" in alarm
    assert alarm in status.collect(ctx).alarms
    assert cli(["--config", str(config), "--json", "views"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["overlay"]["limit_bytes"] == 4 * MIB
    assert shown["overlay"]["used_bytes"] > 3 * MIB
    assert cli(["--config", str(config), "views"]) == 0
    assert "of 4.0 MiB" in " ".join(capsys.readouterr().out.split())


def test_read_only_view_has_no_overlay_to_tell_of(ctx: Context, mark: TimeMark) -> None:
    mounts.mount(ctx, [f"timemark:{mark.id}/db"])
    (shown,) = mounts.views(ctx)
    assert (shown.overlay, shown.view.overlay_limit_bytes) == (None, 0)
    assert list(ctx.instance.overlays_dir.glob("*")) == []
    assert overlays.alarms(ctx) == []


# -- its life ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alive", [True, False])
def test_unmount_removes_what_was_written(
    ctx: Context, view: View, folder: Path, alive: bool
) -> None:
    path = _file(ctx, view)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    if not alive:
        _kill_all(folder)
        assert path.exists()
    mounts.unmount(ctx, [view.name])
    assert not path.exists()
    assert list(ctx.instance.overlays_dir.glob("*")) == []


def test_overlay_gone_remount_says_so_and_never_shows_the_bare_origin(
    ctx: Context, view: View, folder: Path
) -> None:
    with closing(Client(view)) as client:
        client.write(b"w" * 512, 0)
    _kill_all(folder)
    path = _file(ctx, view)
    saved = path.rename(folder / "saved.qcow2")
    done = mounts.remount(ctx)
    assert done.views == ()
    (warning,) = done.warnings
    assert view.name in warning
    assert str(path) in warning
    assert f"offload unmount {view.name}" in warning
    assert [s.alive for s in mounts.views(ctx)] == [False]
    assert any("gone" in alarm for alarm in overlays.alarms(ctx))
    saved.rename(path)  # the way out that the warning names
    (again,) = mounts.remount(ctx).views
    with closing(Client(again)) as client:
        assert client.read(512) == b"w" * 512
    path.unlink()
    mounts.unmount(ctx, [view.name])
    assert ctx.catalog.views() == []


def test_recover_serves_what_was_written_again(ctx: Context, view: View, folder: Path) -> None:
    with closing(Client(view)) as client:
        client.write(b"w" * 512, 0)
    _kill_all(folder)
    report = recover.recover(ctx)
    assert [v.id for v in report.remounted] == [view.id]
    assert report.orphans == ()
    with closing(Client(ctx.catalog.view(view.id))) as client:
        assert client.read(512) == b"w" * 512


def test_orphan_is_named_and_deleted_only_when_asked_for(ctx: Context, view: View) -> None:
    """The journal and the row are lost; a view that is known and its overlay stay."""
    lost = ctx.instance.overlays_dir / f"{ctx.instance.id}.gone.qcow2"
    overlay.create(Overlay(path=lost, limit_bytes=4 * MIB), SIZE)
    foreign = ctx.instance.overlays_dir / "another.view.qcow2"
    foreign.write_bytes(b"of another instance that shares the folder")
    report = recover.recover(ctx)
    (orphan,) = report.orphans
    assert (orphan.kind, orphan.ref) == ("overlay", {"path": str(lost)})
    assert lost.exists()
    assert recover.recover(ctx, orphans=True).orphans_deleted
    assert not lost.exists()
    assert foreign.exists()
    assert _file(ctx, view).exists()


def test_orphan_that_is_served_is_not_deleted(ctx: Context, view: View) -> None:
    ctx.catalog.delete_view(view.id)
    try:
        with pytest.raises(BusyError) as caught:
            recover.recover(ctx, orphans=True)
        assert caught.value.code == "overlay-in-use"
        assert _file(ctx, view).exists()
    finally:
        ctx.catalog.add_view(view)


def test_undo_of_an_overlay_whose_view_stays_leaves_it(ctx: Context, view: View) -> None:
    """An unmount that died before it had noted that the server goes."""
    path = _file(ctx, view)
    args = {"id": view.id, "path": str(path)}
    run_undo(ctx.instance, ctx.catalog, "remove-overlay", args)
    assert path.exists()
    mounts.unmount(ctx, [view.name])
    overlay.create(Overlay(path=path, limit_bytes=4 * MIB), SIZE)
    for _ in range(2):
        run_undo(ctx.instance, ctx.catalog, "remove-overlay", args)
        assert not path.exists()


def test_remount_of_a_view_being_closed_is_left_to_the_journal(ctx: Context, view: View) -> None:
    ctx.catalog.update_view(replace(view, state=ViewState.CLOSING))
    assert mounts.remount(ctx) == mounts.Remounted()
    assert _file(ctx, view).exists()


def test_create_over_an_existing_file_is_refused_and_leaves_it(folder: Path) -> None:
    path = folder / "there.qcow2"
    path.write_bytes(b"somebody's")
    with pytest.raises(BusyError) as caught:
        overlay.create(Overlay(path=path, limit_bytes=4 * MIB), SIZE)
    assert caught.value.code == "overlay-exists"
    assert path.read_bytes() == b"somebody's"


def test_usage_of_an_overlay_that_is_gone_is_none(folder: Path) -> None:
    assert overlay.usage(Overlay(path=folder / "gone.qcow2", limit_bytes=MIB)) is None


@pytest.mark.parametrize("end", [0, 1, 65_535, 65_536, 1_000_000, 4 * MIB])
def test_usage_is_the_end_of_the_last_cluster_with_data(folder: Path, end: int) -> None:
    """Whatever holes there are before it."""
    path = folder / "sparse"
    with path.open("xb") as out:
        out.truncate(4 * MIB)
        if end:
            out.seek(end - 1)
            out.write(b"x")
    found = overlay.usage(Overlay(path=path, limit_bytes=4 * MIB))
    assert found is not None
    assert found.used_bytes == -(-end // overlay.CLUSTER_BYTES) * overlay.CLUSTER_BYTES
