"""The lio target beside an administrator's own LIO, after crashes, and with dead servers below."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from offload.errors import UnavailableError
from offload.iscsi import identity
from offload.model import Exposure
from offload.run import run
from offload.services import director
from offload.services import mount as mounts
from offload.services.context import Context, open_context
from offload.services.mount import MountOptions
from offload.target import ExportRequest
from offload.testing.libiscsi import Initiator, ScsiError
from offload.testing.lio import HERE, MIB, Site, loop_disk, site, wait_until
from targets import lio_device, lio_kernel, lio_state

pytestmark = pytest.mark.in_guest(timeout_s=1200)

ADMIN = "iqn.2020-01.com.example:admin"
PATTERN = bytes(range(256)) * 2
LONG_S = 600  # for a server to answer
SOON_S = 120.0  # emulated, on a busy machine


@pytest.fixture
def lio() -> Iterator[Site]:
    with site() as made:
        yield made


# -- an administrator's own -------------------------------------------------------------------


@contextmanager
def admin_target(address: str) -> Iterator[None]:
    """A RAM disk with a target, made with the library under targetcli."""
    lio_kernel.load()
    lio = lio_kernel.library()
    lio.RTSRoot()  # first, as targetcli does
    store = lio.RDMCPStorageObject("admin", 4 * MIB)
    target = lio.Target(lio.FabricModule("iscsi"), ADMIN)
    try:
        group = lio.TPG(target, 1)
        group.set_attribute("authentication", 0)
        group.set_attribute("generate_node_acls", 1)
        group.set_attribute("demo_mode_write_protect", 0)
        lio.NetworkPortal(group, address, 3260)
        lio.LUN(group, 0, storage_object=store)
        group.enable = True
        yield
    finally:
        target.delete()
        store.delete()


def saved() -> object:
    """All of LIO, as targetcli saves it."""
    return lio_kernel.library().RTSRoot().dump()


def listing() -> str:
    """What targetcli shows."""
    if not Path("/run/dbus/system_bus_socket").exists():  # it does not start without
        Path("/run/dbus").mkdir(exist_ok=True)
        run(["dbus-daemon", "--system", "--fork"])
    return run(["targetcli", "ls"]).stdout


def test_administrators_targets_are_left_as_they_were(lio: Site) -> None:
    with admin_target("127.0.0.1"):
        before = saved()
        with Initiator(f"iscsi://127.0.0.1:3260/{ADMIN}/0") as client:
            client.pwrite(PATTERN, 0)
            request = lio.request()
            endpoint = lio.export(request)  # on the same portal
            shown = listing()
            assert f"offload-{lio.instance.id}-v1" in shown
            assert endpoint.server["iqn"] in shown
            assert saved() != before
            with Initiator(endpoint.uri) as own:
                assert len(own.pread(512, 0)) == 512
            lio.withdraw(request)
            assert client.pread(512, 0) == PATTERN  # the session has lived through it
        assert saved() == before


def test_portal_of_the_administrator_on_all_addresses_takes_the_port(lio: Site) -> None:
    with admin_target("0.0.0.0"):  # noqa: S104
        with pytest.raises(UnavailableError) as error:
            lio.target.check(Exposure())
        assert error.value.code == "port-taken"
        assert lio.target.check(Exposure(port=3261)).port == 3261


def test_restored_leftovers_of_a_view_are_dead_and_swept_before_it_is_served(lio: Site) -> None:
    """What the administrator saved while the view was served, restored after a reboot."""
    image, old = lio.image(), lio.image()
    with loop_disk(image) as disk, loop_disk(old) as other:
        request = lio.request(disk)
        endpoint = lio.export(request)
        assert endpoint.server["device"] == str(disk)
        path = lio.folder / "saved.json"
        run(["targetctl", "save", str(path)])
        # by then the same name is another disk's
        path.write_text(path.read_text().replace(str(disk), str(other)))
        run(["targetctl", "clear"])
        run(["targetctl", "restore", str(path)])
        assert lio_state.iqns(lio_state.Name(instance=lio.instance.id, view="v1"))
        assert not lio.target.alive(request.run_dir, endpoint.server)
        shutil.rmtree(request.run_dir)  # as a reboot does
        again = lio.export(request)
        assert again.uri == endpoint.uri
        with Initiator(again.uri) as client:
            assert client.pread(MIB, 0) == image.read_bytes()
        lio.close()


def test_reservations_do_not_outlive_a_view(lio: Site) -> None:
    """The kernel keeps them in a file, by serial number: Documentation/target, APTPL."""
    request = lio.request()
    lio.export(request)
    path = lio_state.database() / "pr" / f"aptpl_{identity('v1').serial}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("PR_REG_START: 0\n")
    lio.withdraw(request)
    assert not path.exists()


# -- served again -----------------------------------------------------------------------------

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

[overlays]
min_free = "0%"

[groups.shop]
volumes = ["db", "web"]
atomic = "record"
"""


@pytest.fixture
def ctx() -> Iterator[Context]:
    folder = Path(tempfile.mkdtemp(prefix="ofl-", dir="/tmp"))
    for name in ("db", "web"):
        (folder / f"{name}.raw").write_bytes(os.urandom(MIB))
    config = folder / "offload.toml"
    config.write_text(CONFIG.format(folder=folder))
    with open_context(config) as made:
        yield made
        mounts.unmount(made, [], all_views=True, force=True)
    shutil.rmtree(folder)


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
def test_views_come_back_from_the_catalog_as_they_were(ctx: Context, writable: bool) -> None:
    """The administrator clears LIO, or its service is restarted."""
    mark = director.create(ctx, "shop")
    options = MountOptions(target="lio", writable=writable)
    views = mounts.mount(ctx, [f"timemark:{mark.id}"], options)
    seen = {}
    for view in views:
        with Initiator(view.uri) as client:
            if writable:
                client.pwrite(b"w" * 4096, 4096)
                client.flush()
            seen[view.name] = (client.inquiry(0x83), client.block_size, client.pread(MIB, 0))
    run(["targetctl", "clear"])
    assert [status.alive for status in mounts.views(ctx)] == [False, False]

    done = mounts.remount(ctx)
    assert done.warnings == ()
    assert [view.uri for view in done.views] == [view.uri for view in views]
    for view in done.views:
        with Initiator(view.uri) as client:
            found = (client.inquiry(0x83), client.block_size, client.pread(MIB, 0))
        assert found == seen[view.name]
    assert [status.alive for status in mounts.views(ctx)] == [True, True]


def test_unmount_of_a_view_in_use_is_refused_unless_forced(ctx: Context) -> None:
    (view, _) = mounts.mount(ctx, ["shop"], MountOptions(target="lio"))
    with Initiator(view.uri):
        with pytest.raises(Exception, match="1 client connected"):
            mounts.unmount(ctx, [view.name])
        mounts.unmount(ctx, [view.name], force=True)
    assert view.name not in [status.view.name for status in mounts.views(ctx)]


# -- killed while it was made -----------------------------------------------------------------


def export_killed_at(place: str, when: str, lio: Site, request: ExportRequest) -> None:
    """In a process of its own, which ends by `kill -9` as it calls a function, or just after."""
    pid = os.fork()
    if pid == 0:
        try:
            module, _, name = place.rpartition(".")
            owner = import_module(module)
            real = getattr(owner, name)

            def killing(*args: object, **options: object) -> None:
                if when == "after":
                    real(*args, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(owner, name, killing)
            lio.target.export(request)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize(
    ("place", "when", "on_overlay"),
    [
        ("targets.lio_loop._configured", "after", "no"),
        ("targets.lio_build._allow", "before", "no"),
        ("offload.kernel_nbd.attach", "before", "yes"),
        ("offload.kernel_nbd.attach", "after", "yes"),
        ("targets.lio_build._store_attributes", "before", "yes"),
        ("targets.lio_build._group_attributes", "before", "yes"),
        ("targets.lio_build._listen", "after", "yes"),
    ],
)
def test_what_a_killed_export_left_is_found_by_name(
    lio: Site, place: str, when: str, on_overlay: str
) -> None:
    request = lio.request(exposure=Exposure(initiators=(HERE,)), on_overlay=on_overlay == "yes")
    export_killed_at(place, when, lio, request)
    assert request.run_dir.exists()
    lio.target.withdraw(request.run_dir, {})
    wait_until(lambda: not lio.leftovers(), lambda: f"left: {lio.leftovers()}")


def test_export_that_fails_half_way_leaves_nothing(
    lio: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site() as other:
        other.export(other.request(view_id="v2"))
        # a name that the kernel refuses: it is longer than 223 bytes
        long = replace(lio.request(), name="n")
        monkeypatch.setattr("offload.iqn.view_iqn", lambda *_: f"iqn.2026-11.x:{'y' * 300}")
        with pytest.raises(UnavailableError) as error:
            lio.target.export(long)
        assert error.value.code == "lio-failed"
        assert lio.leftovers() == []


# -- dead servers below -----------------------------------------------------------------------


def on_overlay(lio: Site) -> ExportRequest:
    request = lio.request(on_overlay=True)
    endpoint = lio.export(request)
    assert lio.target.alive(request.run_dir, endpoint.server)
    return request


def backing_pid(lio: Site, request: ExportRequest) -> int:
    return int(lio.served[request.run_dir].server["backing_pid"])


_READER = """
import sys
from offload.testing.libiscsi import Initiator
client = Initiator(sys.argv[1], timeout_s=600)
print(flush=True)
sys.stdin.readline()
print(flush=True)
client.pread(512, 65536)
"""


@contextmanager
def waiting_reader(lio: Site, request: ExportRequest, number: int) -> Iterator[None]:
    """An initiator that waits for an answer of a server to which this signal was sent."""
    uri = lio.served[request.run_dir].uri
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", _READER, uri]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(backing_pid(lio, request), number)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        try:
            yield
            assert process.wait(SOON_S) != 0  # an error, not data
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_withdraw_does_not_wait_for_a_server_that_does_not_answer(
    lio: Site, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lio_device, "_ANSWER_S", LONG_S)
    request = on_overlay(lio)
    with waiting_reader(lio, request, number):
        began = time.monotonic()
        lio.withdraw(request)
        assert time.monotonic() - began < SOON_S


def test_read_from_a_killed_server_is_an_error(lio: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lio_device, "_ANSWER_S", 2)
    request = on_overlay(lio)
    with Initiator(lio.served[request.run_dir].uri, timeout_s=60) as client:
        os.kill(backing_pid(lio, request), signal.SIGKILL)
        with pytest.raises(ScsiError):
            client.pread(512, 65536)


def test_killed_server_is_noticed_and_the_view_served_again(lio: Site) -> None:
    request = on_overlay(lio)
    endpoint = lio.served[request.run_dir]
    with Initiator(endpoint.uri) as client:
        client.pwrite(PATTERN, 0)
        client.flush()
    os.kill(backing_pid(lio, request), signal.SIGKILL)
    wait_until(lambda: not lio.target.alive(request.run_dir, endpoint.server))
    lio.withdraw(request)
    again = lio.export(request)
    assert again.uri == endpoint.uri
    with Initiator(again.uri) as client:
        assert client.pread(512, 0) == PATTERN
