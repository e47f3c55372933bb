"""Views as block devices, over NBD, by the real kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload import attachment, nbd_tunnel, procs, run
from offload.cli.main import run as run_cli
from offload.errors import (
    BusyError,
    NotFoundError,
    OffloadError,
    PrivilegeError,
    UnavailableError,
    UsageError,
)
from offload.model import Connection, Exposure
from offload.services import connect, mount, recover
from offload.services.connect import ConnectionState
from offload.services.context import Context
from offload.testing import certificates
from offload.testing.connections import LINKS, MIB, Site, connection_site, wait_for

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "design" / "recovery.md").read_text(encoding="utf-8")


@pytest.fixture
def site() -> Iterator[Site]:
    with connection_site() as made:
        yield made


@pytest.fixture
def running() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts programs and ends them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*argv: str, stdin: int | None = None) -> subprocess.Popen[bytes]:
        started.append(run.spawn(argv, stdin=stdin))
        return started[-1]

    yield start
    for process in started:
        run.terminate(process)


def state_of(site: Site) -> ConnectionState:
    (status,) = connect.connections(site.ctx)
    return status.state


def code_of(action: Callable[[], object], family: type[OffloadError]) -> str:
    with pytest.raises(family) as error:
        action()
    assert type(error.value) is family
    assert error.value.hint
    return error.value.code


def test_connect_view_is_a_read_only_device_under_its_name(site: Site) -> None:
    view = site.mount()
    made = site.connect()
    assert (LINKS / "v").resolve() == Path(made.device)
    assert (LINKS / "v").read_bytes() == site.content
    said = run.run(["blockdev", "--getro", "--getsize64", "--getss", made.device]).stdout
    assert said.split() == ["1", str(2 * MIB), "512"]
    with open(made.device, "r+b", buffering=0) as device, pytest.raises(PermissionError):
        device.write(b"x" * 512)
    assert site.ctx.catalog.connections() == [made]
    assert (made.view, made.name, made.read_only) == (view.id, "v", True)
    assert state_of(site) is ConnectionState.CONNECTED
    assert connect.disconnect(site.ctx, ["v"]) == [made]
    site.assert_clean()
    assert not LINKS.exists()


def test_connect_writable_view_keeps_what_is_written_and_the_origin(site: Site) -> None:
    before = site.content
    site.mount(writable=True)
    made = site.connect(name="scratch")
    assert not made.read_only
    fd = os.open(made.device, os.O_RDWR)
    os.pwrite(fd, b"x" * 4096, MIB)
    os.fsync(fd)
    os.close(fd)
    connect.disconnect(site.ctx, ["scratch"])
    again = site.connect()
    assert Path(again.device).read_bytes() == before[:MIB] + b"x" * 4096 + before[MIB + 4096 :]
    assert site.content == before


def test_connect_two_views_one_is_ended_by_its_device_the_rest_at_once(site: Site) -> None:
    names = ["one", "two", "three"]
    for name in names:
        site.mount(name)
    made = {name: site.connect(name) for name in names}
    assert len({connection.device for connection in made.values()}) == 3
    assert connect.disconnect(site.ctx, [made["two"].device]) == [made["two"]]
    assert connect.disconnect(site.ctx, [str(LINKS / "one")]) == [made["one"]]
    assert connect.disconnect(site.ctx, [], all_connections=True) == [made["three"]]
    site.assert_clean()


def test_connect_what_cannot_be_is_refused(site: Site) -> None:
    view = site.mount()
    site.mount("other")
    made = site.connect()
    again = site.connect
    assert code_of(lambda: again("nosuch"), NotFoundError) == "unknown-view"
    assert code_of(lambda: again("v", name="second"), BusyError) == "already-connected"
    assert code_of(lambda: again(view.uri, name="second"), BusyError) == "already-connected"
    assert code_of(lambda: again("other", name="v"), BusyError) == "name-taken"
    assert code_of(lambda: again("other", name="A B"), UsageError) == "bad-name"
    gone = "nbd+unix:///?socket=/tmp/gone.sock"
    assert code_of(lambda: again(gone), UnavailableError) == "server-gone"
    nobody = lambda: connect.disconnect(site.ctx, ["nosuch"])  # noqa: E731
    assert code_of(nobody, NotFoundError) == "unknown-connection"
    site.assert_clean(connected=1)
    assert Path(made.device).read_bytes() == site.content


def test_connect_view_whose_server_is_dead_is_refused(site: Site) -> None:
    site.mount()
    site.kill_server()
    assert code_of(site.connect, UnavailableError) == "view-dead"
    site.assert_clean()


def test_connect_without_the_kernel_module_names_it(site: Site) -> None:
    site.mount()
    wait_for(lambda: run.run(["rmmod", "nbd"], check=False).status == 0 or not loaded("nbd"))
    block = Path("/etc/modprobe.d/offload-test.conf")
    block.write_text("install nbd /bin/false\n")
    try:
        with pytest.raises(UnavailableError) as error:
            site.connect()
    finally:
        block.unlink()
    assert error.value.code == "module-missing"
    assert "nbd" in error.value.message
    assert "linux-image-amd64" in error.value.hint
    site.assert_clean()
    assert Path(site.connect().device).read_bytes() == site.content


def loaded(module: str) -> bool:
    return Path("/sys/module", module).exists()


def test_connect_as_somebody_else_than_root_says_so(site: Site) -> None:
    site.mount()
    os.seteuid(65534)
    try:
        with pytest.raises(PrivilegeError):
            attachment.check(
                attachment.Attachment(
                    uri="nbd://127.0.0.1", identifier="x", folder=Path("/x"), timeout_s=1
                )
            )
    finally:
        os.seteuid(0)


def test_disconnect_device_in_use_is_refused_and_says_by_whom(
    site: Site, running: Callable[..., subprocess.Popen[bytes]]
) -> None:
    run.run(["mkfs.ext4", "-q", "-F", str(site.volume)])
    site.mount()
    made = site.connect()
    point = site.folder / "mnt"
    point.mkdir()
    run.run(["mount", "-o", "ro,noload", str(LINKS / "v"), str(point)])
    with open(made.device, "rb") as device:
        reader = running("sleep", "600", stdin=device.fileno())
    with pytest.raises(BusyError) as error:
        connect.disconnect(site.ctx, ["v"])
    assert error.value.code == "device-busy"
    assert f"mounted at {point}" in error.value.message
    assert f"process {reader.pid} (sleep)" in error.value.message
    site.assert_clean(connected=1)
    connect.disconnect(site.ctx, ["v"], force=True)
    assert site.ctx.catalog.connections() == []
    assert not LINKS.exists()
    run.run(["umount", str(point)])
    run.terminate(reader)
    site.assert_clean()


def test_unmount_of_a_connected_view_needs_force(site: Site) -> None:
    site.mount()
    site.connect()
    with pytest.raises(BusyError) as error:
        mount.unmount(site.ctx, ["v"])
    assert error.value.code == "view-connected"
    assert "offload disconnect v" in error.value.hint
    assert attachment.answers(site.ctx.catalog.connections()[0].device)
    mount.unmount(site.ctx, ["v"], force=True)
    assert site.ctx.catalog.views() == []
    site.assert_clean()


def test_server_killed_disconnect_still_works(site: Site) -> None:
    site.mount()
    made = site.connect(timeout_s=5)
    site.kill_server()
    assert state_of(site) is ConnectionState.DEAD
    assert not attachment.answers(made.device)
    connect.disconnect(site.ctx, ["v"])
    site.assert_clean()


def test_server_killed_recover_mends_the_device_that_is_open(site: Site) -> None:
    site.mount()
    made = site.connect(timeout_s=5)
    fd = os.open(made.device, os.O_RDONLY)
    site.kill_server()
    assert not attachment.answers(made.device)
    report = recover.recover(site.ctx)
    assert [connection.name for connection in report.reconnected] == ["v"]
    assert report.warnings == ()
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, 2 * MIB, 0) == site.content
    os.close(fd)
    assert recover.recover(site.ctx).reconnected == ()
    assert state_of(site) is ConnectionState.CONNECTED


def test_server_that_cannot_come_back_is_a_warning_of_recover(site: Site) -> None:
    """And the other connection is mended all the same."""
    site.mount("lost")
    site.mount("v")
    site.connect("lost", timeout_s=5)
    site.connect("v", timeout_s=5)
    site.kill_server("lost")
    site.kill_server("v")
    source = site.ctx.catalog.view("lost").source
    getattr(source, "path").unlink()  # noqa: B009 - a raw source has one
    report = recover.recover(site.ctx)
    assert [connection.name for connection in report.reconnected] == ["v"]
    assert any(warning.startswith("lost cannot be connected") for warning in report.warnings)
    connect.disconnect(site.ctx, [], all_connections=True)
    site.assert_clean()


def take_one(ctx: Context) -> Connection:
    return connect.connect(ctx, "v").connection


def end_all(ctx: Context) -> list[Connection]:
    return connect.disconnect(ctx, [], all_connections=True)


def assert_on_the_page(steps: list[str]) -> None:
    """docs/design/recovery.md says what each leaves."""
    unnamed = [s for s in steps if f"`{re.sub(r'-[0-9]+(?=[.])', '-N', s)}`" not in PAGE]
    assert [s for s in unnamed if not s.startswith("undo.")] == []


@pytest.mark.timeout(400)
def test_connect_killed_at_each_step_leaves_nothing_or_all(site: Site) -> None:
    site.mount()
    steps = site.steps(take_one)
    assert "connect.device.intended" in steps
    assert_on_the_page(steps)
    end_all(site.ctx)
    for step in steps:
        site.kill_at(step, take_one)
        site.ctx.journal.recover()
        whole = step == "connect.commit.after"
        site.assert_clean(connected=int(whole))
        if whole:
            assert (LINKS / "v").read_bytes() == site.content
            end_all(site.ctx)


@pytest.mark.timeout(400)
def test_disconnect_killed_at_each_step_is_finished(site: Site) -> None:
    site.mount()
    take_one(site.ctx)
    steps = site.steps(end_all)
    assert "disconnect.device-1.done" in steps
    assert_on_the_page(steps)
    for step in steps:
        take_one(site.ctx)
        site.kill_at(step, end_all)
        site.ctx.journal.recover()
        site.assert_clean(connected=int(step == "disconnect.begin"))
        end_all(site.ctx)


@pytest.mark.timeout(400)
def test_reconnect_killed_at_each_step_is_done_again(site: Site) -> None:
    """The device vanishes as with a reboot, then a recovery dies, then one does not."""

    def lose_the_device() -> None:
        (connection,) = site.ctx.catalog.connections()
        attachment.detach(attachment.Attachment.from_strings(connection.record))
        (LINKS / "v").unlink()

    site.mount()
    take_one(site.ctx)
    lose_the_device()
    steps = site.steps(connect.reconnect)
    assert "reconnect.row.done" in steps
    assert_on_the_page(steps)
    for step in steps:
        lose_the_device()
        site.kill_at(step, connect.reconnect)
        report = recover.recover(site.ctx)
        assert report.warnings == (), step
        site.assert_clean(connected=1)
        assert (LINKS / "v").read_bytes() == site.content


def test_connect_anothers_view_by_its_uri(site: Site) -> None:
    with connection_site() as other:
        view = other.mount("theirs", exposure=Exposure(transport="tcp"))
        made = site.connect(view.uri)
        assert made.view == ""
        assert made.read_only
        assert (LINKS / made.name).read_bytes() == other.content
        assert state_of(site) is ConnectionState.CONNECTED
        taken = lambda: other.connect("theirs", name=made.name)  # noqa: E731
        assert code_of(taken, BusyError) == "name-taken"
        connect.disconnect(site.ctx, [made.name])
    site.assert_clean()


@pytest.fixture
def tls_site() -> Iterator[Site]:
    folder = Path("/tmp/ofc-tls")
    folder.mkdir()
    authority = certificates.make_authority()
    pki = certificates.write_server(folder / "pki", authority)
    certificates.write_client(pki, authority)
    keys = certificates.write_keys(folder / "keys.psk", ["alice"])
    nbd = {"certificates": str(pki), "psk": str(keys)}
    with connection_site({"nbd": nbd}) as made:
        yield made
    run.run(["rm", "-r", str(folder)])


@pytest.mark.parametrize("tls", ["certificates", "psk"])
def test_connect_over_tls_and_again_when_either_end_dies(tls_site: Site, tls: str) -> None:
    site = tls_site
    site.mount(exposure=Exposure(transport="tcp", tls=tls))
    made = site.connect(timeout_s=5)
    assert Path(made.device).read_bytes() == site.content
    folder = attachment.Attachment.from_strings(made.record).folder
    for end in ("server", "tunnel"):
        if end == "server":
            site.kill_server()
        else:
            kill_tunnel(folder)
        assert not attachment.answers(made.device)
        report = recover.recover(site.ctx)
        assert [connection.name for connection in report.reconnected] == ["v"]
        run.run(["blockdev", "--flushbufs", made.device])
        assert Path(made.device).read_bytes() == site.content
    connect.disconnect(site.ctx, ["v"])
    site.assert_clean()
    assert not nbd_tunnel.alive(folder)


def kill_tunnel(folder: Path) -> None:
    (ref,) = procs.find_running("nbdkit", str(folder / "pid"))
    os.kill(ref.pid, signal.SIGKILL)
    wait_for(lambda: not ref.alive())


def test_connect_over_tls_with_a_strangers_certificate_leaves_nothing(tls_site: Site) -> None:
    view = tls_site.mount(exposure=Exposure(transport="tcp", tls="certificates"))
    stranger = certificates.write_client(
        tls_site.folder / "stranger", certificates.make_authority("other")
    )
    refused = lambda: tls_site.connect(f"{view.uri}?tls-certificates={stranger}")  # noqa: E731
    assert code_of(refused, UnavailableError) == "tls-failed"
    tls_site.assert_clean()


def test_command_line_connects_lists_and_disconnects(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    def offload(*words: str) -> str:
        capsys.readouterr()
        assert run_cli(["--config", str(site.config), *words]) == 0
        return capsys.readouterr().out

    site.mount()
    said = offload("connect", "v", "--name", "disk", "--timeout", "5")
    assert "/dev/offload/disk" in said
    assert "read-only" in said
    (listed,) = json.loads(offload("connections", "--json"))
    assert (listed["name"], listed["state"], listed["kind"]) == ("disk", "connected", "nbd")
    assert Path(listed["link"]).resolve() == Path(listed["device"])
    assert "identifier" not in json.dumps(listed)
    assert run_cli(["--config", str(site.config), "unmount", "v"]) == 5
    assert "offload disconnect disk" in capsys.readouterr().err
    assert "disk" in offload("connections")
    assert offload("disconnect", listed["device"]) == "disconnected disk\n"
    assert json.loads(offload("connections", "--json")) == []
    site.assert_clean()
