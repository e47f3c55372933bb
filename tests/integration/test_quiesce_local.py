"""The local quiescer against real file systems on loop devices."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from offload import run
from offload.catalog.store import Catalog
from offload.config import Config
from offload.configs.quiesce import LocalQuiesce
from offload.errors import NotFoundError, PolicyError, UnavailableError
from offload.instance import Instance
from offload.model import Consistency
from offload.quiescers import holder
from offload.quiescers.guardian import FIFREEZE, FITHAW
from offload.quiescers.holder import undo_thaw
from offload.quiescers.local import LocalQuiescer, undo_post
from offload.testing.pools import partitions
from offload.testing.quiesce import frozen

pytestmark = pytest.mark.needs_root

NO_CATALOG = cast("Catalog", None)


class Disk:
    """A raw volume of two partitions on a loop device: ext4 mounted on `a`, XFS on `b`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.path = folder / "volume.raw"
        self.path.touch()
        os.truncate(self.path, 420 << 20)
        run.run(["sfdisk", "-q", str(self.path)], stdin=b"label: gpt\n,64M\n,\n")
        loop = run.run(["losetup", "--show", "-f", str(self.path)]).stdout.strip()
        stack.callback(run.run, ["losetup", "-d", loop])
        stack.enter_context(partitions(Path(loop)))
        self.a, self.b = folder / "a", folder / "b"
        run.run(["mkfs.ext4", "-q", f"{loop}p1"])
        run.run(["mkfs.xfs", "-q", f"{loop}p2"])
        for part, point in ((f"{loop}p1", self.a), (f"{loop}p2", self.b)):
            point.mkdir()
            run.run(["mount", part, str(point)])
            stack.callback(run.run, ["umount", str(point)])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with ExitStack() as stack:
        made = Disk(tmp_path, stack)
        yield made
        for point in (made.a, made.b):  # a failed test must not block the umount
            thaw(point)


def thaw(point: Path) -> bool:
    fd = os.open(point, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FITHAW, 0)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def instance_of(folder: Path, volumes: dict[str, Path], **more: Any) -> Instance:
    config = Config.model_validate(
        {
            "state_dir": folder / "state",
            "volumes": {n: {"provider": "reflink", "path": p} for n, p in volumes.items()},
            **more,
        }
    )
    for name in ("state", "run"):
        (folder / name).mkdir(exist_ok=True)
    return Instance(
        config=config,
        config_path=None,
        state_dir=folder / "state",
        runtime_dir=folder / "run",
        id="test",
    )


@pytest.fixture
def instance(tmp_path: Path, disk: Disk) -> Instance:
    return instance_of(tmp_path, {"v": disk.path})


def entry(**fields: Any) -> LocalQuiesce:
    return LocalQuiesce(kind="local", **fields)


Make = Callable[..., LocalQuiescer]


@pytest.fixture
def make(instance: Instance) -> Iterator[Make]:
    """Quiescers that are closed at the end."""
    with ExitStack() as stack:

        def build(**fields: Any) -> LocalQuiescer:
            made = LocalQuiescer(entry(**fields), ("v",), instance)
            stack.callback(made.close)
            return made

        yield build


class Writer:
    """Writes and syncs a counter; `count` stands still while the file system is frozen."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self.longest_s = 0.0
        self._stop = False
        self._path = folder / "counter"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            began = time.monotonic()
            self._path.write_text(str(self.count))
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.count += 1
            time.sleep(0.001)

    def goes_on(self, within_s: float = 1.0) -> bool:
        was, until = self.count, time.monotonic() + within_s
        while time.monotonic() < until:
            if self.count > was + 2:
                return True
            time.sleep(0.005)
        return False

    def end(self) -> None:
        self._stop = True
        self._thread.join()


@pytest.fixture
def writers(disk: Disk) -> Iterator[list[Writer]]:
    made = [Writer(disk.a), Writer(disk.b)]
    yield made
    for point in (disk.a, disk.b):
        thaw(point)
    for writer in made:
        writer.end()


def test_local_freeze_of_two_mounts_blocks_writers_until_the_thaw(
    make: Make, disk: Disk, writers: list[Writer], instance: Instance
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.check()
    assert quiescer.volumes == ("v",)
    quiescer.arm(10)
    assert all(writer.goes_on() for writer in writers)
    assert frozen(quiescer) is Consistency.FILESYSTEM
    assert not any(writer.goes_on(0.3) for writer in writers)
    assert quiescer.still_frozen()
    assert quiescer.still_frozen()  # asking changes nothing
    quiescer.thaw()
    assert all(writer.goes_on() for writer in writers)
    quiescer.thaw()
    assert not quiescer.still_frozen()
    assert f"{disk.a} frozen in" in quiescer.output
    assert list((instance.runtime_dir / "holds").iterdir()) == []


def test_local_deadline_passed_thaws_and_says_so(
    make: Make, disk: Disk, writers: list[Writer]
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(0.5)
    frozen(quiescer, 0.5)
    time.sleep(0.7)
    assert all(writer.goes_on() for writer in writers)
    assert not quiescer.still_frozen()
    assert "deadline" in quiescer.output
    quiescer.thaw()


def test_local_thawed_by_somebody_else_is_noticed(make: Make, disk: Disk) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(10)
    frozen(quiescer)
    assert thaw(disk.b)
    assert not quiescer.still_frozen()
    assert "somebody else" in quiescer.output
    quiescer.thaw()
    assert not thaw(disk.a)
    assert not thaw(disk.b)


def test_local_mount_frozen_by_somebody_else_fails_and_stays_frozen_for_them(
    make: Make, disk: Disk, instance: Instance
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(10)
    fd = os.open(disk.b, os.O_RDONLY)
    fcntl.ioctl(fd, FIFREEZE, 0)
    os.close(fd)
    with pytest.raises(UnavailableError) as caught:
        frozen(quiescer)
    assert caught.value.code == "freeze-failed"
    assert str(disk.b) in caught.value.message
    for action, args in reversed(quiescer.undos()):  # what the journal's roll-back does
        assert action == "thaw-local"
        undo_thaw(instance, NO_CATALOG, args)
    quiescer.close()
    assert not thaw(disk.a), "all or none: a is thawed again"
    assert thaw(disk.b), "b is still held by its owner"


PARENT = """
    import json, sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.integration.test_quiesce_local import entry, frozen, instance_of
    from offload.quiescers.local import LocalQuiescer
    instance = instance_of(Path({folder!r}), {{"v": {volume!r}}})
    q = LocalQuiescer(entry(mounts={mounts!r}, **{hooks!r}), ("v",), instance)
    q.arm(30)
    undos = q.undos()
    frozen(q)
    print(json.dumps([undos, q._holder._process.pid]), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path: Path, disk: Disk) -> Iterator[Callable[..., tuple[Any, Any, int]]]:
    """Another process that freezes: itself, its undo actions, its guardian's pid."""
    started: list[subprocess.Popen[bytes]] = []
    guardians: list[int] = []

    def start(**hooks: Any) -> tuple[Any, Any, int]:
        code = textwrap.dedent(PARENT).format(
            root=str(Path(__file__).parents[2]),
            mounts=[str(disk.a), str(disk.b)],
            hooks=hooks,
            folder=str(tmp_path),
            volume=str(disk.path),
        )
        process = run.spawn([sys.executable, "-c", code], stderr=None)
        started.append(process)
        assert process.stdout is not None
        undos, guardian = json.loads(process.stdout.readline())
        guardians.append(guardian)
        return process, undos, guardian

    yield start
    for process in started:
        run.terminate(process)
    for guardian in guardians:  # it has the mount points open until it ends
        wait_for(partial(has_ended, guardian), 20)


def has_ended(pid: int) -> bool:
    """Also where nobody has asked for its status yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def test_local_parent_killed_while_frozen_is_thawed_by_the_guardian_within_a_second(
    parent: Callable[..., tuple[Any, Any, int]], writers: list[Writer], tmp_path: Path
) -> None:
    process, _, _ = parent()
    assert not any(writer.goes_on(0.2) for writer in writers)
    process.send_signal(signal.SIGKILL)
    assert all(writer.goes_on(1.0) for writer in writers)
    wait_for(lambda: not list((tmp_path / "run/holds").iterdir()))


def test_local_parent_and_guardian_killed_is_thawed_by_the_undo_and_only_once(
    parent: Callable[..., tuple[Any, Any, int]],
    writers: list[Writer],
    disk: Disk,
    instance: Instance,
) -> None:
    process, undos, guardian = parent()
    process.send_signal(signal.SIGSTOP)  # so that it cannot stand in for its guardian
    os.kill(guardian, signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any(writer.goes_on(0.3) for writer in writers)
    ((action, args),) = undos
    assert action == "thaw-local"
    undo_thaw(instance, NO_CATALOG, args)
    assert all(writer.goes_on() for writer in writers)
    fd = os.open(disk.a, os.O_RDONLY)
    fcntl.ioctl(fd, FIFREEZE, 0)  # somebody else, later
    os.close(fd)
    undo_thaw(instance, NO_CATALOG, args)
    assert thaw(disk.a), "the second undo left a stranger's freeze alone"


def test_local_undo_of_another_boot_does_nothing(
    make: Make, disk: Disk, instance: Instance
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(10)
    frozen(quiescer)
    args = {**quiescer.undos()[0][1], "boot": "another"}
    marker = Path(args["marker"]).read_text()
    undo_thaw(instance, NO_CATALOG, args)
    assert json.loads(marker) == sorted([str(disk.a), str(disk.b)])
    assert quiescer.still_frozen()


def test_local_undo_of_a_mount_with_another_file_system_leaves_it(
    make: Make, disk: Disk, instance: Instance
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(10)
    frozen(quiescer)
    args = dict(quiescer.undos()[0][1])
    args["mounts"] = json.dumps({str(disk.a): "12345", str(disk.b): "12345"})
    undo_thaw(instance, NO_CATALOG, args)
    assert quiescer.still_frozen()


def test_local_guardian_killed_while_frozen_is_thawed_by_the_parent(
    make: Make, disk: Disk, writers: list[Writer]
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(30)
    frozen(quiescer)
    kill_guardian(quiescer)
    assert not any(writer.goes_on(0.2) for writer in writers)
    assert not quiescer.still_frozen()
    assert all(writer.goes_on() for writer in writers)
    quiescer.thaw()


@pytest.mark.parametrize("how", ["thaw", "close"])
def test_local_guardian_killed_is_thawed_by_thaw_or_close_too(
    make: Make, disk: Disk, writers: list[Writer], how: str
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(30)
    frozen(quiescer)
    kill_guardian(quiescer)
    getattr(quiescer, how)()
    assert all(writer.goes_on() for writer in writers)


def test_local_guardian_told_to_end_thaws_first(
    make: Make, disk: Disk, writers: list[Writer]
) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(30)
    frozen(quiescer)
    guardian_of(quiescer).terminate()
    assert all(writer.goes_on() for writer in writers)
    assert not quiescer.still_frozen()


def test_local_closed_while_frozen_thaws(make: Make, disk: Disk, writers: list[Writer]) -> None:
    quiescer = make(mounts=(disk.a, disk.b))
    quiescer.arm(30)
    frozen(quiescer)
    process = guardian_of(quiescer)
    quiescer.close()
    assert all(writer.goes_on() for writer in writers)
    assert process.poll() == 0


def guardian_of(quiescer: LocalQuiescer) -> subprocess.Popen[bytes]:
    assert quiescer._holder is not None
    assert quiescer._holder._process is not None
    return quiescer._holder._process


def kill_guardian(quiescer: LocalQuiescer) -> None:
    process = guardian_of(quiescer)
    process.kill()
    process.wait()


def wait_for(condition: Callable[[], bool], within_s: float = 2.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_local_one_mount_of_two_on_the_volume_does_not_hold_it(make: Make, disk: Disk) -> None:
    quiescer = make(mounts=(disk.a,))
    quiescer.check()
    assert quiescer.volumes == ()
    assert str(disk.b) in quiescer.output


def test_local_other_mount_read_only_leaves_the_volume_held(make: Make, disk: Disk) -> None:
    run.run(["mount", "-o", "remount,ro", str(disk.b)])
    assert make(mounts=(disk.a,)).volumes == ("v",)
    both = make(mounts=(disk.a, disk.b))
    both.check()
    both.arm(10)
    frozen(both)
    both.thaw()
    assert not thaw(disk.b)


def test_local_declared_volume_that_goes_on_writing_is_not_held(make: Make, disk: Disk) -> None:
    quiescer = make(mounts=(disk.a,), volumes=("v",))
    assert quiescer.volumes == ()


def test_local_volume_mounted_in_another_namespace_is_not_held(make: Make, disk: Disk) -> None:
    hidden = run.spawn(
        ["unshare", "-m", "sh", "-c", "echo ready; exec sleep 60"],
    )
    try:
        assert hidden.stdout is not None
        hidden.stdout.readline()
        run.run(["umount", str(disk.b)])
        assert make(mounts=(disk.a,)).volumes == ()
    finally:
        run.terminate(hidden)
        run.run(["mount", loop_of(disk) + "p2", str(disk.b)])


def loop_of(disk: Disk) -> str:
    return run.run(["losetup", "-j", str(disk.path), "-O", "NAME", "-n"]).stdout.strip()


def test_local_two_mounts_of_one_file_system_are_frozen_once(
    make: Make, disk: Disk, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    run.run(["mount", "--bind", str(disk.a), str(again)])
    try:
        quiescer = make(mounts=(disk.a, again, disk.b))
        quiescer.check()
        quiescer.arm(10)
        frozen(quiescer)
        assert quiescer.still_frozen()
        quiescer.close()
    finally:
        run.run(["umount", str(again)])


def test_local_declared_volume_that_cannot_be_looked_up_is_taken_at_its_word(
    disk: Disk, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.raw"
    elsewhere.touch()
    instance = instance_of(tmp_path, {"far": elsewhere})
    assert LocalQuiescer(entry(mounts=(disk.a,)), ("far",), instance).volumes == ()
    declared = LocalQuiescer(entry(mounts=(disk.a,), volumes=("far",)), ("far",), instance)
    assert declared.volumes == ("far",)
    assert "word alone" in declared.output


def test_local_check_of_a_folder_that_is_no_mount_says_so(make: Make, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        make(mounts=(tmp_path,)).check()
    assert caught.value.code == "no-mount"


def test_local_check_of_the_root_file_system_is_refused(make: Make) -> None:
    with pytest.raises(PolicyError) as caught:
        make(mounts=(Path("/"),)).check()
    assert caught.value.code == "would-freeze-ourselves"


def test_local_check_of_a_tmpfs_is_refused(make: Make) -> None:
    with pytest.raises(PolicyError) as caught:
        make(mounts=(Path("/dev/shm"),)).check()
    assert caught.value.code == "cannot-freeze"


@pytest.mark.parametrize(
    "what", ["pool", "snapshots", "state", "runtime", "config", "store", "cwd"]
)
def test_local_check_of_a_file_system_that_we_need_is_refused(
    what: str, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = disk.b / "inside"
    inside.mkdir()
    more: dict[str, Any] = {}
    volume: dict[str, Any] = {"provider": "reflink", "path": disk.path}
    if what == "pool":
        volume["path"] = inside / "not-made-yet.raw"
    elif what == "snapshots":
        volume["snapshot_dir"] = inside
    elif what == "store":
        more["stores"] = {"main": {"kind": "disk", "path": inside}}
    elif what == "cwd":
        monkeypatch.chdir(inside)
    plain = instance_of(tmp_path, {})
    config = Config.model_validate({"state_dir": tmp_path, "volumes": {"v": volume}, **more})
    instance = Instance(
        config=config,
        config_path=inside / "offload.toml" if what == "config" else None,
        state_dir=inside if what == "state" else plain.state_dir,
        runtime_dir=inside if what == "runtime" else plain.runtime_dir,
        id="test",
    )
    quiescer = LocalQuiescer(entry(mounts=(disk.b,)), ("v",), instance)
    with pytest.raises(PolicyError) as caught:
        quiescer.check()
    assert caught.value.code == "would-freeze-ourselves"
    monkeypatch.chdir("/")


def test_local_check_of_what_lies_below_the_pool_is_refused(disk: Disk, tmp_path: Path) -> None:
    """The pool is a loop-mounted file on b: b frozen, the pool would stand still too."""
    image, pool = disk.b / "pool.img", tmp_path / "pool"
    pool.mkdir()
    image.touch()
    os.truncate(image, 64 << 20)
    run.run(["mkfs.ext4", "-q", str(image)])
    run.run(["mount", "-o", "loop", str(image), str(pool)])
    try:
        volume = pool / "v.raw"
        volume.touch()
        quiescer = LocalQuiescer(
            entry(mounts=(disk.b,)), ("v",), instance_of(tmp_path, {"v": volume})
        )
        with pytest.raises(PolicyError) as caught:
            quiescer.check()
        assert caught.value.code == "would-freeze-ourselves"
    finally:
        run.run(["umount", str(pool)])


def script(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def hooks(tmp_path: Path) -> dict[str, Any]:
    say = f'echo "$OFFLOAD_PHASE $OFFLOAD_VOLUMES" | tee -a {tmp_path}/said'
    one = script(tmp_path, "hook", say)
    return {"pre": (one,), "post": (one,)}


def said(tmp_path: Path) -> list[str]:
    path = tmp_path / "said"
    return path.read_text().splitlines() if path.exists() else []


def test_local_hooks_run_around_the_freeze_and_raise_the_consistency(
    make: Make, hooks: dict[str, Any], disk: Disk, tmp_path: Path, instance: Instance
) -> None:
    quiescer = make(mounts=(disk.a, disk.b), **hooks)
    quiescer.check()
    assert [action for action, _ in quiescer.undos()] == ["run-post", "thaw-local"]
    quiescer.arm(10)
    assert said(tmp_path) == []
    assert frozen(quiescer) is Consistency.APPLICATION
    assert said(tmp_path) == ["pre v"]
    quiescer.thaw()
    quiescer.close()
    assert said(tmp_path) == ["pre v", "post v"]
    assert "pre v" in quiescer.output
    undo_post(instance, NO_CATALOG, quiescer.undos()[0][1])
    assert said(tmp_path) == ["pre v", "post v"], "recovery does not run it a second time"


def test_local_hooks_without_mounts_hold_the_group_by_word(
    make: Make, hooks: dict[str, Any]
) -> None:
    quiescer = make(**hooks, level="filesystem")
    assert quiescer.volumes == ("v",)
    quiescer.arm(10)
    assert frozen(quiescer) is Consistency.FILESYSTEM
    assert quiescer.still_frozen()
    quiescer.thaw()


def test_local_failing_pre_freezes_nothing_and_runs_no_post(
    make: Make, hooks: dict[str, Any], disk: Disk, tmp_path: Path
) -> None:
    pre = script(tmp_path, "bad", "echo no database here >&2; exit 3")
    quiescer = make(mounts=(disk.a, disk.b), pre=(pre,), post=hooks["post"])
    quiescer.arm(10)
    with pytest.raises(UnavailableError) as caught:
        frozen(quiescer)
    assert caught.value.code == "hook-failed"
    assert "no database here" in caught.value.message
    quiescer.close()
    assert said(tmp_path) == []
    assert not thaw(disk.a)


def test_local_slow_pre_is_ended_and_refused(make: Make, disk: Disk, tmp_path: Path) -> None:
    quiescer = make(mounts=(disk.a, disk.b), pre=("sleep", "30"), timeout_s=0.2)
    quiescer.arm(10)
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        frozen(quiescer)
    assert time.monotonic() - began < 5


def test_local_failing_freeze_after_pre_runs_post(
    make: Make, hooks: dict[str, Any], disk: Disk, tmp_path: Path
) -> None:
    quiescer = make(mounts=(disk.a, disk.b), **hooks)
    quiescer.arm(10)
    kill_guardian(quiescer)
    with pytest.raises(UnavailableError):
        frozen(quiescer)
    assert said(tmp_path) == ["pre v"]
    quiescer.thaw()
    assert said(tmp_path) == ["pre v", "post v"]


def test_local_failing_post_is_reported_after_the_thaw(
    make: Make, disk: Disk, tmp_path: Path, writers: list[Writer]
) -> None:
    quiescer = make(mounts=(disk.a, disk.b), pre=("true",), post=("false",))
    quiescer.arm(10)
    frozen(quiescer)
    with pytest.raises(UnavailableError) as caught:
        quiescer.thaw()
    assert caught.value.code == "hook-failed"
    assert all(writer.goes_on() for writer in writers)


def test_local_parent_killed_after_pre_runs_post_on_recovery_once(
    parent: Callable[..., tuple[Any, Any, int]],
    hooks: dict[str, Any],
    tmp_path: Path,
    instance: Instance,
) -> None:
    process, undos, _ = parent(**hooks)
    process.kill()
    process.wait()
    assert said(tmp_path) == ["pre v"]
    for _ in range(2):
        undo_thaw(instance, NO_CATALOG, undos[1][1])
        undo_post(instance, NO_CATALOG, undos[0][1])
    assert said(tmp_path) == ["pre v", "post v"]
    assert list((tmp_path / "state/hooks").iterdir()) == []


def test_local_missing_hook_is_found_by_check(make: Make) -> None:
    with pytest.raises(NotFoundError) as caught:
        make(pre=("/nowhere/hook",)).check()
    assert caught.value.code == "hook-missing"


def test_guardian_start_is_quick_and_loads_little(instance: Instance, disk: Disk) -> None:
    code = holder._CODE.replace("sys.exit(main(sys.argv[1]))", "print('\\n'.join(sys.modules))")
    root = str(Path(__file__).parents[2])
    done = run.run([sys.executable, "-I", "-S", "-c", code.format(root=root)])
    loaded = set(done.stdout.split())
    assert "offload.quiescers.guardian" in loaded
    assert not loaded & {"pydantic", "sqlalchemy", "numpy", "ctypes", "subprocess"}
