"""The lab guest itself: commands, disks, ports, the cable, the power."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload.errors import OffloadError
from offload.procs import ref_of
from offload.testing.lab.channel import GuestError
from offload.testing.lab.guest import Guest

MIB = 1 << 20


def disk(folder: Path, size_bytes: int = 8 * MIB) -> tuple[Path, bytes]:
    content = os.urandom(MIB) * (size_bytes // MIB)
    path = folder / "disk.raw"
    path.write_bytes(content)
    return path, content


# -- commands ------------------------------------------------------------------------------------


def test_run_gives_status_and_both_streams(guest: Guest) -> None:
    done = guest.run(["bash", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.status, done.stdout, done.stderr, done.text) == (3, b"out\n", b"err\n", "out\n")


def test_run_failing_command_is_an_error_with_argv_status_and_stderr(guest: Guest) -> None:
    with pytest.raises(GuestError, match=r"'exit 3'.*status 3.*the cause") as caught:
        guest.run(["bash", "-c", "echo the cause >&2; exit 3", "'exit 3'"])
    assert caught.value.code == "lab-guest"


def test_run_command_ended_by_a_signal_has_its_number_below_zero(guest: Guest) -> None:
    assert guest.run(["bash", "-c", "kill -TERM $$"], check=False).status == -signal.SIGTERM


def test_run_missing_program_is_an_error(guest: Guest) -> None:
    with pytest.raises(GuestError, match="no-such-program is not installed"):
        guest.run(["no-such-program"], check=False)


def test_run_missing_folder_is_an_error(guest: Guest) -> None:
    with pytest.raises(GuestError, match="/no/such/place is no folder"):
        guest.run(["true"], cwd="/no/such/place")


def test_run_takes_folder_and_environment(guest: Guest) -> None:
    done = guest.run(["bash", "-c", "pwd; echo $GREETING"], cwd="/etc", env={"GREETING": "hi you"})
    assert done.text == "/etc\nhi you\n"


def test_run_binary_input_and_output_are_intact(guest: Guest) -> None:
    data = os.urandom(3 * MIB + 17)
    assert guest.run(["cat"], stdin=data).stdout == data


def test_run_without_input_reads_its_end_at_once(guest: Guest) -> None:
    assert guest.run(["cat"], timeout_s=60).stdout == b""
    assert guest.run(["cat"], timeout_s=60, stdin=b"").stdout == b""


def test_run_input_that_nobody_reads_does_no_harm(guest: Guest) -> None:
    assert guest.run(["true"], stdin=bytes(2 * MIB)).status == 0
    assert guest.run(["echo", "still here"]).text == "still here\n"


def test_run_late_command_is_killed_with_its_children(guest: Guest) -> None:
    script = "sleep 1234.5 & (trap '' TERM; sleep 1234.5) & wait"
    with pytest.raises(GuestError, match="did not end within 1 s"):
        guest.shell(script, timeout_s=1)
    assert guest.run(["pgrep", "--full", "sleep 1234.5"], check=False).status == 1


def test_run_late_command_that_hangs_in_the_kernel_holds_up_no_other(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read from a suspended device: not even SIGKILL ends it."""
    monkeypatch.setattr("offload.testing.lab.guest._KILL_S", 2.0)
    guest.modprobe("dm-mod")
    script = "dmsetup create stuck --table '0 8 error'; dmsetup suspend --noflush stuck"
    guest.shell(script, env={"DM_DISABLE_UDEV": "1"})  # there is none to make the node
    try:
        with pytest.raises(GuestError, match="nor die within"):
            guest.run(["dd", "if=/dev/mapper/stuck", "of=/dev/null"], timeout_s=5)
        assert guest.run(["echo", "still here"]).text == "still here\n"
    finally:
        script = "dmsetup resume stuck; until dmsetup remove stuck; do sleep 0.02; done"
        guest.shell(script, env={"DM_DISABLE_UDEV": "1"})  # removed when the reader is gone


def test_run_does_not_wait_for_a_daemon_that_holds_its_output(guest: Guest) -> None:
    done = guest.shell("(sleep 300; echo late) & echo $!", timeout_s=30)
    guest.run(["kill", done.text.strip()])  # it is still there


def test_run_commands_run_at_the_same_time(guest: Guest) -> None:
    """Each waits for the other: one after the other they would be late."""
    script = "mkdir /tmp/{0}; until [[ -d /tmp/{1} ]]; do sleep 0.02; done; echo {0}"
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(guest.shell, script.format("a", "b"), timeout_s=30)
        two = pool.submit(guest.shell, script.format("b", "a"), timeout_s=30)
        assert (one.result().text, two.result().text) == ("a\n", "b\n")
    guest.run(["rmdir", "/tmp/a", "/tmp/b"])


def test_shell_ends_at_its_first_failure(guest: Guest) -> None:
    done = guest.shell("echo one; false; echo two", check=False)
    assert (done.status, done.text) == (1, "one\n")


def test_start_gives_lines_as_they_come(guest: Guest) -> None:
    command = guest.start(["bash", "-c", "echo ready; read -r word; echo end"], stdin=None)
    lines = command.lines(time.monotonic() + 30)
    assert next(lines) == "ready"
    assert list(lines) == ["end"]


# -- what the guest is ---------------------------------------------------------------------------


def test_guest_is_the_host_s_file_system_and_keeps_writes_to_itself(guest: Guest) -> None:
    mark = Path("/etc/offload-lab-test")
    guest.shell(f"echo x >{mark}; {sys.executable} -c 'import offload, pytest'")
    assert not mark.exists()
    guest.run(["rm", str(mark)])


def test_guest_has_the_kernel_parts(guest: Guest) -> None:
    guest.modprobe(
        "target_core_mod", "target_core_iblock", "target_core_file", "target_core_user",
        "iscsi_target_mod", "tcm_loop", "iscsi_tcp", "nbd", "loop", "dm-thin-pool", "dm-snapshot",
        "dm-flakey", "dm-log-writes", "st", "ch", "sg",
    )  # fmt: skip
    assert "target" in guest.run(["ls", "/sys/kernel/config"]).text
    types = guest.run(["dmsetup", "targets"]).text
    assert {"thin-pool", "snapshot", "flakey", "log-writes"} <= {
        line.split()[0] for line in types.splitlines()
    }
    for place in ("/etc/target", "/run/lock/iscsi", "/dev/nbd0", "/dev/loop-control"):
        assert guest.run(["test", "-e", place], check=False).status == 0, place


def test_modprobe_unknown_module_is_an_error_that_names_it(guest: Guest) -> None:
    with pytest.raises(GuestError, match="no_such_module"):
        guest.modprobe("no_such_module")


def test_guest_reaps_orphans(guest: Guest) -> None:
    guest.shell("(sleep 0.01 &)")
    script = "while ps -eo stat= | grep -q ^Z; do sleep 0.02; done"
    guest.shell(script, timeout_s=60)


# -- ports and the cable -------------------------------------------------------------------------

SERVER = """
import socket
server = socket.create_server(("0.0.0.0", {port}))
print("ready", flush=True)
while True:
    client, _ = server.accept()
    client.sendall(client.recv(100).upper())
    client.close()
"""


@contextmanager
def shouting(guest: Guest, port: int) -> Iterator[None]:
    """A server in the guest that answers one message a connection, in capitals."""
    command = guest.start(["python3", "-Sc", SERVER.format(port=port)])
    try:
        assert next(command.lines(time.monotonic() + 60)) == "ready"
        yield
    finally:
        command.kill()


def ask(port: int, timeout_s: float = 30) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout_s) as client:
        client.sendall(b"hello")
        return client.recv(100)


def test_forward_leads_to_the_guest_and_stays(guest: Guest) -> None:
    with shouting(guest, 7001):
        port = guest.forward(7001)
        assert ask(port) == b"HELLO"
        assert guest.forward(7001) == port
        assert guest.forward(7002) != port


def test_guest_reaches_a_server_on_the_host_s_loopback(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(lambda: server.accept()[0].recv(100))
            guest.shell(f"echo hello >/dev/tcp/{guest.host_address}/{port}")
            assert got.result(30) == b"hello\n"


def test_guest_reaches_nothing_but_the_host(guest: Guest) -> None:
    assert guest.run(["ip", "route", "show", "default"]).stdout == b""
    assert guest.run(["ip", "-6", "route", "show", "default"]).stdout == b""


def test_network_cut_stops_the_traffic_and_back_again_it_flows(guest: Guest) -> None:
    with shouting(guest, 7003):
        port = guest.forward(7003)
        assert ask(port) == b"HELLO"
        guest.network(up=False)
        try:
            with pytest.raises(TimeoutError):
                ask(port, 1)
        finally:
            guest.network(up=True)
        assert ask(port) == b"HELLO"


# -- disks ---------------------------------------------------------------------------------------


def test_attach_disk_takes_writes_and_detach_leaves_them_in_the_file(
    guest: Guest, tmp_path: Path
) -> None:
    path, content = disk(tmp_path)
    device = guest.attach(path)
    assert guest.run(["cat", device]).stdout == content
    guest.run(["dd", f"of={device}", "conv=fsync,notrunc"], stdin=b"x" * 4096)
    guest.detach(device)
    assert guest.run(["test", "-e", device], check=False).status == 1
    assert path.read_bytes() == b"x" * 4096 + content[4096:]


def test_attach_read_only_refuses_writes_in_the_guest(guest: Guest, tmp_path: Path) -> None:
    path, content = disk(tmp_path)
    path.chmod(0o400)
    device = guest.attach(path, read_only=True)
    try:
        assert guest.run(["blockdev", "--getro", device]).text == "1\n"
        with pytest.raises(GuestError):
            guest.run(["dd", f"of={device}", "conv=fsync"], stdin=b"x" * 4096)
        assert guest.run(["cat", device]).stdout == content
    finally:
        guest.detach(device)
    assert path.read_bytes() == content


def test_attach_has_the_sector_size_asked_for(guest: Guest, tmp_path: Path) -> None:
    path, _ = disk(tmp_path)
    device = guest.attach(path, sector_size=4096)
    try:
        said = guest.run(["blockdev", "--getss", "--getpbsz", "--getsize64", device]).text
        assert said.split() == ["4096", "4096", str(8 * MIB)]
    finally:
        guest.detach(device)


def test_attach_several_disks_each_is_its_own(guest: Guest, tmp_path: Path) -> None:
    devices = []
    for letter in "abc":
        path = tmp_path / letter
        path.write_bytes(letter.encode() * MIB)
        devices.append(guest.attach(path))
    assert [guest.run(["head", "-c1", device]).text for device in devices] == ["a", "b", "c"]
    for device in devices:
        guest.detach(device)


def test_attach_missing_file_is_an_error_and_the_next_one_works(
    guest: Guest, tmp_path: Path
) -> None:
    with pytest.raises(OffloadError, match="gone"):
        guest.attach(tmp_path / "gone")
    path, _ = disk(tmp_path)
    guest.detach(guest.attach(path))


# -- the end -------------------------------------------------------------------------------------


def test_reboot_keeps_disks_and_forwards_and_loses_all_else(
    fresh_guest: Guest, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(bytes(MIB))
    gone, device = fresh_guest.attach(first), fresh_guest.attach(second)
    fresh_guest.detach(gone)  # so that the disk left is not the first one any more
    fresh_guest.run(["dd", f"of={device}", "conv=fsync,notrunc"], stdin=b"kept")
    fresh_guest.shell("touch /etc/mark /tmp/mark")
    port = fresh_guest.forward(7001)
    booted = fresh_guest.run(["cat", "/proc/sys/kernel/random/boot_id"]).text
    waiting = fresh_guest.start(["sleep", "300"])
    fresh_guest.reboot()
    assert waiting.wait(30)
    assert waiting.failure
    assert fresh_guest.run(["cat", "/proc/sys/kernel/random/boot_id"]).text != booted
    assert fresh_guest.run(["head", "-c4", device]).text == "kept"
    assert fresh_guest.run(["test", "-e", gone], check=False).status == 1
    assert fresh_guest.shell("ls /etc/mark /tmp/mark", check=False).stdout == b""
    with shouting(fresh_guest, 7001):
        assert fresh_guest.forward(7001) == port
        assert ask(port) == b"HELLO"


def test_reboot_brings_back_a_guest_whose_kernel_panicked(fresh_guest: Guest) -> None:
    command = fresh_guest.start(["bash", "-c", "echo c >/proc/sysrq-trigger; sleep 300"])
    assert command.wait(120)
    assert not fresh_guest.alive()
    with pytest.raises(GuestError, match="the lab guest has gone"):
        fresh_guest.run(["true"])
    assert "sysrq triggered crash" in fresh_guest.log.read_text()
    fresh_guest.reboot()
    assert fresh_guest.run(["echo", "again"]).text == "again\n"


def test_close_ends_a_guest_whose_qemu_is_stopped(fresh_guest: Guest) -> None:
    process = ref_of(fresh_guest.pid)
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    fresh_guest.close()
    assert not process.alive()
    fresh_guest.close()
    with pytest.raises(GuestError):
        fresh_guest.run(["true"])
