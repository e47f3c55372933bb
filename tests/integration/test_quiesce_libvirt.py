"""The libvirt part against a real libvirt daemon: domains of a real guest with a real qemu-ga."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import libvirt
import pytest

from offload import procs, run
from offload.catalog.store import Catalog
from offload.configs.quiesce import LibvirtFreeze
from offload.errors import NotFoundError, PolicyError, UnavailableError
from offload.instance import Instance
from offload.journal import CRASH_ENV
from offload.model import Consistency
from offload.quiescers import ourselves
from offload.quiescers.holder import undo_thaw
from offload.quiescers.libvirt import LibvirtPart
from offload.testing.instances import make_instance
from offload.testing.libvirt_host import DomainPlan, LibvirtGuest, LibvirtHost
from offload.testing.pools import loop_pool

pytestmark = [pytest.mark.needs_root, pytest.mark.slow, pytest.mark.timeout(900)]

NO_CATALOG = cast("Catalog", None)
UUID = "5c5f3c0a-93ad-4a5c-8d5c-2f0a6f1b7e01"
ONE, TWO = LibvirtGuest.mounts
# no disk, no operating system: it sits in its firmware
BARE = """
<domain type='qemu'>
  <name>bare</name><memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices><memballoon model='none'/></devices>
</domain>
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with loop_pool(tmp_path_factory.mktemp("pool"), "xfs") as point:
        yield point


@pytest.fixture(scope="module")
def host(pool: Path) -> Iterator[LibvirtHost]:
    # the daemon sees what was mounted when it started: the pool is there already
    folder = Path(tempfile.mkdtemp(prefix="ol-"))  # short: unix sockets lie in it
    with LibvirtHost(folder).running() as started:
        yield started
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def booted(host: LibvirtHost, pool: Path) -> Iterator[LibvirtGuest]:
    made = LibvirtGuest(host, DomainPlan(name="shop", uuid=UUID, disks=pool))
    yield made
    made.close()


@pytest.fixture
def guest(booted: LibvirtGuest) -> Iterator[LibvirtGuest]:
    """Up, with its agent, and nothing frozen: also after a test that has ended it."""
    if not booted.handle.isActive():
        booted.start()
        booted.start_agent()
    yield booted
    if booted.handle.isActive():
        assert booted.frozen() == ()


@pytest.fixture
def bare(host: LibvirtHost) -> Iterator[Any]:
    """A domain that is off."""
    connection = libvirt.open(host.uri)
    domain = connection.defineXML(BARE)
    yield domain
    if domain.isActive():
        domain.destroy()
    domain.undefine()
    connection.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="ol-"))
    yield made
    shutil.rmtree(made)


def instance_of(folder: Path, uri: str) -> Instance:
    return make_instance(folder, {"hypervisors": {"kvm": {"kind": "libvirt", "uri": uri}}})


Make = Callable[..., LibvirtPart]


@pytest.fixture
def make(folder: Path, host: LibvirtHost) -> Iterator[Make]:
    made: list[LibvirtPart] = []

    def part(domain: str = "shop", *mounts: str, uri: str = host.uri) -> LibvirtPart:
        entry = LibvirtFreeze(kind="libvirt", hypervisor="kvm", domain=domain, mounts=mounts)
        made.append(LibvirtPart("shop", entry, instance_of(folder, uri)))
        return made[-1]

    yield part
    for each in made:
        each.close()


def freeze(part: LibvirtPart, within_s: float = 30.0) -> Consistency:
    return part.freeze(time.monotonic() + within_s)


def wait_for(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def thawed(guest: LibvirtGuest) -> bool:
    return guest.frozen() == ()


# -- what it is for --------------------------------------------------------------------------------


def test_libvirt_guest_is_frozen_and_thawed(guest: LibvirtGuest, make: Make) -> None:
    part = make()
    part.check()
    part.arm(30)
    assert guest.frozen() == ()
    assert freeze(part) is Consistency.FILESYSTEM
    assert guest.frozen() == (ONE, TWO)
    assert part.still_frozen()
    part.thaw()
    part.thaw()
    assert guest.frozen() == ()
    assert part.unbroken
    assert part.what == (ONE, TWO)
    assert "frozen in" in part.output


def test_libvirt_mounts_are_all_that_is_frozen(guest: LibvirtGuest, make: Make) -> None:
    part = make(UUID, TWO)
    part.check()
    part.arm(30)
    freeze(part)
    assert guest.frozen() == (TWO,)
    assert part.what == (TWO,)
    assert part.still_frozen()
    part.close()
    assert guest.frozen() == ()


# -- what is refused -------------------------------------------------------------------------------


def test_libvirt_domain_that_is_not_there_is_said(host: LibvirtHost, make: Make) -> None:
    with pytest.raises(NotFoundError, match="no domain shoop") as refused:
        make("shoop").check()
    assert refused.value.code == "unknown-domain"


def test_libvirt_daemon_that_does_not_listen_is_unavailable(folder: Path, make: Make) -> None:
    part = make(uri=f"qemu:///system?socket={folder}/none")
    with pytest.raises(UnavailableError) as refused:
        part.check()
    assert refused.value.code == "libvirt-unavailable"
    assert part.undos()  # harmless, and not in need of a connection


def test_libvirt_mount_point_that_is_not_there_is_said(guest: LibvirtGuest, make: Make) -> None:
    with pytest.raises(NotFoundError, match=r"nothing is mounted on /srv/none") as refused:
        make("shop", ONE, "/srv/none").check()
    assert refused.value.code == "no-mount"
    assert TWO in refused.value.hint


def test_libvirt_guest_that_somebody_else_froze_is_refused_and_left(
    guest: LibvirtGuest, make: Make
) -> None:
    part = make()
    part.arm(30)
    guest.handle.fsFreeze()
    with pytest.raises(UnavailableError) as refused:
        make().check()
    assert refused.value.code == "frozen-by-others"
    with pytest.raises(UnavailableError, match="somebody else has frozen"):
        freeze(part)
    part.close()
    undo_thaw(part._instance, NO_CATALOG, dict(part.undos()[0][1]))
    assert guest.frozen() == (ONE, TWO)
    assert guest.handle.fsThaw() == 2


def test_libvirt_agent_that_hangs_is_unavailable(guest: LibvirtGuest, make: Make) -> None:
    guest.signal_agent("STOP")
    try:
        with pytest.raises(UnavailableError) as refused:
            make().check()
    finally:
        guest.signal_agent("CONT")
    assert refused.value.code == "agent-timeout"


def test_libvirt_domain_without_agent_is_unavailable(bare: Any, make: Make) -> None:
    bare.create()
    with pytest.raises(UnavailableError) as refused:
        make("bare").check()
    assert refused.value.code == "agent-missing"


def test_libvirt_domain_that_is_paused_is_said(bare: Any, make: Make) -> None:
    bare.create()
    bare.suspend()
    with pytest.raises(UnavailableError, match="domain bare is paused"):
        make("bare").check()


def test_libvirt_domain_that_is_this_machine_is_refused(
    guest: LibvirtGuest, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ourselves.Machine(macs=frozenset({guest.plan.mac}), uuid="", boot_id="b")
    monkeypatch.setattr(ourselves, "this_machine", lambda: here)
    with pytest.raises(PolicyError) as refused:
        make().check()
    assert refused.value.code == "would-freeze-ourselves"


# -- a domain that is off --------------------------------------------------------------------------


def test_libvirt_domain_that_was_cut_off_counts_as_held(bare: Any, make: Make) -> None:
    bare.create()
    bare.destroy()
    part = make("bare")
    part.check()
    part.arm(10)
    assert freeze(part) is Consistency.CRASH
    assert part.still_frozen()
    part.thaw()
    assert part.unbroken
    assert "power cut" in part.output


def test_libvirt_domain_started_meanwhile_was_not_held(bare: Any, make: Make) -> None:
    part = make("bare")
    part.check()
    part.arm(10)
    freeze(part)
    bare.create()
    assert not part.still_frozen()
    assert not part.unbroken
    assert "was started" in part.output
    with pytest.raises(UnavailableError, match="started just now"):
        freeze(part)


def test_libvirt_guest_that_shut_down_is_whole(guest: LibvirtGuest, make: Make) -> None:
    guest.begin(["bash", "-c", "umount /srv/one /srv/two; echo o > /proc/sysrq-trigger"])
    wait_for(lambda: not guest.handle.isActive(), 60)
    part = make()
    part.check()
    part.arm(10)
    assert freeze(part) is Consistency.FILESYSTEM
    assert part.still_frozen()


# -- a hold that does not last ---------------------------------------------------------------------


def test_libvirt_guest_thawed_by_another_client_is_noticed(guest: LibvirtGuest, make: Make) -> None:
    part = make()
    part.arm(30)
    freeze(part)
    guest.handle.fsThaw()
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken


def test_libvirt_file_system_thawed_in_the_guest_is_noticed_at_the_thaw(
    guest: LibvirtGuest, make: Make
) -> None:
    """qemu-ga goes on to say that all is frozen."""
    part = make()
    part.arm(30)
    freeze(part)
    guest.shell(f"fsfreeze -u {ONE}")
    assert part.still_frozen()
    part.thaw()
    assert not part.unbroken
    assert "2 file systems were frozen, and 1 were so at the thaw" in part.output


def test_libvirt_guest_that_dies_frozen_was_not_held(guest: LibvirtGuest, make: Make) -> None:
    part = make()
    part.arm(30)
    freeze(part)
    guest.destroy()
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken


def test_libvirt_daemon_that_is_killed_meanwhile_is_found_again(
    host: LibvirtHost, guest: LibvirtGuest, make: Make
) -> None:
    part = make()
    part.arm(30)
    freeze(part)
    host.restart()
    part.thaw()
    assert guest.frozen() == ()


# -- the dead man ----------------------------------------------------------------------------------


def test_libvirt_deadline_thaws_by_itself(guest: LibvirtGuest, make: Make) -> None:
    part = make()
    part.arm(2)
    freeze(part, 2)
    wait_for(lambda: thawed(guest))
    assert not part.still_frozen()
    part.thaw()
    assert not part.unbroken


def test_libvirt_hook_that_hangs_ends_with_the_deadline(guest: LibvirtGuest, make: Make) -> None:
    """Nobody can thaw while the agent runs the hook; once it has ended, the guest is thawed."""
    hook = "#!/bin/sh\n[ $1 = thaw ] || until [ -e /run/go ]; do sleep 0.1; done\n"
    guest.shell(f"printf '{hook}' > /run/hook; chmod +x /run/hook".replace("\n", "\\n"))
    guest.start_agent("-F/run/hook")
    part = make()
    part.arm(2)
    with pytest.raises(UnavailableError) as late:
        freeze(part, 2)
    assert late.value.code == "freeze-failed"
    assert guest.frozen() == ()
    guest.shell("touch /run/go")
    part.close()
    guest.start_agent()
    wait_for(lambda: thawed(guest))


CHILD = """
import json, sys, time
from pathlib import Path
from offload.configs.quiesce import LibvirtFreeze
from offload.quiescers.libvirt import LibvirtPart
from offload.testing.instances import make_instance

folder, uri = Path(sys.argv[1]), sys.argv[2]
instance = make_instance(folder, {"hypervisors": {"kvm": {"kind": "libvirt", "uri": uri}}})
entry = LibvirtFreeze(kind="libvirt", hypervisor="kvm", domain="shop")
part = LibvirtPart("shop", entry, instance)
print(json.dumps(part.undos()[0][1]), flush=True)
part.arm(120)
part.freeze(time.monotonic() + 120)
print(part._holder._process.pid, flush=True)
time.sleep(600)
"""


class Director:
    """A process of ours that holds the guest."""

    def __init__(self, folder: Path, host: LibvirtHost) -> None:
        argv = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), host.uri]
        root = str(Path(__file__).parents[2])
        self.process = run.spawn(argv, stderr=None, env={"PYTHONPATH": root})
        out = self.process.stdout
        assert out is not None
        self.undo_args: dict[str, str] = json.loads(out.readline())
        self.guardian = int(out.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_libvirt_director_killed_thaws_at_once(
    guest: LibvirtGuest, host: LibvirtHost, folder: Path
) -> None:
    director = Director(folder, host)
    assert guest.frozen() == (ONE, TWO)
    director.kill()
    wait_for(lambda: thawed(guest))
    assert not Path(director.undo_args["marker"]).exists()


@pytest.mark.parametrize("rebooted", [False, True], ids=["killed", "power cut"])
def test_libvirt_undo_thaws_what_both_dead_left(
    rebooted: bool, guest: LibvirtGuest, host: LibvirtHost, folder: Path
) -> None:
    director = Director(folder, host)
    os.kill(director.guardian, signal.SIGKILL)
    director.kill()
    assert guest.frozen() == (ONE, TWO)
    args = dict(director.undo_args)
    if rebooted:  # the marker lay in memory
        Path(args["marker"]).unlink()
        args["boot"] = "another"
    for _ in range(2):
        undo_thaw(instance_of(folder, host.uri), NO_CATALOG, args)
    assert guest.frozen() == ()


def test_libvirt_undo_leaves_a_freeze_of_others(
    guest: LibvirtGuest, host: LibvirtHost, folder: Path, make: Make
) -> None:
    args = dict(make().undos()[0][1])
    assert args["boot"] == procs.boot_id()
    guest.handle.fsFreeze()
    undo_thaw(instance_of(folder, host.uri), NO_CATALOG, args)
    assert guest.frozen() == (ONE, TWO)
    guest.handle.fsThaw()


# -- a whole TimeMark ------------------------------------------------------------------------------


@pytest.fixture
def offload(folder: Path, pool: Path, host: LibvirtHost) -> Callable[..., run.Completed]:
    """The command, with a group of the guest's two disks."""
    lines = [f'state_dir = "{folder}/state"', f'runtime_dir = "{folder}/run"']
    for name in ("one", "two"):
        lines += [f"[volumes.{name}]", 'provider = "reflink"', f'path = "{pool}/{name}.raw"']
    lines += ["[groups.shop]", 'volumes = ["one", "two"]', 'consistency = "filesystem"']
    lines += ["[vms.shop]", 'volumes = ["one", "two"]']
    lines += ["[vms.shop.freeze]", 'kind = "libvirt"', 'hypervisor = "kvm"', f'domain = "{UUID}"']
    lines += ["[hypervisors.kvm]", 'kind = "libvirt"', f'uri = "{host.uri}"']
    config = folder / "offload.toml"
    config.write_text("\n".join(lines) + "\n")
    config.chmod(0o600)

    def command(*words: str, check: bool = True, **env: str) -> run.Completed:
        argv = [str(Path(sys.executable).with_name("offload")), "--config", str(config), *words]
        return run.run(argv, check=check, timeout_s=120, env=env)

    return command


def test_libvirt_timemark_of_a_running_domain_is_clean(
    guest: LibvirtGuest, offload: Callable[..., run.Completed], pool: Path
) -> None:
    guest.shell(f"echo synced > {ONE}/f; sync {ONE}/f; echo lazy > {TWO}/g")
    made = json.loads(offload("--json", "timemark", "create", "shop").stdout)
    assert made["consistency"] == "filesystem"
    assert made["instant"] == "held"
    (report,) = made["reports"]
    assert report["kind"] == "libvirt"
    assert report["frozen"]
    for snapshot in made["snapshots"]:
        path = snapshot["ref"]["path"]
        assert run.run(["e2fsck", "-fn", path], check=False).status == 0
    offload("timemark", "delete", made["id"], "--yes")


def test_libvirt_timemark_of_a_chosen_domain_needs_no_entry(
    guest: LibvirtGuest, offload: Callable[..., run.Completed], folder: Path
) -> None:
    config = folder / "offload.toml"
    head, _, rest = config.read_text().partition("[vms.shop]")
    named, chosen = (
        'volumes = ["one", "two"]\nconsis',
        f'hypervisor = "kvm"\nvms = ["{UUID}"]\nconsis',
    )
    assert named in head
    config.write_text(head.replace(named, chosen) + rest[rest.index("[hypervisors") :])
    guest.shell(f"echo synced > {ONE}/f; sync {ONE}/f; echo lazy > {TWO}/g")
    made = json.loads(offload("--json", "timemark", "create", "shop").stdout)
    assert (made["consistency"], made["instant"]) == ("filesystem", "held")
    assert [snapshot["volume"] for snapshot in made["snapshots"]] == ["one", "two"]
    assert [(r["vm"], r["kind"], r["frozen"]) for r in made["reports"]] == [
        ("shop", "libvirt", True)
    ]
    assert [machine["name"] for machine in made["machines"]] == ["shop"]
    for snapshot in made["snapshots"]:
        assert run.run(["e2fsck", "-fn", snapshot["ref"]["path"]], check=False).status == 0
    offload("timemark", "delete", made["id"], "--yes")
    assert thawed(guest)


def test_libvirt_timemark_killed_while_frozen_thaws(
    guest: LibvirtGuest, offload: Callable[..., run.Completed]
) -> None:
    offload("timemark", "list")
    killed = offload("timemark", "create", "shop", check=False, **{CRASH_ENV: "timemark.frozen"})
    assert killed.status == -signal.SIGKILL
    wait_for(lambda: thawed(guest))
    offload("recover")
    assert json.loads(offload("--json", "timemark", "list").stdout) == []
