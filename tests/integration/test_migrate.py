"""Views that come home while a client writes: what it wrote is there, whoever is killed when."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from offload import procs, run
from offload.cli.main import run as cli
from offload.errors import BusyError, NotFoundError, PolicyError, UnavailableError, UsageError
from offload.journal import CRASH_ENV
from offload.model import View
from offload.services import migrate, mount, recover
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.testing.instances import free_port

MIB = 1 << 20
SIZE = 24 * MIB
BLOCK = 4096
STEPS = (
    "migrate.begin", "migrate.timemark.intended", "migrate.target.intended", "migrate.target.done",
    "migrate.mirror.done", "migrate.ready.done", "migrate.held.done", "migrate.published.done",
    "migrate.row.done", "migrate.switched.done", "migrate.source.done", "migrate.overlay.done",
    "migrate.commit.before", "migrate.commit.after",
)  # fmt: skip
HOME_FROM = STEPS.index("migrate.row.done")

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
[groups.shop]
volumes = ["db"]
atomic = "record"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ofh-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def config(folder: Path) -> Path:
    with (folder / "db.raw").open("xb") as out:
        out.write(os.urandom(2 * MIB))
        out.truncate(SIZE)
    path = folder / "offload.toml"
    path.write_text(CONFIG.format(folder=folder, port=free_port()))
    return path


@pytest.fixture
def ctx(config: Path, folder: Path) -> Iterator[Context]:
    with open_context(config) as made:
        yield made
        mount.unmount(made, [], all_views=True, force=True)
    assert end_servers(folder) == []


def end_servers(folder: Path) -> list[procs.ProcessRef]:
    """All nbdkit and storage daemons that have to do with this folder."""
    found = []
    for pid in map(int, (path.name for path in Path("/proc").glob("[0-9]*"))):
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes()
            ours = argv.split(b"\0")[0].endswith((b"nbdkit", b"qemu-storage-daemon"))
            if ours and os.fsencode(folder) in argv and (ref := procs.ref_of(pid)) is not None:
                found.append(ref)
    for ref in found:
        ref.end()
    return found


@pytest.fixture
def view(ctx: Context) -> View:
    return mount.mount(ctx, ["shop"], MountOptions(writable=True, name="v"))[0]


class Writer:
    """A client that writes, block after block, and notes what was acknowledged."""

    def __init__(self, view: View) -> None:
        self.client: Any = nbd.NBD()
        self.client.connect_uri(view.uri)
        self.image = bytearray(self.client.pread(SIZE, 0))
        self.count = 0
        self.failed: Exception | None = None
        self._more = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop:
                offset = self.count * 7919 * BLOCK % SIZE
                data = self.count.to_bytes(8, "big") * (BLOCK // 8)
                self.client.pwrite(data, offset)
                self.image[offset : offset + BLOCK] = data
                with self._more:
                    self.count += 1
                    self._more.notify_all()
        except nbd.Error as error:
            self.failed = error

    def wait_for(self, more: int) -> None:
        """Until so many further writes were acknowledged."""
        with self._more:
            wanted = self.count + more
            assert self._more.wait_for(lambda: self.count >= wanted, 60), self.failed

    def stop(self) -> bytes:
        """What the view must show now."""
        self._stop = True
        self._thread.join(60)
        assert self.failed is None
        shown = bytes(self.client.pread(SIZE, 0))
        self.client.shutdown()
        assert shown == self.image
        return shown


@pytest.fixture
def writer(view: View) -> Iterator[Writer]:
    made = Writer(view)
    made.wait_for(20)
    yield made
    made._stop = True
    made._thread.join(60)


def read(view: View) -> bytes:
    client: Any = nbd.NBD()
    client.connect_uri(view.uri)
    data = bytes(client.pread(SIZE, 0))
    client.shutdown()
    return data


# A migration whose guard is killed with it.
UNGUARDED = """
import contextlib, sys
from offload.cli.main import run
from offload.services import migrate_guard
migrate_guard.guarded = lambda ctx: contextlib.nullcontext()
sys.exit(run(sys.argv[1:]))
"""


def migrate_until(step: str, config: Path, folder: Path, *, guarded: bool = False) -> None:
    """A migration that dies at a step."""
    how = ["-m", "offload.cli"] if guarded else ["-c", UNGUARDED]
    program = [sys.executable, *how, "--config", str(config)]
    done = run.run(
        [*program, "migrate", "v", "--to", str(folder / "home.raw")],
        env={CRASH_ENV: step},
        check=False,
        timeout_s=120,
    )
    assert done.status == -signal.SIGKILL, done.stderr


def leftovers(folder: Path) -> list[Path]:
    return [*folder.rglob("*.offload-part"), *(folder / "state/journal").glob("*")]


def test_migrate_to_a_file_under_a_writer_holds_every_write(
    ctx: Context, view: View, writer: Writer, folder: Path
) -> None:
    report = migrate.migrate(ctx, "v", str(folder / "home.raw"))
    writer.wait_for(20)
    shown = writer.stop()
    assert (folder / "home.raw").read_bytes() == shown
    assert report.view.uri == view.uri
    assert list((folder / "state/overlays").iterdir()) == []
    assert ctx.catalog.timemarks() == []  # it was made for the view
    assert leftovers(folder) == []
    (status,) = mount.views(ctx)
    assert status.alive
    assert status.view.origin == f"home:{folder}/home.raw"


def test_migrated_view_after_its_servers_are_killed_is_served_from_home(
    ctx: Context, view: View, folder: Path
) -> None:
    migrate.migrate(ctx, "v", str(folder / "home.raw"))
    client: Any = nbd.NBD()
    client.connect_uri(view.uri)
    client.pwrite(b"at home " * 512, 8192)
    end_servers(folder)
    (again,) = recover.recover(ctx).remounted
    assert again.uri == view.uri
    shown = read(again)
    assert shown[8192 : 8192 + 4096] == b"at home " * 512
    assert shown == (folder / "home.raw").read_bytes()


def test_migrated_view_can_be_migrated_again_and_the_first_home_stays(
    ctx: Context, view: View, writer: Writer, folder: Path
) -> None:
    migrate.migrate(ctx, "v", str(folder / "one.raw"))
    writer.wait_for(5)
    migrate.migrate(ctx, "v", str(folder / "two.raw"))
    writer.wait_for(5)
    shown = writer.stop()
    assert (folder / "two.raw").read_bytes() == shown
    assert (folder / "one.raw").stat().st_size == SIZE


def test_migrate_to_an_nbd_export_holds_every_write(
    ctx: Context, view: View, writer: Writer, folder: Path
) -> None:
    far = folder / "far.raw"
    far.write_bytes(b"x" * (SIZE + MIB))  # longer, and full of something else
    server = run.spawn(
        ["nbdkit", "--foreground", "--unix", str(folder / "far.sock"), "file", str(far)]
    )
    try:
        while not (folder / "far.sock").exists():
            assert server.poll() is None
        migrate.migrate(ctx, "v", f"nbd+unix:///?socket={folder}/far.sock")
        writer.wait_for(20)
        shown = writer.stop()
        assert far.read_bytes()[:SIZE] == shown
        assert far.read_bytes()[SIZE:] == b"x" * MIB
        mount.unmount(ctx, ["v"])
    finally:
        server.kill()
        server.wait()


def test_migrate_of_a_view_on_a_target_that_cannot_is_refused(ctx: Context, folder: Path) -> None:
    """tgt reads a file that may grow, under which QEMU mirrors nothing."""
    mount.mount(ctx, ["shop"], MountOptions(writable=True, name="v", target="tgt"))
    with pytest.raises(UsageError) as caught:
        migrate.migrate(ctx, "v", str(folder / "home.raw"))
    assert caught.value.code == "view-unmovable"
    assert "lio" in caught.value.hint
    assert not (folder / "home.raw").exists()


def test_migrated_view_kept_and_mounted_again_is_served_from_home(
    ctx: Context, view: View, folder: Path
) -> None:
    before = read(view)
    migrate.migrate(ctx, "v", str(folder / "home.raw"))
    mount.keep(ctx, ["v"])
    (again,) = mount.mount_again(ctx, ["v"])
    assert again.uri == view.uri
    assert read(again) == before
    mount.unmount(ctx, ["v"])
    assert (folder / "home.raw").read_bytes() == before


@pytest.mark.needs_root
def test_migrate_to_a_block_device_checks_it_and_holds_every_write(
    ctx: Context, view: View, writer: Writer, folder: Path
) -> None:
    disk, small = folder / "disk.raw", folder / "small.raw"
    for path, size in ((disk, SIZE + MIB), (small, SIZE - MIB)):
        with path.open("xb") as out:
            out.truncate(size)
    loops = [
        run.run(["losetup", "--find", "--show", str(path)]).stdout.strip() for path in (disk, small)
    ]
    try:
        with pytest.raises(PolicyError) as short:
            migrate.migrate(ctx, "v", loops[1])
        assert short.value.code == "target-too-small"
        with open(loops[0], "rb") as held:
            holder = run.spawn(["sleep", "60"], stdin=held.fileno())
        try:
            with pytest.raises(BusyError) as used:
                migrate.migrate(ctx, "v", loops[0])
        finally:
            holder.kill()
            holder.wait()
        assert used.value.code == "device-in-use"
        migrate.migrate(ctx, "v", loops[0])
        writer.wait_for(20)
        shown = writer.stop()
        mount.unmount(ctx, ["v"])
        with open(loops[0], "rb") as device:
            assert device.read(SIZE) == shown
    finally:
        for loop in loops:
            run.run(["losetup", "--detach", loop])


def test_migrate_that_cannot_be_leaves_the_view_as_it_is(
    ctx: Context, view: View, writer: Writer, folder: Path
) -> None:
    (folder / "there.raw").write_bytes(b"mine")
    for place, kind, code in (
        (folder / "there.raw", BusyError, "target-exists"),
        (folder / "no/such/home.raw", NotFoundError, "no-folder"),
        ("nbd+unix:///?socket=/nowhere/sock", UnavailableError, "nbd-unavailable"),
        ("ftp://example/x", UsageError, "bad-target"),
    ):
        with pytest.raises(kind) as caught:
            migrate.migrate(ctx, "v", str(place))
        assert caught.value.code == code
    writer.wait_for(5)
    writer.stop()
    assert (folder / "there.raw").read_bytes() == b"mine"
    assert ctx.catalog.view("v") == view
    assert leftovers(folder) == []


def test_migrate_of_a_read_only_view_is_refused_with_the_way_out(
    ctx: Context, folder: Path
) -> None:
    mount.mount(ctx, ["shop"], MountOptions(name="ro"))
    with pytest.raises(UsageError) as caught:
        migrate.migrate(ctx, "ro", str(folder / "home.raw"))
    assert caught.value.code == "view-read-only"
    assert "--writable" in caught.value.hint


def test_migrate_whose_target_runs_full_leaves_the_view_as_it_is(
    ctx: Context, view: View, writer: Writer, folder: Path
) -> None:
    """An NBD server that has no room behind its middle: the mirror fails, the client never."""
    full = ["nbdkit", "--foreground", "--unix", str(folder / "full.sock"), "--filter=error",
            "memory", f"{SIZE}", "error-pwrite-rate=100%", "error-zero-rate=0%",
            "error-pwrite=ENOSPC", f"error-file={folder}/now"]  # fmt: skip
    (folder / "now").touch()
    server = run.spawn(full)
    try:
        while not (folder / "full.sock").exists():
            assert server.poll() is None
        with pytest.raises(UnavailableError) as caught:
            migrate.migrate(ctx, "v", f"nbd+unix:///?socket={folder}/full.sock")
        assert caught.value.code in {"migration-failed", "target-unavailable"}
        writer.wait_for(10)
        writer.stop()
        assert ctx.catalog.view("v") == view
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("step", STEPS)
def test_migrate_killed_at_a_step_is_served_from_one_place_with_every_write(
    ctx: Context, writer: Writer, folder: Path, step: str
) -> None:
    config = folder / "offload.toml"
    migrate_until(step, config, folder)
    recover.recover(ctx)
    writer.wait_for(10)
    shown = writer.stop()
    now = ctx.catalog.view("v")
    at_home = STEPS.index(step) >= HOME_FROM
    assert now.origin.startswith("home:") == at_home
    assert (folder / "home.raw").exists() == at_home
    assert len(list((folder / "state/overlays").iterdir())) == (not at_home)
    if at_home:
        assert (folder / "home.raw").read_bytes() == shown
    assert leftovers(folder) == []
    recover.recover(ctx)
    assert read(now) == shown


@pytest.mark.parametrize(
    "step", [s for s in STEPS if s.split(".")[1] in {"ready", "published", "row"}]
)
def test_migrate_killed_with_all_servers_is_served_again_from_where_the_catalog_says(
    ctx: Context, config: Path, view: View, folder: Path, step: str
) -> None:
    """As after a power cut: nobody is there to be asked."""
    client: Any = nbd.NBD()
    client.connect_uri(view.uri)
    client.pwrite(b"before  " * 512, 4096)
    image = bytes(client.pread(SIZE, 0))
    migrate_until(step, config, folder)
    end_servers(folder)
    recover.recover(ctx)
    at_home = step == "migrate.row.done"
    assert (folder / "home.raw").exists() == at_home
    assert read(ctx.catalog.view("v")) == image
    assert leftovers(folder) == []


@pytest.mark.parametrize("step", ["migrate.held.done", "migrate.row.done"])
def test_migrate_killed_while_clients_wait_lets_them_go_on_by_itself(
    ctx: Context, writer: Writer, folder: Path, step: str
) -> None:
    migrate_until(step, folder / "offload.toml", folder, guarded=True)
    writer.wait_for(20)  # nobody has recovered
    shown = writer.stop()
    until = time.monotonic() + 30
    while leftovers(folder):
        assert time.monotonic() < until, leftovers(folder)
        time.sleep(0.02)
    now = ctx.catalog.view("v")
    assert now.origin.startswith("home:") == (step == "migrate.row.done")
    assert read(now) == shown


def test_migrate_command_says_where_the_view_is(
    ctx: Context, config: Path, view: View, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["--config", str(config), "migrate", "v", "--to", str(folder / "home.raw")]) == 0
    assert f"v is at {folder}/home.raw" in capsys.readouterr().out
    assert cli(["--config", str(config), "views"]) == 0
    assert "in place" in capsys.readouterr().out
