"""Views as block devices, over iSCSI: open-iscsi and both targets."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload import attachment, openiscsi, procs, run
from offload.endpoint import IscsiEndpoint, parse
from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    OffloadError,
    UnavailableError,
)
from offload.model import Connection, View
from offload.services import connect, recover
from offload.services.context import Context
from offload.testing.connections import LINKS, MIB, Site, connection_site, wait_for

SECRET = "correct horse battery"
MUTUAL = "staple a battery horse"
NODES = Path("/etc/iscsi/nodes")
PORT = 3277

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def iscsid() -> Iterator[None]:
    """open-iscsi's daemon, which systemd starts elsewhere."""
    run.run(["modprobe", "--all", "iscsi_tcp", "fuse"])  # fuse: writable views of tgt
    run.run(["iscsid"])
    yield
    for ref in procs.find_running("iscsid", "iscsid"):
        ref.end()


@pytest.fixture
def secrets() -> Iterator[dict[str, str]]:
    """`[iscsi.chap]`, mutual."""
    folder = Path(tempfile.mkdtemp(prefix="ofs-", dir="/tmp"))
    found = {"user": "backup", "mutual_user": "storage"}
    for key, secret in (("secret_file", SECRET), ("mutual_secret_file", MUTUAL)):
        path = folder / key
        path.touch(mode=0o600)
        path.write_text(secret + "\n")
        found[key] = str(path)
    yield found
    shutil.rmtree(folder)


@pytest.fixture(params=["tgt", "lio"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def site(secrets: dict[str, str]) -> Iterator[Site]:
    with connection_site({"iscsi": {"chap": secrets, "port": PORT}}) as made:
        yield made
    assert sessions() == []
    assert not NODES.exists() or list(NODES.iterdir()) == []


def sessions() -> list[Path]:
    return list(Path("/sys/class/iscsi_session").glob("session*"))


def endpoint(view: View) -> IscsiEndpoint:
    found = parse(view.uri)
    assert isinstance(found, IscsiEndpoint)
    return found


def code_of(action: Callable[[], object], family: type[OffloadError]) -> str:
    with pytest.raises(family) as error:
        action()
    assert SECRET not in error.value.message + error.value.hint
    return error.value.code


def test_connect_logs_in_with_mutual_chap_and_shows_the_view(site: Site, target: str) -> None:
    view = site.mount(target=target)
    made = site.connect()
    assert made.read_only
    assert (LINKS / "v").read_bytes() == site.content
    said = run.run(["blockdev", "--getro", "--getsize64", "--getss", made.device]).stdout
    assert said.split() == ["1", str(2 * MIB), "512"]
    with pytest.raises(OSError, match=r"Read-only|not permitted"):
        Path(made.device).write_bytes(b"x" * 512)
    session = openiscsi.find_session(endpoint(view))
    assert session is not None
    assert (session / "username_in").read_text().strip() == "storage"
    for path in (NODES / endpoint(view).iqn).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    state = site.ctx.instance.state_dir
    for path in (path for path in state.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    connect.disconnect(site.ctx, [made.device])
    assert not Path(made.device).exists()
    assert not LINKS.exists()


def test_connect_writable_view_takes_writes(site: Site, target: str) -> None:
    before = site.content
    site.mount(target=target, writable=True)
    made = site.connect()
    assert not made.read_only
    fd = os.open(made.device, os.O_RDWR)
    os.pwrite(fd, b"x" * 4096, MIB)
    os.fsync(fd)
    os.close(fd)
    connect.disconnect(site.ctx, ["v"])
    again = site.connect()
    assert Path(again.device).read_bytes()[MIB : MIB + 4096] == b"x" * 4096
    assert site.content == before


def test_connect_with_the_wrong_secret_is_refused_and_leaves_nothing(
    site: Site, target: str, secrets: dict[str, str]
) -> None:
    site.mount(target=target)
    Path(secrets["secret_file"]).write_text("wrong horse battery\n")
    with pytest.raises(ConfigError) as error:
        site.connect()
    assert error.value.code == "login-refused"
    assert openiscsi.initiator_name() in error.value.message
    assert "[iscsi.chap]" in error.value.hint
    site.assert_clean()
    assert sessions() == []


def test_secrets_are_on_no_command_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what is started here, and not of what that starts."""
    said = site.folder / "strace"
    site.mount(target="tgt")
    tracer = run.spawn(
        ["strace", "--follow-forks", "--trace=execve", "--string-limit=4096", "--attach",
         str(os.getpid()), "--output", str(said)],
    )  # fmt: skip
    wait_for(lambda: tracer_of(os.getpid()) != 0)
    try:
        site.connect()
    finally:
        run.terminate(tracer)
    words = said.read_text()
    assert "iscsiadm" in words
    assert SECRET not in words
    assert MUTUAL not in words


def tracer_of(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("TracerPid:"):
            return int(line.split()[1])
    return 0


def test_connect_what_cannot_be_is_refused(site: Site) -> None:
    view = site.mount(target="tgt")
    site.connect()
    uri = view.uri
    nobody = uri.replace(f":{PORT}/", ":3279/")
    assert code_of(lambda: site.connect(nobody), UnavailableError) == "server-gone"
    other_lun = uri.rpartition("/")[0] + "/77"
    assert code_of(lambda: site.connect(other_lun), BusyError) == "already-connected"
    connect.disconnect(site.ctx, ["v"])
    assert code_of(lambda: site.connect(other_lun), NotFoundError) == "lun-missing"
    stranger = uri.replace(view.id, "v000000000")
    assert code_of(lambda: site.connect(stranger), UnavailableError) == "login-failed"
    site.assert_clean()
    assert sessions() == []


def test_connect_target_that_an_administrator_is_logged_in_to_is_refused_and_left(
    site: Site, secrets: dict[str, str]
) -> None:
    """Their session goes on."""
    view = site.mount(target="tgt")
    site.connect()
    where = ["--targetname", endpoint(view).iqn, "--portal", endpoint(view).portal]
    site.ctx.catalog.delete_connection(site.ctx.catalog.connections()[0].id)
    (LINKS / "v").unlink()
    assert code_of(site.connect, BusyError) == "already-connected"
    assert len(sessions()) == 1
    run.run(["iscsiadm", "--mode", "node", *where, "--logout"])
    run.run(["iscsiadm", "--mode", "node", *where, "--op", "delete"])


def test_connect_without_iscsid_says_how_to_start_it(site: Site) -> None:
    site.mount(target="tgt")
    for ref in procs.find_running("iscsid", "iscsid"):
        ref.end()
    try:
        with pytest.raises(UnavailableError) as error:
            site.connect()
        assert error.value.code == "iscsid-missing"
        assert "iscsid.socket" in error.value.hint
        site.assert_clean()
    finally:
        run.run(["iscsid"])


def test_server_gone_and_back_the_device_works_again(site: Site) -> None:
    """tgt: its server dies. Requests fail in time, then iscsid logs in again by itself."""
    view = site.mount(target="tgt")
    made = site.connect(timeout_s=3)
    for ref in servers(site):
        ref.end(0)
    assert not attachment.answers(made.device)
    report = recover.recover(site.ctx)
    assert report.warnings == ()
    assert [again.name for again in report.remounted] == ["v"]
    assert Path(made.device).read_bytes() == site.content
    assert openiscsi.logged_in(endpoint(view))
    connect.disconnect(site.ctx, ["v"])


def test_server_gone_disconnect_still_works(site: Site) -> None:
    site.mount(target="tgt")
    made = site.connect(timeout_s=2)
    for ref in servers(site):
        ref.end(0)
    assert not attachment.answers(made.device)
    connect.disconnect(site.ctx, ["v"])
    site.assert_clean()
    assert sessions() == []


def servers(site: Site) -> list[procs.ProcessRef]:
    """The tgtd of this instance."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "comm").exists():
            argv = (entry / "cmdline").read_bytes()
            ref = procs.ref_of(int(entry.name))
            if argv.split(b"\0")[0].endswith(b"tgtd") and ref is not None:
                found.append(ref)
    assert found
    return found


def take_one(ctx: Context) -> Connection:
    return connect.connect(ctx, "v").connection


def end_all(ctx: Context) -> list[Connection]:
    return connect.disconnect(ctx, [], all_connections=True)


def test_connect_and_disconnect_killed_where_the_session_is_leave_nothing(site: Site) -> None:
    """The other steps are the same for any kind of device: see test_connect.py."""
    site.mount(target="tgt")
    for step in ("connect.device.intended", "connect.device.done", "connect.row.done"):
        site.kill_at(step, take_one)
        site.ctx.journal.recover()
        site.assert_clean()
        assert sessions() == [], step
    for step in ("disconnect.device-1.intended", "disconnect.device-1.done"):
        take_one(site.ctx)
        site.kill_at(step, end_all)
        site.ctx.journal.recover()
        site.assert_clean()
        assert sessions() == [], step


def test_recover_logs_in_again_where_the_session_is_gone(site: Site, target: str) -> None:
    """As after a reboot, when the node record is still there."""
    site.mount(target=target)
    made = site.connect()
    session = sessions()[0].name.removeprefix("session")
    run.run(["iscsiadm", "--mode", "session", "--sid", session, "--logout"])
    assert connect.connections(site.ctx)[0].state is connect.ConnectionState.GONE
    report = recover.recover(site.ctx)
    assert report.warnings == ()
    assert [connection.id for connection in report.reconnected] == [made.id]
    assert (LINKS / "v").read_bytes() == site.content


def test_disconnect_disk_in_use_is_refused(site: Site) -> None:
    site.mount(target="tgt")
    made = site.connect()
    with open(made.device, "rb") as disk:
        reader: subprocess.Popen[bytes] = run.spawn(["sleep", "600"], stdin=disk.fileno())
    try:
        assert code_of(lambda: connect.disconnect(site.ctx, ["v"]), BusyError) == "device-busy"
        connect.disconnect(site.ctx, ["v"], force=True)
    finally:
        run.terminate(reader)
