"""Quiesce scripts in a guest: over a real sshd, with the keys that a stranger would have."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from offload import run
from offload.catalog.store import Catalog
from offload.configs.quiesce import SshApplication
from offload.errors import ConfigError, UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers.holder import undo_thaw
from offload.quiescers.ssh import SshPart
from offload.testing.instances import free_port, make_instance
from offload.testing.sshd import RunningSshd, known_host, make_key, running_sshd

ROOT = Path(__file__).parents[2]
NO_CATALOG = cast("Catalog", None)

SCRIPT = """\
#!/bin/sh
cd "$(dirname "$0")" || exit 1
for phase; do :; done
printf '<%s>' "$@" >args.$phase
env | grep ^OFFLOAD_ | sort >env.$phase
echo "$phase" >>log
if [ -e "do.$phase" ]; then . "./do.$phase"; fi
exit 0
"""

HOLDER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from offload.configs.quiesce import SshApplication
from offload.quiescers.ssh import SshPart
from offload.testing.instances import make_instance
entry = SshApplication.model_validate_json(sys.argv[3])
part = SshPart("shop", entry, make_instance(Path(sys.argv[2])))
part.arm(60)
part.freeze(time.monotonic() + 60)
print("held", flush=True)
time.sleep(60)
"""


class Guest:
    """Where the script is, and what it did."""

    def __init__(self, folder: Path, sshd: RunningSshd) -> None:
        self.folder = folder
        self.sshd = sshd
        folder.mkdir()
        script = folder / "quiesce"
        script.write_text(SCRIPT)
        script.chmod(0o755)

    def entry(self, **more: Any) -> SshApplication:
        wanted = {
            "kind": "ssh",
            "name": "erp",
            "host": "127.0.0.1",
            "port": self.sshd.port,
            "user": self.sshd.user,
            "identity_file": self.sshd.identity_file,
            "known_hosts": self.sshd.known_hosts,
            "command": [str(self.folder / "quiesce")],
        }
        return SshApplication.model_validate({**wanted, **more})

    def on(self, phase: str, commands: str) -> None:
        (self.folder / f"do.{phase}").write_text(commands)

    def phases(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().split() if log.exists() else []


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd") / "d") as server:
        yield server


@pytest.fixture
def guest(tmp_path: Path, sshd: RunningSshd) -> Guest:
    return Guest(tmp_path / "guest", sshd)


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return make_instance(tmp_path / "i")


Make = Callable[..., SshPart]


@pytest.fixture
def make(guest: Guest, instance: Instance) -> Iterator[Make]:
    """Parts that are closed at the end."""
    with ExitStack() as stack:

        def build(**more: Any) -> SshPart:
            made = SshPart("shop", guest.entry(**more), instance)
            stack.callback(made.close)
            return made

        yield build


def arm_and_freeze(part: SshPart, within_s: float = 30.0) -> Consistency:
    part.arm(within_s)
    return part.freeze(time.monotonic() + within_s)


def wait_for(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ssh_runs_each_phase_in_the_guest(guest: Guest, make: Make) -> None:
    guest.on("freeze", "echo in backup mode")
    part = make()
    part.check()
    assert arm_and_freeze(part) is Consistency.APPLICATION
    assert part.still_frozen()
    part.thaw()
    assert part.unbroken
    assert guest.phases() == ["check", "freeze", "thaw"]
    assert part.what == ("ssh:erp@127.0.0.1",)
    assert part.output == "in backup mode"
    env = (guest.folder / "env.freeze").read_text()
    assert "OFFLOAD_VM=shop\n" in env
    assert "OFFLOAD_PHASE=freeze\n" in env
    assert "OFFLOAD_DEADLINE_S=30\n" in env


NASTY = ("a b", "$HOME", "`id`", "$(id)", "it's", '"', "*", ";exit 1", "", "-x", "ü\n", "a\\b")


def test_ssh_arguments_reach_the_program_as_they_are(guest: Guest, make: Make) -> None:
    part = make(command=[str(guest.folder / "quiesce"), *NASTY])
    part.check()
    shown = "".join(f"<{word}>" for word in (*NASTY, "check"))
    assert (guest.folder / "args.check").read_text() == shown


def test_ssh_files_with_spaces_and_percents_in_their_names(
    guest: Guest, make: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "keys of %h"
    folder.mkdir()
    key, known = folder / "id %u", folder / "known hosts"
    key.write_bytes(guest.sshd.identity_file.read_bytes())
    key.chmod(0o600)
    known.write_bytes(guest.sshd.known_hosts.read_bytes())
    make(identity_file=key, known_hosts=known).check()
    assert guest.phases() == ["check"]


def refused(part: SshPart) -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        part.check()
    return caught.value


def test_ssh_unknown_host_key_is_refused(guest: Guest, make: Make, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.touch()
    error = refused(make(known_hosts=known))
    assert error.code == "host-key-unknown"
    assert known.read_text() == ""
    assert guest.phases() == []


def test_ssh_changed_host_key_is_refused(guest: Guest, make: Make, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(known_host(guest.sshd.port, make_key(tmp_path / "another")))
    error = refused(make(known_hosts=known))
    assert error.code == "host-key-changed"
    assert "another machine" in error.hint
    assert guest.phases() == []


def test_ssh_refused_key_is_told(guest: Guest, make: Make, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger")
    error = refused(make(identity_file=tmp_path / "stranger"))
    assert error.code == "application-refused"
    assert "authorized_keys" in error.hint


def test_ssh_file_that_is_no_key_is_told(guest: Guest, make: Make, tmp_path: Path) -> None:
    (tmp_path / "none").write_text("no key\n")
    (tmp_path / "none").chmod(0o600)
    assert refused(make(identity_file=tmp_path / "none")).code == "application-refused"


def test_ssh_unknown_user_is_refused(make: Make) -> None:
    assert refused(make(user="nobody-of-that-name")).code == "application-refused"


def test_ssh_nobody_listening_is_told(make: Make) -> None:
    error = refused(make(port=free_port()))
    assert error.code == "application-unreachable"
    assert "Connection refused" in error.message


def test_ssh_name_that_does_not_resolve_is_told(make: Make) -> None:
    assert refused(make(host="none.invalid")).code == "application-unreachable"


def test_ssh_missing_program_in_the_guest_is_told(make: Make) -> None:
    error = refused(make(command=["/nowhere/quiesce"]))
    assert error.code == "hook-failed"
    assert "/nowhere/quiesce" in error.message


def test_ssh_key_that_others_may_read_is_refused(make: Make, guest: Guest, tmp_path: Path) -> None:
    key = tmp_path / "open"
    key.write_bytes(guest.sshd.identity_file.read_bytes())
    key.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        make(identity_file=key).check()
    assert caught.value.code == "secret-unsafe"


@pytest.mark.parametrize(
    ("field", "code"),
    [("identity_file", "secret-missing"), ("known_hosts", "known-hosts-missing")],
)
def test_ssh_missing_file_is_refused(make: Make, tmp_path: Path, field: str, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{field: tmp_path / "none"}).check()
    assert caught.value.code == code


def test_ssh_freeze_that_hangs_is_ended_in_time_and_thawed(guest: Guest, make: Make) -> None:
    guest.on("freeze", "exec sleep 30")
    part = make(timeout_s=3)
    with pytest.raises(UnavailableError) as caught:
        arm_and_freeze(part)
    assert caught.value.code == "hook-failed"
    assert guest.phases() == ["freeze", "thaw"]


def test_ssh_session_that_breaks_in_the_freeze_is_followed_by_thaw(
    guest: Guest, make: Make
) -> None:
    # its parent is the server's process for this session
    guest.on("freeze", "kill -9 $PPID; exec sleep 30")
    part = make()
    with pytest.raises(UnavailableError):
        arm_and_freeze(part)
    assert guest.phases() == ["freeze", "thaw"]


def test_ssh_server_gone_while_held_breaks_the_hold_and_is_thawed_when_it_is_back(
    tmp_path: Path, instance: Instance
) -> None:
    with running_sshd(tmp_path / "d") as server:
        guest = Guest(tmp_path / "guest", server)
        part = SshPart("shop", guest.entry(), instance)
        arm_and_freeze(part)
    ((action, args),) = part.undos()
    assert action == "thaw-ssh"
    with pytest.raises(UnavailableError) as caught:
        part.thaw()
    assert caught.value.code == "thaw-failed"
    assert not part.unbroken
    assert guest.phases() == ["freeze"]
    with running_sshd(tmp_path / "d", server.port):
        undo_thaw(instance, NO_CATALOG, args)
        assert "thaw" in guest.phases()
        part.close()
        assert not Path(args["marker"]).exists()


def test_ssh_server_back_by_itself_is_thawed_by_the_guardian(
    tmp_path: Path, instance: Instance
) -> None:
    with running_sshd(tmp_path / "d") as server:
        guest = Guest(tmp_path / "guest", server)
        process = director(guest, tmp_path / "other")
    process.kill()  # the guardian finds nobody there, and tries again
    process.wait()
    with running_sshd(tmp_path / "d", server.port):
        wait_for(lambda: guest.phases() == ["freeze", "thaw"], 60)
        wait_for(lambda: not list((tmp_path / "other/run/holds").iterdir()))


def director(guest: Guest, folder: Path) -> Any:
    entry = guest.entry().model_dump_json()
    process = run.spawn([sys.executable, "-c", HOLDER, str(ROOT), str(folder), entry], stderr=None)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_ssh_director_killed_is_thawed_by_the_guardian(guest: Guest, tmp_path: Path) -> None:
    process = director(guest, tmp_path / "other")
    process.kill()
    process.wait()
    wait_for(lambda: guest.phases() == ["freeze", "thaw"])
    wait_for(lambda: not list((tmp_path / "other/run/holds").iterdir()))


def test_ssh_guardian_killed_is_thawed_by_the_director(guest: Guest, make: Make) -> None:
    part = make()
    arm_and_freeze(part)
    assert part._holder.pid is not None
    os.kill(part._holder.pid, signal.SIGKILL)
    part.thaw()
    assert not part.unbroken
    assert guest.phases() == ["freeze", "thaw"]
