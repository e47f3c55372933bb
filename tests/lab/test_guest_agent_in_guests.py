"""File systems of a real guest, frozen by a real qemu-ga in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from offload import run
from offload.catalog.store import Catalog
from offload.configs.quiesce import GuestAgentFreeze
from offload.errors import CleanupError, NotFoundError, PolicyError, UnavailableError
from offload.guest_agent import AgentBusyError, GuestAgent
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers import hook_report
from offload.quiescers.guest_agent import GuestAgentPart
from offload.quiescers.holder import undo_thaw
from offload.testing.guest_agent import PORT, STATE, RunningAgent, running_agent, start_agent
from offload.testing.instances import make_instance
from offload.testing.lab.guest import Guest

pytestmark = pytest.mark.slow

NO_CATALOG = cast("Catalog", None)
ROOT = Path(__file__).parents[2]

# counts what it has synced on each file system
WRITER = """
import os, sys
fds = [os.open(f"/mnt/{n}/data", os.O_RDWR | os.O_CREAT) for n in "ab"]
count = os.open("/run/count", os.O_RDWR | os.O_CREAT)
number = 0
while True:
    for fd in fds:
        os.pwrite(fd, b"%d" % number, 0)
        os.fsync(fd)
    number += 1
    os.pwrite(count, b"%d" % number, 0)
"""


@dataclass
class Site:
    """A guest with ext4 on /mnt/a and XFS on /mnt/b, and the port of an agent."""

    guest: Guest
    socket: Path
    instance: Instance

    def part(self, *mounts: str) -> GuestAgentPart:
        entry = GuestAgentFreeze(kind="qemu-ga", socket=self.socket, mounts=mounts)
        return GuestAgentPart("shop", entry, self.instance)

    def writes(self) -> bool:
        """Whether the writer in the guest goes on."""
        script = "was=$(< /run/count); for i in {1..40}; do [[ $(< /run/count) != $was ]] && exit; "
        return self.guest.shell(script + "sleep 0.02; done; exit 1", check=False).status == 0

    def thaw(self, mount: str) -> bool:
        """By an administrator; whether it was frozen."""
        return self.guest.run(["fsfreeze", "-u", mount], check=False).status == 0

    def clean(self) -> None:
        self.guest.shell(f"""
            for i in 1 2; do fsfreeze -u /mnt/a || true; fsfreeze -u /mnt/b || true; done
            rm -rf {STATE} /run/offload-fsfreeze /etc/qemu/lab
        """)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="ofg-", dir="/tmp"))
    socket = folder / "ga"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        guest = stack.enter_context(Guest(folder, ports={PORT: socket}, visible=[ROOT]))
        for name, make, size in (("a", "ext4", 48 << 20), ("b", "xfs", 320 << 20)):
            disk = folder / f"{name}.raw"
            disk.touch()
            os.truncate(disk, size)
            run.run([f"mkfs.{make}", "-q", str(disk)])
            device = guest.attach(disk)
            guest.shell(f"mkdir -p /mnt/{name}; modprobe {make}; mount {device} /mnt/{name}")
        writer = guest.start(["python3", "-Sc", WRITER])
        made = Site(guest=guest, socket=socket, instance=make_instance(folder / "i", {}))
        yield made
        if guest.alive():
            made.clean()
            writer.kill()


@pytest.fixture
def agent(site: Site) -> Iterator[RunningAgent]:
    with running_agent(site.guest, site.socket) as made:
        yield made
    if site.guest.alive():
        site.clean()


Make = Callable[..., GuestAgentPart]


@pytest.fixture
def make(site: Site, agent: RunningAgent) -> Iterator[Make]:
    """Parts that were looked at and armed; closed at the end."""
    with ExitStack() as stack:

        def build(*mounts: str, deadline_s: float = 20.0) -> GuestAgentPart:
            part = site.part(*mounts)
            stack.callback(part.close)
            part.check()
            part.arm(deadline_s)
            return part

        yield build


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def wait_for(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def markers(instance: Instance) -> list[Path]:
    return list((instance.runtime_dir / "holds").glob("*.json"))


# -- freeze and thaw -------------------------------------------------------------------------------


def test_agent_freeze_blocks_the_writer_on_both_file_systems_until_the_thaw(
    site: Site, make: Make
) -> None:
    part = make()
    assert site.writes()
    assert part.freeze(soon()) is Consistency.FILESYSTEM
    assert part.what == ("/mnt/a", "/mnt/b")
    assert not site.writes()
    assert part.still_frozen()
    part.thaw()
    assert site.writes()
    part.close()
    assert part.unbroken
    assert part.reached is Consistency.FILESYSTEM
    assert markers(site.instance) == []


def test_agent_freeze_of_listed_mounts_leaves_the_others(site: Site, make: Make) -> None:
    part = make("/mnt/b")
    part.freeze(soon())
    site.guest.shell("echo x >/mnt/a/free; sync -f /mnt/a/free", timeout_s=60)
    assert not site.writes()
    assert part.still_frozen()
    part.thaw()
    part.close()
    assert part.unbroken
    assert part.what == ("/mnt/b",)


def test_agent_check_names_a_mount_that_is_not_there_and_one_that_cannot_be_frozen(
    site: Site, agent: RunningAgent
) -> None:
    with pytest.raises(NotFoundError, match="/mnt/c ") as caught:
        site.part("/mnt/a", "/mnt/c").check()
    assert caught.value.code == "no-mount"
    assert "/mnt/a, /mnt/b" in caught.value.hint
    site.guest.shell("""
        modprobe -a vfat nls_cp437 nls_ascii loop; mkdir -p /mnt/v
        truncate -s 8M /run/v.img; mkfs.vfat /run/v.img >/dev/null 2>&1 || mkfs.fat /run/v.img
        mount -o loop /run/v.img /mnt/v
    """)
    try:
        with pytest.raises(PolicyError, match="vfat") as refused:
            site.part("/mnt/v").check()
        assert refused.value.code == "cannot-freeze"
    finally:
        site.guest.run(["umount", "/mnt/v"])


# -- somebody else ---------------------------------------------------------------------------------


def test_agent_frozen_by_somebody_else_is_refused_and_stays_frozen(site: Site, make: Make) -> None:
    with GuestAgent(site.socket) as other:
        other.freeze([], 20)
    part = site.part()
    with pytest.raises(UnavailableError) as caught:
        part.check()
    assert caught.value.code == "frozen-by-others"
    part.close()
    assert not site.writes()


def test_agent_file_system_frozen_by_an_administrator_fails_the_freeze(
    site: Site, make: Make
) -> None:
    """The agent passes over it without a word."""
    part = make()
    site.guest.run(["fsfreeze", "-f", "/mnt/a"])
    with pytest.raises(UnavailableError, match="froze 1 file systems where at least 2"):
        part.freeze(soon())
    part.close()
    assert site.writes()


def test_agent_thawed_by_somebody_else_is_known_after_the_thaw(site: Site, make: Make) -> None:
    """The agent says `frozen` all the time."""
    part = make()
    part.freeze(soon())
    assert site.thaw("/mnt/a")
    assert part.still_frozen()
    part.thaw()
    part.close()
    assert not part.unbroken
    assert "2 file systems were frozen, and 1 were so at the thaw" in part.output
    assert site.writes()


def test_agent_busy_with_another_client_is_a_clear_error(site: Site, agent: RunningAgent) -> None:
    with GuestAgent(site.socket), pytest.raises(AgentBusyError):
        GuestAgent(site.socket, 0.5)


# -- deadlines and deaths --------------------------------------------------------------------------


def test_agent_deadline_passed_thaws_and_says_so(site: Site, make: Make) -> None:
    part = make(deadline_s=1.5)
    part.freeze(soon(1.5))
    wait_for(site.writes)
    assert not part.still_frozen()
    assert "deadline" in part.output
    part.thaw()
    assert not part.unbroken


def test_agent_stopped_before_the_freeze_is_not_frozen_later(
    site: Site, make: Make, agent: RunningAgent
) -> None:
    part = make(deadline_s=2.0)
    agent.signal("STOP")
    began = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        part.freeze(soon(2.0))
    assert caught.value.code == "freeze-failed"
    part.close()
    assert time.monotonic() - began < 15
    agent.signal("CONT")
    with GuestAgent(site.socket) as again:
        assert not again.frozen()
    assert site.writes()
    assert markers(site.instance) == []


# -- hooks in the guest ----------------------------------------------------------------------------

HOOKS = "/etc/qemu/lab"


@dataclass
class HookedSite:
    """An agent with our dispatcher, and hooks that each test adds."""

    site: Site

    def add(self, name: str, script: str) -> None:
        path = f"{HOOKS}/fsfreeze-hook.d/{name}"
        self.site.guest.shell(
            f"cat >{path}; chmod +x {path}", stdin=f"#!/bin/sh\n{script}".encode()
        )

    def set(self, line: str) -> None:
        self.site.guest.shell(f"cat >>{HOOKS}/offload-hooks.conf", stdin=f"{line}\n".encode())

    def use(self, *names: str) -> None:
        for name in names:
            source = f"{ROOT}/offload/guest_hooks/fsfreeze-hook.d/{name}"
            self.site.guest.run(["cp", source, f"{HOOKS}/fsfreeze-hook.d/"])


@pytest.fixture
def hooked(site: Site) -> Iterator[HookedSite]:
    site.guest.shell(f"""
        mkdir -p {HOOKS}/fsfreeze-hook.d; cd {ROOT}/offload/guest_hooks
        cp offload-fsfreeze-hook offload-hold offload-hooks.conf {HOOKS}
    """)
    with running_agent(site.guest, site.socket, hook=f"{HOOKS}/offload-fsfreeze-hook"):
        yield HookedSite(site)
    site.clean()


@contextmanager
def armed(site: Site, deadline_s: float = 30.0) -> Iterator[GuestAgentPart]:
    part = site.part()
    try:
        part.check()
        part.arm(deadline_s)
        yield part
    finally:
        part.close()


def test_hooks_run_before_the_freeze_and_in_reverse_after_the_thaw(
    site: Site, hooked: HookedSite
) -> None:
    """A write of a hook would hang if it were frozen by then."""
    for name in "ab":
        hooked.add(name, f"echo {name} $1 >>/mnt/a/trace; sync -f /mnt/a/trace; echo hello")
    with armed(site) as part:
        part.freeze(soon(30))
        part.thaw()
    trace = site.guest.run(["cat", "/mnt/a/trace"]).text.splitlines()
    assert trace == ["a freeze", "b freeze", "b thaw", "a thaw"]
    assert "hook a: hello; hello" in part.output
    assert part.unbroken
    assert part.reached is Consistency.FILESYSTEM, "they do not say that they hold anything"


def test_hooks_that_hold_an_application_make_it_consistent(site: Site, hooked: HookedSite) -> None:
    hooked.use("deadman", "sqlite")
    hooked.set("SQLITE_DATABASES=/mnt/b/shop.db")
    make = "import sqlite3; sqlite3.connect('/mnt/b/shop.db').execute('CREATE TABLE t (n)')"
    site.guest.run(["python3", "-c", make])
    with armed(site) as part:
        assert part.freeze(soon(30)) is Consistency.FILESYSTEM
        part.thaw()
    assert part.unbroken, part.output
    assert part.reached is Consistency.APPLICATION, part.output
    assert "hook sqlite: /mnt/b/shop.db: held" in part.output
    site.guest.run(["rm", "/mnt/b/shop.db"])
    site.guest.shell(
        "! pgrep -f 'unicode_[e]scape|isolation_[l]evel'", timeout_s=20
    )  # no timer stays


def test_hooks_one_that_fails_fails_the_freeze_with_its_words(
    site: Site, hooked: HookedSite
) -> None:
    hooked.add("shop", "echo the shop is open; [ $1 = thaw ]")
    with armed(site) as part:
        with pytest.raises(UnavailableError, match="hook shop: the shop is open") as caught:
            part.freeze(soon(30))
        assert caught.value.code == "hook-failed"
        assert part.what == ()
        assert site.writes()


def test_hooks_of_an_earlier_freeze_count_for_nothing(site: Site, hooked: HookedSite) -> None:
    """As where the dispatcher is taken out of qemu-ga's configuration."""
    hooked.add("shop", "echo level=application")
    with armed(site) as part:
        part.freeze(soon(30))
        part.thaw()
    assert part.reached is Consistency.APPLICATION
    site.guest.shell(f"echo '#!/bin/true' >{HOOKS}/offload-fsfreeze-hook")
    with armed(site) as part:
        part.freeze(soon(30))
        part.thaw()
    assert part.reached is Consistency.FILESYSTEM
    assert "hook" not in part.output


def test_debian_s_own_dispatcher_does_not_say_that_a_hook_failed(site: Site) -> None:
    """Why there is one of ours."""
    folder = "/etc/qemu/fsfreeze-hook.d"
    site.guest.shell(f"printf '#!/bin/sh\\nexit 1\\n' >{folder}/bad; chmod +x {folder}/bad")
    with running_agent(site.guest, site.socket, hook="/etc/qemu/fsfreeze-hook"):
        with armed(site) as part:
            assert part.freeze(soon(30)) is Consistency.FILESYSTEM
            part.thaw()
        site.guest.run(["rm", f"{folder}/bad"])
    site.clean()


def test_deadman_thaws_by_itself_and_that_is_known_after_the_thaw(
    site: Site, hooked: HookedSite
) -> None:
    hooked.use("deadman")
    hooked.set("DEADMAN_S=2")
    with armed(site, 60.0) as part:
        part.freeze(soon(60))
        wait_for(site.writes, 30)
        assert part.still_frozen(), "the agent says so"
        part.thaw()
        assert not part.unbroken
        assert "2 file systems were frozen, and 0 were so at the thaw" in part.output
    assert "nobody had thawed within 2 s; it thawed:" in part.output
    assert part.reached is Consistency.FILESYSTEM


def test_deadman_thaws_where_the_agent_is_dead_and_nobody_asks_any_more(
    site: Site, hooked: HookedSite
) -> None:
    """The backup host has gone, and its session with it; the file system of the hook is frozen."""
    hooked.use("deadman")
    hooked.set("DEADMAN_S=2")
    with GuestAgent(site.socket) as lost:
        lost.freeze([], 30)
    site.guest.run(["pkill", "-KILL", "-x", "qemu-ga"])
    wait_for(site.writes, 30)
    assert not site.thaw("/mnt/a")
    assert not site.thaw("/mnt/b")


def test_deadman_without_python_works_from_a_frozen_file_system(
    site: Site, hooked: HookedSite
) -> None:
    """As where / is frozen: what it runs is on one that is."""
    hooked.use("deadman")
    hooked.set("DEADMAN_S=2")
    make = """
import os, pathlib, shutil
target = pathlib.Path("/mnt/a/bin")
target.mkdir()
for name in ("sh", "sed", "sleep", "fsfreeze"):
    shutil.copy(shutil.which(name), target)
for folder in ("/usr/bin", "/usr/sbin"):
    for name in os.listdir(folder):
        if not name.startswith("python") and not (target / name).exists():
            (target / name).symlink_to(f"{folder}/{name}")
"""
    site.guest.run(["python3", "-c", make])
    hooked.set("PATH=/mnt/a/bin")
    with armed(site, 60.0) as part:
        part.freeze(soon(60))
        wait_for(site.writes, 30)
        part.thaw()
        assert not part.unbroken
    assert "nobody had thawed within 2 s; it thawed:" in part.output
    site.guest.run(["rm", "-r", "/mnt/a/bin"])


def test_deadman_outlives_the_agent_s_service_under_systemd() -> None:
    """Debian's own unit, which systemd restarts, ending all else in it; installed as documented."""
    folder = Path(tempfile.mkdtemp(prefix="ofu-", dir="/tmp"))
    socket, disk = folder / "ga", folder / "disk.raw"
    disk.touch()
    os.truncate(disk, 48 << 20)
    run.run(["mkfs.ext4", "-q", str(disk)])
    with Guest(folder, ports={PORT: socket}, visible=[ROOT], systemd=True) as guest:
        device = guest.attach(disk)
        guest.shell(f"""
            modprobe -a virtio_console ext4; mkdir -p /mnt/a; mount {device} /mnt/a
            cp -r {ROOT}/offload/guest_hooks/. /etc/qemu/
            rm /etc/qemu/fsfreeze-hook.d/{{mysql,postgresql,sqlite}}
            cd /etc/qemu
            printf '[general]\\nfsfreeze-hook=/etc/qemu/offload-fsfreeze-hook\\n' >qemu-ga.conf
            echo DEADMAN_S=4 >>/etc/qemu/offload-hooks.conf
            udevadm trigger --subsystem-match=virtio-ports; udevadm settle
            systemctl start qemu-guest-agent
        """, timeout_s=120)  # fmt: skip
        with GuestAgent(socket, 30) as agent:
            assert agent.freeze([], 60) == 1
        guest.run(["pkill", "-KILL", "-x", "qemu-ga"])
        guest.shell("echo x >/mnt/a/x; sync -f /mnt/a/x", timeout_s=60)
        with GuestAgent(socket, 30) as agent:
            assert agent.frozen(), "the agent is back, and believes it"
            assert agent.thaw(30) == 0
            report = hook_report.parse(hook_report.read(agent))
    assert report.complete
    assert report.hooks["deadman"].thaw == 1
    shutil.rmtree(folder)


def test_agent_whose_hook_hangs_is_late_in_time_and_ends_thawed(site: Site) -> None:
    """Freeze and thaw stand in its queue; both are done when the hook has ended."""
    site.guest.shell("mkfifo /run/gate; printf '#!/bin/sh\\n: </run/gate\\n' >/run/hook; "
                     "chmod +x /run/hook")  # fmt: skip
    with running_agent(site.guest, site.socket, hook="/run/hook"), ExitStack() as stack:
        part = site.part()
        stack.callback(part.close)
        part.check()
        part.arm(2.0)
        began = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            part.freeze(soon(2.0))
        assert caught.value.code == "freeze-failed"
        part.close()
        assert time.monotonic() - began < 15
        with pytest.raises(CleanupError):  # the guardian holds the port: it waits for the end
            undo_thaw(site.instance, NO_CATALOG, part.undos()[0][1])
        for _ in ("freeze", "thaw"):
            site.guest.shell(": >/run/gate", timeout_s=30)
        wait_for(lambda: markers(site.instance) == [])
        undo_thaw(site.instance, NO_CATALOG, part.undos()[0][1])
        assert site.writes()
        assert not site.thaw("/mnt/a")
    site.clean()


def test_agent_stopped_while_frozen_is_told_in_time(
    site: Site, make: Make, agent: RunningAgent
) -> None:
    part = make(deadline_s=2.0)
    part.freeze(soon(10.0))
    agent.signal("STOP")
    began = time.monotonic()
    assert not part.still_frozen()
    with pytest.raises(UnavailableError) as caught:
        part.thaw()
    assert caught.value.code == "thaw-failed"
    part.close()
    assert time.monotonic() - began < 20
    assert not part.unbroken
    agent.signal("CONT")
    wait_for(site.writes)
    wait_for(lambda: markers(site.instance) == [])


def test_agent_killed_while_frozen_and_back_again_is_thawed(
    site: Site, make: Make, agent: RunningAgent
) -> None:
    """It remembers in its folder that it has frozen."""
    part = make()
    part.freeze(soon())
    agent.stop()
    again = start_agent_blind(site)
    try:
        part.thaw()
        part.close()
        assert site.writes()
    finally:
        again.stop()


def start_agent_blind(site: Site) -> RunningAgent:
    """Without waiting for an answer: the guardian holds the port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.testing.guest_agent._wait_ready", lambda _: None)
        return start_agent(site.guest, site.socket)


PARENT = """
    import json, sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from offload.configs.quiesce import GuestAgentFreeze
    from offload.quiescers.guest_agent import GuestAgentPart
    from offload.testing.instances import make_instance
    instance = make_instance(Path({folder!r}), {{}})
    entry = GuestAgentFreeze(kind="qemu-ga", socket=Path({socket!r}))
    part = GuestAgentPart("shop", entry, instance)
    part.check()
    undos = part.undos()
    part.arm(60)
    part.freeze(time.monotonic() + 60)
    print(json.dumps([undos, part._holder._process.pid]), flush=True)
    time.sleep(60)
"""


@contextmanager
def frozen_by_a_process(site: Site) -> Iterator[tuple[subprocess.Popen[bytes], Any, int]]:
    """Another process that freezes: itself, its undo arguments, its guardian's pid."""
    script = textwrap.dedent(PARENT).format(
        root=str(ROOT), folder=str(site.instance.state_dir.parent), socket=str(site.socket)
    )
    process = run.spawn([sys.executable, "-c", script], stderr=None)
    try:
        assert process.stdout is not None
        undos, guardian = json.loads(process.stdout.readline())
        yield process, undos[0][1], guardian
    finally:
        run.terminate(process)


def test_agent_director_killed_is_thawed_within_a_second(site: Site, agent: RunningAgent) -> None:
    with frozen_by_a_process(site) as (process, args, _):
        assert not site.writes()
        process.kill()
        process.wait()
        wait_for(lambda: markers(site.instance) == [], 5.0)
        assert site.writes()
        undo_thaw(site.instance, NO_CATALOG, args)


def test_agent_director_and_guardian_killed_is_thawed_by_the_undo_once(
    site: Site, agent: RunningAgent
) -> None:
    with frozen_by_a_process(site) as (process, args, guardian):
        os.kill(guardian, signal.SIGKILL)
        process.kill()
        process.wait()
        assert not site.writes()
        undo_thaw(site.instance, NO_CATALOG, args)
        assert site.writes()
        assert markers(site.instance) == []
        with GuestAgent(site.socket) as other:
            other.freeze([], 20)
        undo_thaw(site.instance, NO_CATALOG, args)  # what another one froze stays
        assert not site.writes()


def test_agent_guardian_killed_is_thawed_by_the_parent(site: Site, make: Make) -> None:
    part = make()
    part.freeze(soon())
    assert part._holder is not None
    process = part._holder._process
    assert process is not None
    process.kill()
    process.wait()
    assert not part.still_frozen()
    assert not part.unbroken
    assert site.writes()


def test_agent_guest_killed_while_frozen_hangs_nothing_and_is_told(site: Site, make: Make) -> None:
    """The last test of this module: the guest is gone then."""
    part = make()
    part.freeze(soon())
    os.kill(site.guest.pid, signal.SIGKILL)
    began = time.monotonic()
    assert not part.still_frozen()
    part.thaw()
    part.close()
    assert time.monotonic() - began < 10
    assert not part.unbroken
    assert "lost the guest agent" in part.output
    undo_thaw(site.instance, NO_CATALOG, part.undos()[0][1])
    assert markers(site.instance) == []
